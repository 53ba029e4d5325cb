"""Weights of 8 bits, for inference: half of bf16's memory, and half the bytes to read at every step of decoding.

Weight-only, as in CM3Leon's figure 10 (arXiv:2309.02591): every row of a matrix, which makes one output, is rounded to
whole multiples of its largest magnitude / 127; activations are not.

R rows   D width   N outputs   M digits of rows
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from cm3.errors import RequestError
from cm3.model.transformer import Transformer

Quantization = Literal["int8"]

_LARGEST = 127
_BASE = 2 * _LARGEST
"""Of the digits of activations: each is at most `_LARGEST`, of either sign."""

_HAS_WHOLE_PRODUCTS = torch.cpu._is_vnni_supported()
"""Whether the processor sums products of 8 bits exactly (Intel's VNNI); without it sums were seen to be cut off."""

_PACKED_ROWS = range(1, 3) if _HAS_WHOLE_PRODUCTS else range(1, 33)
"""For which numbers of rows in bf16 torch's own product was measured to be the fastest with 8 bits on a CPU."""

_PACKED_STEP = 16
"""Inputs that this product reads at once, without looking whether so many are left in the row."""

_DIGIT_ROWS = range(1, 129) if _HAS_WHOLE_PRODUCTS else range(0)
"""For which other numbers of rows products of digits were."""

_BLOCK_SIZE = 1 << 20
"""Weights that a CPU widens at a time, so that they stay in its cache; a whole matrix would need fresh memory."""


class Int8Linear(nn.Module):
    """A product with a weight matrix of 8 bits, in the place of `cm3.model.layers.Linear`; it cannot be trained."""

    weight: Int8[Tensor, "N D"]
    scale: Float[Tensor, " N"]

    def __init__(self, weight_ND: Float[Tensor, "N D"]) -> None:
        super().__init__()
        rounded_ND, scale_N = quantize_rows(weight_ND)
        self.register_buffer("weight", rounded_ND)
        self.register_buffer("scale", scale_N.to(weight_ND.dtype))

    @property
    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """Weights, and the scale of each row."""
        return self.weight, self.scale

    def forward(self, x_BD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B N"]:
        return int8_product(x_BD, self.weight, self.scale)


def check_quantization(name: str | None) -> None:
    """Raise RequestError for a rounding that does not exist; None is none."""
    if name is not None and name not in get_args(Quantization):
        raise RequestError(
            f"quantize={name!r} is unknown; choose {', '.join(get_args(Quantization))}, or leave it out for the "
            "weights as they are"
        )


def quantize_blocks(transformer: Transformer) -> None:
    """Round the matrices of all blocks to 8 bits, in place; embeddings, norms and head stay as they are.

    Embedding and head are a small part of a large model, and one tensor where they are tied: what reads it, the
    decoding engine and the loss, finds there the type to compute in. The model is frozen and in evaluation mode
    afterwards, and stays so: nothing smaller than a step of the rounding could be learned.
    """
    for module in list(transformer.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight.detach()))
    transformer.requires_grad_(False).eval()
    transformer.refuses_training = "a model with int8 weights cannot be trained; load it without quantize"


def is_quantized(transformer: Transformer) -> bool:
    """Whether `quantize_blocks` was here."""
    return any(isinstance(module, Int8Linear) for module in transformer.modules())


def quantize_rows(weight_ND: Float[Tensor, "N D"]) -> tuple[Int8[Tensor, "N D"], Float[Tensor, " N"]]:
    """Whole numbers up to 127 in magnitude and a scale for each row, whose product is within scale / 2 of the weights.

    Scales are rounded to bf16 before they are divided by, so that models of any type have the same weights.
    """
    scale_N = (weight_ND.float().abs().amax(dim=1) / _LARGEST).bfloat16().float()
    divisor_N = torch.where(scale_N > 0, scale_N, 1.0)
    rounded_ND = (weight_ND.float() / divisor_N[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return rounded_ND.to(torch.int8), scale_N


def int8_product(
    x_BD: Float[Tensor, "*B D"], weight_ND: Int8[Tensor, "N D"], scale_N: Float[Tensor, " N"]
) -> Float[Tensor, "*B N"]:
    """`F.linear` with the weights `scale_N[:, None] * weight_ND`.

    On a CPU a row or two go to torch's kernel if their width suits it, and up to 128 are multiplied as whole numbers,
    see `digits`. Else the weights are widened first, which `torch.compile` can do within the product on a GPU.
    """
    num_rows = x_BD.numel() // x_BD.shape[-1]
    is_cpu = x_BD.device.type == "cpu"
    can_be_packed = x_BD.dtype == torch.bfloat16 and weight_ND.shape[1] % _PACKED_STEP == 0
    if is_cpu and can_be_packed and num_rows in _PACKED_ROWS:
        x_RD = x_BD.reshape(num_rows, -1).contiguous()
        return torch._weight_int8pack_mm(x_RD, weight_ND, scale_N.bfloat16()).unflatten(0, x_BD.shape[:-1])
    if is_cpu and num_rows in _DIGIT_ROWS:
        out_RN = _digit_product(x_BD.reshape(num_rows, -1), weight_ND, scale_N)
        return out_RN.unflatten(0, x_BD.shape[:-1])
    block = max(1, _BLOCK_SIZE // weight_ND.shape[1]) if is_cpu else len(weight_ND)
    parts = zip(weight_ND.split(block), scale_N.to(x_BD.dtype).split(block), strict=True)
    outputs = [F.linear(x_BD, part_ND.to(x_BD.dtype) * part_N[:, None]) for part_ND, part_N in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def digits(x_RD: Float[Tensor, "R D"]) -> tuple[Int8[Tensor, "M D"], Float[Tensor, "R 1"]]:
    """Rows as whole numbers of two digits to the base 254, all first digits before all second ones, and their unit.

    A row's largest magnitude is 127 * 254 units, so that nothing is off by more than a 64,000th of it: less than bf16
    loses of a number of that size.
    """
    largest_R1 = torch.linalg.vector_norm(x_RD, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    unit_R1 = largest_R1.clamp_(min=1e-30).div_(_LARGEST * _BASE)
    units_RD = x_RD / unit_R1
    first_RD = (units_RD / _BASE).round_()
    second_RD = units_RD.sub_(first_RD, alpha=_BASE).round_()
    return torch.cat([first_RD, second_RD]).to(torch.int8), unit_R1


def _digit_product(x_RD: Tensor, weight_ND: Tensor, scale_N: Tensor) -> Tensor:
    """Exact products of the digits, put together in float32."""
    digits_MD, unit_R1 = digits(x_RD)
    # the weights as the left factor, as in `weight_product`
    sums_NM = torch._int_mm(weight_ND, digits_MD.t())
    first_RN, second_RN = sums_NM.t().to(torch.float32, memory_format=torch.contiguous_format).chunk(2)
    return second_RN.add_(first_RN, alpha=_BASE).mul_(unit_R1).mul_(scale_N).to(x_RD.dtype)
