"""Estimates and reports against hand-computed values."""

import json
import math

import pytest

from cm3.eval.document_tasks import word_f1
from cm3.eval.report import Estimate, TaskResult, mean, proportion, ratio, share, write_report


def test_wilson_interval_of_nine_in_ten():
    estimate = proportion(9, 10)
    assert estimate.value == 0.9
    assert estimate.low == pytest.approx(0.5958, abs=1e-3)  # Wilson (1927): 9 of 10 at 95%
    assert estimate.high == pytest.approx(0.9821, abs=1e-3)


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.2775), (10, 0.7225, 1.0)])
def test_wilson_interval_stays_inside_zero_and_one(successes, low, high):
    estimate = proportion(successes, 10)
    assert estimate.low == pytest.approx(low, abs=1e-3) and estimate.high == pytest.approx(high, abs=1e-3)


def test_nothing_counted_is_not_a_number():
    assert math.isnan(proportion(0, 0).value) and math.isnan(mean([]).value) and math.isnan(ratio([], []).value)


def test_mean_and_its_normal_interval():
    estimate = mean([1.0, 2.0, 3.0])
    assert estimate.value == 2.0
    assert estimate.high - 2.0 == pytest.approx(1.96 / math.sqrt(3))


def test_ratio_weighs_by_the_denominator():
    estimate = ratio([1, 0], [1, 3])
    assert estimate.value == 0.25
    assert 0 <= estimate.low <= 0.25 <= estimate.high <= 1


def test_word_f1_counts_repeats():
    assert word_f1("a red red star", "a red star") == pytest.approx(6 / 7)
    assert word_f1("", "") == 1.0 and word_f1("a", "b") == 0.0


def test_report_holds_numbers_and_protocol(tmp_path):
    result = TaskResult(
        "task", {"share": proportion(1, 2), "none": Estimate(math.nan, math.nan, math.nan, 0)}, {"seed": 3}
    )
    write_report(tmp_path, [result], {"model_hash": "abc"})
    values = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert values["model_hash"] == "abc" and values["results"][0]["protocol"] == {"seed": 3}
    assert values["results"][0]["metrics"]["none"]["value"] is None
    assert "| task | share | 0.5 |" in (tmp_path / "results.md").read_text()


def test_share_leaves_out_what_is_not_stated():
    estimate = share([True, None, False, True])
    assert (estimate.value, estimate.count) == (2 / 3, 3)
