"""The table of `cm3 show`: what a process needs by ZeRO stage and number of processes."""

from pathlib import Path

import pytest
from tiny_run import tiny_run

from cm3.config import load_config
from cm3.model.config import parameter_count
from cm3.training.config import ModelRun
from cm3.training.memory_table import PROCESSES, memory_table
from cm3.training.show import activation_bytes
from cm3.training.stages import show

PRETRAIN = Path(__file__).parents[1] / "configs" / "pretrain"


def cells(table, unit="GiB"):
    """Stage -> what stands in its line."""
    header, *lines = table.splitlines()
    assert header.split() == f"{unit} of a process 1 GPU 8 GPUs 64 GPUs 512 GPUs".split()
    rows = [line.split() for line in lines[:4]]
    why = "  -: the stage does not go with other settings, or the rows of a step do not split evenly"
    assert lines[4:] == [why] * any("-" in row for row in rows)
    assert [row[:3] for row in rows] == [["ZeRO", "stage", str(stage)] for stage in range(4)]
    return {stage: row[3:] for stage, row in enumerate(rows)}


@pytest.mark.parametrize("size", ["350m", "760m", "7b"])
def test_the_table_is_that_of_the_zero_paper_plus_activations(size):
    config = load_config(ModelRun, PRETRAIN / f"cm3leon_{size}.yaml")
    found = cells(memory_table(config))
    parameters, activations = parameter_count(config.model), activation_bytes(config)
    for stage, bytes_of in {1: lambda n: 4 + 12 / n, 2: lambda n: 2 + 14 / n, 3: lambda n: 16 / n}.items():
        expected = [f"{(parameters * bytes_of(n) + activations) / 2**30:.1f}" for n in PROCESSES]
        most = config.batch_rows // config.micro_batch_rows
        assert found[stage] == [cell if n <= most else "-" for n, cell in zip(PROCESSES, expected)]
    assert found[0] == ["-"] * 4  # bf16 needs stage 1


def test_what_a_run_cannot_do_has_no_figure(tmp_path):
    averaged = cells(memory_table(tiny_run(tmp_path, tmp_path, precision="fp32", ema_decay=0.9)), "KiB")
    for stage in (0, 1, 2):
        assert averaged[stage][0] != "-" and averaged[stage][1:] == ["-"] * 3  # 4 rows a step are 2 processes' work
    assert averaged[3] == ["-"] * 4


def test_a_small_model_has_figures_in_a_small_unit():
    config = load_config(ModelRun, PRETRAIN.parent / "demo" / "model.yaml")
    parameters, activations = parameter_count(config.model), activation_bytes(config)
    assert cells(memory_table(config), "MiB")[1][0] == f"{(16 * parameters + activations) / 2**20:.1f}"


def test_show_prints_it_after_the_run_itself():
    path = PRETRAIN / "cm3leon_7b.yaml"
    report = show(str(path))
    assert report.endswith("\n\n" + memory_table(load_config(ModelRun, path)))
    assert "memory, a process" in report
