"""How Hugging Face names and lays out the tensors of a Chameleon, and how the rows of ours are made of them.

Ours fuse what one product can serve: queries, keys and values; gate and value of the feed-forward. The two elements
that a rotary position turns are neighbours in ours (as in Meta's own files) and half a head apart in theirs.

V vocabulary   D width   N query heads   G key/value heads   K head width   F feed-forward width
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from cm3.model.config import ModelConfig


class Part(NamedTuple):
    """A foreign tensor, whose rows are some of the rows of one of ours."""

    name: str
    shape: tuple[int, ...]
    rotated_heads: int = 0
    """Heads whose rows are turned by positions and stand in another order in ours; 0: the same order."""
    repeats: int = 1
    """Heads that share each row of a norm."""


def chameleon_layout(config: ModelConfig, norm_rows: tuple[int, int] | None = None) -> dict[str, tuple[Part, ...]]:
    """By the name of each tensor of `Transformer(config)`: the foreign tensors that hold its rows, in order.

    Args:
        config: Of a Chameleon.
        norm_rows: Rows of the norms of queries and of keys, each for as many neighbouring heads; None: one for every
            head, as `transformers` has them.
    """
    vocabulary = (config.vocabulary_size, config.width)
    layout: dict[str, tuple[Part, ...]] = {
        "embedding.weight": (Part("model.embed_tokens.weight", vocabulary),),
        "final_norm.weight": (Part("model.norm.weight", (config.width,)),),
        "head.weight": (Part("lm_head.weight", vocabulary),),
    }
    for index in range(config.num_layers):
        for name, parts in _block_layout(config, norm_rows).items():
            layout[f"blocks.{index}.{name}"] = tuple(
                part._replace(name=f"model.layers.{index}.{part.name}") for part in parts
            )
    return layout


def _block_layout(config: ModelConfig, norm_rows: tuple[int, int] | None) -> dict[str, tuple[Part, ...]]:
    width, inner = config.width, config.ffn_width
    heads, groups, head_width = config.num_heads, config.key_value_heads, config.head_width
    query, key_value = (heads * head_width, width), (groups * head_width, width)
    layout: dict[str, tuple[Part, ...]] = {
        "attention_norm.weight": (Part("input_layernorm.weight", (width,)),),
        "attention.qkv.weight": (
            Part("self_attn.q_proj.weight", query, heads),
            Part("self_attn.k_proj.weight", key_value, groups),
            Part("self_attn.v_proj.weight", key_value),
        ),
        "attention.out.weight": (Part("self_attn.o_proj.weight", (width, width)),),
        "feed_forward_norm.weight": (Part("post_attention_layernorm.weight", (width,)),),
        "feed_forward.up.weight": (
            Part("mlp.gate_proj.weight", (inner, width)),
            Part("mlp.up_proj.weight", (inner, width)),
        ),
        "feed_forward.out.weight": (Part("mlp.down_proj.weight", (width, inner)),),
    }
    for name, count, rows in zip(("q_norm", "k_norm"), (heads, groups), norm_rows or (heads, groups), strict=True):
        for kind in ("weight", "bias"):
            part = Part(f"self_attn.{name}.{kind}", (rows, head_width), rows, count // rows)
            layout[f"attention.{name}.{kind}"] = (part,)
    return layout


def join_parts(parts: Sequence[Part], read: Callable[[str], Tensor], shape: torch.Size) -> Tensor:
    """One of our tensors, of the foreign ones that `read` gives by name.

    Theirs keep several norms of queries and keys for their heads; where our shape has room for one, it is the first.
    """
    rows = [_rows(read(part.name).reshape(-1, *shape[1:]), part) for part in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows))[: shape[0]]


def _rows(tensor: Tensor, part: Part) -> Tensor:
    rows = _to_pairs(tensor, part.rotated_heads)
    if part.repeats == 1:
        return rows
    return rows.unflatten(0, (part.shape[0], -1)).repeat_interleave(part.repeats, dim=0).flatten(0, 1)


def split_parts(tensor: Tensor, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
    """Yield the foreign names and tensors of one of ours: the inverse of `join_parts`, with a norm for every head."""
    counts = [prod(part.shape) // prod(tensor.shape[1:]) for part in parts]
    if len(tensor) < sum(counts):  # a norm that all heads share
        tensor = tensor.repeat(sum(counts) // len(tensor))
    for part, rows in zip(parts, tensor.split(counts), strict=True):
        yield part.name, _to_halves(rows, part.rotated_heads).reshape(part.shape)


def _to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head: from first halves, then second halves, to pairs of one of either."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else rows


def _to_halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `_to_pairs`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else rows
