"""When a training loop acts: every so many steps, and at SIGTERM, which lets it save and leave."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM came; the loop then saves and leaves."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def is_due(step: int, interval: int) -> bool:
    """Return whether something done every `interval` steps (0: never) is done after this one."""
    return interval > 0 and step % interval == 0
