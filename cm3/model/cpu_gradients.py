"""What torch differentiates slowly on a CPU, with the gradient written out: RMSNorm, and causal attention in 16 bit.

Both are as exact as torch's own. Times and errors of either way are in EXPERIMENTS.md.

B batch   T tokens   N heads   K head width   M batch x heads   D width
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_QUERIES = 128
"""Queries whose scores exist at once; of the keys only those up to the last of them are read."""
_BLOCK_SCORES = 2**20
"""Scores that exist at once, of as many heads as that allows: few enough for a cache, enough to hide the calls."""


def learns_on_cpu(x: Tensor) -> bool:
    """Whether gradients are made, on a CPU and outside of torch.compile, which fuses the plain forms by itself."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class RmsNorm(torch.autograd.Function):
    """RMSNorm with weight, like `F.rms_norm`, for which torch has no CPU kernel but a chain of float32 operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = (length.square() / x.shape[-1] + epsilon).rsqrt()  # 1 / root of the mean square
        ctx.save_for_backward(x, inverse, weight_D)
        return (x * inverse).mul_(weight_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, inverse, weight_D = ctx.saved_tensors
        # LayerNorm's kernel, told that the mean is 0, differs from the gradient only by the mean of grad * weight.
        no_mean, only_x = torch.zeros_like(inverse), [True, False, False]
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight_D.shape, no_mean, inverse, weight_D.to(inverse.dtype), None, only_x
        )
        with torch.autocast("cpu", enabled=False):  # which would round the product to 16 bit
            grad_x += (grad @ weight_D)[..., None] * (inverse / x.shape[-1])
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        # Not by that kernel too: in 16 bit it adds up the rows in 16 bit.
        grad_weight_D = (x * inverse).mul_(grad).flatten(0, -2).sum(0).to(weight_D.dtype)
        return grad_x, grad_weight_D, None


class CausalAttention(torch.autograd.Function):
    """Attention over causal rows by plain products over blocks of queries, whose weights are kept for the gradient.

    With P = softmax(S), S = scale Q K' and O = P V: dV = P' dO, dP = dO V', dS = P (dP - sum(P dP)),
    dQ = scale dS K, dK = scale dS' Q. Scores, softmax and the sums over blocks are float32, as in SDPA.
    """

    @staticmethod
    def forward(ctx: Any, q_BNTK: Tensor, k_BNTK: Tensor, v_BNTK: Tensor) -> Tensor:
        q_MTK, k_MTK, v_MTK = (x.flatten(0, 1) for x in (q_BNTK, k_BNTK, v_BNTK))
        wide = torch.promote_types(q_MTK.dtype, torch.float32)
        scaled_q_MTK, wide_k_MTK = q_MTK.to(wide) * q_MTK.shape[-1] ** -0.5, k_MTK.to(wide)
        future_TT = q_MTK.new_full((_BLOCK_QUERIES, _BLOCK_QUERIES), float("-inf"), dtype=wide).triu_(1)
        out_MTK, kept = torch.empty_like(q_MTK), []
        with torch.autocast("cpu", enabled=False):  # which would round the scores to 16 bit
            for asking, seen in _blocks(*q_MTK.shape[:2]):
                scores = scaled_q_MTK[asking] @ wide_k_MTK[seen].mT
                queries = scores.shape[1]
                scores[..., -queries:] += future_TT[:queries, :queries]
                kept.append(scores.softmax(dim=-1).to(q_MTK.dtype))
                out_MTK[asking] = kept[-1] @ v_MTK[seen]
        ctx.save_for_backward(q_MTK, k_MTK, v_MTK, *kept)
        return out_MTK.view(q_BNTK.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNTK: Tensor) -> tuple[Tensor, ...]:
        q_MTK, k_MTK, v_MTK, *kept = ctx.saved_tensors
        grad_MTK = grad_BNTK.flatten(0, 1)
        wide = torch.promote_types(q_MTK.dtype, torch.float32)
        grad_q, grad_k, grad_v = (torch.zeros_like(q_MTK, dtype=wide) for _ in range(3))
        with torch.autocast("cpu", enabled=False):  # where the gradient of float32 inputs is taken inside of one
            for (asking, seen), weights in zip(_blocks(*q_MTK.shape[:2]), kept, strict=True):
                grad_weights = grad_MTK[asking] @ v_MTK[seen].mT
                grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_q[asking] = grad_scores @ k_MTK[seen]
                grad_k[seen] += grad_scores.mT @ q_MTK[asking]
                grad_v[seen] += weights.mT @ grad_MTK[asking]
        scale = q_MTK.shape[-1] ** -0.5
        grads_MTK = (grad_q.mul_(scale), grad_k.mul_(scale), grad_v)
        return tuple(x_MTK.to(q_MTK.dtype).view(grad_BNTK.shape) for x_MTK in grads_MTK)


def _blocks(num_heads: int, num_tokens: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Heads and tokens of a block of queries, and of the keys that the last of them sees."""
    step = max(1, _BLOCK_SCORES // (min(_BLOCK_QUERIES, num_tokens) * num_tokens))
    for head in range(0, num_heads, step):
        heads = slice(head, head + step)
        for start in range(0, num_tokens, _BLOCK_QUERIES):
            stop = min(start + _BLOCK_QUERIES, num_tokens)
            yield (heads, slice(start, stop)), (heads, slice(0, stop))
