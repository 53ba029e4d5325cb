"""Training of the retriever's encoder (`stage: retriever`): our small CLIP by symmetric InfoNCE (arXiv 2103.00020).

One process. What it writes is an `Encoder` for `cm3.retrieval.encoder.open_encoder`.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cm3.checkpoint import load_strict, load_tensors, new_folder, require_no_mount, save_tensors, write_text
from cm3.config import check_seed, dump_config
from cm3.data.sources import SourceConfig
from cm3.errors import ConfigError, DataError, ModelFilesError
from cm3.retrieval.clip import Clip, ClipConfig, ClipEncoder, Contrast, info_nce, text_batch
from cm3.retrieval.select import drop_words
from cm3.tokenizers.document import TEXT_TOKENIZER_FILE
from cm3.tokenizers.image import WeightPrecision, pixels_to_model
from cm3.tokenizers.text import TextTokenizer
from cm3.training.metrics import duration, open_metrics
from cm3.training.optimizer import OptimizerConfig, learning_rate_at, make_optimizer
from cm3.training.pairs import Pair, Pairs
from cm3.training.stopping import is_due, stop_report, stop_signal


@dataclass(frozen=True, kw_only=True)
class RetrieverRun:
    """Everything that decides the outcome of training an encoder for retrieval."""

    data: SourceConfig
    """Pairs of text and picture to learn from."""
    validation: SourceConfig | None = None
    """Held-out pairs for the loss and for how often the right one is found; null is none."""
    text_tokenizer: str
    """Folder that holds `tokenizer.model`."""
    clip: ClipConfig
    """The network; its vocabulary_size is that of the text tokenizer."""
    steps: int
    """Optimiser steps."""
    batch_size: int = 256
    """Pairs of a step; each is told apart from all others of the step, so more make a better encoder."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-3, warmup_steps=200))
    """AdamW and its learning rate."""
    word_dropout: float = 0.2
    """Share of the words of a text that are left out, as in queries of training (CM3Leon, section 2.1); 0 is off."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of activations; weights and optimiser are fp32."""
    export_precision: WeightPrecision = "bf16"
    """Number format of the weights in the final files."""
    max_pairs_in_memory: int = 50_000
    """Data sets up to this size are read once and kept; larger ones are read as needed."""
    log_interval: int = 50
    """Steps between console lines."""
    evaluation_interval: int = 500
    """Steps between evaluations; one more follows the last step. 0 leaves only that one."""
    evaluation_pairs: int = 512
    """Most pairs of an evaluation; each is looked for among all of them."""
    checkpoint_interval: int = 500
    """Steps between checkpoints; one more follows the last step, or SIGTERM. 0 leaves only that one."""
    seed: int = 0
    """Seed of the weights, the data order and the words left out."""
    output: str
    """Run folder; the result is in `encoder/`. A run that finds its checkpoint there goes on from it."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_interval", "max_pairs_in_memory"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 1 or more")
        for name in ("batch_size", "evaluation_pairs"):
            if getattr(self, name) < 2:
                raise ConfigError(
                    f"{name}={getattr(self, name)}; choose 2 or more: one pair has nothing to differ from"
                )
        check_seed(self.seed)
        if not 0 <= self.word_dropout < 1:
            raise ConfigError(f"word_dropout={self.word_dropout} is a share; choose from 0 to below 1")


class RetrieverState:
    """Network, optimiser, and the finished steps."""

    def __init__(self, config: RetrieverRun, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.step = 0
        self.device = device
        self.model = Clip(config.clip).to(device)
        self.optimizer = make_optimizer(self.model, config.optimizer)

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file."""
        tensors = {"step": torch.tensor(self.step)}
        tensors |= {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in values.items()}
        save_tensors(path, tensors)

    def load(self, path: Path) -> None:
        """Restore `save`.

        Raises:
            ModelFilesError: the file is damaged, or of a run with another network.
        """
        model, moments = {}, dict[int, dict[str, Tensor]]()
        tensors = load_tensors(path)
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "model":
                model[rest] = tensor
            elif kind == "optimizer":
                index, _, moment = rest.partition("/")
                moments.setdefault(int(index), {})[moment] = tensor
        load_strict(self.model, model, str(path))
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            self.step = int(tensors["step"])
        except (KeyError, ValueError) as error:
            raise ModelFilesError(f"{path} does not fit this run ({error}); use another output folder") from error


