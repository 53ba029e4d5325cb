"""OpenCLIP weight files, renamed for Hugging Face's CLIP: the same network under other names (arXiv 2212.07143).

The open_clip package is not needed. Its tokenizer is CLIP's: the files of any CLIP on the Hub, beside the weights.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cm3.checkpoint import load_strict, load_tensors
from cm3.errors import ModelFilesError, RequestError
from cm3.retrieval.foreign_clip import (
    ForeignClipEncoder,
    Preprocessing,
    empty_model,
    hash_files,
    load_tokenizer,
    tokenizer_files,
)

OPEN_CLIP_PREFIX = "open_clip:"
QUICK_GELU_SUFFIX = "-quickgelu"
"""Ends the name of an architecture whose activation is x * sigmoid(1.702 x), as in OpenAI's weights."""


class Heads(NamedTuple):
    """The numbers of attention heads, which the shapes of the weights do not tell."""

    image: int
    text: int


ARCHITECTURES = {
    "ViT-B-32": Heads(12, 8),
    "ViT-B-16": Heads(12, 8),
    "ViT-L-14": Heads(16, 12),
    "ViT-H-14": Heads(16, 16),
    "ViT-g-14": Heads(16, 16),
}


def load_open_clip(name: str, device: str | torch.device | None = None) -> ForeignClipEncoder:
    """Open `open_clip:ARCHITECTURE:FILE`, such as `open_clip:ViT-B-32:weights/open_clip_model.safetensors`.

    The tokenizer's files (`tokenizer.json`, or `vocab.json` and `merges.txt`) lie in the folder of FILE, as they do
    in OpenCLIP's repositories on the Hub.

    Raises:
        RequestError: another form of name, or an unknown architecture.
        MissingDependencyError: transformers is not installed.
        ModelFilesError: the files are missing, damaged or of another architecture.
    """
    architecture, _, file = name.removeprefix(OPEN_CLIP_PREFIX).partition(":")
    heads = ARCHITECTURES.get(architecture.removesuffix(QUICK_GELU_SUFFIX))
    if heads is None or not file:
        raise RequestError(
            f"{name!r} is not {OPEN_CLIP_PREFIX}ARCHITECTURE:FILE with an architecture of {', '.join(ARCHITECTURES)}, "
            f"each also with {QUICK_GELU_SUFFIX}"
        )
    tokenizer = load_tokenizer(Path(file).parent)
    tensors = _read(Path(file))
    try:
        renamed = rename_open_clip(tensors)
        settings = infer_config(tensors, heads, quick_gelu=architecture.endswith(QUICK_GELU_SUFFIX))
    except (KeyError, IndexError) as error:
        raise ModelFilesError(f"{file} holds no OpenCLIP {architecture}: {error} is missing") from error
    model = empty_model(settings)
    load_strict(model, renamed, file)
    side = settings["vision_config"]["image_size"]
    preprocessing = Preprocessing(size=side, crop_size=side, round_crop=True)
    source_hash = hash_files([Path(file), *tokenizer_files(Path(file).parent)])
    return ForeignClipEncoder(model, tokenizer, preprocessing, f"{architecture} {source_hash}", device)


def rename_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an OpenCLIP state dict under the names of `transformers.CLIPModel`."""
    renamed = {
        "logit_scale": tensors["logit_scale"],
        "text_model.embeddings.token_embedding.weight": tensors["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": tensors["positional_embedding"],
        "text_projection.weight": tensors["text_projection"].T,
        "vision_model.embeddings.class_embedding": tensors["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": tensors["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": tensors["visual.positional_embedding"],
        "visual_projection.weight": tensors["visual.proj"].T,
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",  # the library's spelling
        "visual.ln_post": "vision_model.post_layernorm",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts |= {"attn.out_proj": "self_attn.out_proj"}
    for old, new in (("transformer", "text_model"), ("visual.transformer", "vision_model")):
        for layer in range(_num_layers(tensors, old)):
            source, target = f"{old}.resblocks.{layer}", f"{new}.encoder.layers.{layer}"
            norms |= {f"{source}.{before}": f"{target}.{after}" for before, after in parts.items()}
            for kind in ("weight", "bias"):
                thirds = tensors[f"{source}.attn.in_proj_{kind}"].chunk(3)
                renamed |= {f"{target}.self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", thirds)}
    for before, after in norms.items():
        renamed |= {f"{after}.{kind}": tensors[f"{before}.{kind}"] for kind in ("weight", "bias")}
    return renamed


def infer_config(tensors: Mapping[str, Tensor], heads: Heads, quick_gelu: bool) -> dict[str, Any]:
    """The settings of `transformers.CLIPConfig` that the shapes of an OpenCLIP state dict tell."""
    activation = "quick_gelu" if quick_gelu else "gelu"
    vocabulary_size, text_width = tensors["token_embedding.weight"].shape
    image_width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
    num_positions = len(tensors["visual.positional_embedding"])
    text = {
        "vocab_size": vocabulary_size,
        "hidden_size": text_width,
        "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _num_layers(tensors, "transformer"),
        "num_attention_heads": heads.text,
        "max_position_embeddings": len(tensors["positional_embedding"]),
        "hidden_act": activation,
        "bos_token_id": vocabulary_size - 2,
        "eos_token_id": vocabulary_size - 1,
        "pad_token_id": vocabulary_size - 1,
    }
    vision = {
        "hidden_size": image_width,
        "intermediate_size": len(tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _num_layers(tensors, "visual.transformer"),
        "num_attention_heads": heads.image,
        "image_size": patch_size * int((num_positions - 1) ** 0.5),
        "patch_size": patch_size,
        "hidden_act": activation,
    }
    return {"text_config": text, "vision_config": vision, "projection_dim": tensors["text_projection"].shape[1]}


def _num_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    start = f"{prefix}.resblocks."
    return len({name[len(start) :].split(".")[0] for name in tensors if name.startswith(start)})


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one that `torch.save` wrote."""
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ModelFilesError(f"cannot read {path} as a file of tensors ({error}); download it again") from error
    return {name.removeprefix("module."): tensor for name, tensor in tensors.get("state_dict", tensors).items()}
