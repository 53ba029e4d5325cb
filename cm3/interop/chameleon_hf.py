"""Chameleon in Hugging Face's format (`model_type: chameleon`): a folder of theirs to one of ours, and back.

Chameleon: arXiv:2405.09818. Weights go through memory a file at a time. Their format has the encoder of the image
tokenizer and lacks its decoder, which Chameleon's own `vqgan.ckpt` has.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm3.checkpoint import (
    StoredTensor,
    atomic_path,
    check_shapes,
    read_json,
    stored_tensors,
    stream_model_weights,
    write_json,
)
from cm3.errors import ConfigError, ModelFilesError, RequestError
from cm3.interop.chameleon import require_chameleon
from cm3.interop.chameleon_layout import Part, chameleon_layout, join_parts, split_parts
from cm3.interop.chameleon_names import chameleon_vocabulary, names_of_tokenizer
from cm3.interop.chameleon_settings import foreign_settings, model_config, vq_config
from cm3.interop.taming import OUR_CODEBOOK, THEIR_CODEBOOK, load_vqgan, vqgan_of_tensors
from cm3.model.config import ModelConfig
from cm3.model.pretrained import read_model_config, save_settings
from cm3.model.transformer import Transformer
from cm3.pretrained import CONFIG_FILE
from cm3.tokenizers.document import VOCABULARY_FILE
from cm3.tokenizers.image import ImageTokenizer, WeightPrecision
from cm3.tokenizers.taming import TamingConfig, TamingVQGAN
from cm3.tokenizers.vocabulary import Vocabulary

MODEL_TYPE = "chameleon"
TOKENIZER_JSON = "tokenizer.json"
CARRIED_FILES = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Their files of tokenizer and processor, which lie in our folder as they are, for the way back."""
_VQ = "model.vqmodel."
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODEBOOK_TOLERANCE = 2**-8
"""Relative difference of the codebooks of one image tokenizer in fp32 and bf16, at most."""


def import_chameleon(
    source: str | Path,
    destination: str | Path,
    *,
    vqgan: str | Path | None = None,
    max_shard_size: int | str = "5GB",
) -> ModelConfig:
    """Write a Chameleon of Hugging Face as a model folder of ours.

    Args:
        source: A folder with `config.json`, `tokenizer.json` and safetensors in one file or in shards.
        destination: The folder to write; must not exist, or be empty.
        vqgan: Chameleon's `vqgan.ckpt` with its YAML file beside it: the image tokenizer with its decoder. Without it
            pictures can be read and not drawn.
        max_shard_size: Bytes of a weight file at most, as a number or such as "5GB"; about what is in memory at once.

    Raises:
        RequestError: the destination holds something.
        ModelFilesError: a file is missing or damaged, the model is no Chameleon or of a form that is not known, or
            tensors are missing, unexpected or of other shapes; the message lists them.
    """
    source, destination = Path(source), Path(destination)
    require_empty(destination)
    settings = _settings(source)
    config, encoder = model_config(settings, source), vq_config(settings, source)
    stored = stored_tensors(source)
    layout = chameleon_layout(config)
    _check_tensors(stored, layout, encoder, source)
    config = replace(config, qk_norm_per_head=not _norms_are_shared(stored, layout))
    vocabulary = chameleon_vocabulary(_names(settings, source), config.vocabulary_size, str(source))
    image = _image_tokenizer(stored, encoder, vqgan, source)
    if image.num_codes != vocabulary.image_range.size:
        raise ModelFilesError(
            f"{source} names {vocabulary.image_range.size} image codes, its image tokenizer has {image.num_codes}"
        )
    dtype = _widest_dtype([tensor for name, tensor in stored.items() if not name.startswith(_VQ)])
    with torch.device("meta"):
        planned = Transformer(config).to(dtype).state_dict()

    def make(name: str) -> Tensor:
        return join_parts(layout[name], lambda part: stored[part].read().to(dtype), planned[name].shape)

    with atomic_path(destination) as folder:
        stream_model_weights(folder, planned, make, max_shard_size)
        image.save(folder)
        vocabulary.save(folder / VOCABULARY_FILE)
        _carry(source, folder)
        text_hash = hashlib.sha256((folder / TOKENIZER_JSON).read_bytes()).hexdigest()
        tokenizer_hash = hashlib.sha256("\n".join((text_hash, image.hash, vocabulary.hash)).encode()).hexdigest()
        save_settings(folder, config, tokenizer_hash=tokenizer_hash, card=_card(source, config), dtype=dtype)
    return config


def export_chameleon(source: str | Path, destination: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Write a Chameleon of ours in Hugging Face's format; `import_chameleon` of that gives the same weights again.

    The decoder of the image tokenizer, for which the format has no place, stays behind.

    Args:
        source: A model folder that `import_chameleon` wrote, or one that was trained on from such.
        destination: The folder to write; must not exist, or be empty.
        max_shard_size: Bytes of a weight file at most, as a number or such as "5GB".

    Raises:
        RequestError: the destination holds something.
        ConfigError: the model is no Chameleon.
        ModelFilesError: a file is missing or damaged.
    """
    source, destination = Path(source), Path(destination)
    require_empty(destination)
    config = read_model_config(source)
    require_chameleon(replace(config, dropout=0.0))
    vocabulary, tokenizer = Vocabulary.load(source / VOCABULARY_FILE), ImageTokenizer.load(source)
    image = tokenizer.model
    if not isinstance(image, TamingVQGAN):
        raise ConfigError(f"{source} has an image tokenizer of our own, for which Chameleon's format has no place")
    stored = stored_tensors(source)
    with torch.device("meta"):
        own = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    check_shapes(own, {name: tensor.shape for name, tensor in stored.items()}, str(source), "Transformer")
    dtype = _widest_dtype(list(stored.values()))
    layout = chameleon_layout(config)
    owner = {part.name: name for name, parts in layout.items() for part in parts}
    encoder = _encoder_tensors(image, torch.float32 if tokenizer.precision == "fp32" else dtype)
    planned = {
        part.name: torch.empty(part.shape, dtype=dtype, device="meta") for parts in layout.values() for part in parts
    }

    def make(foreign: str) -> Tensor:
        if foreign in encoder:
            return encoder[foreign]
        name = owner[foreign]
        return dict(split_parts(stored[name].read().to(dtype), layout[name]))[foreign]

    with atomic_path(destination) as folder:
        stream_model_weights(folder, planned | encoder, make, max_shard_size)
        _carry(source, folder)
        names = names_of_tokenizer(read_json(source / TOKENIZER_JSON), str(source / TOKENIZER_JSON))
        write_json(folder / CONFIG_FILE, foreign_settings(config, image.config, vocabulary, names, dtype))


def require_empty(folder: Path) -> None:
    """Raise RequestError where there is something that would be lost."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} is not empty; choose a folder that does not exist yet")


