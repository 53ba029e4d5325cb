"""Checksums of shards: each file ends in a line with the CRC-32 of all before it, where readers of Arrow look no more.

CRC-32, since what is feared is damage and no forger, and since a training reads all its shards once to compare them:
zlib does 1.5 GB/s a core where SHA-256 with instructions of its own did 0.9.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cm3.distributed import is_main, rank, world_size
from cm3.errors import DataError

_LINE = re.compile(rb"\ncrc32 ([0-9a-f]{8})\n")
_LINE_BYTES = 16
_ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""What every whole stream of Arrow ends in, and so every shard of before there were checksums."""
_BLOCK_BYTES = 1 << 22
_THREADS = 4
_NAMED_FAULTS = 3
_ANNOUNCED_BYTES = 1 << 30
"""Reading so much can take so long that it is announced."""


@dataclass(frozen=True)
class ShardState:
    """What a look at a shard has found."""

    fault: str = ""
    """What is wrong with it; empty where it is as it was written."""
    num_bytes: int = 0
    """Bytes that were compared with the checksum; 0 where there is none, as in shards of earlier versions."""


def sum_line(content: Any) -> bytes:
    """Return the line that belongs behind the bytes of a shard."""
    return b"\ncrc32 %08x\n" % zlib.crc32(content)


def look_at_shard(path: str | Path) -> ShardState:
    """Compare a shard with its checksum; of one without, only whether it ends as it should."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, 2) - _LINE_BYTES
            file.seek(max(0, size))
            end = file.read()
            line = _LINE.fullmatch(end)
            if line is None:
                return ShardState("" if end.endswith(_ARROW_END) else "is cut off, or its end is damaged")
            file.seek(0)
            found, buffer, left = 0, memoryview(bytearray(_BLOCK_BYTES)), size
            while left and (count := file.readinto(buffer[: min(left, _BLOCK_BYTES)])):
                found, left = zlib.crc32(buffer[:count], found), left - count
    except FileNotFoundError:
        return ShardState("is missing")
    except OSError as error:
        return ShardState(f"cannot be read ({error.strerror})")
    if found != int(line[1], 16):
        return ShardState(f"has the checksum {found:08x}, but was written with {line[1].decode()}", size)
    return ShardState(num_bytes=size)


def check_shards(folder: Path, shards: Sequence[Path]) -> None:
    """Compare the shards of a prepared folder with their checksums, and print how many there were. A collective.

    Where they are large, it says so beforehand.

    Processes that see the same folder read a share of it each; of a folder that is copied to every machine, every copy
    is read.

    Raises:
        DataError: in every process; some are damaged or missing.
    """
    start = time.monotonic()
    if is_main() and (size := sum(path.stat().st_size for path in shards if path.is_file())) >= _ANNOUNCED_BYTES:
        print(
            f"{folder}: comparing {len(shards)} shards, {_amount(size)}, with their checksums; "
            "data.check_shards=false leaves that out",
            flush=True,
        )
    places = _from_all(_place(folder))
    number = rank() if len(places) > 1 else 0
    with ThreadPoolExecutor(_THREADS) as pool:
        mine = shards[share(places, number)]
        states = list(zip(mine, pool.map(look_at_shard, mine), strict=True))
    faults = [f"{path} {state.fault}" for path, state in states if state.fault]
    counts = (sum(state.num_bytes for _, state in states), sum(not state.num_bytes for _, state in states))
    found = _from_all((faults, *counts))
    if all_faults := sorted({fault for faults, _, _ in found for fault in faults}):
        raise DataError(_advice(folder, all_faults, len(shards)))
    num_bytes, unverified = (sum(part[i] for part, place in zip(found, places) if place == places[0]) for i in (1, 2))
    if is_main():
        old = f"; {unverified} of an earlier version have no checksum" if unverified else ""
        compared, seconds = _amount(num_bytes), time.monotonic() - start
        print(f"{folder}: {len(shards)} shards, {compared} compared with checksums in {seconds:.1f} s{old}", flush=True)


def share(places: Sequence[Hashable], number: int) -> slice:
    """Return which shards a process looks at: those that see the same folder share it out.

    Args:
        places: Where the folder lies as each process sees it.
        number: Of the process.
    """
    together = [other for other, place in enumerate(places) if place == places[number]]
    return slice(together.index(number), None, len(together))


def _place(folder: Path) -> Hashable:
    """Tells a folder from its copies on other machines, but is the same on all machines that share it."""
    found = folder.stat()
    # disks that are made alike can agree in all but the id of their file system; Windows has none
    file_system = os.statvfs(folder).f_fsid if hasattr(os, "statvfs") else 0
    return str(folder), found.st_ino, found.st_mtime_ns, file_system


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"


def _from_all(value: Any) -> list[Any]:
    """Return what every process gave, in the order of their ranks. A collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _advice(folder: Path, faults: Sequence[str], num_shards: int) -> str:
    named = "; ".join(faults[:_NAMED_FAULTS])
    more = f"; and {len(faults) - _NAMED_FAULTS} more" if len(faults) > _NAMED_FAULTS else ""
    return (
        f"of the {num_shards} shards of {folder} {len(faults)} cannot be trained on: {named}{more}; copy them again, "
        f"or run `cm3 prepare {folder / 'config.yaml'} --output {folder}`, which makes only these anew"
    )
