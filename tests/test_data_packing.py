"""Packing plans: whole documents into rows, streams cut into rows, and the order of an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.data.packing import (
    WINDOW_DOCUMENTS,
    DocumentPlan,
    Purpose,
    StreamPlan,
    best_fit,
    epoch_order,
    generator,
)


def order(count: int, seed: int = 0):
    return lambda epoch: epoch_order(np.arange(count), seed, epoch)


def no_spans(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.int64)


def poisson(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.poisson(1.0, size)


@given(st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_packs_every_item_once_and_no_bin_over_its_capacity(lengths):
    bins = best_fit(np.array(lengths, dtype=np.int64), 20)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    loads = sorted(sum(lengths[item] for item in items) for items in bins)
    assert all(load <= 20 for load in loads)
    assert len(loads) < 2 or loads[0] + loads[1] > 20  # no two bins could be one


def test_best_fit_by_example():
    assert best_fit(np.array([3, 7, 5, 2, 3]), 10) == [[1, 0], [2, 4, 3]]


def test_a_document_plan_packs_each_document_of_an_epoch_once():
    lengths = np.random.default_rng(0).integers(5, 60, 2 * WINDOW_DOCUMENTS + 100)
    plan = DocumentPlan(lengths, order(len(lengths)), poisson, ids_per_span=3, sequence_length=64, seed=0)
    rows = [row for window in range(3) for row in plan.rows(0, window)]
    pieces = [piece for row in rows for piece in row.pieces]
    assert plan.rows(0, 3) == []
    assert sorted(piece.document for piece in pieces) == list(range(len(lengths)))
    assert all((piece.start, piece.stop) == (0, lengths[piece.document]) for piece in pieces)
    assert max(sum(p.stop + 3 * p.num_spans for p in row.pieces) for row in rows) <= 64
    assert np.mean([piece.num_spans > 0 for piece in pieces]) == pytest.approx(0.63, abs=0.05)
    fill = sum(lengths) / (64 * len(rows))
    assert fill > 0.8  # spans take another 3 ids each


def test_rows_do_not_come_sorted_by_the_lengths_of_their_documents():
    lengths = np.random.default_rng(0).integers(5, 60, WINDOW_DOCUMENTS)
    plan = DocumentPlan(lengths, order(len(lengths)), no_spans, ids_per_span=3, sequence_length=64, seed=0)
    longest = [lengths[row.pieces[0].document] for row in plan.rows(0, 0)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


def test_a_document_as_long_as_a_row_is_left_unmasked():
    plan = DocumentPlan(
        np.array([64]),
        order(1),
        lambda rng, size: np.full(size, 2),
        ids_per_span=3,
        sequence_length=64,
        seed=0,
    )
    assert plan.rows(0, 0)[0].pieces[0].num_spans == 0


@pytest.mark.parametrize(("keep_rest", "num_rows"), [(False, 6), (True, 7)])
def test_a_stream_plan_covers_the_joined_documents(keep_rest, num_rows):
    lengths = np.array([10, 3, 25, 7, 12, 8])  # 65 ids
    plan = StreamPlan(lengths, order(6), sequence_length=10, keep_rest=keep_rest)
    rows = plan.rows(3, 0)
    joined = [(d, i) for d in order(6)(3) for i in range(lengths[d])]
    planned = [(p.document, i) for row in rows for p in row.pieces for i in range(p.start, p.stop)]
    assert len(rows) == num_rows
    assert planned == joined[: len(planned)]
    assert len(planned) == min(65, 10 * num_rows)
    assert [row.number for row in rows] == list(range(num_rows))
    assert plan.rows(3, 1) == []


def test_orders_and_plans_are_functions_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, 50)
    args = {"ids_per_span": 3, "sequence_length": 64}
    first = DocumentPlan(lengths, order(50), poisson, seed=0, **args)
    again = DocumentPlan(lengths, order(50), poisson, seed=0, **args)
    other = DocumentPlan(lengths, order(50, seed=1), poisson, seed=1, **args)
    again.rows(0, 0)
    assert first.rows(1, 0) == again.rows(1, 0)
    assert first.rows(0, 0) != first.rows(1, 0)
    assert first.rows(0, 0) != other.rows(0, 0)


def test_each_purpose_has_its_own_random_numbers():
    draws = {generator(0, purpose, 1, 2).random() for purpose in Purpose}
    assert len(draws) == len(Purpose)
