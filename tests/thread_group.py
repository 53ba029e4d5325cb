"""A sequence group of threads in one process, for the tests of rows that are shared."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from cm3.model.sequence_parallel import SequenceGroup

Result = TypeVar("Result")


def in_parts(size: int, work: Callable[[SequenceGroup], Result]) -> list[Result]:
    """Return what `work` returns in each of `size` threads, which exchange blocks as processes would."""
    meeting = threading.Barrier(size, timeout=60)
    sent: list[Tensor] = [torch.empty(0)] * size

    def run(index: int) -> Result:
        def all_to_all(x: Tensor) -> Tensor:
            sent[index] = x
            meeting.wait()
            received = torch.stack([blocks[index] for blocks in sent])
            meeting.wait()
            return received

        try:
            return work(SequenceGroup(size, index, all_to_all))
        except BaseException:
            meeting.abort()  # the others would wait for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, index) for index in range(size)]]
