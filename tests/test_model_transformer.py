"""The transformer: CM3Leon's facts, Chameleon's switches, packing, types and activation checkpointing."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cm3.errors import ConfigError
from cm3.model.config import ModelConfig
from cm3.model.layers import rotary_table, rotate
from cm3.model.transformer import Transformer

# Large weights and no zero matrices, so that every part shows in the output.
CONFIG = ModelConfig(
    vocabulary_size=64,
    width=32,
    num_layers=2,
    num_heads=4,
    max_positions=48,
    init_std=0.2,
    position_init_std=0.2,
    zero_init_outputs=False,
)
CHAMELEON = replace(
    CONFIG,
    norm="rmsnorm",
    activation="swiglu",
    position="rope",
    qk_norm=True,
    norm_order="swin",
    num_key_value_heads=2,
    tie_embeddings=False,
)
PER_HEAD = replace(CHAMELEON, qk_norm_per_head=True)
CONFIGS = pytest.mark.parametrize(
    "config", [CONFIG, CHAMELEON, PER_HEAD], ids=["cm3leon", "chameleon", "chameleon-34b"]
)
DOCUMENTS_BT = torch.tensor([[0] * 7 + [1] * 20 + [2] * 3 + [-1] * 10, [5] * 40])


def build(config, seed=0):
    torch.manual_seed(seed)
    return Transformer(config)


def random_ids(batch=2, num_tokens=40, seed=1):
    return torch.randint(0, 64, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


def test_initialisation_is_the_papers():
    model = build(ModelConfig(vocabulary_size=500, width=64, num_layers=2, num_heads=4, max_positions=100))
    for name, weight in model.named_parameters():
        if name.endswith(("attention.out.weight", "feed_forward.out.weight")):
            assert (weight == 0).all()
            continue
        std = 0.0002 if name.startswith("position_embedding") else 0.006
        assert weight.abs().max() <= 3 * std
        # A normal cut at 3 standard deviations has 0.9866 of its deviation left.
        assert weight.std().item() == pytest.approx(0.9866 * std, rel=0.05)
    hidden = model(random_ids())
    without_blocks = model.final_norm(model.embedding(random_ids()) + model.position_embedding(torch.arange(40)))
    torch.testing.assert_close(hidden, without_blocks)


def test_no_biases_and_no_norm_weights():
    names = [name for name, _ in build(CONFIG).named_parameters()]
    assert not [name for name in names if "bias" in name or "norm" in name]
    assert [name for name in names if name.startswith("head")] == []
    chameleon_names = [name for name, _ in build(CHAMELEON).named_parameters()]
    assert {name.split(".")[-2] for name in chameleon_names if "bias" in name} == {"q_norm", "k_norm"}
    assert "head.weight" in chameleon_names


def test_norms_of_every_head_that_are_equal_are_the_shared_norm():
    shared, per_head = build(CHAMELEON), build(PER_HEAD)
    weights = {}
    for name, tensor in shared.state_dict().items():
        if "q_norm" in name or "k_norm" in name:
            tensor.uniform_(0.5, 1.5)
            weights[name] = tensor.repeat(4 if "q_norm" in name else 2)
        else:
            weights[name] = tensor
    per_head.load_state_dict(weights)
    torch.testing.assert_close(per_head(random_ids()), shared(random_ids()))
    for name, tensor in per_head.state_dict().items():
        if name.endswith("q_norm.weight"):
            tensor[8:16] *= 2  # the second head alone
    assert (per_head(random_ids()) - shared(random_ids())).abs().max() > 0.01
    assert {tensor.ndim for name, tensor in weights.items() if "norm" in name} == {1}  # not decayed


def test_without_zero_outputs_depth_scales_the_output_matrices():
    config = replace(CONFIG, width=128, zero_init_outputs=False, init_std=0.006, num_layers=8)
    weight = build(config).blocks[0].feed_forward.out.weight
    assert weight.std().item() == pytest.approx(0.9866 * 0.006 / 4, rel=0.05)


@CONFIGS
def test_a_token_does_not_see_the_future(config):
    model, ids = build(config), random_ids()
    changed = ids.clone()
    changed[:, 20] += 1
    changed %= 64
    same = model(ids) == model(changed)
    assert same[:, :20].all()
    assert not same[:, 20:].all(dim=-1).any()


@CONFIGS
@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_packed_documents_equal_separate_rows(config, backend):
    model, ids = build(config), random_ids()
    model.attention_backend = backend
    packed = model(ids, document_ids_BT=DOCUMENTS_BT)
    assert packed.isfinite().all()
    for row, start, stop in ((0, 0, 7), (0, 7, 27), (0, 27, 30), (1, 0, 40)):
        alone = model(ids[row : row + 1, start:stop])
        torch.testing.assert_close(packed[row : row + 1, start:stop], alone, rtol=1e-4, atol=1e-4)


@CONFIGS
def test_positions_matter_and_can_be_given(config):
    model, ids = build(config), random_ids(1, 5).fill_(3)
    default = torch.arange(5)[None]
    torch.testing.assert_close(model(ids), model(ids, positions_BT=default))
    spread = default * torch.tensor([1, 1, 1, 1, 5])
    if config.position == "learned":
        assert not torch.allclose(model(ids), model(ids, positions_BT=spread))
    else:  # only distances count, and equal keys hide even those: use different ids
        ids = random_ids(1, 5)
        assert not torch.allclose(model(ids), model(ids, positions_BT=spread))
        torch.testing.assert_close(model(ids), model(ids, positions_BT=default + 9), rtol=1e-3, atol=1e-4)


def test_rotation_is_ropes():
    """arXiv:2104.09864, equation 15, pair by pair; and scores that depend on the distance only."""
    q = torch.randn(1, 3, 2, 8)
    positions = torch.tensor([[0, 3, 900]])
    rotated = rotate(q, rotary_table(positions, 8, 10_000.0))
    for token, position in enumerate((0, 3, 900)):
        for pair in range(4):
            angle = torch.tensor(position * 10_000.0 ** (-2 * pair / 8))
            x, y = q[0, token, :, 2 * pair], q[0, token, :, 2 * pair + 1]
            expected = torch.stack([x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()], -1)
            torch.testing.assert_close(rotated[0, token, :, 2 * pair : 2 * pair + 2], expected, rtol=1e-4, atol=1e-4)


def test_swin_order_normalises_what_a_block_adds():
    model = build(replace(CHAMELEON, num_layers=1))
    block = model.blocks[0]
    seen = {}
    block.attention_norm.register_forward_hook(lambda _, inputs, output: seen.update(added=output))
    block.feed_forward.register_forward_hook(lambda _, inputs, output: seen.update(middle=inputs[0]))
    ids = random_ids()
    model(ids)
    torch.testing.assert_close(seen["middle"], model.embedding(ids) + seen["added"])


def test_dropout_only_while_training():
    model, ids = build(replace(CONFIG, dropout=0.5)), random_ids()
    model.eval()
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), build(CONFIG)(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@CONFIGS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(config, dropout):
    results = []
    for activation_checkpointing in (False, True):
        model = build(replace(config, dropout=dropout))
        model.activation_checkpointing = activation_checkpointing
        torch.manual_seed(3)
        loss = model(random_ids(), document_ids_BT=DOCUMENTS_BT).square().mean()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


@CONFIGS
def test_bfloat16_weights_and_autocast_follow_float32(config):
    ids = random_ids()
    exact = build(config)(ids, document_ids_BT=DOCUMENTS_BT)
    low = build(config).to(torch.bfloat16)(ids, document_ids_BT=DOCUMENTS_BT)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = build(config)(ids, document_ids_BT=DOCUMENTS_BT)
    assert low.dtype == torch.bfloat16
    real = DOCUMENTS_BT >= 0
    for approximate in (low.float(), mixed.float()):
        assert (approximate - exact)[real].abs().mean() < 0.03 * exact[real].abs().mean()


def test_rope_keeps_its_precision_in_bfloat16():
    """At position 4,001 bfloat16 has steps of 16: a table in that type would be noise."""
    low = rotary_table(torch.tensor([[4001]]), 64, 10_000.0)
    assert low.dtype == torch.complex64
    assert low[0, 0, 0, 0].real.item() == pytest.approx(torch.tensor(4001.0).double().cos().item(), abs=1e-5)
    assert not list(build(CHAMELEON).buffers())


@CONFIGS
def test_logits_of_a_range_are_a_view_of_the_head(config):
    model = build(config)
    hidden = model(random_ids())
    logits = model.logits(hidden)
    assert logits.shape == (2, 40, 64)
    torch.testing.assert_close(model.logits(hidden, (10, 30)), logits[..., 10:30])
    assert model.logits(hidden[:, -1], (10, 30)).shape == (2, 20)
    assert (model.head_weight_VD is model.embedding.weight) == config.tie_embeddings


def test_meta_device_builds_without_memory():
    with torch.device("meta"):
        assert Transformer(CHAMELEON).embedding.weight.is_meta


def test_too_long_rows_are_refused_but_long_packs_are_not():
    model = build(CONFIG)
    with pytest.raises(ConfigError, match="49 tokens was given, but model.max_positions=48"):
        model(random_ids(1, 49))
    with pytest.raises(ConfigError, match="max_positions=48"):
        model(random_ids(1, 60), document_ids_BT=torch.zeros(1, 60, dtype=torch.int32))
    ids = random_ids(1, 60)
    assert model(ids, document_ids_BT=torch.arange(60)[None] // 30).shape == (1, 60, 32)
    padded = torch.where(torch.arange(60) < 5, 0, -1)[None]
    assert model(ids, document_ids_BT=padded).isfinite().all()


def test_every_parameter_learns():
    for config in (CONFIG, CHAMELEON):
        model = build(config)
        model.logits(model(random_ids())).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, nn.Parameter)
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
