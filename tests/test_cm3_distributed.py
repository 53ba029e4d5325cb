"""Rank, world size and barrier, launched and not."""

import os
import subprocess
import sys

import pytest

from cm3 import distributed
from cm3.errors import ConfigError

TWO_PROCESSES = """
import sys
import torch.distributed as dist
from cm3 import distributed

assert distributed.world_size() == 2
before = distributed.rank(), distributed.local_rank()
store = dist.FileStore(sys.argv[1], 2)
dist.init_process_group("gloo", store=store, rank=before[0], world_size=2)
assert before == (distributed.rank(), distributed.local_rank())
assert distributed.world_size() == 2
assert distributed.is_main() == (distributed.rank() == 0)
distributed.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_without_launcher_is_alone():
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_main()
    distributed.barrier()


def test_the_launchers_environment_counts_before_the_group_exists(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (5, 8, 1)
    assert not distributed.is_main()
    with pytest.raises(AssertionError, match="before the process group"):
        distributed.barrier()


def test_a_broken_environment_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"):
        distributed.world_size()


def test_two_processes_agree(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "rendezvous")],
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
