"""The end of a run: its weights as a model folder, with a model card that says how they came about."""

import dataclasses
import platform
from pathlib import Path

import torch
from torch import Tensor

from cm3.config import dump_config
from cm3.distributed import barrier, is_main, world_size
from cm3.model.config import parameter_count
from cm3.model.pretrained import save_model
from cm3.training.config import ModelRun
from cm3.training.engine import Engine
from cm3.training.metrics import duration
from cm3.training.state import RunState, WeightAverage

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
            tokenizer_folder=config.data.train,
            tokenizer_hash=state.tokenizer_hash,
            card=model_card(config, state, validation, engine.device),
            generation=dataclasses.asdict(config.generation),
            dtype=EXPORT_DTYPES[config.export_precision],
        )
        print(f"wrote the model to {folder}", flush=True)
    barrier()
    return folder


def strip_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the transformer's own names (in training it is the `model` of `LossModule`)."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def model_card(config: ModelRun, state: RunState, validation: dict[str, float], device: torch.device) -> str:
    """Return the README.md of a model folder."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    weights = f"average of decay {config.ema_decay}" if config.ema_decay else "of the last step"
    rows = {
        "Parameters": f"{parameter_count(config.model):,}",
        "Training data": f"`{Path(config.data.train).name}`",
        "Objective": f"{config.objective.name}, whole-segment rotation {config.objective.rotation_probability}",
        "Steps": f"{state.step:,} of {config.batch_rows} rows of {config.data.sequence_length} tokens",
        "Tokens seen": f"{state.tokens:,}",
        "Weights": weights,
        "Precision": f"trained in {config.precision}, saved in {config.export_precision}",
        "Seed": str(config.seed),
        "Hardware": f"{world_size()} x {hardware}, torch {torch.__version__}",
        "Training time": duration(state.seconds),
        "Tokenizer hash": f"`{state.tokenizer_hash[:16]}`",
    }
    rows |= {f"Validation {name.replace('_', ' ')}": f"{value:.4f}" for name, value in validation.items()}
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

Draw with it: `cm3 generate "..." --model FOLDER`.
"""
