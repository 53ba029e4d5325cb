"""When a training loop acts: every so many steps, and at SIGTERM, which lets it save and leave."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM came; the loop then saves and leaves."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_report(step: int, steps: int, saved: Path) -> str:
    """Return the last line of a run that SIGTERM stopped: where it is, and how it goes on."""
    return f"stopped by SIGTERM after step {step} of {steps}, saved in {saved}; the same command goes on from there"


def is_due(step: int, interval: int) -> bool:
    """Return whether something done every `interval` steps (0: never) is done after this one."""
    return interval > 0 and step % interval == 0
