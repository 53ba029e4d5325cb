"""Files in and out: atomic writes, JSON, and strict safetensors.

Nothing is pickled. A file or folder is written under a temporary name beside its place and then renamed, so
that a reader, or a run that resumes after a crash, finds the old content or the new one and never a part.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cm3.errors import ModelFilesError, RequestError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD_PATTERN = "model{suffix}.safetensors"
_MAX_NAMES_IN_ERROR = 8
_LEFTOVER = re.compile(r"\.[0-9a-f]{8}\.(tmp|old)\..+|\.tmp\w{6}")  # the second is what safetensors writes into


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a free name beside `path`; a file or folder written there replaces `path` on success.

    Parent folders are made. When the body raises, what it wrote is removed and `path` is untouched.
    A file is replaced in one step; an old folder is first set aside, since no rename replaces a full folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    temporary = path.with_name(f".{token}.tmp.{path.name}")  # ends as `path` does: some writers read the suffix
    try:
        yield temporary
        assert temporary.exists(), f"nothing was written for {path}"
        _flush(temporary)
        if temporary.is_dir() and path.is_dir():
            old = path.with_name(f".{token}.old.{path.name}")
            path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                old.rename(path)
                raise
            _remove(old)
        else:
            temporary.replace(path)
        _flush_entry(path.parent)
    finally:
        _remove(temporary)


@contextmanager
def new_folder(path: str | Path, parts: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` on success, as in `atomic_path`.

    What else a user had put into the earlier folder, such as `.git`, is carried over.

    Args:
        path: The folder.
        parts: Names and patterns of files that such a folder may have besides those that are written now; they go
            with the earlier one.

    Raises:
        ModelFilesError: the disk is full or the place cannot be written; what was there is as it was.
        OSError: the body met another fault, such as a file that it cannot read; what was there is as it was.
    """
    require_no_mount(path)
    place = Path(path).resolve()
    folder: Path | None = None
    try:
        with atomic_path(place) as folder:
            folder.mkdir()
            yield folder
            if place.is_dir():
                _carry_over(place, folder, parts)
    except OSError as error:
        named = [Path(str(name)) for name in (error.filename, error.filename2) if name is not None]
        written = [name for name in named if name in (place, place.parent) or folder and name.is_relative_to(folder)]
        if folder and named and not written:
            raise
        raise ModelFilesError(
            f"cannot write the folder {path} ({error.strerror or error}); make room or mend the place, and give the "
            "same command again"
        ) from error


def require_no_mount(path: str | Path) -> None:
    """Raise ModelFilesError where a folder is a mount point, such as a volume of Docker, which nothing can replace."""
    if os.path.ismount(path):
        raise ModelFilesError(
            f"{path} is a mount point, and a folder that is written whole cannot take its place; choose a folder "
            f"inside it, such as {Path(path) / 'new'}"
        )


def foreign_entries(folder: Path, parts: Sequence[str]) -> set[str]:
    """Return the names in a folder that are none of the names and patterns given."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if not any(fnmatchcase(name, part) for part in parts)}


def _carry_over(old: Path, new: Path, parts: Sequence[str]) -> None:
    """Give `new` what `old` has beyond `parts` and the names in `new`.

    Until `new` is in its place the files are in both: nothing is lost wherever this stops.
    """
    kept = foreign_entries(old, parts) - {path.name for path in new.iterdir()}

    def left_out(folder: str, names: Sequence[str]) -> set[str]:
        return set(names) - kept if folder == str(old) else set()

    if kept:
        shutil.copytree(old, new, symlinks=True, ignore=left_out, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the system cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def require_empty(folder: str | Path) -> None:
    """Raise RequestError where there is something that would be lost."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} is not empty; choose a folder that does not exist yet")


