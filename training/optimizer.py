"""AdamW's parameter groups and the learning rate of every step (arXiv 2301.03728: CM3Leon's scaling laws)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from cm3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, linear decay and clipping by the global norm."""

    learning_rate: float = 6e-4
    """Peak learning rate, reached at the end of the warm-up."""
    warmup_steps: int = 1500
    """Optimiser steps of linear warm-up from 0; 0 starts at the peak."""
    final_fraction: float = 0.1
    """Learning rate at the last step as a fraction of the peak; the decay is linear. 1 means no decay."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam's first and second moment."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices and embeddings; gains and biases are never decayed."""
    gradient_clip: float = 1.0
    """Largest global L2 norm of the gradient; 0 is off."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"optimizer.learning_rate={self.learning_rate}; choose a value above 0")
        if self.warmup_steps < 0:
            raise ConfigError(f"optimizer.warmup_steps={self.warmup_steps}; choose 0 or more")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"optimizer.final_fraction={self.final_fraction}; choose a value from 0 to 1")


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step (the first is 1): linear warm-up, then linear decay."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * (1 - (1 - config.final_fraction) * min(1.0, done))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW with two groups: matrices and embeddings decay, vectors (gains, biases) do not."""
    groups = [
        {"params": [p for p in _unique(model) if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in _unique(model) if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def _unique(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield trainable parameters; a tied tensor comes once."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
