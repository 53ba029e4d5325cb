"""The shape of the language model: one dataclass, the published sizes, and counts of parameters and FLOPs.

CM3Leon (arXiv:2309.02591, section 2.3 and table 3) is the default; Chameleon (arXiv:2405.09818,
section 2.3) is reached by switches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from cm3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every number that decides the transformer's weights and arithmetic."""

    vocabulary_size: int
    """Joint vocabulary: text, image codes and special ids (rows of the embedding)."""
    width: int
    """Width D of the residual stream."""
    num_layers: int
    """Number of blocks (attention + feed-forward)."""
    num_heads: int
    """Number of query heads N; must divide the width."""
    num_key_value_heads: int | None = None
    """Number of key/value heads G of grouped-query attention; None: as many as query heads."""
    feed_forward_width: int | None = None
    """Inner width F of the feed-forward; None: 4 x width, or for swiglu 8/3 x width rounded up to 256."""
    max_positions: int = 4096
    """Longest context in tokens (rows of the learned position table)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """layernorm: without weight and bias (CM3Leon); rmsnorm: with weight (Chameleon)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in every norm."""
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    """Feed-forward activation; swiglu adds a gate projection."""
    position: Literal["learned", "rope"] = "learned"
    """learned: absolute position embeddings; rope: rotary embeddings of queries and keys."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths; used with position="rope"."""
    qk_norm: bool = False
    """LayerNorm with weight and bias over each head of queries and keys, before the rotation."""
    qk_norm_per_head: bool = False
    """A weight and bias of that norm for every head (Chameleon 34B) instead of one for all heads of a layer."""
    norm_order: Literal["pre", "swin"] = "pre"
    """pre: x + f(norm(x)); swin: x + norm(f(x)) (Chameleon 34B)."""
    dropout: float = 0.0
    """Probability of dropping an output element of attention and of the feed-forward; 0 is off."""
    tie_embeddings: bool = True
    """Share one matrix between input embedding and output head."""
    init_std: float = 0.006
    """Standard deviation of the normal (cut at 3 std) that weights are drawn from."""
    position_init_std: float = 0.0002
    """The same for learned positions."""
    zero_init_outputs: bool = True
    """Start attention-out and feed-forward-out at zero; off: init_std / sqrt(2 x num_layers)."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        """Yield one sentence per setting that cannot work."""
        for name in ("vocabulary_size", "width", "num_layers", "num_heads", "max_positions"):
            if getattr(self, name) < 1:
                yield f"model.{name}={getattr(self, name)} must be at least 1"
        for name in ("num_key_value_heads", "feed_forward_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"model.{name}={value} must be at least 1, or null for the default"
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                yield f"model.{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}"
        if not 0.0 <= self.dropout < 1.0:
            yield f"model.dropout={self.dropout} must be in [0, 1)"
        for name in ("norm_epsilon", "rope_theta", "init_std", "position_init_std"):
            if getattr(self, name) <= 0:
                yield f"model.{name}={getattr(self, name)} must be positive"
        if self.num_heads < 1 or self.width < 1:
            return
        if self.width % self.num_heads:
            yield (
                f"model.num_heads={self.num_heads} does not divide model.width={self.width}; "
                f"choose a width that is a multiple of {self.num_heads}"
            )
        elif self.position == "rope" and self.head_width % 2:
            yield (
                f"model.position=rope needs an even head width, found {self.head_width} "
                f"(width {self.width} / num_heads {self.num_heads})"
            )
        if self.qk_norm_per_head and not self.qk_norm:
            yield "model.qk_norm_per_head=true needs model.qk_norm=true"
        if self.key_value_heads > 0 and self.num_heads % self.key_value_heads:
            yield (
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide model.num_heads={self.num_heads}"
            )

    @property
    def head_width(self) -> int:
        """Width K of one head."""
        return self.width // self.num_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads G, the default filled in."""
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def ffn_width(self) -> int:
        """Inner width F of the feed-forward, the default filled in (swiglu: Chameleon's rule)."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        if self.activation == "swiglu":
            return 256 * math.ceil(8 * self.width // 3 / 256)
        return 4 * self.width


_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("relu", "gelu", "swiglu"),
    "position": ("learned", "rope"),
    "norm_order": ("pre", "swin"),
}

PAPER_VOCABULARY_SIZE = 66_056
"""Text 56,320 + image codes 8,192 + special ids, rounded up (the size the published counts are for)."""

NAMED_SIZES: dict[str, ModelConfig] = {
    "350m": ModelConfig(vocabulary_size=PAPER_VOCABULARY_SIZE, width=1024, num_layers=24, num_heads=16),
    "760m": ModelConfig(vocabulary_size=PAPER_VOCABULARY_SIZE, width=1536, num_layers=24, num_heads=16),
    "7b": ModelConfig(vocabulary_size=PAPER_VOCABULARY_SIZE, width=4096, num_layers=32, num_heads=32),
}
"""CM3Leon table 3; heads from the metaseq size table of the same models."""


def named_size(name: str, **overrides: Any) -> ModelConfig:
    """Return a published size with some fields replaced, e.g. ``named_size("350m", vocabulary_size=4096)``.

    Raises:
        ConfigError: for an unknown name.
    """
    if name.lower() not in NAMED_SIZES:
        raise ConfigError(f"model size {name!r} is unknown; choose one of {', '.join(NAMED_SIZES)}")
    return replace(NAMED_SIZES[name.lower()], **overrides)


def _block_matrix_parameters(config: ModelConfig) -> int:
    """Weights of one block's matrices: fused qkv, attention out, feed-forward in (and gate) and out."""
    attention = config.width * config.head_width * (2 * config.num_heads + 2 * config.key_value_heads)
    feed_forward_matrices = 3 if config.activation == "swiglu" else 2
    return attention + feed_forward_matrices * config.width * config.ffn_width


def parameter_count(config: ModelConfig) -> int:
    """Number of trainable parameters, in closed form; a tied head counts once."""
    norm = config.width if config.norm == "rmsnorm" else 0
    normed_heads = config.num_heads + config.key_value_heads if config.qk_norm_per_head else 2
    qk_norm = 2 * normed_heads * config.head_width if config.qk_norm else 0
    block = _block_matrix_parameters(config) + 2 * norm + qk_norm
    embedding = config.vocabulary_size * config.width
    head = 0 if config.tie_embeddings else embedding
    positions = config.max_positions * config.width if config.position == "learned" else 0
    return embedding + head + positions + config.num_layers * block + norm


def flops_per_token(config: ModelConfig, context: int | float) -> float:
    """Training FLOPs (forward and backward) per token, counted as in PaLM (arXiv:2204.02311, appendix B).

    Six per weight that takes part in a matrix product (embedding look-ups cost none, the head counts) and
    12 x layers x heads x head width x context for the attention scores and their use.

    Args:
        context: keys a token attends to. PaLM takes the sequence length; for what a causal kernel really
            computes pass the mean, about half the sequence (or half the mean document of packed rows).
    """
    matrices = config.num_layers * _block_matrix_parameters(config) + config.vocabulary_size * config.width
    return float(6 * matrices + 12 * config.num_layers * config.width * context)
