"""Every attention backend against the math reference, and the masks against their definition."""

import importlib.machinery
import sys
import types

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.errors import ConfigError, MissingDependencyError
from cm3.model import attention
from cm3.model.attention import attend, has_flash_attention
from cm3.model.cache import KeyValueCache
from cm3.model.config import ModelConfig
from cm3.model.masks import CausalMask, PackedMask, document_positions

DOCUMENTS_BT = torch.tensor(
    [
        [0] * 5 + [1] * 33 + [2] * 1 + [-1] * 11,
        [7] * 50,
        [-1] * 3 + [0] * 40 + [0] * 7,
        [-1] * 50,
    ]
)


def random_qkv(batch, num_tokens, num_heads, num_kv_heads, dtype=torch.float32, head_width=16):
    torch.manual_seed(0)
    shapes = [(batch, num_tokens, heads, head_width) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def run(backend, qkv, mask):
    """Output and gradients of a random projection of it."""
    out = attend(*qkv, mask=mask, backend=backend)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad((out.float() * torch.randn(out.shape)).sum(), qkv)]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_sdpa_equals_math_with_gradients(kind, num_kv_heads):
    mask = CausalMask() if kind == "causal" else PackedMask(DOCUMENTS_BT)
    qkv = random_qkv(4, 50, 4, num_kv_heads)
    for actual, expected in zip(run("sdpa", qkv, mask), run("math", qkv, mask), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [50, 300])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_sdpa_in_bfloat16_is_close_to_math(num_kv_heads, num_tokens):
    """Both sides of the length at which training in 16 bit leaves the plain products for SDPA."""
    qkv = random_qkv(2, num_tokens, 4, num_kv_heads, torch.bfloat16)
    for mask in (CausalMask(), PackedMask(torch.arange(num_tokens).expand(2, -1) // (num_tokens - 9))):
        for actual, expected in zip(run("sdpa", qkv, mask), run("math", qkv, mask), strict=True):
            assert actual.dtype == torch.bfloat16
            torch.testing.assert_close(actual.float(), expected.float(), rtol=0.05, atol=0.08)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_padding_gives_zeros_and_no_gradient(backend):
    qkv = random_qkv(4, 50, 4, 2)
    out, *gradients = run(backend, qkv, PackedMask(DOCUMENTS_BT))
    for tensor in (out, *gradients):
        assert tensor.isfinite().all()
        assert (tensor[DOCUMENTS_BT < 0] == 0).all()


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_packed_documents_equal_separate_rows(backend):
    q, k, v = random_qkv(4, 50, 4, 2)
    packed = attend(q, k, v, mask=PackedMask(DOCUMENTS_BT), backend=backend)
    for row, start, stop in ((0, 0, 5), (0, 5, 38), (0, 38, 39), (1, 0, 50), (2, 3, 50)):
        part = (slice(row, row + 1), slice(start, stop))
        alone = attend(q[part], k[part], v[part], mask=CausalMask(), backend="math")
        torch.testing.assert_close(packed[part], alone, rtol=1e-4, atol=1e-5)


def test_rows_of_only_padding():
    mask = PackedMask(torch.full((2, 5), -1))
    assert (attend(*random_qkv(2, 5, 4, 4), mask=mask, backend="sdpa") == 0).all()
    assert mask.longest == 0


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 90)), min_size=1, max_size=12))
def test_document_groups_lose_nothing_and_waste_little(runs):
    ids_BT = torch.cat([torch.full((length,), document) for document, length in runs])[None]
    mask = PackedMask(ids_BT)
    groups = mask.groups
    real = ids_BT.flatten() >= 0
    assert (groups.token_of_slot[groups.slot_of_token[real]] == torch.arange(len(real))[real]).all()
    x = torch.randn(len(real), 2, 3)
    assert torch.equal(groups.to_tokens(groups.to_slots(x)), x * real[:, None, None])
    slots = sum(count * length for count, length in groups.shapes)
    assert slots == len(groups.token_of_slot)
    assert slots <= 1.5 * int(real.sum()) + 32 * len(mask.cumulative_lengths)
    assert mask.cumulative_lengths[-1] == real.sum()


def test_positions_restart_at_each_document():
    ids_BT = torch.tensor([[4, 4, 4, 5, 6, 6, -1, -1], [0, 0, 1, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 0, 1, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert document_positions(ids_BT).tolist() == expected


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("num_new", [None, [3, 0, 4]])
def test_cache_mask_sdpa_equals_math(num_new, num_kv_heads):
    config = ModelConfig(vocabulary_size=8, width=64, num_layers=1, num_heads=4, num_key_value_heads=num_kv_heads)
    cache = KeyValueCache.create(config, 3, 12)
    cache.advance(8, torch.tensor([0, 5, 8]))
    mask = cache.plan_step(4, None if num_new is None else torch.tensor(num_new))
    q, k, v = (x.detach() for x in random_qkv(3, 13, 4, num_kv_heads))
    q = q[:, :4]
    math = attend(q, k, v, mask=mask, backend="math")
    torch.testing.assert_close(attend(q, k, v, mask=mask, backend="sdpa"), math, rtol=1e-4, atol=1e-5)
    if mask.real_BT is not None:
        assert (math[~mask.real_BT] == 0).all()


def test_unknown_backend(monkeypatch):
    """Without the suite's type checks, which would be the first to object."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match="'triton' is unknown; choose auto, math, sdpa, flash"):
        attention.attend(*random_qkv(1, 2, 4, 4), mask=CausalMask(), backend="triton")


@pytest.mark.skipif(has_flash_attention(), reason="flash-attn is installed")
def test_flash_not_installed_names_the_extra():
    with pytest.raises(MissingDependencyError, match=r"open-cm3\[flash\]"):
        attend(*random_qkv(1, 2, 4, 4), mask=CausalMask(), backend="flash")


def test_flash_backend_calls_flash_attn_as_documented(monkeypatch):
    """A stand-in with flash-attn's two signatures; the kernels themselves need a GPU."""

    def flash_attn_func(q, k, v, *, causal):
        assert causal
        return attend(q, k, v, mask=CausalMask(), backend="math")

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([flash_attn_func(*(x[None] for x in part), causal=True)[0] for part in parts])

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    has_flash_attention.cache_clear()
    assert has_flash_attention()
    has_flash_attention.cache_clear()
    qkv = random_qkv(4, 50, 4, 2)
    for mask in (CausalMask(), PackedMask(DOCUMENTS_BT), PackedMask(torch.full((4, 50), -1))):
        for actual, expected in zip(run("flash", qkv, mask), run("math", qkv, mask), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_flash_attn_is_not_imported_unasked():
    attend(*random_qkv(1, 4, 4, 4), mask=CausalMask(), backend="auto")
    assert "flash_attn" not in sys.modules
