"""Weights of 8 bits: how far they are from the real ones, every way of multiplying with them, and what is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_transformer import KINDS, logits, transformer_of

from cm3.errors import ModelFilesError, RequestError
from cm3.generation.engine import Engine
from cm3.model import quantized
from cm3.model.cache import KeyValueCache
from cm3.model.lora import load_adapter, weights_hash
from cm3.model.quantized import (
    Int8Linear,
    check_quantization,
    digits,
    int8_product,
    is_quantized,
    quantize_blocks,
    quantize_rows,
)
from cm3.tokenizers.vocabulary import Vocabulary

SEEDS = st.integers(0, 10_000)
SIZES = st.sampled_from([1e-6, 0.02, 1.0, 300.0])


def random(rows, columns, seed, size=1.0):
    return size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_rows_are_rounded_by_hand():
    rounded_ND, scale_N = quantize_rows(torch.tensor([[127.0, -63.6, 0.4, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    assert rounded_ND.tolist() == [[127, -64, 0, 1], [0, 0, 0, 0]] and rounded_ND.dtype == torch.int8
    assert scale_N.tolist() == [1.0, 0.0]


@given(SEEDS, SIZES)
def test_weights_are_off_by_half_a_scale_at_most(seed, size):
    weight_ND = random(5, 33, seed, size)
    rounded_ND, scale_N = quantize_rows(weight_ND)
    assert rounded_ND.abs().max() == 127
    assert torch.equal(scale_N, scale_N.bfloat16().float())
    error_ND = (weight_ND - scale_N[:, None] * rounded_ND).abs()
    assert (error_ND <= 0.5001 * scale_N[:, None]).all()


@given(SEEDS, SIZES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_two_digits_are_the_row(seed, size, dtype):
    x_RD = random(3, 40, seed, size).to(dtype)
    x_RD[1] = 0
    digits_MD, unit_R1 = digits(x_RD)
    assert digits_MD.dtype == torch.int8 and digits_MD.int().abs().max() == 127
    first_RD, second_RD = digits_MD.double().chunk(2)
    error_RD = ((254 * first_RD + second_RD) * unit_R1 - x_RD.double()).abs()
    assert (error_RD <= x_RD.double().abs().amax(dim=1, keepdim=True) / 64_000).all()


@pytest.mark.parametrize("path", ["digits", "packed", "widened"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (2, 1), (3,), (2, 3, 3), (128,), (129,)])
@pytest.mark.parametrize("width", [20, 40, 64, 100])
def test_every_way_of_multiplying_gives_the_same(monkeypatch, path, dtype, shape, width):
    """The product with the rounded weights: to 16 bits where digits are multiplied, else as their type allows."""
    if path == "digits" and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no products of 8 bits")
    monkeypatch.setattr(quantized, "_DIGIT_ROWS", range(1, 1000) if path == "digits" else range(0))
    monkeypatch.setattr(quantized, "_PACKED_ROWS", range(1, 1000) if path == "packed" else range(0))
    monkeypatch.setattr(quantized, "_BLOCK_SIZE", 5 * width)
    rounded_ND, scale_N = quantize_rows(random(48, width, seed=1, size=0.02))
    x_BD = torch.randn(*shape, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    found_BN = int8_product(x_BD, rounded_ND, scale_N.to(dtype))
    expected_BN = x_BD.double() @ (scale_N[:, None] * rounded_ND).double().T
    assert found_BN.shape == (*shape, 48) and found_BN.dtype == dtype
    error = (found_BN.double() - expected_BN).norm() / expected_BN.norm()
    assert error < (5e-5 if dtype == torch.float32 else 4e-3)


@given(SEEDS, st.sampled_from([1, 3, 200]))
def test_the_product_is_off_by_the_rounding_of_the_weights_alone(seed, rows):
    """|y - y'| <= sum |x| scale / 2 for every output, and about a hundredth of its size in all."""
    x_RD, weight_ND = random(rows, 64, seed), random(24, 64, seed + 1, 0.02)
    linear = Int8Linear(weight_ND)
    exact_RN = x_RD.double() @ weight_ND.double().T
    error_RN = (linear(x_RD).double() - exact_RN).abs()
    bound_RN = x_RD.double().abs().sum(dim=1, keepdim=True) * linear.scale.double() / 2
    assert (error_RN <= 1.001 * bound_RN).all()
    assert error_RN.norm() < 0.015 * exact_RN.norm()


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_activations_that_are_no_numbers_do_not_become_some(rows, value):
    x_RD = torch.ones(rows, 16, dtype=torch.bfloat16)
    x_RD[0, 3] = value
    out_RN = Int8Linear(torch.ones(4, 16, dtype=torch.bfloat16))(x_RD)
    assert not out_RN[0].isfinite().any() and out_RN[1:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrices_of_blocks_are_rounded_and_nothing_else(kind, dtype):
    plain, model = transformer_of(kind).to(dtype), transformer_of(kind).to(dtype)
    assert not is_quantized(model)
    quantize_blocks(model)
    assert is_quantized(model) and not any(module.training for module in model.modules())
    before, after = plain.state_dict(), model.state_dict()
    changed = {name for name in before if after[name].dtype != before[name].dtype}
    matrices = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.out")
    assert changed == {f"blocks.{layer}.{name}.weight" for layer in range(2) for name in matrices}
    assert after.keys() - before.keys() == {name.replace("weight", "scale") for name in changed}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - changed)
    error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert error < 0.03


def test_memory_halves():
    def size(model):
        return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())

    model = transformer_of("cm3leon", feed_forward_width=1024).bfloat16()
    matrices = sum(p.numel() for p in model.blocks.parameters())
    rows = 2 * (3 * 32 + 32 + 1024 + 32)
    before = size(model)
    quantize_blocks(model)
    assert size(model) == before - matrices + 2 * rows
    assert size(model) < 0.55 * before


def test_decoding_with_a_cache_is_the_whole_pass():
    model = transformer_of("chameleon")
    quantize_blocks(model)
    ids_BT = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        whole_BTD = model(ids_BT)
        cache = KeyValueCache.create(model.config, 2, 8)
        steps = [model(ids_BT[:, :5], cache=cache), model(ids_BT[:, 5:], cache=cache)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole_BTD, rtol=1e-3, atol=1e-3)


def test_a_quantized_model_is_frozen_and_refuses_to_be_trained():
    """The refusal changes nothing: a decoding engine puts a model back into the mode that it found."""
    engine = Engine(transformer_of("cm3leon"), Vocabulary.build(20, 12, num_sentinels=2, multiple=8))
    model, sequences = engine.model, [([3, 4, 5], [6, 7])]
    quantize_blocks(model)
    before = engine.score(sequences)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RequestError, match="a model with int8 weights cannot be trained; load it without quantize"):
        model.train()
    assert not any(module.training for module in model.modules())
    assert engine.score(sequences) == before
    assert model.eval() is model


def test_an_adapter_does_not_fit_rounded_weights(tmp_path):
    """Though it was trained on these weights before they were rounded."""
    model = transformer_of("cm3leon")
    base_hash = weights_hash(model)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "base.json").write_text(json.dumps({"weights_hash": base_hash, "model": "base"}))
    quantize_blocks(model)
    with pytest.raises(ModelFilesError, match=f"belongs to the weights {base_hash[:12]} of base, found "):
        load_adapter(model, tmp_path)


def test_unknown_roundings_are_refused():
    check_quantization(None)
    check_quantization("int8")
    with pytest.raises(RequestError, match="quantize='int4' is unknown; choose int8, or leave it out for the weights"):
        check_quantization("int4")
