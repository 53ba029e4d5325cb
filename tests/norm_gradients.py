"""How exact the gradients of the LayerNorms of a model are."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def worst_norm_gradient(model: nn.Module, forward: Callable[[], Tensor]) -> float:
    """Return the largest relative error of the gradients of weight and bias of any LayerNorm of a model.

    Args:
        model: With LayerNorms over the last dimension.
        forward: Runs it and returns what to differentiate, a number.
    """
    seen: dict[nn.LayerNorm, list[Tensor]] = {}

    def watch(norm: nn.LayerNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        seen[norm] = [inputs[0].detach()]
        output.register_hook(seen[norm].append)

    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(watch) for norm in norms]
    forward().backward()
    for hook in hooks:
        hook.remove()
    assert norms and seen.keys() == set(norms)
    errors = []
    for norm, (x, grad) in seen.items():
        normal, grad = F.layer_norm(x.double(), norm.normalized_shape, eps=norm.eps).flatten(0, -2), grad.double()
        exact = ((normal * grad.flatten(0, -2)).sum(0), grad.flatten(0, -2).sum(0))
        for parameter, expected in zip((norm.weight, norm.bias), exact, strict=True):
            assert parameter.grad is not None
            errors.append(float((parameter.grad.double() - expected).norm() / expected.norm()))
    return max(errors)
