"""The process group of trainings inside the test process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def process_group() -> Iterator[None]:
    """End the group that a training starts, with all that DeepSpeed remembers of it, and restore the environment."""
    import deepspeed.comm

    environment = dict(os.environ)
    try:
        yield
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