def _settings(source: Path) -> dict[str, Any]:
    settings = read_json(source / CONFIG_FILE)
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found != MODEL_TYPE:
        raise ModelFilesError(
            f"{source} holds a model of type {found!r}, `chameleon` reads {MODEL_TYPE!r}; choose another format"
        )
    return settings


def _names(settings: Mapping[str, Any], source: Path) -> dict[str, int]:
    """The names of the tokenizer, with those of the settings, which must be the same where both have them."""
    path = source / TOKENIZER_JSON
    names = names_of_tokenizer(read_json(path), str(path))
    mapped = settings.get("vocabulary_map") or {}
    if other := [name for name, id in mapped.items() if names.get(name, id) != id]:
        raise ModelFilesError(
            f"{path} has {other[0]} at id {names[other[0]]}, the vocabulary_map of {CONFIG_FILE} at "
            f"{mapped[other[0]]}; use the files of one model"
        )
    return names | mapped


def _check_tensors(
    stored: Mapping[str, StoredTensor], layout: Mapping[str, tuple[Part, ...]], encoder: TamingConfig, source: Path
) -> None:
    """Compare names and shapes of all tensors, those of the image tokenizer included, before anything is written."""
    expected = {part.name: part.shape for parts in layout.values() for part in parts}
    with torch.device("meta"):
        expected |= {name: tuple(tensor.shape) for name, tensor in _encoder_tensors(TamingVQGAN(encoder)).items()}
    check_shapes(expected, {name: tensor.shape for name, tensor in stored.items()}, str(source), "Chameleon")


def _norms_are_shared(stored: Mapping[str, StoredTensor], layout: Mapping[str, tuple[Part, ...]]) -> bool:
    """Whether the norms of queries and keys are the same for all heads of each layer."""
    names = [part.name for name, parts in layout.items() for part in parts if "q_norm." in name or "k_norm." in name]
    norms_NK = (stored[name].read() for name in names)
    return all(bool((norm_NK == norm_NK[:1]).all()) for norm_NK in norms_NK)


def _image_tokenizer(
    stored: Mapping[str, StoredTensor], encoder: TamingConfig, vqgan: str | Path | None, source: Path
) -> ImageTokenizer:
    """The image tokenizer of their weights, or of Chameleon's own checkpoint, which must be the same one."""
    found = {name.removeprefix(_VQ): tensor for name, tensor in stored.items() if name.startswith(_VQ)}
    if vqgan is None:
        precision: WeightPrecision = "bf16" if _widest_dtype(list(found.values())) == torch.bfloat16 else "fp32"
        tensors = {name: tensor.read() for name, tensor in found.items()}
        return ImageTokenizer(vqgan_of_tensors(encoder, tensors, str(source)), precision)
    model = load_vqgan(vqgan)
    if replace(model.config, decoder=False) != encoder:
        raise ModelFilesError(f"{vqgan} has the shape {model.config}, {source} has {encoder}; use files of one model")
    own, theirs = model.quantizer.codebook_QE, found[THEIR_CODEBOOK].read().float()
    if not torch.allclose(own, theirs, rtol=_CODEBOOK_TOLERANCE, atol=0.0):
        raise ModelFilesError(f"{vqgan} and {source} have different codebooks; use files of one model")
    return ImageTokenizer(model)


def _encoder_tensors(model: TamingVQGAN, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of an image tokenizer by their names in Chameleon's format, without the decoder."""
    return {
        _VQ + (THEIR_CODEBOOK if name == OUR_CODEBOOK else name): tensor.to(dtype)
        for name, tensor in model.state_dict().items()
        if not name.startswith("decoder.")
    }


def _widest_dtype(tensors: list[StoredTensor]) -> torch.dtype:
    """The type that holds all tensors without loss."""
    if unknown := [tensor for tensor in tensors if tensor.dtype not in _DTYPES]:
        raise ModelFilesError(
            f"{unknown[0].path} has {unknown[0].name} in {unknown[0].dtype}, known are {', '.join(_DTYPES)}; use "
            "weights that are not quantised"
        )
    return reduce(torch.promote_types, {_DTYPES[tensor.dtype] for tensor in tensors})


def _carry(source: Path, folder: Path) -> None:
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _card(source: Path, config: ModelConfig) -> str:
    """The text of README.md."""
    return (
        f"# Chameleon, imported\n\nMade of `{source.name}`, a Chameleon in Hugging Face's format, by `cm3 import "
        f"chameleon`: {config.num_layers} layers of width {config.width}. The licence of the weights is that of their "
        "source.\n"
    )
