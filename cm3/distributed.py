"""Which process this is, among how many; answers hold with and without a process group.

Before a process group exists the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, as set by torchrun
and by DeepSpeed) is the source; a process started without a launcher is rank 0 of 1.
"""

import os

import torch.distributed as dist

from cm3.errors import ConfigError


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _environment_int(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r} in the environment is not a count; unset it or use a launcher")
    return int(value)


def rank() -> int:
    """Index of this process among all, from 0."""
    return dist.get_rank() if _has_group() else _environment_int("RANK", 0)


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if _has_group() else _environment_int("WORLD_SIZE", 1)


def local_rank() -> int:
    """Index of this process on its machine, from 0; it selects the GPU."""
    return _environment_int("LOCAL_RANK", 0)


def is_main() -> bool:
    """Whether this process is the one that prints and writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here; returns at once in a single process."""
    if _has_group():
        dist.barrier()
    else:
        assert world_size() == 1, "barrier() before the process group of a launched run exists"
