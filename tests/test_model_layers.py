"""Products with weights: whichever way round, the same numbers, and learning goes the plain way."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cm3.model import layers
from cm3.model.layers import Linear, rotary_table, rotate, weight_product


def on_any_processor(monkeypatch):
    """Choose as on the processor that was measured, without a compiler."""
    monkeypatch.setattr(layers, "multiplies", lambda *_: False)
    monkeypatch.setattr(layers, "_HAS_MATRIX_TILES", True)
    monkeypatch.setattr(layers, "_PANEL_ROWS", range(4, 33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [48, 64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 1), (3, 3), (16, 1), (33, 2), (8,), (1, 2, 4)])
def test_products_are_those_of_linear(monkeypatch, dtype, shape, outputs):
    on_any_processor(monkeypatch)
    weight = torch.randn(outputs, 32).to(dtype)
    x = torch.randn(*shape, 32).to(dtype)
    with torch.no_grad():
        found, expected = weight_product(x, weight), F.linear(x, weight)
    assert found.shape == expected.shape and found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 8)


class Ways(TorchDispatchMode):
    """Which way products go."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.matmul.default:
            self.seen.append("vector" if args[1].dim() == 1 else "turned")
        elif function is torch.ops.aten.bmm.default:
            self.seen.append("panels" if args[0].stride(0) == 0 else "turned panels")
        elif function is torch.ops.aten.linear.default:
            self.seen.append("linear")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "rows", "outputs", "way"),
    [
        (torch.bfloat16, 1, 32, "vector"),
        (torch.bfloat16, 2, 32, "turned"),
        (torch.bfloat16, 1024, 32, "turned"),
        (torch.bfloat16, 1025, 32, "linear"),
        (torch.float32, 1, 32, "linear"),
        (torch.float32, 3, 32, "linear"),
        (torch.float32, 4, 64, "panels"),
        (torch.float32, 12, 64, "panels"),
        (torch.float32, 13, 96, "turned panels"),
        (torch.float32, 32, 64, "turned panels"),
        (torch.float32, 33, 32, "linear"),
        (torch.float32, 4, 48, "linear"),
        (torch.float32, 16, 48, "linear"),
        (torch.float64, 1, 32, "linear"),
        (torch.float64, 16, 32, "linear"),
    ],
)
def test_which_way_a_product_goes(monkeypatch, dtype, rows, outputs, way):
    """As measured, see EXPERIMENTS.md; whichever way, in the shape and with the numbers of the plain one."""
    on_any_processor(monkeypatch)
    linear = Linear(16, outputs).to(dtype)
    x = torch.randn(rows, 1, 16).to(dtype)
    with torch.inference_mode():
        with Ways() as ways:
            product = linear(x)
        assert ways.seen == [way]
        tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(product, x @ linear.weight.mT, rtol=tolerance, atol=tolerance)


def test_processors_that_were_not_measured_multiply_plainly(monkeypatch):
    monkeypatch.setattr(layers, "multiplies", lambda *_: False)
    monkeypatch.setattr(layers, "_HAS_MATRIX_TILES", False)
    monkeypatch.setattr(layers, "_PANEL_ROWS", range(0))
    with torch.inference_mode(), Ways() as ways:
        for rows in (1, 2, 8, 16):
            for dtype in (torch.float32, torch.bfloat16):
                weight_product(torch.ones(rows, 16, dtype=dtype), torch.ones(32, 16, dtype=dtype))
    assert ways.seen == ["linear"] * 8


def test_learning_is_not_turned(monkeypatch):
    on_any_processor(monkeypatch)
    plain = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: plain.append(x.shape) or real(x, weight))
    linear = Linear(16, 24).to(torch.bfloat16)
    linear(torch.ones(4, 16, dtype=torch.bfloat16)).float().sum().backward()
    assert plain == [(4, 16)] and linear.weight.grad is not None
    assert isinstance(linear, torch.nn.Linear) and linear.bias is None and list(linear.state_dict()) == ["weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_rotation_is_the_same(monkeypatch, dtype):
    """In real numbers, with its gradient."""
    table = rotary_table(torch.tensor([[0, 3, 900]]), 8, 10_000.0)
    outputs, gradients = [], []
    for is_compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda is_compiling=is_compiling: is_compiling)
        x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        outputs.append(rotate(x, table))
        (outputs[-1].float() ** 3).sum().backward()
        gradients.append(x.grad)
    assert outputs[1].dtype == dtype
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
