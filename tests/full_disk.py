"""A limit on the size of files, which stands in for a full disk: the system refuses a write in the same way."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

FOUND = "File too large"
"""What the system says of it."""


@contextmanager
def full_disk(limit: int = 0) -> Iterator[None]:
    """Let this process write no file of more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
