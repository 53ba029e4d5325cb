"""Checkpoints that PyTorch pickled: their tensors and plain values, mapped into memory; nothing in them is run."""

import pickle
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from cm3.checkpoint import load_tensors
from cm3.errors import ModelFilesError

_TRAINER_CLASSES = ("pytorch_lightning.", "lightning.", "argparse.")
"""Checkpoints of trainers name classes that are not read: as keys of their state, or with the command line."""


def read_tensors(path: str | Path, *entries: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, or of the first of `entries` that it has. See `read_values`.

    Raises:
        ModelFilesError: there is no such file, it is damaged, or it holds objects of other kinds.
    """
    path = Path(path)
    values = read_values(path)
    entry = next((entry for entry in entries if isinstance(values, dict) and entry in values), None)
    tensors = values if entry is None else values[entry]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelFilesError(f"{path} holds no tensors by name; choose another file")
    return tensors


def read_values(path: str | Path) -> Any:
    """What a checkpoint holds: tensors and plain values only.

    Tensors stay in the file, which may be larger than the memory, until they are used.

    Raises:
        ModelFilesError: there is no such file, it is damaged, or it holds objects of other kinds.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFilesError(f"cannot read {path}: no such file; check the path")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        is_zip = is_zipfile(path)  # older files can be neither mapped nor looked into
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        stand_ins: Any = [(_TrainerClass, name) for name in named if name.startswith(_TRAINER_CLASSES)]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        LookupError,  # of files that are cut off, by torch itself
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        # torch begins with advice to read such files unsafely
        reason = next(iter(str(error).split("WeightsUnpickler error: ")[-1].strip().splitlines()), type(error).__name__)
        raise ModelFilesError(f"{path} cannot be read as a file of tensors ({reason}); download it again") from error


class _TrainerClass:
    """An empty class in place of any of the trainer's."""
