"""What the output folder of a preparation holds already, and whether another may go on in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from cm3.checkpoint import read_json
from cm3.config import read_yaml
from cm3.data.shard_sums import look_at_shard
from cm3.data.shards import INDEX_FILE, SHARDS_FOLDER, read_shard_metadata
from cm3.errors import ConfigError, DataError

CONFIG_FILE, REPORT_FILE = "config.yaml", "report.json"
INPUTS_KEY = "inputs"
"""Of the metadata of a shard: fingerprints of what it was made of, by the names of `changed_inputs`."""

_WITHOUT_EFFECT = ("stage", "batch_size", "num_processes", "device", "output", "data.max_bad_fraction", "data.stream")


class Fits(Protocol):
    """Tells whether a shard, by its number and metadata, is what the settings make, or the beginning of it."""

    def __call__(self, number: int, metadata: Mapping[str, str]) -> bool: ...


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says of a full disk or a folder that cannot be written into an error for the user.

    Raises:
        DataError: a file could not be written; there is nothing under its name, or what was there before.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"cannot write the prepared folder {folder} ({reason}); make room or mend the folder, and give the same "
            "command to go on: shards that are whole are kept"
        ) from error


def refuse_other_settings(
    folder: Path, settings: Mapping[str, Any], fits: Fits, inputs: Mapping[str, str]
) -> Sequence[str]:
    """Look whether all shards of a folder fit the settings; what is damaged does not count, for it is made anew.

    Args:
        folder: The output.
        settings: What would be in its `config.yaml`.
        fits: See there.
        inputs: Fingerprints of what shards would be made of.

    Returns:
        The settings that are others in `config.yaml` and can be, such as a larger limit, each with both values.

    Raises:
        ConfigError: some shards were made with other settings, or of other rows, tokenizers or another memory.
    """
    shards = sorted(path for path in (folder / SHARDS_FOLDER).glob("*.arrow") if path.stem.isdecimal())
    changes = _changes(folder, settings) if shards else []
    for path in shards:
        found = read_shard_metadata(path)
        if found is None or fits(int(path.stem), found) or look_at_shard(path).fault:
            continue
        before = json.loads(found.get(INPUTS_KEY, "{}"))
        others = [f"other {name}" for name, value in inputs.items() if before.get(name, value) != value]
        reasons = [*changes, *others] or ["other raw rows, tokenizers or memory, or another version of open-cm3"]
        raise ConfigError(
            f"{folder} holds shards that were prepared with other settings ({'; '.join(reasons)}); choose another "
            f"output, or delete {folder} to prepare it anew"
        )
    return changes


def is_finished(folder: Path, settings: Mapping[str, Any], num_shards: int) -> bool:
    """Return whether a folder was declared complete with these settings; its shards are not looked at."""
    index = folder / SHARDS_FOLDER / INDEX_FILE
    try:
        is_complete = index.is_file() and read_json(index)["num_shards"] == num_shards
    except (ValueError, KeyError, TypeError):  # a damaged index is written anew
        return False
    has_others = (folder / CONFIG_FILE).is_file() and (folder / REPORT_FILE).is_file()
    return is_complete and has_others and not _changes(folder, settings)


def fingerprint_of(content: Any) -> str:
    """Return a short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _changes(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The settings that decide what shards hold and are others in the folder's `config.yaml`."""
    try:
        before = read_yaml(folder / CONFIG_FILE)
    except ConfigError:
        return []
    return [
        f"{name}: {json.dumps(old)} there, {json.dumps(new)} now"
        for name, old, new in _differences(before, settings)
        if name not in _WITHOUT_EFFECT
    ]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new
