"""Estimates and reports against hand-computed values."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from cm3.eval.document_tasks import word_f1
from cm3.eval.report import Estimate, TaskResult, average, mean, of_sums, proportion, ratio, share, write_report


def test_wilson_interval_of_nine_in_ten():
    estimate = proportion(9, 10)
    assert estimate.value == 0.9
    assert estimate.low == pytest.approx(0.5958, abs=1e-3)  # Wilson (1927): 9 of 10 at 95%
    assert estimate.high == pytest.approx(0.9821, abs=1e-3)


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.2775), (10, 0.7225, 1.0)])
def test_wilson_interval_stays_inside_zero_and_one(successes, low, high):
    estimate = proportion(successes, 10)
    assert estimate.low == pytest.approx(low, abs=1e-3) and estimate.high == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize("count", range(1, 60))
def test_wilson_interval_does_not_leave_them_by_rounding(count):
    assert proportion(0, count).low == 0 and proportion(count, count).high == 1


def test_nothing_counted_is_not_a_number():
    assert math.isnan(proportion(0, 0).value) and math.isnan(mean([]).value) and math.isnan(ratio([], []).value)


def test_mean_and_its_normal_interval():
    estimate = mean([1.0, 2.0, 3.0])
    assert estimate.value == 2.0
    assert estimate.high - 2.0 == pytest.approx(1.96 / math.sqrt(3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[3.0], [3.0, math.inf]])
def test_mean_of_one_or_of_infinite_values_has_no_interval(values, tmp_path):
    estimate = mean(values)
    assert estimate.value == max(values) and estimate.count == len(values) and not estimate.has_interval
    assert str(estimate) == f"{max(values):g} [no interval] (n={len(values)})"
    write_report(tmp_path, [TaskResult("task", {"clock": estimate})], {})
    assert f"| task | clock | {max(values):g} | none | {len(values)} |" in (tmp_path / "results.md").read_text()
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["results"][0]["metrics"]["clock"]["low"] is None


def test_average_of_independent_estimates_adds_their_distances_as_squares():
    estimate = average([Estimate(0.5, 0.2, 0.9, 10), Estimate(0.9, 0.5, 1.2, 30)])
    assert estimate.value == pytest.approx(0.7) and estimate.count == 40
    assert estimate.low == pytest.approx(0.7 - math.hypot(0.3, 0.4) / 2)
    assert estimate.high == pytest.approx(0.7 + math.hypot(0.4, 0.3) / 2)
    assert math.isnan(average([]).value)


def test_average_of_certain_shares_stays_inside_zero_and_one():
    certain = average([proportion(10, 10)] * 6)
    assert certain.high == 1 and 0.7 < certain.low < 1


def test_figures_of_sums_have_a_bootstrap_interval():
    rows = np.column_stack([np.arange(20.0), np.ones(20)])
    (figure,) = of_sums(rows, lambda sums: sums[..., :1] / sums[..., 1:])
    normal = mean(list(range(20)))
    assert figure.value == 9.5 and figure.count == 20
    assert figure.low == pytest.approx(normal.low, abs=0.4) and figure.high == pytest.approx(normal.high, abs=0.4)
    (empty,) = of_sums(np.zeros((0, 2)), lambda sums: sums[..., :1])
    assert math.isnan(empty.value) and empty.count == 0


def test_ratio_weighs_by_the_denominator():
    estimate = ratio([1, 0], [1, 3])
    assert estimate.value == 0.25
    assert 0 <= estimate.low <= 0.25 <= estimate.high <= 1


def test_word_f1_counts_repeats():
    assert word_f1("a red red star", "a red star") == pytest.approx(6 / 7)
    assert word_f1("", "") == 1.0 and word_f1("a", "b") == 0.0


def test_report_holds_numbers_and_protocol(tmp_path):
    result = TaskResult(
        "task",
        {"share": proportion(1, 2), "none": Estimate(math.nan, math.nan, math.nan, 0)},
        {"seed": 3, "scales": (1.0, math.nan)},
    )
    write_report(tmp_path, [result], {"model_hash": "abc"})
    values = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert values["model_hash"] == "abc" and values["results"][0]["protocol"] == {"seed": 3, "scales": [1.0, None]}
    assert values["results"][0]["metrics"]["none"]["value"] is None
    assert "| task | share | 0.5 |" in (tmp_path / "results.md").read_text()


def test_a_sheet_is_written_beside_the_figures_and_not_into_them(tmp_path):
    result = TaskResult("picture matching", {"share": proportion(1, 2)}, sheet=Image.new("RGB", (3, 2), "red"))
    write_report(tmp_path, [result, TaskResult("other", {})], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture_matching.png", "results.json", "results.md"]
    assert Image.open(tmp_path / "picture_matching.png").getpixel((0, 0)) == (255, 0, 0)
    assert set(json.loads((tmp_path / "results.json").read_text())["results"][0]) == {
        "task",
        "metrics",
        "protocol",
        "seconds",
    }


def test_share_leaves_out_what_is_not_stated():
    estimate = share([True, None, False, True])
    assert (estimate.value, estimate.count) == (2 / 3, 3)
