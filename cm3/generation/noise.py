"""Counter-based noise: every random number is a pure function of (seed, position, purpose, id).

Nothing is stored and nothing is drawn in order, so a row gets the same noise alone, in a batch or reordered,
on every device and inside a compiled step. The hash works on unsigned 32-bit values held in int64; constants
are written as signed 32-bit numbers so that no product leaves 64 bits. Its mixing function has the
xorshift-multiply form of MurmurHash3's finaliser (A. Appleby, public domain) with C. Wellons's "lowbias32"
constants.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOKEN_NOISE = 1
"""Purpose of the noise that draws the next id; another use of noise takes another number."""

_MASK = 0xFFFFFFFF
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)
_STEP_1 = 0x9E3779B9
_STEP_2 = 0x85EBCA6B


def _mix(values: Tensor) -> Tensor:
    """Bijective scrambling of unsigned 32-bit values held in int64."""
    values = values ^ (values >> 16)  # memory of its own, which the rest works in
    values.mul_(_MULTIPLIER_1).bitwise_and_(_MASK)
    values.bitwise_xor_(values >> 15)
    values.mul_(_MULTIPLIER_2).bitwise_and_(_MASK)
    return values.bitwise_xor_(values >> 16)


def hash_bits(
    seed_B: Int[Tensor, " B"], position_B: Int[Tensor, " B"], purpose: int, size: int, start: int = 0
) -> Int[Tensor, "B V"]:
    """Hash of (seed, position, purpose, id) for ids `start .. start + size`: unsigned 32-bit values in int64.

    Seeds have 64 bits. Two independent 32-bit keys per (seed, position, purpose) keep rows apart.
    """
    seed_B = seed_B.long()
    low_B, high_B = seed_B & _MASK, (seed_B >> 32) & _MASK
    keys_2B = _mix(torch.stack([low_B ^ _STEP_1, low_B ^ _STEP_2]))  # at once, for every operation takes its time
    keys_2B = _mix(keys_2B ^ high_B)
    keys_2B = _mix((keys_2B + (position_B.long() & _MASK)) & _MASK)
    keys_2B = torch.stack([keys_2B[0] + purpose * _STEP_1, keys_2B[1] + purpose * _STEP_2])
    keys_2B1 = _mix(keys_2B & _MASK)[..., None]
    ids_V = torch.arange(start, start + size, device=seed_B.device)
    return _mix(_mix(ids_V ^ keys_2B1[0]).bitwise_xor_(keys_2B1[1]))


def uniform(
    seed_B: Int[Tensor, " B"], position_B: Int[Tensor, " B"], purpose: int, size: int, start: int = 0
) -> Float[Tensor, "B V"]:
    """Uniform float32 numbers in the open interval (0, 1), finely spaced near 0 (multiples of 2**-33)."""
    bits_BV = hash_bits(seed_B, position_B, purpose, size, start)
    return bits_BV.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)


def gumbel(
    seed_B: Int[Tensor, " B"], position_B: Int[Tensor, " B"], purpose: int, size: int, start: int = 0
) -> Float[Tensor, "B V"]:
    """Standard Gumbel noise: `argmax(logits + gumbel)` is one draw from `softmax(logits)`.

    Written as -log(-log(1 - u)): large values, which decide the draw, come from the finely spaced end of u.
    """
    return uniform(seed_B, position_B, purpose, size, start).neg_().log1p_().neg_().log_().neg_()
