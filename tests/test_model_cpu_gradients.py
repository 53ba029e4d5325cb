"""Hand-written gradients: their definition, torch's own, how exact they are in 16 bit, and where they are taken."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_transformer import CHAMELEON, build, random_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from cm3.model import attention, cpu_gradients
from cm3.model.attention import attend
from cm3.model.cpu_gradients import CausalAttention, RmsNorm, learns_on_cpu
from cm3.model.layers import Norm, SharedHeadNorm
from cm3.model.loss import next_token_loss
from cm3.model.masks import CausalMask


def relative_error(found, exact):
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def with_gradients(function, inputs, seed=1):
    """Output and the gradients of a projection of it, the same whatever the type."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    grad = torch.randint(-3, 4, out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def rms_inputs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator) * 2 + 0.5
    return [x.to(dtype), (1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype)]


def test_rms_norm_is_differentiated_correctly():
    x, weight = (x.double().requires_grad_() for x in rms_inputs((2, 3, 6), torch.float64))
    assert torch.autograd.gradcheck(lambda *inputs: RmsNorm.apply(*inputs, 1e-3), (x, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_rms_norm_is_torchs(dtype, tolerance):
    """Over so many rows that a sum of the weight's gradient in 16 bit would be off by several per cent."""
    inputs = rms_inputs((4, 1024, 48), dtype)
    exact = with_gradients(lambda x, w: F.rms_norm(x, [48], w, 1e-5), [x.double() for x in inputs])
    found = with_gradients(lambda x, w: RmsNorm.apply(x, w, 1e-5), inputs)
    assert [x.dtype for x in found] == [dtype] * 3
    for actual, expected in zip(found, exact, strict=True):
        assert relative_error(actual, expected) < tolerance


def test_rms_norm_of_rows_without_a_mean_and_of_zeros():
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    out, grad_x, grad_weight = with_gradients(lambda x, w: RmsNorm.apply(x, w, 1e-5), [x, torch.ones(4)])
    torch.testing.assert_close(out[0], torch.tensor([1.2, -1.6, 0.0, 0.0]), rtol=1e-5, atol=0)
    assert (out[1] == 0).all() and grad_x.isfinite().all() and grad_weight.isfinite().all()


def test_a_frozen_weight_gets_no_gradient():
    x, weight = rms_inputs((2, 3, 8), torch.float32)
    x.requires_grad_()
    RmsNorm.apply(x, weight, 1e-5).square().sum().backward()
    assert weight.grad is None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_head_norm_sums_its_gradients_exactly(dtype):
    """torch's own kernel is wrong by tens of per cent here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2048, 6, 16, generator=generator).to(dtype)
    norm = SharedHeadNorm(16).to(dtype)
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    out = norm(x)
    out.backward(grad.float())
    exact = nn.LayerNorm(16).double()
    exact(x.double()).backward(grad.double())
    assert relative_error(norm.weight.grad, exact.weight.grad) < 0.01
    assert relative_error(norm.bias.grad, exact.bias.grad) < 0.01
    assert relative_error(out, exact(x.double())) < 0.01


def test_shared_head_norm_is_layer_norm_in_float32():
    norm, plain = SharedHeadNorm(16), nn.LayerNorm(16)
    assert norm.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 5, 3, 16)
    assert torch.equal(norm(x), plain(x))


def qkv(batch, num_heads, num_tokens, head_width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, num_heads, num_tokens, head_width, generator=generator).to(dtype) for _ in range(3)]


def own_gradient(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_causal_attention_is_differentiated_correctly(monkeypatch):
    """With two heads at a time, and blocks of queries of which the last is shorter."""
    monkeypatch.setattr(cpu_gradients, "_BLOCK_QUERIES", 3)
    monkeypatch.setattr(cpu_gradients, "_BLOCK_SCORES", 2 * 3 * 8)
    inputs = [x.requires_grad_() for x in qkv(1, 3, 8, 4, torch.float64)]
    assert torch.autograd.gradcheck(CausalAttention.apply, inputs)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 16), st.integers(1, 3000))
def test_causal_attention_is_torchs(batch, num_heads, num_tokens, block_queries, block_scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_gradients, "_BLOCK_QUERIES", block_queries)
        patch.setattr(cpu_gradients, "_BLOCK_SCORES", block_scores)
        inputs = qkv(batch, num_heads, num_tokens, 8)
        found, expected = with_gradients(CausalAttention.apply, inputs), with_gradients(own_gradient, inputs)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_causal_attention_is_as_exact_as_torchs_in_bfloat16(spread, autocast):
    """Also where scores are large, whose rounding to 16 bit would show."""
    inputs = [x.to(torch.bfloat16) for x in qkv(1, 2, 300, 32)]
    inputs[:2] = [spread * x for x in inputs[:2]]
    exact = with_gradients(own_gradient, [x.double() for x in inputs])
    torchs = with_gradients(own_gradient, inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = with_gradients(CausalAttention.apply, inputs)
    for actual, own, expected in zip(found, torchs, exact, strict=True):
        assert actual.dtype == torch.bfloat16
        assert relative_error(actual, expected) <= 1.5 * relative_error(own, expected) < 0.02


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "learns", "taken"),
    [
        (torch.bfloat16, 256, True, False),
        (torch.bfloat16, 257, True, True),
        (torch.bfloat16, 512, True, True),
        (torch.bfloat16, 513, True, False),
        (torch.bfloat16, 300, False, False),
        (torch.float32, 300, True, False),
    ],
)
def test_which_rows_take_it(monkeypatch, dtype, num_tokens, learns, taken):
    """As measured, see EXPERIMENTS.md; grouped queries too."""
    seen = []
    real = CausalAttention.apply
    monkeypatch.setattr(attention.CausalAttention, "apply", lambda *x: seen.append(x[1].shape) or real(*x))
    q, k, v = (x.transpose(1, 2).to(dtype).requires_grad_(learns) for x in qkv(1, 4, num_tokens, 8))
    k, v = k[:, :, :2], v[:, :, :2]
    out = attend(q, k, v, mask=CausalMask())
    assert seen == ([(1, 4, num_tokens, 8)] if taken else [])
    plain = attend(q, k, v, mask=CausalMask(), backend="math")
    torch.testing.assert_close(out.float(), plain.float(), rtol=0.05, atol=0.05)


def test_not_without_gradients_nor_compiled_nor_elsewhere(monkeypatch):
    x = torch.ones(2)
    assert learns_on_cpu(x) and not learns_on_cpu(torch.empty(2, device="meta"))
    with torch.no_grad():
        assert not learns_on_cpu(x)
    with torch.inference_mode():
        assert not learns_on_cpu(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not learns_on_cpu(x)


def test_a_norm_of_a_model_gives_the_same_numbers_when_it_learns():
    norm = Norm(CHAMELEON)
    nn.init.normal_(norm.weight, 1, 0.3)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 7, CHAMELEON.width).to(dtype)
        learning = norm(x)
        assert "RmsNorm" in learning.grad_fn.name()
        with torch.no_grad():
            torch.testing.assert_close(learning, norm(x))
    assert Norm(CHAMELEON).to("meta")(torch.empty(1, 2, CHAMELEON.width, device="meta")).is_meta


@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "checkpointing"])
def test_a_chameleon_learns_what_it_learns_in_float32(kind):
    """Rows long enough for blocks of queries."""
    config, ids = replace(CHAMELEON, max_positions=300), random_ids(num_tokens=300)
    exact = build(config)
    next_token_loss(exact, ids, image_range=(20, 50)).loss.backward()
    model = build(config)
    if kind != "autocast":
        model.to(torch.bfloat16)
    model.activation_checkpointing = kind == "checkpointing"
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        output = next_token_loss(model, ids, image_range=(20, 50))
    output.loss.backward()
    for (name, actual), parameter in zip(model.named_parameters(), exact.parameters(), strict=True):
        similarity = F.cosine_similarity(actual.grad.float().flatten(), parameter.grad.flatten(), dim=0)
        assert similarity > 0.97, name


def test_autocast_rounds_nothing_of_float32():
    """Not even where the gradient is taken inside of it."""
    x, weight = rms_inputs((2, 5, 48), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        norm = with_gradients(lambda x, w: RmsNorm.apply(x, w, 1e-5), [x, weight])
        attention = with_gradients(CausalAttention.apply, qkv(1, 2, 40, 8))
    expected = with_gradients(lambda x, w: RmsNorm.apply(x, w, 1e-5), [x, weight])
    expected += with_gradients(CausalAttention.apply, qkv(1, 2, 40, 8))
    assert all(torch.equal(a, b) for a, b in zip(norm + attention, expected, strict=True))


def test_checkpointing_changes_no_gradient():
    inputs = qkv(1, 2, 280, 8, torch.bfloat16)
    kept = with_gradients(CausalAttention.apply, inputs)
    again = with_gradients(lambda *x: checkpoint(CausalAttention.apply, *x, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
