"""Rows that several processes share: threads that stand for them compute what one does with the whole rows."""

import copy

import pytest
import torch
from test_model_transformer import CONFIG, CONFIGS, DOCUMENTS_BT, build, random_ids
from thread_group import in_parts

from cm3.errors import ConfigError
from cm3.model.attention import attend
from cm3.model.loss import next_token_loss
from cm3.model.masks import PackedMask, document_positions
from cm3.model.sequence_parallel import ALONE, SharedRows, join_sequence_group

DIRECTION_BTD = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(5))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@CONFIGS
@pytest.mark.parametrize(("backend", "activation_checkpointing"), [("math", False), ("sdpa", True)])
def test_parts_are_those_of_whole_rows_with_all_gradients(config, backend, activation_checkpointing):
    model, ids_BT = build(config), random_ids()
    model.attention_backend, model.activation_checkpointing = backend, activation_checkpointing
    copies = [copy.deepcopy(model) for _ in range(2)]

    def part(group):
        own = copies[group.index]
        hidden_BLD = own(group.part(ids_BT), rows=SharedRows(DOCUMENTS_BT, group))
        (hidden_BLD * DIRECTION_BTD.chunk(group.size, dim=1)[group.index]).sum().backward()
        return hidden_BLD.detach()

    parts = in_parts(2, part)
    hidden_BTD = model(ids_BT, document_ids_BT=DOCUMENTS_BT)
    (hidden_BTD * DIRECTION_BTD).sum().backward()
    assert [tuple(hidden.shape) for hidden in parts] == [(2, 20, 32)] * 2
    torch.testing.assert_close(torch.cat(parts, dim=1), hidden_BTD, rtol=1e-4, atol=1e-5)
    own, other = map(gradients, copies)
    assert own.keys() == gradients(model).keys()
    for name, expected in gradients(model).items():
        assert expected.abs().max() > 0
        scale = float(expected.abs().max())
        torch.testing.assert_close(own[name] + other[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=name)


@CONFIGS
@pytest.mark.parametrize("documents_BT", [None, DOCUMENTS_BT], ids=["one document", "packed"])
def test_the_chunked_loss_of_parts_adds_up(config, documents_BT):
    ids_BT, weights_BT = random_ids(), torch.rand(2, 40)
    settings = {"image_range": (20, 50), "weights_BT": weights_BT, "z_loss_weight": 0.1, "chunk_size": 7}
    model = build(config)
    copies = [copy.deepcopy(model) for _ in range(2)]

    def part(group):
        out = next_token_loss(copies[group.index], ids_BT, documents_BT, group=group, **settings)
        (out.loss * out.weight_sum).backward()
        return out

    parts = in_parts(2, part)
    whole = next_token_loss(model, ids_BT, documents_BT, **settings)
    (whole.loss * whole.weight_sum).backward()
    for name in ("weight_sum", "text_loss_sum", "text_count", "image_loss_sum", "image_count"):
        torch.testing.assert_close(sum(getattr(out, name) for out in parts), getattr(whole, name), msg=name)
    for name in ("loss", "z_loss"):
        total = sum(getattr(out, name) * out.weight_sum for out in parts)
        torch.testing.assert_close(total, getattr(whole, name) * whole.weight_sum, msg=name)
    own, other = map(gradients, copies)
    for name, expected in gradients(model).items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(own[name] + other[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(("size", "heads"), [(2, (4, 4)), (2, (6, 2)), (4, (8, 4)), (5, (5, 5))])
def test_every_process_gets_all_tokens_of_its_heads_and_gives_back_its_own_tokens(size, heads):
    q_BTNK, k_BTGK, v_BTGK = (torch.randn(2, 40, count, 8) for count in (heads[0], heads[1], heads[1]))

    def exchange(group):
        rows = SharedRows(DOCUMENTS_BT, group)
        gathered = rows.gather_tokens(*(x.chunk(size, dim=1)[group.index] for x in (q_BTNK, k_BTGK, v_BTGK)))
        return gathered, rows.gather_heads(gathered[0]), rows.positions_BL

    positions_BT = document_positions(DOCUMENTS_BT)
    for index, (gathered, back_BLNK, positions_BL) in enumerate(in_parts(size, exchange)):
        for got, whole in zip(gathered, (q_BTNK, k_BTGK, v_BTGK), strict=True):
            assert torch.equal(got, whole.chunk(size, dim=2)[index])
        assert torch.equal(back_BLNK, q_BTNK.chunk(size, dim=1)[index])
        assert torch.equal(positions_BL, positions_BT.chunk(size, dim=1)[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_nothing_but_padding_gives_zeros(dtype):
    """The last quarter of the first row is padding, and nobody sees it."""
    q, k, v = (torch.randn(1, 40, count, 8).to(dtype) for count in (8, 4, 4))

    def part(group):
        rows = SharedRows(DOCUMENTS_BT[:1], group)
        return attend(*(x.chunk(4, dim=1)[group.index] for x in (q, k, v)), mask=rows)

    parts = in_parts(4, part)
    assert parts[3].dtype == dtype and (parts[3] == 0).all() and not (parts[2] == 0).any()
    torch.testing.assert_close(torch.cat(parts, dim=1), attend(q, k, v, mask=PackedMask(DOCUMENTS_BT[:1])))


def test_a_document_over_all_parts_is_measured_whole():
    model, ids_BT = build(CONFIG), random_ids(1, 60)
    with pytest.raises(ConfigError, match="a document of 60 tokens was given, but model.max_positions=48"):
        in_parts(2, lambda group: model(group.part(ids_BT), rows=SharedRows(torch.zeros_like(ids_BT), group)))


def test_one_process_shares_with_nobody():
    ids_BT = random_ids()
    assert join_sequence_group(1) is ALONE
    assert torch.equal(ALONE.part(ids_BT), ids_BT)
