"""The weights of a run as a model folder, at its end or from a checkpoint, written whole or not at all."""

import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from cm3.checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    foreign_entries,
    load_tensors,
    new_folder,
    read_json,
    require_empty,
    write_json,
)
from cm3.config import load_config
from cm3.errors import ModelFilesError, RequestError
from cm3.model.lora import merge_adapter, save_adapter, weights_hash
from cm3.model.pretrained import CARD_FILE, GENERATION_FILE, TOKENIZER_FILES, load_model, save_model
from cm3.pretrained import CONFIG_FILE as MODEL_CONFIG_FILE
from cm3.pretrained import resolve_model
from cm3.tokenizers.document import JSON_TEXT_TOKENIZER_FILE, DocumentTokenizer
from cm3.training.average import WeightAverage
from cm3.training.card import hardware, model_card
from cm3.training.config import ModelRun
from cm3.training.engine import Engine, from_main
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
_RUN_KEY = "run_hash"
"""In config.json: the run that the weights are of, see `_run_hash`."""
_PARTS = (
    MODEL_CONFIG_FILE,
    GENERATION_FILE,
    CARD_FILE,
    WEIGHTS_FILE,
    INDEX_FILE,
    "model-*.safetensors",
    *TOKENIZER_FILES,
    JSON_TEXT_TOKENIZER_FILE,
)
"""What model folders are made of, large and small ones, with a text tokenizer of either kind."""


def export_model(
    folder: Path,
    engine: Engine,
    average: WeightAverage | None,
    config: ModelRun,
    state: RunState,
    validation: dict[str, float],
) -> Path:
    """Write the model folder of a run from the fp32 weights, or from their average, in place of an earlier one.

    A collective.

    Raises:
        ModelFilesError: in every process; the disk is full or the folder cannot be written.
    """
    tensors = dict(average.tensors if average else engine.state("weights"))

    def write() -> None:
        card = model_card(config, state, validation, hardware(engine.device))
        _write_model(folder, strip_prefix(tensors), config, state, Path(config.output), config.data.train_folder, card)
        print(f"wrote the model to {folder}", flush=True)

    from_main(write)
    return folder


def export_adapter(
    folder: Path,
    engine: Engine,
    average: WeightAverage | None,
    config: ModelRun,
    state: RunState,
    validation: dict[str, float],
) -> Path:
    """Write the adapter of a run, from its fp32 weights or their average, in place of an earlier one. A collective.

    Raises:
        ModelFilesError: in every process; the disk is full or the folder cannot be written.
    """
    tensors = dict(average.tensors if average else engine.state("weights"))

    def write() -> None:
        with new_folder(folder) as temporary:
            save_adapter(
                temporary,
                strip_prefix(tensors),
                config.model,
                config.lora,
                base=str(config.initialize_from),
                base_hash=state.base_hash,
                tokenizer_hash=state.tokenizer_hash,
                card=model_card(config, state, validation, hardware(engine.device)),
            )
        print(f"wrote the adapter to {folder}", flush=True)

    from_main(write)
    return folder


def export_checkpoint(source: str | Path, out: str | Path, tokenizers: str | Path | None = None) -> Path:
    """Write the model folder of a checkpoint: of its average of the weights where there is one, else of its weights.

    A checkpoint of adapters is merged with the model that they were trained on.

    Args:
        source: Folder of a checkpoint, or of a run, whose newest good checkpoint is then taken.
        out: The model folder: a new one, or an earlier export of the same run, which is replaced.
        tokenizers: Folder with the tokenizer files; None takes the data of the run.

    Returns:
        The checkpoint that was taken.

    Raises:
        ModelFilesError: there is no checkpoint or it is damaged, the tokenizers, or the model that was adapted, are
            not those of the run, or the folder cannot be written.
        RequestError: `out` holds something else.
    """
    path = _find_checkpoint(Path(source))
    run = path.resolve().parent.parent
    _require_replaceable(Path(out), run)
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
    card = model_card(config, state, {}, "not known: exported from a checkpoint")
    _write_model(Path(out), tensors, config, state, run, folder, card)
    return path


def _write_model(
    folder: Path,
    tensors: dict[str, Tensor],
    config: ModelRun,
    state: RunState,
    run: Path,
    tokenizers: str | Path,
    card: str,
) -> None:
    """Write a whole model folder or nothing; `run` is the folder of the run that the weights are of."""
    with new_folder(folder, _PARTS) as temporary:
        save_model(
            temporary,
            tensors,
            config.model,
            tokenizer_folder=tokenizers,
            tokenizer_hash=state.tokenizer_hash,
            card=card,
            generation=dataclasses.asdict(config.generation),
            dtype=EXPORT_DTYPES[config.export_precision],
        )
        path = temporary / MODEL_CONFIG_FILE
        write_json(path, read_json(path) | {_RUN_KEY: _run_hash(run)})


def _run_hash(run: Path) -> str:
    """SHA-256 of the place of a run, which nobody reads out of a model that is passed on."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()


def _run_of(folder: Path) -> str | None:
    """The `_run_hash` in a model folder, if it is one and has one."""
    try:
        values = read_json(folder / MODEL_CONFIG_FILE)
    except ModelFilesError:
        return None
    return values.get(_RUN_KEY) if isinstance(values, dict) else None


def _require_replaceable(folder: Path, run: Path) -> None:
    """Raise RequestError where a model of that run cannot be written without loss of something else."""
    try:
        require_empty(folder)
    except RequestError as error:
        if _run_of(folder) != _run_hash(run) or foreign_entries(folder, _PARTS):
            raise RequestError(
                f"{folder} is not empty, and what it holds is not just an earlier export of {run}; choose a folder "
                "that does not exist yet"
            ) from error


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
