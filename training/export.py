"""The weights of a run as a model folder, at its end or from a checkpoint; its card says how they came about."""

import dataclasses
import platform
from pathlib import Path

import torch
from torch import Tensor

from cm3.checkpoint import load_tensors
from cm3.config import dump_config, load_config
from cm3.distributed import barrier, is_main, world_size
from cm3.errors import ModelFilesError
from cm3.model.config import parameter_count
from cm3.model.lora import adapter_parameter_count, merge_adapter, save_adapter, weights_hash
from cm3.model.pretrained import load_model, save_model
from cm3.pretrained import resolve_model
from cm3.tokenizers.document import DocumentTokenizer
from cm3.training.average import WeightAverage
from cm3.training.config import ModelRun
from cm3.training.engine import Engine
from cm3.training.metrics import duration
from cm3.training.state import (
    AVERAGE_FILE,
    CONFIG_FILE,
    STATE_FILE,
    RunState,
    checkpoint_damage,
    newest_checkpoint,
    read_state,
)

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_model(
    folder: Path,
    engine: Engine,
    average: WeightAverage | None,
    config: ModelRun,
    state: RunState,
    validation: dict[str, float],
) -> Path:
    """Write the model folder of a run from the fp32 weights, or from their average. A collective."""
    tensors = dict(average.tensors if average else engine.state("weights"))
    if is_main():
        save_model(
            folder,
            strip_prefix(tensors),
            config.model,
            tokenizer_folder=config.data.train_folder,
            tokenizer_hash=state.tokenizer_hash,
            card=model_card(config, state, validation, _hardware(engine.device)),
            generation=dataclasses.asdict(config.generation),
            dtype=EXPORT_DTYPES[config.export_precision],
        )
        print(f"wrote the model to {folder}", flush=True)
    barrier()
    return folder


def export_adapter(
    folder: Path,
    engine: Engine,
    average: WeightAverage | None,
    config: ModelRun,
    state: RunState,
    validation: dict[str, float],
) -> Path:
    """Write the adapter of a run, from its fp32 weights or their average. A collective."""
    tensors = dict(average.tensors if average else engine.state("weights"))
    if is_main():
        save_adapter(
            folder,
            strip_prefix(tensors),
            config.model,
            config.lora,
            base=str(config.initialize_from),
            base_hash=state.base_hash,
            tokenizer_hash=state.tokenizer_hash,
            card=model_card(config, state, validation, _hardware(engine.device)),
        )
        print(f"wrote the adapter to {folder}", flush=True)
    barrier()
    return folder


def export_checkpoint(source: str | Path, out: str | Path, tokenizers: str | Path | None = None) -> Path:
    """Write the model folder of a checkpoint: of its average of the weights where there is one, else of its weights.

    A checkpoint of adapters is merged with the model that they were trained on.

    Args:
        source: Folder of a checkpoint, or of a run, whose newest good checkpoint is then taken.
        out: The model folder.
        tokenizers: Folder with the tokenizer files; None takes the data of the run.

    Returns:
        The checkpoint that was taken.

    Raises:
        ModelFilesError: there is no checkpoint or it is damaged, or the tokenizers, or the model that was adapted, are
            not those of the run.
    """
    path = _find_checkpoint(Path(source))
    if damage := checkpoint_damage(path):
        raise ModelFilesError(f"{path} cannot be used: {', '.join(damage)}; export another checkpoint of the run")
    config, state = load_config(ModelRun, path / CONFIG_FILE), read_state(path)
    folder = Path(tokenizers or config.data.train_folder)
    found = DocumentTokenizer.load(folder).hash
    if found != state.tokenizer_hash:
        raise ModelFilesError(
            f"{path} was trained with the tokenizers {state.tokenizer_hash[:12]}, {folder} has {found[:12]}; name the "
            "folder that has the run's tokenizers"
        )
    has_average = (path / AVERAGE_FILE).exists()
    tensors = strip_prefix(load_tensors(path / (AVERAGE_FILE if has_average else "weights.safetensors")))
    if config.lora.rank:
        tensors = _merged(config, state, tensors)
    save_model(
        Path(out),
        tensors,
        config.model,
        tokenizer_folder=folder,
        tokenizer_hash=state.tokenizer_hash,
        card=model_card(config, state, {}, "not known: exported from a checkpoint"),
        generation=dataclasses.asdict(config.generation),
        dtype=EXPORT_DTYPES[config.export_precision],
    )
    return path


def _merged(config: ModelRun, state: RunState, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the adapted model with its adapters merged into them, in fp32."""
    transformer, _ = load_model(resolve_model(str(config.initialize_from)), dtype=torch.float32)
    found = weights_hash(transformer)
    if found != state.base_hash:
        raise ModelFilesError(
            f"the run adapted the weights {state.base_hash[:12]} of {config.initialize_from}, which now has "
            f"{found[:12]}; restore that model"
        )
    merge_adapter(transformer, config.lora, tensors)
    return transformer.state_dict()


def _find_checkpoint(source: Path) -> Path:
    if (source / STATE_FILE).exists():
        return source
    for folder in (source / "checkpoints", source):
        if folder.is_dir() and (found := newest_checkpoint(folder)):
            return found
    raise ModelFilesError(f"{source} is no checkpoint and no folder of a run with checkpoints; check the path")


def strip_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the transformer's own names (in training it is the `model` of `LossModule`)."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return f"{world_size()} x {name}, torch {torch.__version__}"


def _data_names(train: str | dict[str, str]) -> str:
    folders = [train] if isinstance(train, str) else list(train.values())
    return ", ".join(f"`{Path(folder).name}`" for folder in folders)


def model_card(config: ModelRun, state: RunState, validation: dict[str, float], hardware: str) -> str:
    """Return the README.md of a model folder."""
    weights = f"average of decay {config.ema_decay}" if config.ema_decay else "of the last step"
    adapters = adapter_parameter_count(config.model, config.lora)
    trained = f", of which none was trained, and {adapters:,} of its adapters" if adapters else ""
    rows = {
        "Parameters": f"{parameter_count(config.model):,}{trained}",
        "Started from": f"`{config.initialize_from}`" if config.initialize_from else "random weights",
        "Training data": _data_names(config.data.train),
        "Objective": f"{config.objective.name}, whole-segment rotation {config.objective.rotation_probability}",
        "Steps": f"{state.step:,} of {config.batch_rows} rows of {config.data.sequence_length} tokens",
        "Tokens seen": f"{state.tokens:,}",
        "Weights": weights,
        "Precision": f"trained in {config.precision}, saved in {config.export_precision}",
        "Seed": str(config.seed),
        "Hardware": hardware,
        "Training time": duration(state.seconds),
        "Tokenizer hash": f"`{state.tokenizer_hash[:16]}`",
    }
    rows |= {f"Validation {name.replace('_', ' ')}": f"{value:.4f}" for name, value in validation.items()}
    use = f"--model {config.initialize_from} --adapter FOLDER" if config.lora.rank else "--model FOLDER"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: open-cm3
pipeline_tag: text-to-image
tags:
- cm3
- text-to-image
- image-to-text
---

# A CM3 model

One decoder-only transformer over text and image tokens, trained with the CM3 objective of CM3Leon (arXiv 2309.02591)
by open-cm3: it draws pictures from words, writes words for pictures, and fills in parts of both.

| | |
|---|---|
{table}

Trained with `cm3 train`, or `torchrun -m cm3 train` on several processes, and this configuration:

```yaml
{dump_config(config, stage="model")}```

Draw with it: `cm3 generate "..." {use}`.
"""
