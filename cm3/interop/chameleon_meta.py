"""Chameleon in Meta's own format, which Anole is released in too: a folder with `params.json` and `consolidated.pth`.

A model that was trained on several devices lies in as many files, each with a part of every tensor. Parts are put
together as tensor-parallel layers are: those that make outputs by their rows, those that take inputs by their columns.
The norms of queries and keys were trained apart and differ, so every part keeps its own for its heads.

K width per head
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cm3.checkpoint import check_shapes, read_json, write_json
from cm3.errors import ModelFilesError, RequestError
from cm3.interop.chameleon_files import DTYPES, TOKENIZER_JSON, ForeignChameleon
from cm3.interop.chameleon_layout import Part, chameleon_layout
from cm3.interop.chameleon_names import names_of_tokenizer, with_placeholder
from cm3.interop.chameleon_settings import model_config
from cm3.interop.pickled import read_values
from cm3.interop.taming import load_vqgan
from cm3.model.config import ModelConfig
from cm3.tokenizers.image import ImageTokenizer

PARAMS_FILE = "params.json"
PARALLEL_FILE = "consolidate_params.json"
_TOKENIZER_FOLDER = "tokenizer"
_TEXT_TOKENIZER = "text_tokenizer.json"
_IMAGE_TOKENIZER = "vqgan.ckpt"
_MOST_PARTS = 1024
_DERIVED = "rope.freqs"
"""A tensor that follows from the settings; Anole's tools write None in its place."""

Join = Literal["rows", "columns", "heads", "mean"]
"""How the parts of a tensor make the whole: rows or columns of it, a row of its own each, or copies."""

_MODULES: dict[str, tuple[str, Join]] = {
    "model.embed_tokens": ("tok_embeddings", "columns"),
    "model.norm": ("norm", "mean"),
    "lm_head": ("output", "rows"),
    "input_layernorm": ("attention_norm", "mean"),
    "self_attn.q_proj": ("attention.wq", "rows"),
    "self_attn.k_proj": ("attention.wk", "rows"),
    "self_attn.v_proj": ("attention.wv", "rows"),
    "self_attn.o_proj": ("attention.wo", "columns"),
    "self_attn.q_norm": ("attention.q_normalization", "heads"),
    "self_attn.k_norm": ("attention.k_normalization", "heads"),
    "post_attention_layernorm": ("ffn_norm", "mean"),
    "mlp.gate_proj": ("feed_forward.w1", "rows"),
    "mlp.up_proj": ("feed_forward.w3", "rows"),
    "mlp.down_proj": ("feed_forward.w2", "columns"),
}
"""Hugging Face's names of the modules, Meta's, and how the parts are joined."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardedTensor(NamedTuple):
    """A tensor whose parts lie in several files under one name, not read yet."""

    paths: tuple[Path, ...]
    name: str
    shape: tuple[int, ...]
    dtype: str
    join: Join

    @property
    def path(self) -> Path:
        """The file of the first part."""
        return self.paths[0]

    def read(self) -> Tensor:
        """Return the whole; of the files, which are mapped and not loaded, only its parts are read."""
        parts: list[Tensor] = [read_values(path)[self.name] for path in self.paths]
        if self.join == "heads":
            return torch.stack(parts)
        if len(parts) == 1:
            return parts[0]
        if self.join == "mean":
            return torch.stack(parts).float().mean(dim=0).to(parts[0].dtype)
        return torch.cat(parts, dim=0 if self.join == "rows" else 1)


def meta_folder(source: Path) -> Path | None:
    """The folder of the weights, where `source` is that or the folder of a release; None: it has another format.

    Raises:
        RequestError: there are several models.
    """
    if (source / PARAMS_FILE).is_file():
        return source
    found = sorted(path.parent for path in source.glob(f"models/*/{PARAMS_FILE}"))
    if len(found) > 1:
        raise RequestError(
            f"{source} holds several models ({', '.join(path.name for path in found)}); give the folder of one, such "
            f"as {found[0]}"
        )
    return found[0] if found else None


def read_meta(folder: Path, vqgan: str | Path | None = None) -> ForeignChameleon:
    """Look into a folder of `meta_folder`, every tensor accounted for.

    Args:
        folder: Has the settings and weights; the tokenizers lie in `tokenizer`, beside the folder of all models.
        vqgan: Another place of `vqgan.ckpt`, which has its YAML file beside it.

    Raises:
        ModelFilesError: a file is missing or damaged, the model is of a form that is not known, or tensors are missing,
            unexpected or of other shapes; the message lists them.
    """
    params = _params(folder)
    config = model_config(_settings(params, folder), folder / PARAMS_FILE)
    paths = _shard_paths(folder, params)
    layout, joins = _meta_layout(config, len(paths))
    tokenizers = folder.absolute().parent.parent / _TOKENIZER_FOLDER
    text_path = tokenizers / _TEXT_TOKENIZER
    tokenizer = with_placeholder(read_json(text_path), str(text_path))
    return ForeignChameleon(
        config=config,
        layout=layout,
        tensors=_tensors(paths, layout, joins),
        names=names_of_tokenizer(tokenizer, str(text_path)),
        image=ImageTokenizer(load_vqgan(vqgan or tokenizers / _IMAGE_TOKENIZER)),
        save_text_files=lambda target: write_json(target / TOKENIZER_JSON, tokenizer),
        origin=f"`{folder.name}`, a Chameleon in Meta's format",
    )


def _params(folder: Path) -> dict[str, Any]:
    """The settings of both files; the model's own may lie a level deeper."""
    params, parallel = read_json(folder / PARAMS_FILE), read_json(folder / PARALLEL_FILE)
    if not all(isinstance(part, dict) for part in (params, parallel)) or not isinstance(params.get("model", {}), dict):
        raise ModelFilesError(f"{folder} has no settings in {PARAMS_FILE} and {PARALLEL_FILE}; download them again")
    return {**params, **params.get("model", {}), **parallel}


