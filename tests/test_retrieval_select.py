"""The rules of selection, each as a property, and that no copy of the query passes."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cm3.errors import ConfigError
from cm3.retrieval.select import (
    Candidate,
    Item,
    SelectionConfig,
    admissible,
    best,
    diverse,
    draw,
    draw_count,
    drop_words,
    pool,
    similarity,
)

LIMIT = 0.9


def unit(rng, width=3):
    vector_E = rng.normal(size=width).astype(np.float32)
    return vector_E / np.linalg.norm(vector_E)


def vector_or_none(rng):
    return unit(rng) if rng.random() < 0.8 else None


def random_candidates(rng, count):
    """Candidates of three numbers, so that many are near each other, best first."""
    scores = np.sort(rng.uniform(-1, 1, count))[::-1]
    return [
        Candidate(vector_or_none(rng), vector_or_none(rng), f"row {rng.integers(count)}", row=row, score=float(score))
        for row, score in enumerate(scores)
    ]


def along(angle):
    """A unit vector whose cosine with `along(0)` is that of the angle."""
    return np.array([np.cos(angle), np.sin(angle)], dtype=np.float32)


def test_similarity_is_that_of_the_nearer_modality():
    first = Item(along(0.0), along(0.0))
    assert similarity(first, Item(along(1.0), along(0.1))) == pytest.approx(np.cos(0.1))
    assert similarity(first, Item(along(0.1), None)) == pytest.approx(np.cos(0.1))
    assert similarity(Item(along(0.0), None), Item(None, along(0.0))) == -1.0


@given(st.integers(0, 10_000))
def test_what_is_admissible_is_no_copy_of_the_query_and_nothing_else_is_left_out(seed):
    rng = np.random.default_rng(seed)
    candidates = random_candidates(rng, 30)
    query = Item(vector_or_none(rng), vector_or_none(rng), "row 3")
    kept = list(admissible(query, candidates, LIMIT))
    assert [candidate.row for candidate in kept] == sorted(candidate.row for candidate in kept)
    for candidate in candidates:
        is_copy = candidate.name == "row 3" or candidate.score > LIMIT or similarity(query, candidate) > LIMIT
        assert (candidate in kept) != is_copy


def test_the_limit_itself_passes_and_holds_for_score_and_for_each_modality():
    query = Item(along(0.0), along(0.0))
    far = along(2.0)
    for text_E, image_E, score, passes in [
        (far, far, LIMIT, True),
        (far, far, LIMIT + 1e-6, False),
        (along(0.2), far, 0.5, False),  # a copy of the text, whose picture lowers the mixed score
        (far, along(0.2), 0.5, False),
        (along(0.6), along(0.6), 0.5, True),
    ]:
        assert bool(list(admissible(query, [Candidate(text_E, image_E, row=0, score=score)], LIMIT))) == passes


@given(st.integers(0, 10_000), st.integers(0, 6))
def test_chosen_documents_are_no_copies_of_each_other(seed, count):
    rng = np.random.default_rng(seed)
    candidates = random_candidates(rng, 30)
    chosen = diverse(candidates[20:], [], 2, LIMIT)
    kept = diverse(candidates, chosen, count, LIMIT)
    assert len(kept) <= count
    together = [*chosen, *kept]
    for place, first in enumerate(together):
        for second in together[place + 1 :]:
            assert first.row != second.row and first.name != second.name and similarity(first, second) <= LIMIT
    full_at = kept[-1].row if kept else 0
    passed_over = candidates[:full_at] if len(kept) == count else candidates
    for candidate in passed_over:  # greedy: whoever was passed over is a copy of somebody
        assert any(
            candidate.row == other.row or candidate.name == other.name or similarity(candidate, other) > LIMIT
            for other in together
        )


@given(st.integers(0, 10_000))
def test_a_pool_has_two_for_each_modality_and_only_permitted_ones(seed):
    rng = np.random.default_rng(seed)
    candidates = random_candidates(rng, 60)
    query = Item(unit(rng), unit(rng), "row 1")
    config = SelectionConfig(num_documents=3)
    ranked = {"image": iter(candidates[::2]), "text": iter(candidates[1::2])}
    pooled = pool(query, ranked, config)
    assert list(pooled) == ["image", "text"] and all(len(kept) <= 2 for kept in pooled.values())
    together = [candidate for kept in pooled.values() for candidate in kept]
    assert together == diverse(together, [], 4, LIMIT)
    assert together == list(admissible(query, together, LIMIT))


def test_one_document_found_by_both_modalities_counts_once():
    shared = Candidate(along(1.0), None, row=5, score=0.5)
    other = Candidate(None, along(1.0), row=6, score=0.4)
    query = Item(along(0.0), along(3.0))
    config = SelectionConfig(per_modality=1, num_documents=2)
    pooled = pool(query, {"image": [shared], "text": [shared, other]}, config)
    assert pooled == {"image": [shared], "text": [other]}


@pytest.mark.parametrize(("distribution", "expected"), [("fixed", {2}), ("uniform", {0, 1, 2})])
def test_the_number_of_documents(distribution, expected):
    config = SelectionConfig(num_documents=2, distribution=distribution)
    counts = [draw_count(config, np.random.default_rng(seed)) for seed in range(600)]
    assert set(counts) == expected
    shares = [counts.count(count) / len(counts) for count in expected]
    assert all(abs(share - 1 / len(expected)) < 0.08 for share in shares)


def test_training_draws_evenly_and_generation_takes_the_best():
    candidates = [Candidate(None, None, row=row, score=1 - row / 10) for row in range(4)]
    pooled = {"image": candidates[2:], "text": candidates[:2]}
    config = SelectionConfig(num_documents=3)
    assert [candidate.row for candidate in best(pooled, config)] == [0, 1, 2]
    draws = [tuple(c.row for c in draw(pooled, config, np.random.default_rng(seed))) for seed in range(800)]
    assert all(len(set(drawn)) == 3 for drawn in draws)
    firsts = [drawn[0] for drawn in draws]
    assert all(abs(firsts.count(row) / len(firsts) - 0.25) < 0.07 for row in range(4))
    assert draws[3] == tuple(c.row for c in draw(pooled, config, np.random.default_rng(3)))


WORDS = st.lists(st.text("abc", min_size=1, max_size=3), max_size=12)


@given(WORDS, st.floats(0, 0.99), st.integers(0, 1000))
def test_dropping_words_keeps_order_and_one_word(words, rate, seed):
    kept = drop_words(" ".join(words), rate, np.random.default_rng(seed)).split()
    rest = iter(words)
    assert all(word in rest for word in kept)  # a subsequence
    assert bool(kept) == bool(words)
    assert len(words) - len(kept) <= int(rate * len(words)) + 1
    assert rate or kept == words


def test_a_fifth_of_the_words_is_dropped_and_each_as_often():
    words = [f"w{number}" for number in range(7)]
    kept = [drop_words(" ".join(words), 0.2, np.random.default_rng(seed)).split() for seed in range(1500)]
    for word in words:
        assert abs(sum(word in text for text in kept) / len(kept) - 0.8) < 0.04


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_documents": -1}, "num_documents=-1"),
        ({"num_documents": 5}, "raise per_modality"),
        ({"per_modality": 0}, "per_modality=0"),
        ({"query_dropout": 1.0}, "query_dropout=1.0"),
    ],
)
def test_impossible_rules_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**change)
