"""LayerNorm that learns exactly in 16 bit: torch's own numbers, and the gradients of weight and bias."""

import pytest
import torch
from torch import nn

from cm3.tokenizers.layer_norm import LayerNorm

ROWS, WIDTH = (3, 701), 24  # no multiple of the rows that are added up at once


def relative_error(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def learn(norm, x, grad, autocast=False):
    """The output, and the gradients of the input, the weight and the bias."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = norm(x)
    return [out.detach(), *torch.autograd.grad(out, [x, norm.weight, norm.bias], grad.to(out.dtype))]


def like(norm, kind, dtype):
    made = kind(WIDTH)
    made.load_state_dict({name: tensor.float() for name, tensor in norm.state_dict().items()})
    return made.to(dtype)


@pytest.fixture(scope="module")
def case():
    """A norm in float64, inputs whose rows have a mean, and the gradient of the output; all fit 16 bit."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(WIDTH).double()
    for parameter, mean in ((norm.weight, 1.0), (norm.bias, 0.0)):
        parameter.data = (mean + 0.3 * torch.randn(WIDTH, generator=generator)).bfloat16().double()
    x, grad = (torch.randn(*ROWS, WIDTH, generator=generator).bfloat16() for _ in range(2))
    return norm, x + 0.5, grad


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "autocast", "tolerance"),
    [
        (torch.bfloat16, torch.float32, True, 1e-5),
        (torch.bfloat16, torch.bfloat16, False, 5e-3),
        (torch.float16, torch.float16, False, 1e-3),
    ],
)
def test_weight_and_bias_get_exact_gradients_and_all_else_is_torchs(case, dtype, weight_dtype, autocast, tolerance):
    """Over so many rows that a sum in 16 bit would be off by several per cent."""
    exact, x, grad = case
    x, grad = x.to(dtype), grad.to(dtype)
    found = learn(like(exact, LayerNorm, weight_dtype), x, grad, autocast)
    torchs = learn(like(exact, nn.LayerNorm, weight_dtype), x, grad, autocast)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:2], torchs[:2], strict=True))
    assert [tensor.dtype for tensor in found] == [dtype, dtype, weight_dtype, weight_dtype]
    for actual, expected in zip(found[2:], learn(exact, x.double(), grad)[2:], strict=True):
        assert relative_error(actual, expected) < tolerance


def test_it_has_torchs_names_and_numbers_in_float32_too(case):
    exact, x, grad = case
    ours, theirs = like(exact, LayerNorm, torch.float32), like(exact, nn.LayerNorm, torch.float32)
    assert ours.state_dict().keys() == theirs.state_dict().keys() and ours.eps == theirs.eps
    results = (learn(norm, x.float(), grad) for norm in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        assert torch.equal(ours.bfloat16()(x), theirs.bfloat16()(x))


def test_frozen_parts_get_no_gradient(case):
    exact, x, _ = case
    norm = like(exact, LayerNorm, torch.float32).requires_grad_(False)
    assert not norm(x).requires_grad
    x = x.clone().requires_grad_()
    norm(x).float().square().sum().backward()
    assert norm.weight.grad is None and x.grad.abs().sum() > 0