def _settings(params: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Meta's settings under Hugging Face's names."""
    if not params.get("qk_normalization", False):
        raise ModelFilesError(f"{folder / PARAMS_FILE} has no qk_normalization, which every Chameleon that is read has")
    try:
        theta = params.get("rope_theta", 10_000.0)
        return {
            "vocab_size": params["vocab_size"],
            "hidden_size": params["dim"],
            "intermediate_size": _inner_width(params),
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params.get("n_kv_heads"),
            "max_position_embeddings": 4096 if theta <= 10_000.0 else 16_384,  # as transformers' converter has it
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "rope_theta": theta,
            "swin_norm": params.get("swin_norm", False),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFilesError(f"{folder / PARAMS_FILE} cannot be used ({error}); download it again") from error


def _inner_width(params: Mapping[str, Any]) -> int:
    """Two thirds of four times the width, times a factor, rounded up to a multiple."""
    multiplier = params.get("ffn_dim_multiplier")
    multiple: int = params.get("multiple_of", 256)
    width: int = 8 * params["dim"] // 3
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple) * multiple


def _shard_paths(folder: Path, params: Mapping[str, Any]) -> tuple[Path, ...]:
    count = params.get("model_parallel_size", 1)
    if not isinstance(count, int) or not 1 <= count <= _MOST_PARTS:
        raise ModelFilesError(f"{folder / PARALLEL_FILE} has model_parallel_size={count!r}; download it again")
    whole = folder / "consolidated.pth"
    paths = (
        (whole,)
        if count == 1 and whole.is_file()
        else tuple(folder / f"consolidated.{index:02}.pth" for index in range(count))
    )
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ModelFilesError(f"{folder} lacks {', '.join(missing)} of {count} file(s) of weights; download all")
    return paths


def _meta_layout(config: ModelConfig, count: int) -> tuple[dict[str, tuple[Part, ...]], dict[str, Join]]:
    """The layout under Meta's names, and how the parts of each tensor are joined."""
    layout: dict[str, tuple[Part, ...]] = {}
    joins: dict[str, Join] = {}
    for ours, parts in chameleon_layout(config, norm_rows=(count, count)).items():
        layout[ours] = ()
        for part in parts:
            name, join = _name_and_join(part.name)
            layout[ours] += (part._replace(name=name, rotated_heads=0),)  # rotated rows stand as they do in ours
            joins[name] = join
    return layout, joins


def _name_and_join(name: str) -> tuple[str, Join]:
    """Of Hugging Face's name of a tensor: Meta's, and how its parts are joined."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.(layers\.\d+)\.(.+)", module):
        own, join = _MODULES[match[2]]
        return f"{match[1]}.{own}.{kind}", join
    own, join = _MODULES[module]
    return f"{own}.{kind}", join


def _tensors(
    paths: tuple[Path, ...], layout: Mapping[str, tuple[Part, ...]], joins: Mapping[str, Join]
) -> dict[str, ShardedTensor]:
    """The tensors by name, when every file has its part of each in the right shape."""
    shapes = {part.name: part.shape for parts in layout.values() for part in parts}
    expected = {name: _part_shape(shape, joins[name], len(paths)) for name, shape in shapes.items()}
    dtypes: dict[str, str] = {}
    for path in paths:
        values = read_values(path)
        found = {name: value for name, value in values.items() if name != _DERIVED} if isinstance(values, dict) else {}
        if not found or not all(isinstance(value, Tensor) for value in found.values()):
            raise ModelFilesError(f"{path} holds no tensors by name; download it again")
        check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in found.items()}, str(path), "Chameleon")
        dtypes |= {name: _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in found.items()}
    return {name: ShardedTensor(paths, name, shape, dtypes[name], joins[name]) for name, shape in shapes.items()}


def _part_shape(shape: tuple[int, ...], join: Join, count: int) -> tuple[int, ...]:
    """The shape in each of `count` files of a tensor that has `shape` when it is joined."""
    if join == "rows":
        return (shape[0] // count, *shape[1:])
    if join == "columns":
        return (shape[0], shape[1] // count)
    return shape[1:] if join == "heads" else shape
