"""Temperature, top-k, top-p, repetition penalty and guidance: by hand, and for any logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.errors import RequestError
from cm3.generation.guidance import classifier_free
from cm3.generation.logits import repetition_penalty, temperature, top_k, top_p
from cm3.generation.settings import SamplingSettings

INF = float("inf")
ROWS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def kept(logits):
    return [[index for index, value in enumerate(row) if value > -INF] for row in logits.tolist()]


def test_temperature_by_hand():
    logits = torch.tensor([[1.0, 3.0, -INF], [1.0, 3.0, -INF], [2.0, 5.0, 5.0]])
    expected = [[2.0, 6.0, -INF], [1.0, 3.0, -INF], [-INF, 0.0, 0.0]]
    assert temperature(logits, torch.tensor([0.5, 1.0, 0.0])).tolist() == expected


def test_top_k_by_hand():
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]] * 3 + [[2.0, 5.0, 2.0, 1.0]])
    assert kept(top_k(logits, torch.tensor([1, 0, 9, 2]))) == [[1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2]]


def test_top_p_by_hand():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().expand(5, 4)
    found = kept(top_p(logits, torch.tensor([0.45, 0.6, 0.8, 0.95, 1.0])))
    assert found == [[1], [1, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_top_p_takes_the_lower_of_equally_likely_ids():
    assert kept(top_p(torch.zeros(2, 4), torch.tensor([0.5, 0.51]))) == [[0, 1], [0, 1, 2]]


def test_top_p_never_brings_back_an_excluded_id():
    logits = torch.tensor([[0.0, -INF, 0.0]])
    assert kept(top_p(logits, torch.tensor([0.999]))) == [[0, 2]]


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]] * 2)
    seen = torch.tensor([[True, True, False, False]] * 2)
    found = repetition_penalty(logits, seen, torch.tensor([2.0, 1.0])).tolist()
    assert found == [[1.0, -4.0, 2.0, -2.0], [2.0, -2.0, 2.0, -2.0]]


@settings(max_examples=20)
@given(ROWS, st.floats(0.01, 1.0))
def test_top_p_is_the_smallest_sufficient_set(row, p):
    logits = torch.tensor([row])
    probabilities = logits.softmax(1)[0].double()
    inside = top_p(logits, torch.tensor([p]))[0] > -INF
    total = probabilities[inside].sum().item()
    assert total >= p - 1e-5
    assert p == 1 or total - probabilities[inside].min().item() < p + 1e-5
    if not inside.all():
        assert probabilities[inside].min() >= probabilities[~inside].max()


@settings(max_examples=20)
@given(ROWS, st.integers(0, 15))
def test_top_k_keeps_the_k_highest_and_their_ties(row, k):
    found = kept(top_k(torch.tensor([row]), torch.tensor([k])))[0]
    threshold = sorted(row, reverse=True)[min(k or len(row), len(row)) - 1]
    assert found == [index for index, value in enumerate(row) if value >= threshold]


@settings(max_examples=20)
@given(ROWS, ROWS)
def test_settings_that_are_off_change_nothing_beside_rows_that_use_them(row, other):
    size = min(len(row), len(other))
    logits = torch.tensor([row[:size], other[:size]])
    off, on = 0, 1
    changed = [
        temperature(logits, torch.tensor([1.0, 0.3])),
        top_k(logits, torch.tensor([0, 1])),
        top_p(logits, torch.tensor([1.0, 0.3])),
        repetition_penalty(logits, torch.ones(2, size, dtype=torch.bool), torch.tensor([1.0, 1.7])),
        classifier_free(logits, -logits, torch.tensor([1.0, 3.0])),
    ]
    for found in changed:
        assert torch.equal(found[off], logits[off])
    assert kept(changed[1])[on] == [i for i in range(size) if other[i] == max(other[:size])]


def test_guidance_by_hand():
    conditional, unconditional = torch.tensor([[1.0, 2.0]] * 3), torch.tensor([[0.0, 4.0]] * 3)
    found = classifier_free(conditional, unconditional, torch.tensor([0.0, 1.0, 3.0]))
    assert found.tolist() == [[0.0, 4.0], [1.0, 2.0], [3.0, -2.0]]


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}]
    + [{"guidance_scale": -1.0}, {"temperature": INF}, {"temperature": float("nan")}],
)
def test_settings_out_of_range_are_refused(setting):
    (name,) = setting
    with pytest.raises(RequestError, match=f"{name}=.*choose"):
        SamplingSettings(**setting)
