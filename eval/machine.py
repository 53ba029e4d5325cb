"""What this machine reaches and what a process takes: rates of matrix products and of reading, and memory."""

from __future__ import annotations

import time
from pathlib import Path

import torch

_STATUS_FILE = Path("/proc/self/status")


class MatrixPeak:
    """The best rate of matrix products seen so far: the 100% of FLOPs utilisation.

    It is measured, not looked up, and measured again beside what is compared with it: on a machine that others use
    too, a peak from a busy minute would make the steps of a quiet one look better than possible. Of all products
    the fastest counts.

    Args:
        device: Where the products run.
        dtype: Their number format.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        sizes = (4096, 8192) if device.type == "cuda" else (512, 1024, 2048)
        # random numbers, because products of constants draw less power and run faster on a GPU
        self._factors = [torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for size in sizes]
        self.flops_per_second = 0.0
        """FLOP/s, a multiplication and an addition being two."""

    def measure(self, products: int = 3) -> None:
        """Multiply a few times in each size."""
        for factor_NN in self._factors:
            for _ in range(products):
                synchronize(self._device)
                start = time.perf_counter()
                torch.matmul(factor_NN, factor_NN)
                synchronize(self._device)
                rate = 2 * len(factor_NN) ** 3 / (time.perf_counter() - start)
                self.flops_per_second = max(self.flops_per_second, rate)


class ReadRate:
    """The best rate of reading memory seen so far: what bounds a step that reads all weights for a few products.

    Measured like `MatrixPeak`, and again beside what is compared with it.

    Args:
        device: Whose memory is read, with the threads that torch uses.
        num_bytes: Of the numbers that are read; more than caches hold.
    """

    def __init__(self, device: torch.device, num_bytes: int = 1 << 28) -> None:
        self._device = device
        self._rows = torch.ones(num_bytes // (4 * 4096), 4096, device=device)
        self._factor = torch.ones(4096, device=device)
        self.bytes_per_second = 0.0

    def measure(self, passes: int = 3) -> None:
        """Read all of it a few times, as a sum and as a product of matrix and vector."""
        for read in (self._rows.sum, lambda: self._rows @ self._factor):
            for _ in range(passes):
                synchronize(self._device)
                start = time.perf_counter()
                read()
                synchronize(self._device)
                rate = 4 * self._rows.numel() / (time.perf_counter() - start)
                self.bytes_per_second = max(self.bytes_per_second, rate)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_in_use(device: torch.device) -> float:
    """Bytes of tensors on a GPU; on a CPU all of this process, and nan where the system does not tell."""
    return float(torch.cuda.memory_allocated(device)) if device.type == "cuda" else _status_bytes("VmRSS")


def peak_memory(device: torch.device) -> float:
    """The most that `memory_in_use` has been since this process began."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status_bytes("VmHWM")


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew at what is in use; nothing happens on a CPU whose system does not offer it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def describe(device: torch.device) -> str:
    """The device in a few words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _status_bytes(name: str) -> float:
    try:
        lines = _STATUS_FILE.read_text().splitlines()
    except OSError:
        return float("nan")
    found = [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]
    return 1024.0 * found[0] if found else float("nan")  # some systems that look like Linux tell only a part
