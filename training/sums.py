"""Checksums of the files of a folder, in the format of `sha256sum`.

SHA-256 rather than a CRC, although what is feared is damage and no forger: any machine can check a copied checkpoint
with `sha256sum --check SHA256SUMS`, and at about 1 GB/s a core it is no slower than the disks it reads from.
"""

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cm3.checkpoint import write_text

SUMS_FILE = "SHA256SUMS"
_BLOCK_BYTES = 1 << 22


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder into `SHA256SUMS`, which `sha256sum --check` reads."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_FILE)
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(_sha256, files))
    lines = [f"{digest}  {path.relative_to(folder).as_posix()}\n" for digest, path in zip(sums, files, strict=True)]
    write_text(folder / SUMS_FILE, "".join(lines))


def find_damage(folder: Path, required: Sequence[str] = ()) -> list[str]:
    """Compare the files of a folder with its `SHA256SUMS`.

    Args:
        folder: What `write_sums` was called on.
        required: Files that must be among those listed.

    Returns:
        What is wrong, a fault each; nothing where every file is as it was written.
    """
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [f"{SUMS_FILE} cannot be read"]
    sums = {line[66:]: line[:64] for line in lines if re.fullmatch(r"[0-9a-f]{64}  .+", line)}
    if len(sums) < len(lines):
        return [f"{SUMS_FILE} is damaged"]
    unlisted = [f"{SUMS_FILE} does not list {name}" for name in required if name not in sums]
    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(lambda name: _fault(folder / name, sums[name]), sums))
    return unlisted + [f"{name} {fault}" for name, fault in zip(sums, faults, strict=True) if fault]


def _fault(path: Path, expected: str) -> str:
    try:
        return "" if _sha256(path) == expected else "is not what was written (its checksum differs)"
    except OSError as error:
        return "is missing" if not path.exists() else f"cannot be read ({error.strerror})"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
