"""The loader: what a batch holds, and that its rows depend on (seed, epoch, place) alone."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from cm3.data.loader import PackedLoader
from cm3.data.shards import ShardedDocuments, shard_path, write_index, write_shard
from cm3.errors import ConfigError, DataError
from cm3.model.config import ModelConfig
from cm3.model.loss import next_token_loss
from cm3.model.objective import ObjectiveConfig, unmask
from cm3.model.transformer import Transformer
from cm3.tokenizers.document import ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(text_size=300, image_codes=256, num_sentinels=16)
CM3, CAUSAL = ObjectiveConfig(), ObjectiveConfig(name="causal")
S0 = VOCABULARY.sentinel_id(0)
COUNT, LENGTH = 40, 64


def prepared(folder, *, retrieved=0, longest=30) -> ShardedDocuments:
    """Documents of a caption that no other has and 4x4 codes; with context before them if `retrieved`."""
    rng = np.random.default_rng(0)
    documents = []
    for number in range(COUNT):
        caption = np.array([100 + number, *rng.integers(4, 100, rng.integers(1, longest))], dtype=np.int32)
        pair = (TextTokens(caption), ImageCodes(rng.integers(0, 256, (4, 4)).astype(np.uint16)))
        context = (TextTokens(np.array([4, 5], dtype=np.int32)),) * retrieved
        documents.append(TokenizedDocument((*context, *pair), {"retrieved": retrieved}))
    write_shard(shard_path(folder, 0), documents[:25], {})
    write_shard(shard_path(folder, 1), documents[25:], {})
    VOCABULARY.save(folder / "vocabulary.json")
    write_index(folder, 2, "a" * 64)
    return ShardedDocuments(folder)


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> ShardedDocuments:
    return prepared(tmp_path_factory.mktemp("prepared"))


def loader(documents, objective=CM3, **settings) -> PackedLoader:
    return PackedLoader(documents, VOCABULARY, objective, **{"sequence_length": LENGTH, "rows": 2, **settings})


def take(batches, count):
    return list(itertools.islice(batches, count))


def contexts(batch):
    """Every document of a batch: its ids."""
    for ids_T, document_ids_T in zip(batch["ids_BT"].numpy(), batch["document_ids_BT"].numpy()):
        for number in range(document_ids_T.max() + 1):
            yield ids_T[document_ids_T == number]


def same(first, second) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def test_a_batch_has_the_promised_tensors(documents):
    batch = next(iter(loader(documents)))
    padding = batch["document_ids_BT"] < 0
    starts = batch["document_ids_BT"] != batch["document_ids_BT"].roll(1, dims=1)
    starts[:, 0] = True
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "ids_BT": ((2, LENGTH), torch.int64),
        "document_ids_BT": ((2, LENGTH), torch.int64),
        "weights_BT": ((2, LENGTH), torch.float32),
    }
    assert (batch["ids_BT"][padding] == VOCABULARY.pad_id).all()
    assert torch.equal(batch["weights_BT"] == 0, padding | starts)


def test_an_evaluation_shows_every_document_once_and_whole(documents):
    batches = list(loader(documents, evaluation=True))
    found = Counter(unmask(ids_T, VOCABULARY).tobytes() for batch in batches for ids_T in contexts(batch))
    assert found == Counter(documents.ids(i).tobytes() for i in range(len(documents)))


def test_an_evaluation_is_the_same_each_time_and_for_any_number_of_processes(documents):
    one = loader(documents, evaluation=True, rows=4)
    again = list(one)
    assert same(list(one), again)
    halves = [list(loader(documents, evaluation=True, rows=2, rank=r, world_size=2)) for r in (0, 1)]
    joined = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert same(joined, again)


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_the_rows_do_not_depend_on_the_number_of_processes(documents, packing):
    one = take(loader(documents, rows=6, packing=packing), 3)
    for world_size in (2, 3):
        parts = [
            take(loader(documents, rows=6 // world_size, rank=r, world_size=world_size, packing=packing), 3)
            for r in range(world_size)
        ]
        joined = [{k: torch.cat([part[k] for part in step]) for k in step[0]} for step in zip(*parts)]
        assert same(joined, one)


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_resuming_is_exact_anywhere(documents, packing):
    straight = loader(documents, packing=packing)
    batches, states = [], []
    for batch in itertools.islice(straight, 30):  # more than an epoch
        batches.append(batch)
        states.append(straight.state())
    assert states[-1]["epoch"] > 0
    assert all(isinstance(value, int) for value in states[-1].values())
    for done in (1, 20):
        resumed = loader(documents, packing=packing)
        resumed.load_state(states[done - 1])
        assert same(take(resumed, 3), batches[done : done + 3])


def test_a_step_of_other_processes_and_micro_batches_goes_on_from_the_same_state(documents):
    first = loader(documents, rows=4)
    take(first, 3)
    expected = torch.cat([batch["ids_BT"] for batch in take(first, 2)])
    second = [loader(documents, rows=1, rank=r, world_size=2) for r in (0, 1)]
    other = loader(documents, rows=4)
    take(other, 3)
    parts = []
    for part in second:
        part.load_state(other.state())
        parts.append(torch.cat([batch["ids_BT"] for batch in take(part, 4)]))
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), expected)


def test_each_epoch_has_every_document_in_another_order_with_other_masks(documents):
    seen: list[dict[bytes, bytes]] = []
    single = loader(documents, rows=1)
    for _ in range(2):
        epoch = len(seen)
        masks: dict[bytes, bytes] = {}
        for batch in single:
            masks |= {unmask(ids_T, VOCABULARY).tobytes(): ids_T.tobytes() for ids_T in contexts(batch)}
            if len(masks) == COUNT:
                break
        assert single.state()["epoch"] == epoch
        seen.append(masks)
    assert list(seen[0]) != list(seen[1])
    assert sum(seen[0][key] != seen[1][key] for key in seen[0]) > COUNT // 3


def test_the_seed_changes_order_and_masks(documents):
    assert not same(take(loader(documents, seed=0), 1), take(loader(documents, seed=1), 1))


def test_a_stream_joins_documents_and_cuts_them_anywhere(documents):
    batches = list(loader(documents, CAUSAL, packing="stream", evaluation=True))
    rows = torch.cat([batch["ids_BT"] for batch in batches])
    places = torch.cat([batch["document_ids_BT"] for batch in batches])
    expected = np.concatenate([documents.ids(i) for i in range(len(documents))])
    np.testing.assert_array_equal(rows[places == 0].numpy(), expected)
    assert set(places.unique().tolist()) == {-1, 0}


def test_a_masked_stream_has_full_rows_that_unmask(documents):
    for batch in take(loader(documents, packing="stream", rows=8), 5):
        assert (batch["document_ids_BT"] == 0).all()
        for ids_T in batch["ids_BT"].numpy():
            restored = unmask(ids_T, VOCABULARY)
            assert len(ids_T) - len(restored) == 3 * (ids_T == VOCABULARY.eoss_id).sum()


def test_weights_of_sentinels_and_of_retrieved_context(tmp_path):
    documents = prepared(tmp_path, retrieved=2, longest=8)
    objective = ObjectiveConfig(sentinel_loss_weight=0.0, retrieved_loss_weight=0.25, min_spans=1)
    for batch in take(loader(documents, objective, rows=4), 5):
        ids_BT, weights_BT = batch["ids_BT"], batch["weights_BT"]
        is_sentinel = (ids_BT >= S0) & (ids_BT < S0 + 16)
        is_caption = (ids_BT >= 100) & (ids_BT < 300)  # stands in the query only
        is_context = (ids_BT == 4) | (ids_BT == 5)
        assert is_sentinel.any() and is_caption.any()
        assert (weights_BT[is_sentinel] == 0).all()
        assert (weights_BT[is_caption] == 1).all()
        assert (weights_BT[ids_BT == VOCABULARY.eoss_id] == 1).all()
        assert (weights_BT[is_context] == 0.25).float().mean() > 0.8  # captions hold a few of these ids too


def test_packed_documents_have_the_loss_and_gradients_of_the_same_documents_alone(documents):
    config = ModelConfig(
        vocabulary_size=VOCABULARY.size,
        width=32,
        num_layers=2,
        num_heads=2,
        max_positions=LENGTH,
        init_std=0.3,
        zero_init_outputs=False,
    )
    model = Transformer(config)
    image_range = (VOCABULARY.image_range.start, VOCABULARY.image_range.stop)
    batch = next(iter(loader(documents, ObjectiveConfig(sentinel_loss_weight=0.5), rows=4)))
    parameters = list(model.parameters())
    packed = next_token_loss(
        model, batch["ids_BT"], batch["document_ids_BT"], image_range=image_range, weights_BT=batch["weights_BT"]
    )
    packed_gradients = torch.autograd.grad(packed.loss, parameters)

    alone = []
    for b, document_ids_T in enumerate(batch["document_ids_BT"]):
        for number in range(int(document_ids_T.max()) + 1):
            place = document_ids_T == number
            ids_1T, weights_1T = batch["ids_BT"][b, place][None], batch["weights_BT"][b, place][None]
            alone.append(next_token_loss(model, ids_1T, image_range=image_range, weights_BT=weights_1T))
    assert len(alone) > 4
    weight_sum = torch.stack([each.weight_sum for each in alone]).sum()
    loss = torch.stack([each.loss * each.weight_sum for each in alone]).sum() / weight_sum
    torch.testing.assert_close(packed.weight_sum, weight_sum)
    torch.testing.assert_close(packed.loss, loss)
    for name in ("text_loss_sum", "text_count", "image_loss_sum", "image_count"):
        torch.testing.assert_close(getattr(packed, name), torch.stack([getattr(each, name) for each in alone]).sum())
    for packed_gradient, gradient in zip(packed_gradients, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_documents_longer_than_a_row_are_left_out_and_counted(tmp_path):
    documents = prepared(tmp_path, longest=80)
    part = loader(documents, evaluation=True)
    assert part.num_too_long == (documents.lengths > LENGTH).sum() > 0
    assert sum(1 for batch in part for _ in contexts(batch)) == COUNT - part.num_too_long


def test_documents_that_fill_no_row_are_refused(documents):
    with pytest.raises(DataError, match="the 40 documents of .* fill no row of 8 ids"):
        loader(documents, sequence_length=8)
    with pytest.raises(DataError, match="fill no row of 100000 ids"):
        loader(documents, sequence_length=100000, packing="stream")


def test_wrong_settings_are_refused(documents):
    with pytest.raises(ConfigError, match="rank=2 of 2"):
        loader(documents, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="prepare the data with this model's tokenizers"):
        PackedLoader(documents, Vocabulary.build(300, 256, 4), CM3, sequence_length=LENGTH, rows=1)


def test_leaving_a_loop_early_leaves_no_thread(documents):
    import threading

    batches = iter(loader(documents))
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
