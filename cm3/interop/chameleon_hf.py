"""Chameleon in files of others to a folder of ours: Hugging Face's format (`model_type: chameleon`), or Meta's own.

Chameleon: arXiv:2405.09818. Weights go through memory a file at a time. Hugging Face's format has the encoder of the
image tokenizer and lacks its decoder, which Chameleon's own `vqgan.ckpt` has. Two families of models came from
Chameleon in this format with changes: Anole, some of whose folders have the decoder too, and Lumina-mGPT, whose
folders have no image tokenizer at all and one norm of queries and keys for many heads.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm3.checkpoint import (
    StoredTensor,
    check_shapes,
    new_folder,
    read_json,
    require_empty,
    stored_tensors,
    stream_model_weights,
)
from cm3.errors import ModelFilesError
from cm3.interop.chameleon_files import (
    TOKENIZER_JSON,
    ForeignChameleon,
    image_tokenizer,
    norms_are_shared,
    widest_dtype,
)
from cm3.interop.chameleon_layout import chameleon_layout, join_parts
from cm3.interop.chameleon_meta import PARAMS_FILE, meta_folder, read_meta
from cm3.interop.chameleon_names import names_of_tokenizer
from cm3.interop.chameleon_settings import model_config, vq_config
from cm3.interop.chameleon_text import GENERATION, chameleon_vocabulary
from cm3.interop.taming import OUR_CODEBOOK, THEIR_CODEBOOK
from cm3.model.config import ModelConfig
from cm3.model.pretrained import save_settings
from cm3.model.transformer import Transformer
from cm3.pretrained import CONFIG_FILE
from cm3.tokenizers.document import VOCABULARY_FILE
from cm3.tokenizers.taming import TamingConfig, TamingVQGAN

MODEL_TYPE = "chameleon"
CARRIED_FILES = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Their files of tokenizer and processor, which lie in our folder as they are, for the way back."""
_VQ = "model.vqmodel."
_LUMINA = "ChameleonXLLMX"
"""How the names of Lumina-mGPT's classes begin."""


def import_chameleon(
    source: str | Path,
    destination: str | Path,
    *,
    vqgan: str | Path | None = None,
    max_shard_size: int | str = "5GB",
) -> ModelConfig:
    """Write a Chameleon of others as a model folder of ours.

    Args:
        source: A folder of Hugging Face's, with `config.json`, `tokenizer.json` and safetensors in one file or in
            shards; or of Meta's, with `models/7b` (or that folder) and `tokenizer`.
        destination: The folder to write; must not exist, or be empty.
        vqgan: Chameleon's `vqgan.ckpt` with its YAML file beside it: the image tokenizer with its decoder. Without it
            a folder of Hugging Face's can read pictures and not draw; one of Meta's has its own.
        max_shard_size: Bytes of a weight file at most, as a number or such as "5GB"; about what is in memory at once.

    Raises:
        RequestError: the destination holds something, or the source several models or no image tokenizer.
        ModelFilesError: a file is missing or damaged, the model is no Chameleon or of a form that is not known, or
            tensors are missing, unexpected or of other shapes; the message lists them.
    """
    source, destination = Path(source), Path(destination)
    require_empty(destination)
    weights = meta_folder(source)
    found = read_meta(weights, vqgan) if weights else _read_hugging_face(source, vqgan)
    config = replace(found.config, qk_norm_per_head=not norms_are_shared(found))
    vocabulary = chameleon_vocabulary(found.names, config.vocabulary_size, str(source), named_sizes=found.named_sizes)
    if found.image.num_codes != vocabulary.image_range.size:
        raise ModelFilesError(
            f"{source} names {vocabulary.image_range.size} image codes, its image tokenizer has {found.image.num_codes}"
        )
    dtype = widest_dtype(found.tensors.values())
    with torch.device("meta"):
        planned = Transformer(config).to(dtype).state_dict()

    def make(name: str) -> Tensor:
        return join_parts(found.layout[name], lambda part: found.tensors[part].read().to(dtype), planned[name].shape)

    with new_folder(destination) as folder:
        stream_model_weights(folder, planned, make, max_shard_size)
        found.image.save(folder)
        vocabulary.save(folder / VOCABULARY_FILE)
        found.save_text_files(folder)
        text_hash = hashlib.sha256((folder / TOKENIZER_JSON).read_bytes()).hexdigest()
        tokenizer_hash = hashlib.sha256("\n".join((text_hash, found.image.hash, vocabulary.hash)).encode()).hexdigest()
        save_settings(
            folder,
            config,
            tokenizer_hash=tokenizer_hash,
            card=_card(found.origin, config),
            generation=GENERATION,
            dtype=dtype,
        )
    return config


