"""Checkpoints of a run: safetensors and JSON, independent of the number of processes and of the ZeRO stage.

checkpoints/step_00001200/{weights,exp_avg,exp_avg_sq[,average]}.safetensors, state.json, config.yaml and, over them
all, SHA256SUMS; checkpoints/latest holds the name of the newest complete folder and is written last. A checkpoint
that is not what was written is passed over for the one before it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cm3.checkpoint import (
    atomic_path,
    load_tensors,
    read_json,
    remove_folder,
    save_tensors,
    tensor_shapes,
    write_json,
    write_text,
)
from cm3.distributed import is_main
from cm3.errors import ModelFilesError
from cm3.training.average import WeightAverage
from cm3.training.engine import STATE_KINDS, Engine, from_main, trained_parameters
from cm3.training.sums import SUMS_FILE, find_damage, write_sums

STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
AVERAGE_FILE = "average.safetensors"
LATEST_FILE = "latest"
_NEEDED = (*(f"{kind}.safetensors" for kind in STATE_KINDS), STATE_FILE, CONFIG_FILE)


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
    samples: int = 0
    """CRC-32 over the numbers of all documents seen, in their order: equal in two runs that saw the same data."""
    skipped: int = 0
    """Steps without an update, because loss or gradient was not finite."""
    skipped_in_row: int = 0
    """How many of them came last, without another step between."""
    base_hash: str = ""
    """`weights_hash` of the frozen model whose adapters are trained; empty where all weights are."""

    @property
    def updates(self) -> int:
        """Updates of the weights: Adam's own count."""
        return self.step - self.skipped


def save_checkpoint(
    folder: Path,
    engine: Engine,
    state: RunState,
    average: WeightAverage | None,
    config_yaml: str,
    *,
    keep: int,
    keep_every_steps: int = 0,
) -> None:
    """Write a checkpoint under `folder`, then `latest`, then delete old ones. A collective.

    Args:
        folder: The checkpoints of a run.
        engine: Holds the weights and moments.
        state: Of the step just done.
        average: Saved too where there is one.
        config_yaml: The settings of the run.
        keep: Newest checkpoints up to this step that stay.
        keep_every_steps: Those at multiples of it stay as well; 0 is off.

    Raises:
        ModelFilesError: in every process; the disk is full or cannot be written. Earlier checkpoints are as they were.
    """
    name = f"step_{state.step:08d}"
    gathering = ((kind, engine.state(kind)) for kind in STATE_KINDS)
    failure: OSError | None = None
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(folder / name) as path:
                path.mkdir()
                for kind, tensors in gathering:
                    save_tensors(path / f"{kind}.safetensors", dict(tensors))
                if average is not None:
                    save_tensors(path / AVERAGE_FILE, average.tensors)
                write_json(path / STATE_FILE, asdict(state))
                write_text(path / CONFIG_FILE, config_yaml)
                write_sums(path)
        except OSError as error:
            failure = error
    for _, tensors in gathering:
        for _ in tensors:
            pass  # every process takes part in gathering, and so does the main one after a failure

    def publish() -> None:
        try:
            if failure is not None:
                raise failure
            write_text(folder / LATEST_FILE, name)
            # of a run that was set back to an earlier step, the later checkpoints do not count
            for old in [path for path in _checkpoints(folder) if path.name <= name][keep:]:
                if not keep_every_steps or int(old.name.removeprefix("step_")) % keep_every_steps:
                    remove_folder(old)
        except OSError as error:
            raise ModelFilesError(
                f"cannot write the checkpoint {folder / name} ({error.strerror or error}); make room or mend the "
                "folder, and give the same command to go on from the checkpoint before"
            ) from error

    from_main(publish)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is what was written, or None where there is none at all.

    `latest` names it. Where that one is damaged or missing, the newest good one is returned and a warning printed.

    Raises:
        ModelFilesError: there are checkpoints, and none is good.
    """
    found = _checkpoints(folder)
    marker = folder / LATEST_FILE
    latest = marker.read_text(encoding="utf-8", errors="replace").strip() if marker.exists() else None
    faults = []
    if latest in [path.name for path in found]:
        found = [path for path in found if path.name <= latest]  # a run may have been set back to an earlier step
    elif latest is not None:
        faults.append(f"{marker} names {latest[:40]!r}, which is not there")
    elif found:
        faults.append(f"{marker} is missing")
    for path in found:
        if not (damage := checkpoint_damage(path)):
            if faults:
                print(f"warning: {'; '.join(faults)}; using {path}", flush=True)
            return path
        faults.append(f"{path.name} cannot be used: {', '.join(damage)}")
    if faults:
        raise ModelFilesError(
            f"no checkpoint in {folder} is good ({'; '.join(faults)}); bring one back, or remove the folder to start "
            "anew"
        )
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    return sorted((path for path in folder.glob("step_*[0-9]") if path.name[5:].isdecimal()), reverse=True)


def checkpoint_damage(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint; of one without checksums, what its files tell by themselves."""
    if is_verifiable(path):
        averages = [AVERAGE_FILE] if (path / AVERAGE_FILE).exists() else []
        return find_damage(path, [*_NEEDED, *averages])
    if missing := [name for name in _NEEDED if not (path / name).is_file()]:
        return [f"{name} is missing" for name in missing]
    faults = []
    for file in path.glob("*.safetensors"):
        try:
            tensor_shapes(file)
        except ModelFilesError as error:
            faults.append(str(error))
    return faults


def is_verifiable(path: Path) -> bool:
    """Return whether a checkpoint has checksums; those of early versions have none."""
    return (path / SUMS_FILE).exists()


def read_state(path: Path) -> RunState:
    """Read the numbers of a checkpoint.

    Raises:
        ModelFilesError: they are missing or of another version.
    """
    values = read_json(path / STATE_FILE)
    try:
        return RunState(**values)
    except TypeError as error:
        raise ModelFilesError(
            f"{path / STATE_FILE} is not of this version of open-cm3 ({error}); go on with the one that wrote it"
        ) from error


def load_checkpoint(
    path: Path, engine: Engine, average: WeightAverage | None, tokenizer_hash: str, base_hash: str = ""
) -> RunState:
    """Restore weights, optimiser and average; return the numbers of the run.

    Raises:
        ModelFilesError: A file lacks a tensor or has another shape, or the data's tokenizers or the frozen model are
            others.
    """
    state = read_state(path)
    if state.tokenizer_hash != tokenizer_hash:
        raise ModelFilesError(
            f"{path} was trained with the tokenizers {state.tokenizer_hash[:12]}, the data were prepared with "
            f"{tokenizer_hash[:12]}; prepare the data with the run's tokenizers or choose another output"
        )
    if state.base_hash != base_hash:
        raise ModelFilesError(
            f"{path} holds {_trained(state.base_hash)}, this run trains {_trained(base_hash)}; give the settings and "
            "the model of that run or choose another output"
        )
    for kind in STATE_KINDS:
        engine.load_state(kind, _read(path / f"{kind}.safetensors", engine.module))
    engine.set_step(state.updates)
    if average is not None:
        average.load(_read(path / AVERAGE_FILE, engine.module))
    return state


def _read(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Read a tensor for every trained parameter of the module, and none else."""
    tensors, parameters = load_tensors(path), dict(trained_parameters(module))
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


def _trained(base_hash: str) -> str:
    return f"adapters of the weights {base_hash[:12]}" if base_hash else "whole weights"
