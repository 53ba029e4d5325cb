"""Guidance by picture and text, and CD-K: by hand, at the edges, and for any logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.generation.guidance import classifier_free, contrastive, image_text

INF = float("inf")
VALUES = st.floats(-20, 20, width=32)
TWO_ROWS = st.integers(1, 10).flatmap(
    lambda size: st.tuples(*[st.lists(VALUES, min_size=size, max_size=size) for _ in range(3)])
)


def contrast(expert, amateur, alpha=0.5, k=1, amateur_temperature=1.0):
    """The scores of one row."""
    column = torch.tensor([alpha]), torch.tensor([k]), torch.tensor([amateur_temperature])
    return contrastive(torch.tensor([expert]), torch.tensor([amateur]), *column)[0]


def plausible(scores):
    return [index for index, score in enumerate(scores.tolist()) if score > -INF]


def logs(*shares):
    return [math.log(share) if share else -INF for share in shares]


def test_guidance_by_picture_and_text_by_hand():
    none, image, full = (torch.tensor([row] * 2) for row in ([0.0, 1.0], [1.0, 3.0], [3.0, 2.0]))
    found = image_text(none, image, full, torch.tensor([1.5, 0.0]), torch.tensor([2.0, 1.0]))
    assert found.tolist() == [[0 + 1.5 * 1 + 2 * 2, 1 + 1.5 * 2 + 2 * -1], [0 + 2, 1 - 1]]


@settings(max_examples=20)
@given(TWO_ROWS, st.floats(0, 8, width=32))
def test_picture_and_text_guidance_holds_the_two_stream_forms(rows, scale):
    none, image, full = (torch.tensor([row] * 3) for row in rows)
    found = image_text(none, image, full, torch.tensor([1.0, 1.0, scale]), torch.tensor([1.0, scale, scale]))
    assert torch.equal(found[0], full[0])
    scale_1 = torch.tensor([scale])
    torch.testing.assert_close(found[1:2], classifier_free(full[:1], image[:1], scale_1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2:], classifier_free(full[:1], none[:1], scale_1), rtol=1e-4, atol=1e-4)


def test_contrast_by_hand():
    """p_E 0.5 0.3 0.15 0.05; alpha 0.5 leaves two ids by the 1st of them (from 0.25), three by the 2nd (0.15)."""
    expert, amateur = logs(0.5, 0.31, 0.16, 0.03), logs(0.6, 0.1, 0.1, 0.2)
    one, two = contrast(expert, amateur, k=1), contrast(expert, amateur, k=2)
    assert plausible(one) == [0, 1] and plausible(two) == [0, 1, 2]
    assert two[:3].tolist() == pytest.approx(logs(0.5 / 0.6, 3.1, 1.6), abs=1e-5)
    assert one[:2].tolist() == two[:2].tolist()
    assert plausible(contrast(expert, amateur, alpha=0.01, k=1)) == [0, 1, 2, 3]


def test_the_amateurs_temperature_flattens_it():
    expert, amateur = logs(0.5, 0.5), logs(0.8, 0.2)
    shares = [0.8**0.5, 0.2**0.5]
    found = contrast(expert, amateur, amateur_temperature=2.0)
    assert found.tolist() == pytest.approx([math.log(0.5 * sum(shares) / share) for share in shares], abs=1e-5)


def test_k_1_and_alpha_1_leave_the_likeliest_id_and_its_ties():
    assert plausible(contrast([1.0, 4.0, 2.0], [9.0, 9.0, 0.0], alpha=1.0, k=1)) == [1]
    assert plausible(contrast([4.0, 4.0, 2.0], [9.0, 0.0, 0.0], alpha=1.0, k=1)) == [0, 1]


def test_ids_tied_with_the_kth_all_stay():
    assert plausible(contrast([3.0, 2.0, 2.0, 2.0, 1.0], [0.0] * 5, alpha=1.0, k=2)) == [0, 1, 2, 3]


def test_excluded_ids_stay_excluded_and_count_for_nothing():
    expert, amateur = [-INF, 2.0, -INF, 1.0], [5.0, 1.0, 7.0, 1.0]
    found = contrast(expert, amateur, alpha=1.0, k=8)  # fewer than k: compared with the least likely
    assert plausible(found) == [1, 3]
    assert found[[1, 3]].tolist() == contrast([2.0, 1.0], [1.0, 1.0], alpha=1.0, k=2).tolist()
    assert plausible(contrast([-INF, -INF], [0.0, 0.0])) == []


def test_scores_are_finite_where_the_amateurs_probability_underflows():
    found = contrast([5.0, 5.0, 4.0], [0.0, -900.0, -INF], k=3)
    assert found.isfinite().all()
    assert found[1] - found[0] == pytest.approx(900.0)
    assert found[2] > found[1]


@settings(max_examples=30)
@given(TWO_ROWS, st.floats(0.01, 1), st.integers(1, 12))
def test_the_plausible_set_is_as_defined_and_holds_the_likeliest(rows, alpha, k):
    expert, amateur, _ = rows
    found = plausible(contrast(expert, amateur, alpha=alpha, k=k))
    threshold = math.log(alpha) + sorted(expert, reverse=True)[min(k, len(expert)) - 1]
    assert max(range(len(expert)), key=expert.__getitem__) in found
    assert found == [i for i, value in enumerate(expert) if value >= threshold] or any(
        abs(value - threshold) < 1e-5 for value in expert
    )


@settings(max_examples=20)
@given(TWO_ROWS, VALUES, VALUES)
def test_shifting_the_logits_of_either_changes_nothing(rows, shift, other_shift):
    expert, amateur, _ = rows
    found = contrast(expert, amateur, alpha=0.01, k=4)
    shifted = contrast([x + shift for x in expert], [x + other_shift for x in amateur], alpha=0.0099, k=4)
    inside = plausible(found)
    torch.testing.assert_close(found[inside], shifted[inside], rtol=1e-4, atol=1e-4)


def test_every_row_has_its_own_rule():
    expert, amateur = [3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]
    rules = [(0.5, 1, 1.0), (1.0, 3, 0.5), (0.2, 2, 2.0)]
    columns = [torch.tensor(values) for values in zip(*rules)]
    together = contrastive(torch.tensor([expert] * 3), torch.tensor([amateur] * 3), *columns)
    for row, rule in zip(together, rules):
        assert torch.equal(row, contrast(expert, amateur, *rule))
