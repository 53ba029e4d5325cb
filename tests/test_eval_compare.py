"""`cm3 compare`: runs of a group together, groups side by side."""

import json

import pytest

from cm3.cli import main
from cm3.eval.compare import compare, over_runs
from cm3.eval.report import Estimate, TaskResult, write_report


def write(folder, value, metric="loss"):
    write_report(folder, [TaskResult("task", {metric: Estimate(value, value, value, 7)})], {})
    return folder


def test_the_interval_is_students():
    estimate = over_runs([1.0, 2.0, 3.0])
    assert (estimate.value, estimate.count) == (2.0, 3)
    assert estimate.high - 2.0 == pytest.approx(4.303 / 3**0.5, rel=1e-4)  # 0.975 quantile of t(2), deviation 1


def test_one_run_has_no_interval(tmp_path):
    table = compare({"one": [write(tmp_path / "a", 1.5)]})
    assert "| task | loss | 1.5 |" in table


def test_groups_stand_side_by_side(tmp_path, capsys):
    folders = [str(write(tmp_path / str(n), n)) for n in (1.0, 2.0, 3.0)]
    other = str(write(tmp_path / "other", 9.0, "other metric"))
    assert main(["compare", "--group", "seeds", *folders, "--group", "else", other]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| task | metric | seeds (3 runs) | else (1 run) |"
    assert lines[2].startswith("| task | loss | 2 (") and lines[2].endswith("|  |")
    assert lines[3] == "| task | other metric |  | 9 |"


def test_a_metric_without_a_value_is_no_number(tmp_path):
    folder = write(tmp_path / "a", float("nan"))
    assert json.loads((folder / "results.json").read_text())["results"][0]["metrics"]["loss"]["value"] is None
    assert "| task | loss | nan |" in compare({"one": [folder]})


def test_errors_say_what_to_do(tmp_path, capsys):
    first, second = str(write(tmp_path / "a", 1.0)), str(write(tmp_path / "b", 1.0, "else"))
    assert main(["compare", "--group", "mine", first, second]) == 2
    assert "the runs of mine were not measured by the same tasks" in capsys.readouterr().err
    assert main(["compare", "--group", "mine"]) == 2
    assert "--group mine names no folder" in capsys.readouterr().err
    assert main(["compare", "--group", "mine", str(tmp_path / "none")]) == 2
    assert "results.json" in capsys.readouterr().err
