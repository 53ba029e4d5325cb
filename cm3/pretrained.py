"""Where a model name leads: the model inside this package, a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from cm3.checkpoint import read_json
from cm3.errors import ModelFilesError, RequestError

DEMO = "demo"
"""Name of the model inside this package."""

CONFIG_FILE = "config.json"
MODEL_TYPE = "open-cm3"
"""What `model_type` in `config.json` says of our models."""

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
        ModelFilesError: what is there is no model of ours.
    """
    if str(name) == DEMO or Path(name).is_dir():
        folder = demo_folder() if str(name) == DEMO else Path(name)
        _check_type(folder)
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    asked = f"model {str(name)!r} is no folder here"
    if Path(name).is_absolute() or str(name).count("/") > 1 or str(name).startswith("."):
        raise RequestError(f"{asked}; check the path, or use `demo`")
    try:
        folder = Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=CONFIG_FILE))
        _check_type(folder)  # before gigabytes of somebody else's weights come
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=_HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"{asked} and could not be had from the Hub ({reason}); check the name, or use `demo`"
        ) from None


def _check_type(folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise ModelFilesError(f"{folder} has no {CONFIG_FILE}, so it is no model folder; {_instead(folder)}")
    found = read_json(folder / CONFIG_FILE).get("model_type")
    if found != MODEL_TYPE:
        raise ModelFilesError(
            f"{folder} holds a model of type {found!r}, this code runs {MODEL_TYPE!r}; choose another"
        )


def _instead(folder: Path) -> str:
    """What to give in the place of a folder without a model: the parts of a run lie in folders of its own."""
    if (folder / "model" / CONFIG_FILE).is_file():
        return f"it is the folder of a run, whose model is {folder / 'model'}: give that"
    if (folder / "adapter").is_dir():
        return f"it is the folder of a run that trained an adapter: give its model, and {folder / 'adapter'} as adapter"
    if (folder / "checkpoints").is_dir():
        return f"it is the folder of a run that has not ended: `cm3 export {folder} --out FOLDER` makes a model of it"
    return "give one that `cm3 train`, `cm3 export` or save_pretrained wrote"
