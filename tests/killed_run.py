"""Training runs in processes of their own that are killed, for `test_training_kill.py`.

Forked from one server that has imported everything, so that a run starts within a second.
"""

import multiprocessing
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Iterator
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cm3.training import train
from cm3.training.config import ModelRun

SECONDS_TO_WAIT = 900  # of a machine that does much else, too


def start(config: ModelRun, num_processes: int = 1, dies_at: int = 0) -> tuple[list, Connection]:
    """Start a run; return its processes and where its console lines come out.

    Args:
        config: Of the run.
        num_processes: Without a launcher, but with the variables that one sets.
        dies_at: The first process kills itself before this operation on a file of the checkpoints; 0 is never.
    """
    context = _server()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    reader, writer = context.Pipe(duplex=False)
    processes = []
    for rank in range(num_processes):
        arguments = (config, rank, num_processes, port, writer if rank == 0 else None, dies_at if rank == 0 else 0)
        processes.append(context.Process(target=_run, args=arguments, daemon=True))
        processes[-1].start()
    writer.close()
    return processes, reader


@cache
def _server() -> Any:
    """Start the server that runs are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run", "deepspeed", "torch.utils.tensorboard"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # where it finds this file
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


def _run(config: ModelRun, rank: int, num_processes: int, port: int, writer: Connection | None, dies_at: int) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    if writer is not None:
        os.dup2(writer.fileno(), 1)
        writer.close()
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if dies_at:
        _die_at(Path(config.output) / "checkpoints", dies_at)
    train.run(config)


def _die_at(folder: Path, number: int) -> None:
    """Kill this process at an operation on a file in a folder: opened, made, renamed, removed, listed, synchronised."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event.partition(".")[0] not in ("open", "os", "shutil") or not arguments:
            return
        if isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(os.fspath(folder)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def lines(reader: Connection) -> Iterator[str]:
    """Yield the console lines of a run as they come, until it ends or is killed."""
    rest = b""
    while select.select([reader], [], [], SECONDS_TO_WAIT)[0]:
        read = os.read(reader.fileno(), 1 << 16)
        if not read:
            return
        *whole, rest = (rest + read).split(b"\n")
        yield from (line.decode() for line in whole)
    raise TimeoutError(f"the run said nothing for {SECONDS_TO_WAIT} seconds")


def kill_after(config: ModelRun, training_lines: int, num_processes: int = 1) -> bool:
    """Run, and kill all processes when so many training steps were told; return whether that was before the end."""
    processes, reader = start(config, num_processes)
    with reader:
        seen = 0
        try:
            for line in lines(reader):
                seen += " | loss " in line
                if seen == training_lines:
                    break
        finally:
            killed = _kill(processes)
        return killed


def kill_at(config: ModelRun, operation: int) -> bool:
    """Run until the process kills itself, see `start`; return whether that was before the end."""
    processes, reader = start(config, dies_at=operation)
    with reader:
        for _ in lines(reader):
            pass
        processes[0].join(SECONDS_TO_WAIT)
        return processes[0].exitcode == -signal.SIGKILL


def stop_after(config: ModelRun, training_lines: int, num_processes: int = 1) -> list[str]:
    """Run, and send SIGTERM to the last process when so many training steps were told; return the console lines."""
    processes, reader = start(config, num_processes)
    told, seen = [], 0
    with reader:
        for line in lines(reader):
            told.append(line)
            seen += " | loss " in line
            if seen == training_lines and " | loss " in line:
                os.kill(processes[-1].pid, signal.SIGTERM)
    _end_well(processes, told)
    return told


def finish(config: ModelRun, num_processes: int = 1) -> list[str]:
    """Run to the end; return the console lines."""
    processes, reader = start(config, num_processes)
    with reader:
        told = list(lines(reader))
    _end_well(processes, told)
    return told


def _end_well(processes: list, told: list[str]) -> None:
    for process in processes:
        process.join(SECONDS_TO_WAIT)
        assert process.exitcode == 0, told


def _kill(processes: list) -> bool:
    random.shuffle(processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(SECONDS_TO_WAIT)
    return any(process.exitcode == -signal.SIGKILL for process in processes)
