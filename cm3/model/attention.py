"""Attention behind one entry with named backends: a math reference, torch's SDPA and flash-attn.

B batch   T queries   S keys   N query heads   G key/value heads   K head width
"""

import importlib.util
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cm3.errors import ConfigError, MissingDependencyError
from cm3.model.cpu_gradients import CausalAttention, learns_on_cpu
from cm3.model.masks import AttentionMask, CacheMask, CausalMask, DocumentGroups, PackedMask
from cm3.model.sequence_parallel import SharedRows

Backend = Literal["auto", "math", "sdpa", "flash"]

_MAX_PRODUCT_TOKENS = 256
"""Longest rows (documents) for which plain products train faster than SDPA in 16 bit on a CPU."""
_MAX_BLOCK_TOKENS = 512
"""Longest rows for which `CausalAttention` trains faster than SDPA, likewise; its kept weights grow with the square."""


@cache
def has_flash_attention() -> bool:
    """Whether flash-attn is installed; does not import it."""
    return importlib.util.find_spec("flash_attn") is not None


def attend(
    q_BTNK: Float[Tensor, "B T N K"],
    k_BSGK: Float[Tensor, "B S G K"],
    v_BSGK: Float[Tensor, "B S G K"],
    *,
    mask: AttentionMask,
    backend: Backend = "auto",
) -> Float[Tensor, "B T N K"]:
    """Scaled dot-product attention (arXiv:1706.03762, equation 1), grouped-query if G < N.

    Every backend computes the same function and takes its softmax statistics in float32. Queries at padding
    give zeros. Without a cache S = T. Of rows that several processes share, all give their parts and get them back.

    Args:
        backend: "math" is the readable reference; "sdpa" runs everywhere; "flash" (flash-attn, CUDA, 16 bit)
            serves causal and packed rows and leaves rows with a cache to SDPA; "auto" takes flash where it
            is installed and applies, else SDPA.

    Raises:
        ConfigError: for an unknown backend.
        MissingDependencyError: if flash-attn is asked for and not installed.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"attention backend {backend!r} is unknown; choose {', '.join(get_args(Backend))}")
    if backend == "auto":
        fits_flash = q_BTNK.is_cuda and q_BTNK.dtype in (torch.float16, torch.bfloat16)
        backend = "flash" if fits_flash and has_flash_attention() else "sdpa"
    run = _attend_shared if isinstance(mask, SharedRows) else _attend
    return run(q_BTNK, k_BSGK, v_BSGK, mask, backend)


@torch.compiler.disable  # traced, the exchange would be inlined and its gradient might be lost
def _attend_shared(q_BLNK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, mask: SharedRows, backend: Backend) -> Tensor:
    return mask.gather_heads(_attend(*mask.gather_tokens(q_BLNK, k_BLGK, v_BLGK), mask, backend))


def _attend(q_BTNK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: AttentionMask, backend: Backend) -> Tensor:
    if backend == "math":
        return _math(q_BTNK, k_BSGK, v_BSGK, mask)
    if isinstance(mask, CacheMask):
        return _sdpa_cached(q_BTNK, k_BSGK, v_BSGK, mask)
    if isinstance(mask, PackedMask):
        run = _flash_packed if backend == "flash" else _sdpa_packed
        return run(q_BTNK, k_BSGK, v_BSGK, mask)
    if backend == "flash":
        return _flash_attn().flash_attn_func(q_BTNK, k_BSGK, v_BSGK, causal=True)
    return _sdpa_causal(q_BTNK, k_BSGK, v_BSGK)


def _math(q_BTNK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: AttentionMask) -> Tensor:
    """The definition, in float32 and with every score in memory."""
    if isinstance(mask, CausalMask):
        visible_BTS = mask.visible(q_BTNK.shape[1], q_BTNK.device)
    elif isinstance(mask, PackedMask):
        visible_BTS = mask.visible()
    else:
        visible_BTS = mask.visible_BTS
        if mask.real_BT is not None:
            visible_BTS = visible_BTS & mask.real_BT[..., None]
    group_size = q_BTNK.shape[2] // k_BSGK.shape[2]
    k_BSNK = k_BSGK.float().repeat_interleave(group_size, dim=2)
    v_BSNK = v_BSGK.float().repeat_interleave(group_size, dim=2)
    scores_BNTS = torch.einsum("btnk,bsnk->bnts", q_BTNK.float(), k_BSNK) * q_BTNK.shape[-1] ** -0.5
    hidden_B1TS = ~visible_BTS[:, None]
    # The lowest finite number, not -inf: a query that sees nothing must give zeros and not NaN.
    weights_BNTS = scores_BNTS.masked_fill(hidden_B1TS, torch.finfo(torch.float32).min).softmax(dim=-1)
    weights_BNTS = weights_BNTS.masked_fill(hidden_B1TS, 0.0)
    return torch.einsum("bnts,bsnk->btnk", weights_BNTS, v_BSNK).to(q_BTNK.dtype)


def _sdpa_causal(q_BTNK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    num_tokens, num_heads = q_BTNK.shape[1:3]
    is_trained = torch.is_grad_enabled() and (q_BTNK.requires_grad or k_BTGK.requires_grad)
    is_16_bit_cpu = q_BTNK.device.type == "cpu" and q_BTNK.element_size() == 2
    if is_trained and is_16_bit_cpu and num_tokens <= _MAX_PRODUCT_TOKENS:
        return _products_causal(q_BTNK, k_BTGK, v_BTGK)
    if is_trained and is_16_bit_cpu and num_tokens <= _MAX_BLOCK_TOKENS and learns_on_cpu(q_BTNK):
        k_BTNK, v_BTNK = (x.repeat_interleave(num_heads // x.shape[2], 2) for x in (k_BTGK, v_BTGK))
        return CausalAttention.apply(*(x.transpose(1, 2) for x in (q_BTNK, k_BTNK, v_BTNK))).transpose(1, 2)
    out_BNTK = F.scaled_dot_product_attention(
        q_BTNK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        is_causal=True,
        enable_gqa=num_heads != k_BTGK.shape[2],
    )
    return out_BNTK.transpose(1, 2)


def _products_causal(q_BTNK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Plain batched products; for short rows on a CPU in 16 bit SDPA's gradient takes four times as long."""
    batch, num_tokens, num_heads, head_width = q_BTNK.shape
    groups = num_heads // k_BTGK.shape[2]
    q_MTK = q_BTNK.transpose(1, 2).flatten(0, 1)
    k_MTK, v_MTK = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k_BTGK, v_BTGK))
    k_MTK, v_MTK = (x.transpose(1, 2).flatten(0, 1) for x in (k_MTK, v_MTK))
    mask_1TS = q_BTNK.new_full((1, num_tokens, num_tokens), float("-inf")).triu_(1)
    scores_MTS = torch.baddbmm(mask_1TS, q_MTK, k_MTK.mT, alpha=head_width**-0.5)
    out_MTK = scores_MTS.softmax(dim=-1).to(v_MTK.dtype) @ v_MTK
    return out_MTK.unflatten(0, (batch, num_heads)).transpose(1, 2)