def run(config: RetrieverRun) -> Path | None:
    """Train an encoder, or go on with an interrupted run.

    Returns:
        The folder with `config.json`, `model.safetensors` and `tokenizer.model`, or None where the run was stopped
        by SIGTERM after saving a checkpoint.

    Raises:
        ConfigError: the network does not embed the pieces of the text tokenizer.
        DataError: there are fewer pairs than a batch has, or too many rows are bad.
        ModelFilesError: the checkpoint is of another network.
    """
    output, yaml = Path(config.output), dump_config(config, stage="retriever")
    require_no_mount(output / "encoder")
    tokenizer = TextTokenizer.load(Path(config.text_tokenizer) / TEXT_TOKENIZER_FILE)
    if tokenizer.size != config.clip.vocabulary_size:
        raise ConfigError(
            f"clip.vocabulary_size={config.clip.vocabulary_size}, but {config.text_tokenizer} has {tokenizer.size} "
            "pieces; write that number"
        )
    data = _open_pairs(config.data, config, config.batch_size)
    validation = _validation_pairs(config)
    print(yaml, flush=True)
    write_text(output / "config.yaml", yaml)

    state = RetrieverState(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = output / "checkpoint.safetensors"
    if checkpoint.exists():
        state.load(checkpoint)
        print(f"resumed from {checkpoint} at step {state.step}", flush=True)
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    print(f"{num_parameters / 1e6:.2f}M parameters, {len(data)} pairs, {state.device.type}", flush=True)

    start, first_step, stopped = time.perf_counter(), state.step, False
    with open_metrics(output / "metrics.jsonl", state.step) as metrics, stop_signal() as stop_requested:

        def report(split: str, values: dict[str, float]) -> None:
            print(_line(split, state.step, config.steps, values), flush=True)
            metrics.write(json.dumps({"split": split, "step": state.step, **values}) + "\n")
            metrics.flush()

        while state.step < config.steps and not stopped:
            values = train_step(state, data.batch(config.batch_size, config.seed, state.step), tokenizer, config)
            stopped = stop_requested()
            if state.step % config.log_interval == 0 or state.step == config.steps:
                seconds_per_step = (time.perf_counter() - start) / (state.step - first_step)
                values["pairs_per_second"] = config.batch_size / seconds_per_step
                values["eta_seconds"] = (config.steps - state.step) * seconds_per_step
                report("train", values)
            if validation and (is_due(state.step, config.evaluation_interval) or state.step == config.steps):
                report("validation", evaluate(state, validation, tokenizer, config))
            if is_due(state.step, config.checkpoint_interval) or stopped or state.step == config.steps:
                state.save(checkpoint)

    if state.step < config.steps:
        print(stop_report(state.step, config.steps, checkpoint), flush=True)
        return None
    with new_folder(output / "encoder") as folder:
        ClipEncoder(state.model, tokenizer, config.export_precision).save(folder)
    print(f"wrote {output / 'encoder'}", flush=True)
    return output / "encoder"


def train_step(
    state: RetrieverState, pairs: list[Pair], tokenizer: TextTokenizer, config: RetrieverRun
) -> dict[str, float]:
    """One optimiser step; `state.step` counts it.

    Returns:
        Loss, hits within the batch, the scale of the cosines, the norm of the gradient and the learning rate.
    """
    rng = np.random.default_rng((config.seed, state.step, 1))  # `Pairs.batch` draws from (seed, step)
    texts = [drop_words(text, config.word_dropout, rng) if config.word_dropout else text for text, _ in pairs]
    state.step += 1
    learning_rate = learning_rate_at(state.step, config.steps, config.optimizer)
    contrast = _contrast(state, [(text, pixels) for text, (_, pixels) in zip(texts, pairs)], tokenizer, config)
    state.optimizer.zero_grad()
    contrast.loss.backward()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.optimizer.gradient_clip or float("inf"))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    return {
        **_plain(contrast),
        "scale": float(state.model.log_scale.detach().exp()),
        "gradient_norm": float(norm),
        "learning_rate": learning_rate,
    }


@torch.no_grad()
def evaluate(
    state: RetrieverState, pairs: list[Pair], tokenizer: TextTokenizer, config: RetrieverRun
) -> dict[str, float]:
    """The loss of held-out pairs, and how often the right one is the nearest of all of them."""
    return _plain(_contrast(state, pairs, tokenizer, config))


def _contrast(state: RetrieverState, pairs: list[Pair], tokenizer: TextTokenizer, config: RetrieverRun) -> Contrast:
    tokens_BT, mask_BT = text_batch([text for text, _ in pairs], tokenizer, config.clip.max_text_tokens)
    image_BCHW = pixels_to_model(torch.from_numpy(np.stack([pixels for _, pixels in pairs])).to(state.device))
    with torch.autocast(state.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        text_BE = state.model.encode_texts(tokens_BT.to(state.device), mask_BT.to(state.device))
        image_BE = state.model.encode_images(image_BCHW)
    return info_nce(text_BE, image_BE, state.model.log_scale)


def _plain(contrast: Contrast) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in contrast._asdict().items()}


def _open_pairs(source: SourceConfig, config: RetrieverRun, least: int) -> Pairs:
    pairs = Pairs(source, config.clip.image_size, config.max_pairs_in_memory)
    if len(pairs) < least:
        raise DataError(
            f"{source.kind} {source.path} has {len(pairs)} rows, {least} are needed at a time; use a smaller batch_size"
        )
    return pairs


def _validation_pairs(config: RetrieverRun) -> list[Pair]:
    if config.validation is None:
        return []
    pairs = _open_pairs(config.validation, config, 2)
    return [pairs[index] for index in range(min(len(pairs), config.evaluation_pairs))]


def _line(split: str, step: int, total_steps: int, values: dict[str, float]) -> str:
    parts = [f"step {step}/{total_steps}", f"{'validation ' if split == 'validation' else ''}loss {values['loss']:.3f}"]
    parts.append(f"found: image {values['text_to_image']:.1%} text {values['image_to_text']:.1%}")
    if split == "train":
        parts.append(
            f"scale {values['scale']:.1f} | grad {values['gradient_norm']:.2f} | lr {values['learning_rate']:.1e}"
        )
        parts.append(f"{values['pairs_per_second']:.0f} pairs/s | eta {duration(values['eta_seconds'])}")
    return " | ".join(parts)
