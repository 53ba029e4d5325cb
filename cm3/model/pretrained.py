"""Model folders in Hugging Face's shape: weights, config.json, tokenizer files, generation defaults, model card."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm3.checkpoint import load_model_weights, load_strict, read_json, save_model_weights, write_json, write_text
from cm3.errors import CM3Error, ModelFilesError
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer
from cm3.pretrained import CONFIG_FILE, MODEL_TYPE
from cm3.tokenizers.document import JSON_TEXT_TOKENIZER_FILE, has_json_text_tokenizer

FORMAT_VERSION = 1
GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"
TOKENIZER_FILES = ("tokenizer.model", "image_tokenizer.safetensors", "image_tokenizer.json", "vocabulary.json")
"""Of our own models; imported ones have another text tokenizer, see `tokenizer_files`."""


def tokenizer_files(folder: str | Path) -> tuple[str, ...]:
    """The names of the tokenizer files that a folder has, or should have."""
    if has_json_text_tokenizer(folder):
        return (JSON_TEXT_TOKENIZER_FILE, *TOKENIZER_FILES[1:])
    return TOKENIZER_FILES


def save_model(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    tokenizer_folder: str | Path,
    tokenizer_hash: str,
    card: str,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a complete model folder.

    Args:
        folder: Made where it does not exist; files of the same names are replaced.
        tensors: names and values of `Transformer.state_dict()`.
        config: Configuration of the transformer.
        tokenizer_folder: Holds the tokenizer files that the model was trained with.
        tokenizer_hash: `DocumentTokenizer.hash` of those files; `load_model` compares it.
        card: Text of the model card.
        generation: Defaults of sampling.
        dtype: Number format of the weights.

    Raises:
        ModelFilesError: a tokenizer file is missing.
    """
    folder, source = Path(folder), Path(tokenizer_folder)
    names = tokenizer_files(source)
    if missing := [name for name in names if not (source / name).is_file()]:
        raise ModelFilesError(f"{source} lacks {', '.join(missing)}; prepare the data again")
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != source.resolve():
        for name in names:
            shutil.copyfile(source / name, folder / name)
    save_model_weights(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    save_settings(folder, config, tokenizer_hash=tokenizer_hash, card=card, generation=generation, dtype=dtype)


def save_settings(
    folder: str | Path,
    config: ModelConfig,
    *,
    tokenizer_hash: str,
    card: str,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write all of a model folder but its weights and tokenizers, which must be there; see `save_model`."""
    folder = Path(folder)
    write_json(folder / GENERATION_FILE, dict(generation or {}))
    write_text(folder / CARD_FILE, card)
    write_json(  # last: a folder with a config is complete
        folder / CONFIG_FILE,
        {
            "format_version": FORMAT_VERSION,
            "model_type": MODEL_TYPE,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "tokenizer_hash": tokenizer_hash,
            "model": dataclasses.asdict(config),
        },
    )


def load_model(
    folder: str | Path,
    *,
    tokenizer_hash: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Transformer, ModelConfig]:
    """Load the transformer of a model folder, in evaluation mode.

    Args:
        folder: What `save_model` wrote.
        tokenizer_hash: `DocumentTokenizer.hash` of the tokenizers it will be used with; None checks nothing.
        device: Where the weights go.
        dtype: Number format; None keeps that of the file.

    Raises:
        ModelFilesError: a file is missing or damaged, the format is newer than this code, names or shapes do not
            fit, or the tokenizers are not those of the training.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG_FILE)
    config = _model_config(values, folder / CONFIG_FILE)
    if tokenizer_hash is not None and values.get("tokenizer_hash") != tokenizer_hash:
        raise ModelFilesError(
            f"{folder} was trained with the tokenizers {str(values.get('tokenizer_hash'))[:12]}, found "
            f"{tokenizer_hash[:12]}; restore the tokenizer files that were saved with the model"
        )
    tensors = load_model_weights(folder)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    load_strict(model, tensors, str(folder))
    model.to(device=device, dtype=dtype or next(iter(tensors.values())).dtype)
    return model.eval(), config


def read_model_config(folder: str | Path) -> ModelConfig:
    """Read the transformer's settings of a model folder.

    Raises:
        ModelFilesError: there is no such file, or it is not of a model of ours.
    """
    path = Path(folder) / CONFIG_FILE
    return _model_config(read_json(path), path)


def _model_config(values: Any, path: Path) -> ModelConfig:
    """Read the transformer's settings out of config.json."""
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        raise ModelFilesError(f"{path} is not of a CM3 model (model_type {MODEL_TYPE!r}); choose another folder")
    if values.get("format_version") != FORMAT_VERSION:
        raise ModelFilesError(
            f"{path} has format version {values.get('format_version')}, this code reads {FORMAT_VERSION}; "
            "use a matching release of open-cm3"
        )
    try:
        return ModelConfig(**values["model"])
    except (KeyError, TypeError, CM3Error) as error:
        raise ModelFilesError(f"{path} has no valid model settings ({error}); download or export it again") from error
