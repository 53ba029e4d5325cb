"""Where a model name leads: the model inside this package, a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from cm3.errors import RequestError

DEMO = "demo"
"""Name of the model inside this package."""

_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "README.md"]


def demo_folder() -> Path:
    """Folder of the model inside this package."""
    return Path(__file__).parent / "assets" / DEMO


def resolve_model(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a model, downloaded from the Hub where the name is neither `demo` nor a folder.

    Args:
        name: `demo`, a folder, or `owner/name` on the Hub.
        revision: Branch, tag or commit on the Hub.
        token: Hub token for private repositories; None uses the saved one.

    Raises:
        RequestError: the name leads nowhere.
    """
    if str(name) == DEMO:
        return demo_folder()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    asked = f"model {str(name)!r} is no folder here"
    if Path(name).is_absolute() or str(name).count("/") > 1 or str(name).startswith("."):
        raise RequestError(f"{asked}; check the path, or use `demo`")
    try:
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=_HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(
            f"{asked} and could not be had from the Hub ({reason}); check the name, or use `demo`"
        ) from None
