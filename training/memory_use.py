"""The memory of a run: what is expected before it, and what was measured after it."""

import math

import torch

from cm3.eval.machine import memory_in_use, peak_memory, reset_peak_memory
from cm3.training.config import ModelRun
from cm3.training.show import amount, memory


class MemoryUse:
    """The memory of this process from now on, beyond what is in use already.

    Args:
        device: Where the model will be; on a CPU all memory of the process counts, on a GPU that of tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        reset_peak_memory(device)
        self._before = memory_in_use(device)

    def expected(self, config: ModelRun, num_processes: int) -> str:
        """The estimate of `cm3 show` in a line."""
        parts = memory(config, num_processes)
        return (
            f"memory: about {amount(parts.total)} a process expected (weights {amount(parts.weights)}, gradients "
            f"{amount(parts.gradients)}, optimizer {amount(parts.optimizer)}, activations roughly "
            f"{amount(parts.activations)})"
        )

    def measured(self) -> str | None:
        """The peak in a line; None where the system does not tell."""
        used = peak_memory(self._device) - self._before
        if math.isnan(used):
            return None
        return f"memory: at most {amount(used)} used beyond the {amount(self._before)} of the program itself"
