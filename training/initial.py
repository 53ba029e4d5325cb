"""What a run starts from: random weights, those of a finished model, or that model, frozen, with adapters."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from cm3.checkpoint import load_strict, read_json
from cm3.errors import ConfigError
from cm3.model.config import ModelConfig
from cm3.model.lora import add_adapter, weights_hash
from cm3.model.pretrained import load_model
from cm3.model.transformer import Transformer
from cm3.pretrained import CONFIG_FILE, resolve_model
from cm3.training.config import ModelRun
from cm3.training.engine import from_main

_FREE_FIELDS = ("dropout", "init_std", "position_init_std", "zero_init_outputs")
"""Settings of a model that change neither its weights nor what it computes with them."""


def make_transformer(config: ModelRun, tokenizer_hash: str) -> tuple[Transformer, str]:
    """Return a new transformer and, where only adapters are trained, the hash of the frozen weights. A collective.

    Raises:
        ModelFilesError, ConfigError: as `initial_weights`.
        MissingDependencyError: there are to be adapters, and peft is not installed.
    """
    transformer = Transformer(config.model)
    if not config.lora.rank:
        return transformer, ""
    tensors = {name.removeprefix("model."): t for name, t in initial_weights(config, tokenizer_hash).items()}
    load_strict(transformer, tensors, str(config.initialize_from))
    base_hash = weights_hash(transformer)
    add_adapter(transformer, config.lora)
    return transformer, base_hash


def initial_weights(config: ModelRun, tokenizer_hash: str) -> dict[str, Tensor]:
    """Return the fp32 weights of the model that `initialize_from` names, under their names in training. A collective.

    Raises:
        ModelFilesError: there is no such model, or it is damaged.
        ConfigError: the model has other tokenizers than the data, or another shape than `model:`.
    """
    name = str(config.initialize_from)
    folder = Path(from_main(lambda: str(resolve_model(name))))  # one process asks the Hub
    found = str(read_json(folder / CONFIG_FILE).get("tokenizer_hash"))
    if found != tokenizer_hash:
        raise ConfigError(
            f"initialize_from={name} was trained with the tokenizers {found[:12]}, the data were prepared with "
            f"{tokenizer_hash[:12]}; prepare the data with the tokenizer files of that model"
        )
    model, model_config = load_model(folder, dtype=torch.float32)
    if differences := _differences(model_config, config.model):
        raise ConfigError(
            f"initialize_from={name} is another model than `model:`: "
            + ", ".join(f"{field} is {there!r} there and {here!r} here" for field, there, here in differences)
            + "; write the values of that model under `model:`"
        )
    return {f"model.{parameter_name}": tensor.detach() for parameter_name, tensor in model.named_parameters()}


def _differences(there: ModelConfig, here: ModelConfig) -> list[tuple[str, object, object]]:
    """Return (name, value there, value here) of every setting that decides the weights or their use and differs."""
    values = [
        dataclasses.asdict(config)
        | {"num_key_value_heads": config.key_value_heads, "feed_forward_width": config.ffn_width}  # defaults filled in
        for config in (there, here)
    ]
    names = [name for name in values[0] if name not in _FREE_FIELDS and values[0][name] != values[1][name]]
    return [(name, values[0][name], values[1][name]) for name in names]