def _sdpa_cached(q_BTNK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: CacheMask) -> Tensor:
    out_BNTK = F.scaled_dot_product_attention(
        q_BTNK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask.visible_BTS[:, None],
        enable_gqa=q_BTNK.shape[2] != k_BSGK.shape[2],
    )
    out_BTNK = out_BNTK.transpose(1, 2)
    return out_BTNK if mask.real_BT is None else out_BTNK * mask.real_BT[..., None, None]


@torch.compiler.disable  # the number and lengths of the documents differ from batch to batch
def _sdpa_packed(q_BTNK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: PackedMask) -> Tensor:
    """Documents gathered into right-padded batches, causal attention in each, results put back."""
    groups = mask.groups
    flat_q, flat_k, flat_v = (_Gather.apply(x.flatten(0, 1), groups, False) for x in (q_BTNK, k_BSGK, v_BSGK))
    outputs = []
    offset = 0
    for count, length in groups.shapes:
        rows = slice(offset, offset + count * length)
        offset = rows.stop
        q, k, v = (x[rows].unflatten(0, (count, length)) for x in (flat_q, flat_k, flat_v))
        outputs.append(_sdpa_causal(q, k, v).flatten(0, 1))
    flat_out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _Gather.apply(flat_out, groups, True).view_as(q_BTNK)


class _Gather(torch.autograd.Function):
    """Move rows from tokens to the slots of the padded batches, or back; empty places become zeros.

    The map is one-to-one, so its gradient is the opposite gather. Autograd's own gradient of indexing is an
    `index_add`, several times slower.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, groups: DocumentGroups, to_tokens: bool) -> Tensor:
        ctx.groups, ctx.to_tokens = groups, to_tokens
        return groups.to_tokens(source) if to_tokens else groups.to_slots(source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.groups.to_slots(grad) if ctx.to_tokens else ctx.groups.to_tokens(grad), None, None


def _flash_packed(q_BTNK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: PackedMask) -> Tensor:
    """flash-attn's variable-length kernel over the real tokens."""
    if mask.longest == 0:  # nothing for the kernel to do; this keeps the gradients connected
        return _sdpa_packed(q_BTNK, k_BSGK, v_BSGK, mask)
    tokens = mask.token_indices
    flat_q, flat_k, flat_v = (x.flatten(0, 1)[tokens] for x in (q_BTNK, k_BSGK, v_BSGK))
    flat_out = _flash_attn().flash_attn_varlen_func(
        flat_q,
        flat_k,
        flat_v,
        cu_seqlens_q=mask.cumulative_lengths,
        cu_seqlens_k=mask.cumulative_lengths,
        max_seqlen_q=mask.longest,
        max_seqlen_k=mask.longest,
        causal=True,
    )
    zeros = flat_out.new_zeros(mask.document_ids_BT.numel(), *flat_out.shape[1:])
    return zeros.index_copy(0, tokens, flat_out).view_as(q_BTNK)


def _flash_attn() -> Any:
    """The flash-attn package, imported only when asked for."""
    try:
        import flash_attn
    except ImportError as error:
        raise MissingDependencyError(
            "attention backend 'flash' needs the flash-attn package, which is not installed; "
            "run pip install --no-build-isolation 'open-cm3[flash]', or choose backend 'sdpa'"
        ) from error
    return flash_attn
