"""Checkpoints of a run: safetensors and JSON, independent of the number of processes and of the ZeRO stage.

checkpoints/step_00001200/{weights,exp_avg,exp_avg_sq[,average]}.safetensors, state.json and config.yaml;
checkpoints/latest holds the name of the newest complete folder and is written last.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cm3.checkpoint import atomic_path, load_tensors, read_json, save_tensors, write_json, write_text
from cm3.distributed import barrier, is_main
from cm3.errors import ModelFilesError
from cm3.training.engine import STATE_KINDS, Engine


@dataclass(frozen=True)
class RunState:
    """The plain numbers of a checkpoint. Random numbers need none: they are functions of seed and step."""

    step: int
    """Optimiser steps done."""
    tokens: int
    """Training tokens seen."""
    seconds: float
    """Training time spent, over all interruptions."""
    loader: dict[str, Any]
    """State of the data loader."""
    tokenizer_hash: str
    """Hash of the tokenizers and the vocabulary of the data."""


class WeightAverage:
    """Exponential moving average of the weights in fp32 (Polyak averaging); sampling profits from it.

    Args:
        module: Module whose parameters are averaged.
        decay: Share of the old average kept at every step; early steps use (1 + step) / (10 + step) if smaller.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = dict(module.named_parameters())
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


def save_checkpoint(
    folder: Path, engine: Engine, state: RunState, average: WeightAverage | None, config_yaml: str, keep: int
) -> None:
    """Write a checkpoint under `folder`, then `latest`, then delete all but the newest `keep` up to this step."""
    name = f"step_{state.step:08d}"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / name) as path:
            path.mkdir(exist_ok=True)
            for kind in STATE_KINDS:
                save_tensors(path / f"{kind}.safetensors", dict(engine.state(kind)))
            if average is not None:
                save_tensors(path / "average.safetensors", average.tensors)
            write_json(path / "state.json", asdict(state))
            write_text(path / "config.yaml", config_yaml)
        write_text(folder / "latest", name)
        # of a run that was set back to an earlier step, the later checkpoints do not count
        for old in sorted(path for path in folder.glob("step_*[0-9]") if path.name <= name)[:-keep]:
            shutil.rmtree(old)
    else:
        for kind in STATE_KINDS:
            for _ in engine.state(kind):
                pass  # every process takes part in gathering
    barrier()


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None where there is none."""
    marker = folder / "latest"
    if not marker.exists():
        return None
    path = folder / marker.read_text(encoding="utf-8").strip()
    if not (path / "state.json").exists():
        raise ModelFilesError(f"{marker} names {path.name}, which is not there; write the name of another step into it")
    return path


def load_checkpoint(path: Path, engine: Engine, average: WeightAverage | None, tokenizer_hash: str) -> RunState:
    """Restore weights, optimiser and average; return the numbers of the run.

    Raises:
        ModelFilesError: A file lacks a tensor or has another shape, or the data's tokenizers are others.
    """
    state = RunState(**read_json(path / "state.json"))
    if state.tokenizer_hash != tokenizer_hash:
        raise ModelFilesError(
            f"{path} was trained with the tokenizers {state.tokenizer_hash[:12]}, the data were prepared with "
            f"{tokenizer_hash[:12]}; prepare the data with the run's tokenizers or choose another output"
        )
    for kind in STATE_KINDS:
        engine.load_state(kind, _read(path / f"{kind}.safetensors", engine.module))
    engine.set_step(state.step)
    if average is not None:
        average.load(_read(path / "average.safetensors", engine.module))
    return state


def _read(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Read a tensor for every parameter of the module, and none else."""
    tensors, parameters = load_tensors(path), dict(module.named_parameters())
    missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unexpected:
        raise ModelFilesError(
            f"{path} is of another model: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}; "
            "resume with the model settings of the run or choose another output"
        )
    for name, parameter in parameters.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # at ZeRO stage 3 a parameter is a share
        if tuple(tensors[name].shape) != shape:
            raise ModelFilesError(
                f"{path} is of another model: {name} is {tuple(tensors[name].shape)} instead of {shape}; "
                "resume with the model settings of the run or choose another output"
            )
    return tensors
