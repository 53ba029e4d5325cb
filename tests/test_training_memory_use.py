"""The memory of a run: the estimate that is printed before it, and the peak after it."""

import re

import pytest
import torch
from tiny_run import tiny_run

from cm3.training.memory_use import MemoryUse
from cm3.training.show import amount, memory

MIB = 2**20


def test_the_estimate_is_that_of_show(tmp_path):
    config = tiny_run(tmp_path, tmp_path)
    parts = memory(config, 2)
    line = MemoryUse(torch.device("cpu")).expected(config, 2)
    assert f"about {amount(parts.total)} a process" in line and f"optimizer {amount(parts.optimizer)}" in line


def test_the_peak_counts_what_came_after_and_is_gone_again():
    before = torch.ones(32 * MIB // 4)
    use = MemoryUse(torch.device("cpu"))
    first = use.measured()
    if first is None:
        pytest.skip("the system does not tell how much memory a process uses")
    torch.ones(96 * MIB // 4).sum()
    found = re.fullmatch(r"memory: at most ([\d.]+) MiB used beyond the .* of the program itself", use.measured())
    assert found and 90 < float(found[1]) < 150
    assert len(before) == 8 * MIB
