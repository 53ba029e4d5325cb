"""The stages of training by the name that a run's YAML gives in `stage`, and how each is run and shown."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cm3.config import STAGE_KEY, dump_config, load_config, read_yaml
from cm3.distributed import is_main
from cm3.errors import ConfigError
from cm3.eval.run import TASKS, load_evaluation
from cm3.eval.show import show_evaluation
from cm3.training import image_tokenizer, retriever, text_tokenizer
from cm3.training import prepare as preparation
from cm3.training import train as transformer
from cm3.training.config import ModelRun
from cm3.training.image_tokenizer import ImageTokenizerRun
from cm3.training.memory_table import memory_table
from cm3.training.prepare import PrepareConfig
from cm3.training.retriever import RetrieverRun
from cm3.training.show import show_model_run
from cm3.training.text_tokenizer import TextTokenizerRun

_TRAINED: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "text_tokenizer": (TextTokenizerRun, text_tokenizer.run),
    "image_tokenizer": (ImageTokenizerRun, image_tokenizer.run),
    "retriever": (RetrieverRun, retriever.run),
    "model": (ModelRun, transformer.run),
}
_PREPARED: dict[str, tuple[type, Callable[[Any], Any]]] = {"prepare": (PrepareConfig, preparation.run)}


def train(path: str, overrides: Sequence[str] = ()) -> None:
    """Run the training stage of a YAML file."""
    _run(path, overrides, _TRAINED)


def prepare(path: str, overrides: Sequence[str] = ()) -> None:
    """Run the data preparation of a YAML file."""
    _run(path, overrides, _PREPARED)


def show(path: str, overrides: Sequence[str] = ()) -> str:
    """Return the resolved config of any stage; for a model also its size, FLOPs and memory, for an evaluation its
    examples. Runs nothing."""
    if STAGE_KEY not in (values := read_yaml(path)) and values.keys() & set(TASKS):
        return show_evaluation(load_evaluation(path, overrides))
    config_class, _ = _stage(path, _TRAINED | _PREPARED)
    config: Any = load_config(config_class, path, overrides)
    if isinstance(config, ModelRun):
        return f"{show_model_run(config)}\n\n{memory_table(config)}"
    return dump_config(config, read_yaml(path)[STAGE_KEY])


def config_class_of(path: str) -> type:
    """The config class of a YAML file with a `stage` key."""
    return _stage(path, _TRAINED | _PREPARED)[0]


def _run(path: str, overrides: Sequence[str], stages: dict[str, tuple[type, Callable[[Any], Any]]]) -> None:
    config_class, run = _stage(path, stages)
    config: Any = load_config(config_class, path, overrides)
    if is_main():
        _require_writable(config.output)
    run(config)


def _require_writable(output: str) -> None:
    """Write a byte where a run will write, and leave nothing behind; raise ConfigError where that cannot be done."""
    try:
        folder = next(folder for folder in (Path(output), *Path(output).absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise ConfigError(
            f"output={output} cannot be written to ({error.strerror or error}); choose another output, or make room or "
            "mend that place"
        ) from error


def _stage(path: str, stages: dict[str, tuple[type, Any]]) -> tuple[type, Callable[[Any], Any]]:
    name = read_yaml(path).get(STAGE_KEY)
    if name in stages:
        return stages[name]
    if name is None:
        raise ConfigError(
            f"{path} has no key {STAGE_KEY}; it is one of {', '.join(stages)}, or `cm3 eval` runs the file"
        )
    if name in _TRAINED | _PREPARED:
        raise ConfigError(
            f"{path} says {STAGE_KEY}: {name}; `cm3 {'train' if name in _TRAINED else 'prepare'}` runs it"
        )
    near = difflib.get_close_matches(str(name), stages, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(stages)}"
    raise ConfigError(f"{path} says {STAGE_KEY}: {name}; {hint}")
