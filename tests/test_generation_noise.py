"""Noise: the hash against an independent one, golden values, and statistics at fixed seeds."""

import pytest
import torch

from cm3.generation.noise import TOKEN_NOISE, gumbel, hash_bits, uniform

MASK = 0xFFFFFFFF
GOLDEN = [
    [2181950053, 3977345033, 39244097],
    [4232812693, 1097633211, 2705784566],
    [44574084, 3845810116, 1965403210],
]
"""Changing these changes every picture that a seed stands for."""


def reference_mix(value):
    """The same mixing with Python's unbounded integers and unsigned constants."""
    value ^= value >> 16
    value = value * 0x7FEB352D & MASK
    value ^= value >> 15
    value = value * 0x846CA68B & MASK
    return value ^ value >> 16


def reference_bits(seed, position, purpose, id):
    keys = []
    for step in (0x9E3779B9, 0x85EBCA6B):
        key = reference_mix(reference_mix(seed & MASK ^ step) ^ seed >> 32)
        key = reference_mix(key + position & MASK)
        keys.append(reference_mix(key + purpose * step & MASK))
    return reference_mix(reference_mix(id ^ keys[0]) ^ keys[1])


def bits(seeds, positions, size, purpose=TOKEN_NOISE, start=0):
    return hash_bits(torch.as_tensor(seeds), torch.as_tensor(positions), purpose, size, start)


def test_golden_values():
    found = bits([0, 1, 2**40 + 3], [0, 5, 9], 3).tolist()
    assert found == GOLDEN
    assert found == [
        [reference_bits(seed, position, TOKEN_NOISE, id) for id in range(3)]
        for seed, position in [(0, 0), (1, 5), (2**40 + 3, 9)]
    ]


def test_matches_unbounded_integers_over_the_whole_range():
    seeds = torch.randint(0, 2**63 - 1, (50,))
    positions = torch.randint(0, 2**31, (50,))
    expected = [
        [reference_bits(seed, position, 7, id) for id in (70_000, 70_001)]
        for seed, position in zip(seeds.tolist(), positions.tolist())
    ]
    assert bits(seeds, positions, 2, purpose=7, start=70_000).tolist() == expected


def test_a_range_of_ids_is_a_slice_and_a_row_stands_alone():
    whole = bits([3, 4], [1, 8], 100)
    assert torch.equal(bits([3, 4], [1, 8], 20, start=60), whole[:, 60:80])
    assert torch.equal(bits([4], [8], 100), whole[1:])


@pytest.mark.parametrize("axis", ["seed", "position", "purpose", "id"])
def test_uniform_and_unrelated_along_every_axis(axis):
    n = 1 << 15
    counter = torch.arange(n)
    fixed = torch.full_like(counter, 11)
    if axis == "id":
        stream = uniform(fixed[:1], fixed[:1], TOKEN_NOISE, n)[0]
    elif axis == "purpose":
        stream = torch.cat([uniform(fixed[:32], counter[:32], purpose, 32).flatten() for purpose in range(32)])
    else:
        seeds, positions = (counter, fixed) if axis == "seed" else (fixed, counter)
        stream = uniform(seeds, positions, TOKEN_NOISE, 1)[:, 0]
    n = len(stream)
    counts = torch.histc(stream, bins=256, min=0, max=1)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    assert 160 < chi_square < 360  # 255 degrees of freedom, 4.5 standard deviations
    for lag in (1, 2, 16):
        correlation = torch.corrcoef(torch.stack([stream[:-lag], stream[lag:]]))[0, 1].item()
        assert abs(correlation) < 4.5 / n**0.5


def test_flipping_any_input_bit_flips_half_of_the_output():
    seeds = torch.randint(0, 2**62, (4096,))
    positions = torch.randint(0, 4096, (4096,))
    before = bits(seeds, positions, 1)

    def flipped_share(after):
        changed = (before ^ after).flatten()
        return torch.stack([(changed >> bit & 1).float().mean() for bit in range(32)])

    for bit in (0, 1, 13, 31, 32, 50):
        assert (flipped_share(bits(seeds ^ (1 << bit), positions, 1)) - 0.5).abs().max() < 0.05
    for bit in (0, 3, 11):
        assert (flipped_share(bits(seeds, positions ^ (1 << bit), 1)) - 0.5).abs().max() < 0.05


def test_uniform_stays_inside_the_open_interval():
    stream = uniform(torch.arange(16), torch.arange(16), 1, 4096)
    assert 0 < stream.min() and stream.max() < 1
    assert torch.isfinite(gumbel(torch.arange(16), torch.arange(16), 1, 4096)).all()


def test_gumbel_max_draws_from_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, float("-inf")])
    n = 20_000
    draws = (logits + gumbel(torch.full((n,), 5), torch.arange(n), TOKEN_NOISE, 5)).argmax(1)
    shares = torch.bincount(draws, minlength=5) / n
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.015, rtol=0)
    assert shares[4] == 0
