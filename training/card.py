"""The model card of a run: how its weights came about."""

import platform
from pathlib import Path

import torch

from cm3.config import dump_config
from cm3.distributed import world_size
from cm3.model.config import parameter_count
from cm3.model.lora import adapter_parameter_count
from cm3.training.config import ModelRun
from cm3.training.metrics import duration
from cm3.training.state import RunState


def hardware(device: torch.device) -> str:
    """Return what a run trained on, as its card names it."""
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
