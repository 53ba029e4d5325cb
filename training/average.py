"""A moving average of the weights, kept beside a training and put in their place for evaluation and export."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of the weights in fp32 (Polyak averaging); sampling profits from it.

    Args:
        module: Module whose trained parameters are averaged.
        decay: Share of the old average kept at every step; early steps use (1 + step) / (10 + step) if smaller.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._decay = decay
        self.tensors = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after an optimiser step."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter.float(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module for the length of a `with` block."""
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self.tensors[name])
            yield
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the average."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
