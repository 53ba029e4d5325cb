"""What a name that a person typed leads to: rows here, or a data set of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from cm3.data.sources import SourceKind, kind_of
from cm3.errors import RequestError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def named_kind(name: str) -> SourceKind:
    """How the rows of a name are stored, see `kind_of`; a name that leads nowhere is refused at once.

    Raises:
        RequestError: there is no such file or folder, and no such data set on the Hub, or the Hub is out of reach.
    """
    kind, path = kind_of(name), Path(name)
    if kind != "hub":
        return kind
    if path.exists():
        raise RequestError(f"{name} does not end as any kind of rows; say with kind=NAME how they are stored")
    beside = len(path.parts) > 1 and path.parent.is_dir()
    if beside or not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise RequestError(
            f"{name} is no file or folder here; check the path, or give kind=hub for a data set of the Hub"
        )
    _require_data_set(name)
    return kind


def _require_data_set(name: str) -> None:
    """Ask the Hub, or its cache, once: `datasets` asks many times, with long pauses."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(name, repo_type="dataset", allow_patterns="README.md")
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"{name} is no file or folder here and could not be had from the Hub ({reason}); check the path or name"
        ) from None
