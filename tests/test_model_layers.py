"""Products with weights: whichever way round, the same numbers, and learning goes the plain way."""

import pytest
import torch
import torch.nn.functional as F

from cm3.model import layers
from cm3.model.layers import Linear, weight_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 5), (16, 1), (33, 2), (8,), (2, 2, 4)])
def test_products_are_those_of_linear(monkeypatch, dtype, shape):
    monkeypatch.setattr(layers, "_HAS_MATRIX_TILES", True)
    weight = torch.randn(48, 32).to(dtype)
    x = torch.randn(*shape, 32).to(dtype)
    with torch.no_grad():
        found, expected = weight_product(x, weight), F.linear(x, weight)
    assert found.shape == expected.shape and found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize(
    ("dtype", "rows", "tiles", "turned"),
    [
        (torch.bfloat16, 2, True, True),
        (torch.bfloat16, 64, True, True),
        (torch.bfloat16, 65, True, False),
        (torch.bfloat16, 1, True, False),
        (torch.bfloat16, 2, False, False),
        (torch.float32, 7, True, False),
        (torch.float32, 8, False, True),
        (torch.float32, 32, False, True),
        (torch.float32, 33, False, False),
        (torch.float64, 16, True, False),
    ],
)
def test_where_a_product_is_turned(monkeypatch, dtype, rows, tiles, turned):
    """As measured, see EXPERIMENTS.md."""
    monkeypatch.setattr(layers, "_HAS_MATRIX_TILES", tiles)
    plain = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: plain.append(x.shape) or real(x, weight))
    linear = Linear(16, 24).to(dtype)
    with torch.inference_mode():
        linear(torch.ones(rows, 1, 16, dtype=dtype))
    assert bool(plain) != turned


def test_learning_is_not_turned(monkeypatch):
    monkeypatch.setattr(layers, "_HAS_MATRIX_TILES", True)
    plain = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: plain.append(x.shape) or real(x, weight))
    linear = Linear(16, 24).to(torch.bfloat16)
    linear(torch.ones(4, 16, dtype=torch.bfloat16)).float().sum().backward()
    assert plain == [(4, 16)] and linear.weight.grad is not None
    assert isinstance(linear, torch.nn.Linear) and linear.bias is None and list(linear.state_dict()) == ["weight"]
