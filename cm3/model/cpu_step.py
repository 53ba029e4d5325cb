"""One decoding step on a CPU in one call, for a model and a cache: `kernels.cpp` does what `Transformer` describes.

Else a step is some thousand operations on a few numbers each, which take as long as reading the weights.

B batch   D width
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cm3.errors import RequestError
from cm3.model.cache import KeyValueCache
from cm3.model.config import ModelConfig
from cm3.model.kernels import Address, Count, Matrix, library, multiplies
from cm3.model.layers import HeadNorm, Norm, rotary_table

_ACTIVATIONS = {"relu": 0, "gelu": 1, "swiglu": 2}
_CACHES = {torch.float32: 0, torch.bfloat16: 1}


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, Address) for name in ("attention_norm", "feed_forward_norm")],
        *[(name, Address) for name in ("q_weight", "q_bias", "k_weight", "k_bias")],
        *[(name, Matrix) for name in ("qkv", "attention_out", "up", "feed_forward_out")],
        *[(name, Address) for name in ("keys", "values")],
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, Address) for name in ("layers", "final_norm", "rotary")],
        *[(name, Count) for name in ("num_layers", "width", "num_heads", "groups", "head_width", "inner_width")],
        *[(name, Count) for name in ("activation", "is_swin", "cache_kind", "row_stride")],
        ("epsilon", ctypes.c_float),
    ]


class CpuStep:
    """Steps of one token a row, see `fits`. Small weights are copied: make it anew when they change.

    Args:
        model: a `Transformer`, whose module imports this one.
        cache: whose memory is written to at every step.
    """

    def __init__(self, model: Any, cache: KeyValueCache) -> None:
        config = model.config
        self._kept: list[Any] = [model, cache.keys_LBSGK, cache.values_LBSGK]
        blocks = list(model.blocks)
        layers = (_Layer * config.num_layers)(*(self._layer(block, cache, i) for i, block in enumerate(blocks)))
        rotary = None
        if config.position == "rope":
            positions_1S = torch.arange(cache.capacity + 1)[None]
            table = rotary_table(positions_1S, config.head_width, config.rope_theta)
            rotary = self._floats(torch.view_as_real(table))
        self._kept.append(layers)
        self._step = _Step(
            ctypes.addressof(layers),
            self._floats(model.final_norm.weight),
            rotary,
            config.num_layers,
            config.width,
            config.num_heads,
            config.key_value_heads,
            config.head_width,
            config.ffn_width,
            _ACTIVATIONS[config.activation],
            config.norm_order == "swin",
            _CACHES[cache.keys_LBSGK.dtype],
            cache.keys_LBSGK.stride(1),
            config.norm_epsilon,
        )
        rows, slots = len(cache.lengths_B), cache.capacity + 1
        self._rows = rows
        widest = max(layers[0].qkv.outputs, layers[0].up.outputs)
        inner = max(config.ffn_width, config.width)
        sizes = (rows * config.width, rows * widest, rows * inner, (rows + 16) * inner, rows * config.num_heads * slots)
        self._room = [torch.empty(size) for size in sizes]
        self._slots = slots

    def __call__(self, x_BD: Float[Tensor, "B D"], lengths_B: Int[Tensor, " rows"]) -> Float[Tensor, "B D"]:
        """Hidden states after the final norm, of new tokens that are now in the cache behind as many as it held.

        Args:
            x_BD: embeddings.
            lengths_B: tokens that each row of the cache holds. What is fed to a row that rests comes behind them, too,
                where nobody looks at it and the next token takes its place.
        """
        found = library()
        assert found is not None
        if not len(x_BD) == len(lengths_B) == self._rows:
            raise RequestError(
                f"{len(x_BD)} rows of ids were given for {len(lengths_B)} lengths and a cache of {self._rows} rows; "
                "give one row of ids for each row of the cache"
            )
        lengths_B = lengths_B.to("cpu", torch.int64).contiguous()
        x_BD = x_BD.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        room = [part.data_ptr() for part in self._room]
        threads = torch.get_num_threads()
        step, lengths = ctypes.addressof(self._step), lengths_B.data_ptr()
        outside = found.decode(step, len(x_BD), threads, lengths, self._slots, x_BD.data_ptr(), *room)
        if outside:
            raise RequestError(
                f"{outside} rows of a cache of {self._slots - 1} tokens are full and were given one more; "
                "create it with more capacity"
            )
        return self._room[0].view_as(x_BD)

    def _layer(self, block: Any, cache: KeyValueCache, index: int) -> _Layer:
        attention, feed_forward = block.attention, block.feed_forward
        matrices = (attention.qkv, attention.out, feed_forward.up, feed_forward.out)
        return _Layer(
            self._floats(block.attention_norm.weight),
            self._floats(block.feed_forward_norm.weight),
            *self._head_norm(attention.q_norm, attention.heads[0]),
            *self._head_norm(attention.k_norm, attention.heads[1]),
            *[self._matrix(*module.matrix) for module in matrices],
            cache.keys_LBSGK[index].data_ptr(),
            cache.values_LBSGK[index].data_ptr(),
        )

    def _head_norm(self, norm: Any, num_heads: int) -> tuple[int | None, int | None]:
        """Weight and bias of every head."""
        if norm is None:
            return None, None
        copies = 1 if isinstance(norm, HeadNorm) else num_heads
        return self._floats(norm.weight.repeat(copies)), self._floats(norm.bias.repeat(copies))

    def _matrix(self, weight_ND: Tensor, scale_N: Tensor | None) -> Matrix:
        self._kept.append(weight_ND)
        if scale_N is not None:
            scale_N = scale_N.float()
            self._kept.append(scale_N)
        return Matrix.of(weight_ND, scale_N)

    def _floats(self, values: Tensor | None) -> int | None:
        """The address of values in float32."""
        if values is None:
            return None
        self._kept.append(values.detach().to("cpu", torch.float32).contiguous())
        return self._kept[-1].data_ptr()


def fits(model: Any, cache: KeyValueCache) -> bool:
    """Whether `CpuStep` can take the place of the model's blocks on this cache.

    That is on a CPU with a compiler, for so few rows that reading the weights takes longest, and if nobody watches or
    has replaced the parts of a block.
    """
    config, memory = model.config, (cache.keys_LBSGK, cache.values_LBSGK)
    if len(model.blocks) != config.num_layers or not all(_fits_memory(part, config) for part in memory):
        return False
    if len({(part.dtype, part.shape[:3], part.stride(1)) for part in memory}) > 1:
        return False
    modules = [*model.blocks.modules(), *model.final_norm.modules()]
    if type(model.final_norm) is not Norm or any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return False
    for block in model.blocks:
        parts = [block.attention.qkv, block.attention.out, block.feed_forward.up, block.feed_forward.out]
        matrices = [getattr(part, "matrix", None) for part in parts]
        if not all(found is not None and multiplies(found[0], len(cache.lengths_B)) for found in matrices):
            return False
    return len(cache.lengths_B) == cache.keys_LBSGK.shape[1] and not (model.training and config.dropout)


def _fits_memory(part_LBSGK: Tensor, config: ModelConfig) -> bool:
    """Whether keys or values of a cache are the model's, in memory and the slots of a row behind each other."""
    if type(part_LBSGK) is not Tensor or part_LBSGK.device.type != "cpu" or part_LBSGK.dtype not in _CACHES:
        return False
    num_layers, *_, groups, head_width = part_LBSGK.shape
    is_models = (num_layers, groups, head_width) == (config.num_layers, config.key_value_heads, config.head_width)
    return is_models and part_LBSGK[:1, :1].is_contiguous()
