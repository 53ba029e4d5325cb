"""Mixtures: exact counts, clipped repetition, and an order that depends on (seed, epoch, place) alone."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.data.loader import PackedLoader
from cm3.data.mixture import Mixture, open_documents
from cm3.data.shards import ShardedDocuments, shard_path, write_index, write_shard
from cm3.errors import ConfigError, DataError
from cm3.model.objective import ObjectiveConfig, unmask
from cm3.tokenizers.document import TextTokens, TokenizedDocument
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(text_size=600, image_codes=16, num_sentinels=4)
SIZES = {"large": 40, "middle": 12, "small": 3}


def prepared(folder: Path, first: int, count: int, tokenizer_hash: str = "a" * 64, longest: int = 20) -> str:
    """A folder of `count` texts; the first piece of each, `first` and so on, names it."""
    rng = np.random.default_rng(first)
    documents = [
        TokenizedDocument((TextTokens(np.array([number, *rng.integers(4, 100, rng.integers(1, longest))], np.int32)),))
        for number in range(first, first + count)
    ]
    write_shard(shard_path(folder, 0), documents, {})
    VOCABULARY.save(folder / "vocabulary.json")
    write_index(folder, 1, tokenizer_hash)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("prepared")
    return {name: prepared(root / name, 100 * (i + 1), size) for i, (name, size) in enumerate(SIZES.items())}


@pytest.fixture(scope="module")
def mixture(folders) -> Mixture:
    opened = open_documents(folders, {"large": 1, "middle": 2, "small": 1})
    assert isinstance(opened, Mixture)
    return opened


def loader(documents, **changes) -> PackedLoader:
    options = {"sequence_length": 64, "rows": 8, "seed": 5, **changes}
    return PackedLoader(documents, VOCABULARY, options.pop("objective", ObjectiveConfig()), **options)


def take(batches, count):
    return list(itertools.islice(batches, count))


class Stored:
    """A source in memory, of which only the number of documents matters."""

    vocabulary, tokenizer_hash, folder = VOCABULARY, "a" * 64, Path(".")

    def __init__(self, size: int) -> None:
        self.lengths = np.arange(5, 5 + size, dtype=np.int32)
        self.num_moved_answers = np.full(size, -1)

    def __len__(self) -> int:
        return len(self.lengths)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(1, 4),
    st.integers(0, 3),
)
def test_counts_are_exact_and_documents_come_equally_often(sources, least, most, seed):
    mixture = Mixture(
        {str(i): Stored(size) for i, (size, _) in enumerate(sources)},
        {str(i): weight for i, (_, weight) in enumerate(sources)},
        min_repetition=least,
        max_repetition=most,
    )
    starts = np.cumsum([0, *(size for size, _ in sources)])
    total, seen = len(mixture), Counter()
    for epoch in range(5):
        members = mixture.members(np.arange(total), seed, epoch)
        assert len(set(members.tolist())) == len(members) and members.max() < len(mixture.lengths)
        drawn = np.histogram(members % total, starts)[0]
        assert drawn.tolist() == [count.drawn for count in mixture.counts()]
        seen.update((members % total).tolist())
    for count, start, stop in zip(mixture.counts(), starts[:-1], starts[1:], strict=True):
        times = [seen[document] for document in range(start, stop)]
        assert max(times) - min(times) <= 1
        expected = np.clip(count.wanted, least, most) * count.documents
        assert abs(count.drawn - max(1, expected)) <= 0.5 + 1e-9


def test_repetition_is_clipped_by_hand():
    few, many = Stored(10), Stored(1000)
    equal = Mixture({"few": few, "many": many}).counts()
    assert [(count.drawn, round(count.wanted, 3)) for count in equal] == [(30, 50.5), (505, 0.505)]
    skewed = Mixture({"few": few, "many": many}, {"few": 99, "many": 1}).counts()
    assert [count.drawn for count in skewed] == [30, 300]
    free = Mixture({"few": few, "many": many}, min_repetition=0, max_repetition=100).counts()
    assert [count.drawn for count in free] == [505, 505]
    by_size = Mixture({"few": few, "many": many}, {"few": 10, "many": 1000}).counts()
    assert [count.drawn for count in by_size] == [10, 1000]
    assert [count.ids for count in by_size] == [int(few.lengths.sum()), int(many.lengths.sum())]
    assert str(equal[0]) == (
        "few: 30 of an epoch's documents and 285 of its ids, each of 10 documents 3.00 times, 50.50 by weight"
    )
    assert str(by_size[1]).endswith("each of 1000 documents 1.00 times")


def names(batches) -> Counter:
    """How often each document stands in the batches, by its first piece."""
    found: Counter = Counter()
    for batch in batches:
        for ids_T, document_ids_T in zip(batch["ids_BT"].numpy(), batch["document_ids_BT"].numpy(), strict=True):
            for number in range(document_ids_T.max() + 1):
                found[int(unmask(ids_T[document_ids_T == number], VOCABULARY)[1])] += 1
    return found


def test_an_epoch_of_the_loader_has_the_counts_of_the_mixture(mixture):
    source = loader(mixture, rows=1)
    found: Counter = Counter()
    for batch in source:
        if source.state()["epoch"]:
            break
        found += names([batch])
    drawn = Counter({number // 100: 0 for number in (100, 200, 300)})
    for number, times in found.items():
        drawn[number // 100] += times
    # 55 documents in all: a quarter, a half, a quarter are 13.75, 27.5, 13.75, and 3 times the 3 small ones are 9
    assert [drawn[i] for i in (1, 2, 3)] == [14, 28, 9] == [count.drawn for count in mixture.counts(source.usable)]
    assert set(found.values()) <= {1, 2, 3}
    assert all(found[number] == 3 for number in (300, 301, 302))


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_the_rows_are_the_same_for_any_number_of_processes(mixture, packing):
    one = take(loader(mixture, packing=packing), 6)
    for world_size in (2, 4, 8):
        parts = [
            take(loader(mixture, rows=8 // world_size, rank=rank, world_size=world_size, packing=packing), 6)
            for rank in range(world_size)
        ]
        for whole, *shares in zip(one, *parts, strict=True):
            for name in whole:
                assert torch.equal(whole[name], torch.cat([share[name] for share in shares]))


@settings(max_examples=10)
@given(st.integers(0, 30), st.sampled_from([1, 2, 4]), st.sampled_from(["documents", "stream"]))
def test_resuming_is_exact_at_any_place_and_on_other_processes(mixture, done, world_size, packing):
    straight = loader(mixture, rows=4, packing=packing)
    take(straight, done)
    state = straight.state()
    assert set(state) == {"epoch", "window", "row"} and all(type(value) is int for value in state.values())
    expected = torch.cat([batch["ids_BT"] for batch in take(straight, 2)])
    parts = []
    for rank in range(world_size):
        part = loader(mixture, rows=4 // world_size, rank=rank, world_size=world_size, packing=packing)
        part.load_state(state)
        parts.append(torch.stack([batch["ids_BT"] for batch in take(part, 2)]))
    assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), expected)


def test_the_seed_decides_what_an_epoch_shows(mixture):
    every = np.arange(len(mixture))
    first = mixture.members(every, 0, 0)
    assert np.array_equal(first, mixture.members(every, 0, 0))
    assert set(first) != set(mixture.members(every, 1, 0)) != set(mixture.members(every, 0, 1))


def test_copies_in_one_epoch_are_masked_differently(folders):
    documents = Mixture({"small": ShardedDocuments(folders["small"])}, min_repetition=3)
    masks: dict[int, set[bytes]] = {}
    batches = take(loader(documents, rows=1, objective=ObjectiveConfig(min_spans=1, rotation_probability=0.0)), 2)
    for batch in batches:
        for number in range(int(batch["document_ids_BT"].max()) + 1):
            ids_T = batch["ids_BT"][batch["document_ids_BT"] == number].numpy()
            masks.setdefault(int(unmask(ids_T, VOCABULARY)[1]), set()).add(ids_T.tobytes())
    assert max(len(different) for different in masks.values()) > 1


def test_documents_and_their_copies_are_those_of_the_sources(mixture, folders):
    middle = ShardedDocuments(folders["middle"])
    for index in (SIZES["large"] + 5, len(mixture) + SIZES["large"] + 5):
        assert mixture[index].segments == middle[5].segments
        assert mixture[index].metadata["source"] == "middle"
        assert np.array_equal(mixture.ids(index), middle.ids(5))
        assert mixture.lengths[index] == len(middle.ids(5))
    assert mixture.num_retrieved_ids(0) == 0
    assert (len(mixture), str(mixture)) == (55, "the mixture of large, middle, small")
    with pytest.raises(IndexError, match="has 55 and their copies"):
        mixture[len(mixture.lengths)]


def test_an_evaluation_of_a_mixture_shows_every_document_once(mixture):
    assert names(loader(mixture, rows=2, evaluation=True)) == Counter(
        number for i, size in enumerate(SIZES.values()) for number in range(100 * (i + 1), 100 * (i + 1) + size)
    )


def test_documents_too_long_for_a_row_count_for_nothing(folders, tmp_path):
    long = ShardedDocuments(prepared(tmp_path / "long", 400, 30, longest=120))
    documents = Mixture({"large": ShardedDocuments(folders["large"]), "long": long})
    source = loader(documents)
    usable = int((long.lengths <= 64).sum())
    assert source.num_too_long == 30 - usable > 0
    assert [count.documents for count in documents.counts(source.usable)] == [40, usable]
    assert documents.lengths[documents.members(source.usable, 0, 0)].max() <= 64
    with pytest.raises(DataError, match="none of the 40 documents of large .* fits into a row .the shortest has"):
        documents.counts(np.flatnonzero(np.arange(len(documents)) >= 40))


def test_one_folder_opens_as_itself(folders):
    assert isinstance(open_documents(folders["small"]), ShardedDocuments)
    with pytest.raises(ConfigError, match="weights were given for a, but the data are the one folder"):
        open_documents(folders["small"], {"a": 1.0})


def test_what_cannot_be_mixed_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="a mixture of no sources"):
        open_documents({})
    with pytest.raises(ConfigError, match="has weights for other, its sources are large, middle, small; give each"):
        open_documents(folders, {"other": 1.0})
    with pytest.raises(ConfigError, match="the weight of small is 0; choose a number above 0"):
        open_documents(folders, {"large": 1, "middle": 1, "small": 0})
    with pytest.raises(ConfigError, match="min_repetition=4, max_repetition=3.0; choose 0 <= min <= max"):
        open_documents(folders, min_repetition=4)
    other = prepared(tmp_path / "other", 500, 3, tokenizer_hash="b" * 64)
    with pytest.raises(ConfigError, match="large was prepared with the tokenizers aaaaaaaaaaaa, other with bbbbbbbb"):
        open_documents({"large": folders["large"], "other": other})