def remove_folder(path: Path) -> None:
    """Remove a folder and all that it holds; whoever looks for it finds it whole or not at all."""
    doomed = path.with_name(f".{secrets.token_hex(4)}.old.{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what writes into `folder` left beside their places when they were killed; none may be going on."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            _remove(path)


def _flush(path: Path) -> None:
    """Bring a file, or all of a folder, from the cache of the system to the disk."""
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _flush_entry(entry)


def _flush_entry(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove what nobody looks for; what cannot go yet, as files on NFS that are open, `remove_leftovers` finds."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 in one step, line ends as they are."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON in UTF-8."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ModelFilesError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ModelFilesError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise ModelFilesError(f"{path} is not JSON ({error}); write or download it again") from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file.

    Tied tensors must be named once: safetensors refuses names that share memory.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.touch()
        usual_mode = temporary.stat().st_mode
        try:
            save_file(on_cpu, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # a full disk among others; told as Python tells it
            number = re.search(r"os error (\d+)", str(error))
            code = (int(number[1]), os.strerror(int(number[1]))) if number else (0, str(error))
            raise OSError(*code, str(path)) from error
        temporary.chmod(usual_mode)  # safetensors leaves a file that only its owner can read


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file to the CPU.

    Raises:
        ModelFilesError: there is no such file, or it is damaged.
    """
    if not Path(path).is_file():
        raise ModelFilesError(f"cannot read {path}: no such file; check the path")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFilesError(f"{path} is damaged ({error}); write or download it again") from error


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a safetensors file from its header, which also tells the length of the file.

    Raises:
        ModelFilesError: there is no such file, or it is damaged.
    """
    return {name: stored.shape for name, stored in _stored(Path(path)).items()}


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it, such as "F32" and "BF16"."""

    def read(self) -> Tensor:
        """Return the values; nothing else of the file is read."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def _stored(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, from its header."""
    if not path.is_file():
        raise ModelFilesError(f"cannot read {path}: no such file; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: StoredTensor(path, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelFilesError(f"{path} is damaged ({error}); write or download it again") from error


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module`, every name and shape accounted for.

    Args:
        module: receives the values, in its own dtype and on its own device.
        tensors: name to value, as in `module.state_dict()`.
        source: where the tensors come from, for the error.

    Raises:
        ModelFilesError: lists missing, unexpected and wrongly shaped names; the module is then unchanged.
    """
    check_shapes(
        {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        source,
        type(module).__name__,
    )
    module.load_state_dict(dict(tensors))


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str, target: str
) -> None:
    """Compare the names and shapes of tensors with those that are needed.

    Args:
        expected: name to shape, as `target` needs them.
        found: name to shape, as `source` has them.
        source: where the tensors come from, for the error.
        target: what they are for, for the error.

    Raises:
        ModelFilesError: lists missing, unexpected and wrongly shaped names.
    """
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "wrongly shaped": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if listed := [f"{kind}: {_shortened(names)}" for kind, names in problems.items() if names]:
        raise ModelFilesError(
            f"the tensors of {source} do not fit {target}; {'; '.join(listed)}. "
            "Use the configuration they were saved with"
        )


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_IN_ERROR])
    rest = len(names) - _MAX_NAMES_IN_ERROR
    return f"{shown} and {rest} more" if rest > 0 else shown


def save_model_weights(folder: str | Path, tensors: Mapping[str, Tensor], max_shard_size: int | str = "5GB") -> None:
    """Write a model's tensors as `model.safetensors`, or as shards with an index where that is too large.

    The names and the index are Hugging Face's; weight files that an earlier save left are removed.
    """
    stream_model_weights(folder, tensors, tensors.__getitem__, max_shard_size)


def stream_model_weights(
    folder: str | Path,
    planned: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write what `save_model_weights` writes with no more than one shard of it in memory.

    Args:
        folder: Made where it does not exist.
        planned: The names, shapes and types to come; tensors on the meta device will do.
        make: Gives the tensor of a name; called once for each.
        max_shard_size: Bytes of a file at most, as a number or such as "5GB"; a larger tensor gets its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    split = split_torch_state_dict_into_shards(
        dict(planned), filename_pattern=_SHARD_PATTERN, max_shard_size=max_shard_size
    )
    for filename, names in split.filename_to_tensors.items():
        save_tensors(folder / filename, {name: make(name) for name in names})
    current = set(split.filename_to_tensors)
    if split.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        current.add(INDEX_FILE)
    earlier = {WEIGHTS_FILE, INDEX_FILE, *(path.name for path in folder.glob("model-*.safetensors"))}
    for name in earlier - current:
        (folder / name).unlink(missing_ok=True)


def load_model_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read what `save_model_weights` wrote, in one file or in shards.

    Raises:
        ModelFilesError: no weights, a shard that is missing or damaged, or an index that does not fit them.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted({stored.path for stored in stored_tensors(folder).values()}):
        tensors |= load_tensors(path)
    return tensors


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Return what a folder of weights holds, from the headers of its files.

    Raises:
        ModelFilesError: no weights, a shard that is missing or damaged, or an index that does not fit them.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return _stored(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise ModelFilesError(f"{folder} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there")
    index = read_json(folder / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
        raise ModelFilesError(f"{folder / INDEX_FILE} has no valid weight_map; write or download it again")
    stored: dict[str, StoredTensor] = {}
    for filename in sorted(set(weight_map.values())):
        stored |= _stored(folder / filename)
    if stored.keys() != weight_map.keys():
        difference = sorted(stored.keys() ^ weight_map.keys())
        raise ModelFilesError(
            f"the shards of {folder} and {INDEX_FILE} differ in {_shortened(difference)}; download all again"
        )
    return stored
