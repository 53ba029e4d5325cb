"""ModelConfig: the published sizes, closed-form counts, and what is refused."""

from dataclasses import replace

import jaxtyping
import pytest
import torch

from cm3.errors import ConfigError
from cm3.model.config import ModelConfig, flops_per_token, named_size, parameter_count
from cm3.model.transformer import Transformer

SMALL = ModelConfig(vocabulary_size=64, width=32, num_layers=2, num_heads=4, max_positions=64)

VARIATIONS = {
    "cm3leon": {},
    "untied": {"tie_embeddings": False},
    "chameleon": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "qk_norm": True},
    "swin": {"norm": "rmsnorm", "norm_order": "swin", "num_key_value_heads": 2, "activation": "gelu"},
    "widths": {"feed_forward_width": 100, "num_key_value_heads": 1, "qk_norm": True},
    "heads": {"num_key_value_heads": 2, "qk_norm": True, "qk_norm_per_head": True},
}


def count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


@pytest.mark.parametrize(
    ("name", "tied", "millions"),
    [
        ("350m", True, 374),
        ("350m", False, 441),
        ("760m", True, 787),
        ("760m", False, 889),
        ("7b", True, 6730),
        ("7b", False, 7000),
    ],
)
def test_published_sizes_have_the_published_parameter_counts(name, tied, millions):
    config = named_size(name, tie_embeddings=tied)
    assert count(config) == parameter_count(config)
    assert parameter_count(config) / 1e6 == pytest.approx(millions, abs=0.5)


def test_exact_counts_of_the_published_sizes():
    assert [parameter_count(named_size(name)) for name in ("350m", "760m", "7b")] == [
        373_825_536,
        787_230_720,
        6_729_793_536,
    ]


@pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS)
def test_parameter_count_is_the_sum_of_sizes(changes):
    config = replace(SMALL, **changes)
    assert count(config) == parameter_count(config)


@pytest.mark.parametrize(("width", "expected"), [(4096, 11008), (8192, 22016), (384, 1024)])
def test_swiglu_width_follows_chameleon(width, expected):
    assert replace(SMALL, width=width, activation="swiglu").ffn_width == expected


def test_default_widths():
    assert SMALL.ffn_width == 128
    assert SMALL.head_width == 8
    assert SMALL.key_value_heads == 4
    assert replace(SMALL, activation="swiglu", feed_forward_width=48).ffn_width == 48


def test_flops_count_matrices_and_attention():
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 64 * 32
    assert flops_per_token(SMALL, context=0) == 6 * matrices
    assert flops_per_token(SMALL, context=10) == 6 * matrices + 12 * 2 * 32 * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "num_heads=4 does not divide model.width=30; choose a width that is a multiple of 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be at least 1"),
        ({"width": 12, "position": "rope"}, "even head width, found 3"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"qk_norm_per_head": True}, "qk_norm_per_head=true needs model.qk_norm=true"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"init_std": 0.0}, "init_std"),
        ({"num_layers": 0, "dropout": -1.0}, "num_layers=0 .*; model.dropout=-1.0"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **changes)


def test_unknown_choices_are_named(monkeypatch):
    """Without the suite's type checks, which would be the first to object."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match="'selu' is unknown; choose one of relu, gelu, swiglu"):
        replace(SMALL, activation="selu")


def test_named_size_takes_overrides_and_names_the_choices():
    assert named_size("7B", vocabulary_size=100).vocabulary_size == 100
    with pytest.raises(ConfigError, match="'8b' is unknown; choose one of 350m, 760m, 7b"):
        named_size("8b")
