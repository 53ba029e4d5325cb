"""`cm3 show`: the numbers of a run from its configuration."""

import pytest
from tiny_run import tiny_run

from cm3.model.config import named_size
from cm3.training.config import DataConfig
from cm3.training.show import activation_bytes, amount, memory, show_model_run, total_flops


def run_7b(tmp_path, **changes):
    size = named_size("7b")
    data = DataConfig(train="data", sequence_length=4096)
    return tiny_run(tmp_path, tmp_path, model=size, data=data, batch_rows=2048, ema_decay=0.0, **changes)


@pytest.mark.parametrize(("stage", "gib"), [(1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, 16 / 8)])
def test_zero_shares_out_memory(tmp_path, stage, gib):
    """ZeRO paper, figure 1: bytes per parameter."""
    parts = memory(run_7b(tmp_path, zero_stage=stage), num_processes=8)
    parameters = 6.73e9
    assert parts.total - parts.activations == pytest.approx(gib * parameters, rel=0.01)


def test_checkpointing_keeps_the_input_of_a_layer_only(tmp_path):
    plain, saved = (activation_bytes(run_7b(tmp_path, activation_checkpointing=on)) for on in (False, True))
    assert plain / saved == pytest.approx(8 + 2 * 4)
    assert saved == 2 * 4096 * 4096 * 32 * 2


def test_processes_that_share_rows_share_the_activations(tmp_path):
    alone, shared = (activation_bytes(run_7b(tmp_path, sequence_parallel=size)) for size in (1, 8))
    assert shared == alone / 8
    report = show_model_run(run_7b(tmp_path, sequence_parallel=8), num_processes=32)
    assert "256 of 2 rows in each of 4 groups of 8 processes, 512 tokens of a row in each process" in report
    assert "1024 of 2 rows in each of 1 groups of 8 processes" in show_model_run(run_7b(tmp_path, sequence_parallel=8))


def test_flops_are_about_six_per_parameter_and_token(tmp_path):
    config = run_7b(tmp_path, steps=286_000)
    assert total_flops(config) == pytest.approx(9.7e22, rel=0.15)


def test_the_report_names_everything(tmp_path):
    report = show_model_run(tiny_run("data", "run"), num_processes=2)
    for part in ("sequence_length: 32", "parameters ", "tokens per step     128 = 4 rows of 32", "FLOPs of the run",
                 "1 of 2 rows in each of 2 processes", "KiB at ZeRO stage 1"):  # fmt: skip
        assert part in report


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0.0 KiB"),
        (512, "0.5 KiB"),
        (12_471_000, "11.9 MiB"),
        (2**20 - 1, "1024.0 KiB"),
        (2**20, "1.0 MiB"),
        (108_700_000_000, "101.2 GiB"),
    ],
)
def test_amounts_have_the_largest_unit_of_which_there_is_one(num_bytes, text):
    assert amount(num_bytes) == text


def test_a_small_model_is_not_said_to_need_nothing(tmp_path):
    report = show_model_run(tiny_run("data", "run"))
    assert "GiB" not in report and " 0.0 " not in report