def carry_text_files(source: Path, folder: Path) -> None:
    """Copy what there is of tokenizer and processor."""
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def vq_tensors(model: TamingVQGAN, dtype: torch.dtype = torch.float32, *, decoder: bool = False) -> dict[str, Tensor]:
    """The tensors of an image tokenizer by their names in Hugging Face's format."""
    return {
        _VQ + (THEIR_CODEBOOK if name == OUR_CODEBOOK else name): tensor.to(dtype)
        for name, tensor in model.state_dict().items()
        if decoder or not name.startswith("decoder.")
    }


def _read_hugging_face(source: Path, vqgan: str | Path | None) -> ForeignChameleon:
    """Look into a folder, every tensor accounted for, those of the image tokenizer included."""
    settings = _settings(source)
    path = source / CONFIG_FILE
    config, vq = model_config(settings, path), vq_config(settings, path)
    stored = stored_tensors(source)
    vq = replace(vq, decoder=any(name.startswith(f"{_VQ}decoder.") for name in stored))
    layout = chameleon_layout(config, _norm_rows(stored, config, source))
    expected = {part.name: part.shape for parts in layout.values() for part in parts}
    if any(name.startswith(_VQ) for name in stored):
        expected |= _vq_shapes(vq)
    check_shapes(expected, {name: tensor.shape for name, tensor in stored.items()}, str(source), "Chameleon")
    vq_stored = {name.removeprefix(_VQ): tensor for name, tensor in stored.items() if name.startswith(_VQ)}
    is_lumina = any(name.startswith(_LUMINA) for name in settings.get("architectures") or ())
    return ForeignChameleon(
        config=config,
        layout=layout,
        tensors={name: tensor for name, tensor in stored.items() if not name.startswith(_VQ)},
        names=_names(settings, source),
        image=image_tokenizer(vq_stored, vq, vqgan, source),
        save_text_files=lambda target: carry_text_files(source, target),
        origin=f"`{source.name}`, a {'Lumina-mGPT' if is_lumina else 'Chameleon'} in Hugging Face's format",
        named_sizes=is_lumina,
    )


def _settings(source: Path) -> dict[str, Any]:
    if not (source / CONFIG_FILE).is_file():
        raise ModelFilesError(
            f"{source} has neither {CONFIG_FILE}, as Hugging Face's folders, nor {PARAMS_FILE} or models/7b/"
            f"{PARAMS_FILE}, as Meta's; check the path"
        )
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
    if not isinstance(mapped, dict) or not all(isinstance(id, int) for id in mapped.values()):
        raise ModelFilesError(f"the vocabulary_map of {source / CONFIG_FILE} is no table of ids; download it again")
    if other := [name for name, id in mapped.items() if names.get(name, id) != id]:
        raise ModelFilesError(
            f"{path} has {other[0]} at id {names[other[0]]}, the vocabulary_map of {CONFIG_FILE} at "
            f"{mapped[other[0]]}; use the files of one model"
        )
    return names | mapped


def _norm_rows(stored: Mapping[str, StoredTensor], config: ModelConfig, source: Path) -> tuple[int, int]:
    """Rows of the norms of queries and keys: one for each head, or for as many neighbouring heads as share one."""
    rows = []
    for name, heads in (("q_norm", config.num_heads), ("k_norm", config.key_value_heads)):
        first = stored.get(f"model.layers.0.self_attn.{name}.weight")
        shape = first.shape if first else ()
        if len(shape) == 1:
            raise ModelFilesError(
                f"{source} has one {name} of {shape[0]} for all heads, as the copy of transformers in Anole's "
                "repository writes it; the rows of queries and keys then stand in another order. Convert it with its "
                "training/bin_to_pth.py and import the result"
            )
        rows.append(shape[0] if len(shape) == 2 and 0 < shape[0] <= heads and heads % shape[0] == 0 else heads)
    return rows[0], rows[1]


def _vq_shapes(config: TamingConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in vq_tensors(TamingVQGAN(config), decoder=True).items()}


def _card(origin: str, config: ModelConfig) -> str:
    """The text of README.md."""
    return (
        f"# Chameleon, imported\n\nMade of {origin}, by `cm3 import chameleon`: {config.num_layers} layers of width "
        f"{config.width}. The licence of the weights is that of their source.\n"
    )
