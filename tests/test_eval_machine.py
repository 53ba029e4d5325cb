"""What the system tells of the memory of a process, and what it leaves out."""

import math

import pytest
import torch

from cm3.eval import machine
from cm3.training.memory_use import MemoryUse

CPU = torch.device("cpu")


def test_memory_is_read_in_bytes(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    monkeypatch.setattr(machine, "_STATUS_FILE", status)
    assert machine.peak_memory(CPU) == 2 * 2**20 and machine.memory_in_use(CPU) == 2**20


@pytest.mark.parametrize("told", ["Name:\tpython\nVmRSS:\t    1024 kB\n", "VmHWM:\t    2048 kB\n", "", None])
def test_a_system_that_tells_only_a_part_stops_nothing(tmp_path, monkeypatch, told):
    if told is not None:
        (tmp_path / "status").write_text(told)
    monkeypatch.setattr(machine, "_STATUS_FILE", tmp_path / "status")
    found = {"VmHWM": machine.peak_memory(CPU), "VmRSS": machine.memory_in_use(CPU)}
    assert {name for name, value in found.items() if not math.isnan(value)} == {
        name for name in found if name in (told or "")
    }
    assert MemoryUse(CPU).measured() is None
