"""Training of the CM3 transformer: one loop, read from top to bottom.

The loss is the mean over all targets of a step (spec 2.3), whatever its split into processes and micro batches.
"""

import itertools
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from cm3.checkpoint import write_text
from cm3.config import dump_config
from cm3.data.loader import PackedLoader
from cm3.data.shards import ShardedDocuments
from cm3.distributed import barrier, is_main, rank, world_size
from cm3.errors import ConfigError
from cm3.model.config import flops_per_token
from cm3.model.loss import next_token_loss, shift_targets
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary
from cm3.training.config import ModelRun
from cm3.training.engine import Engine, deepspeed_config, start_distributed
from cm3.training.export import export_model
from cm3.training.metrics import MetricsWriter, Window, peak_flops
from cm3.training.optimizer import learning_rate_at, make_optimizer
from cm3.training.state import RunState, WeightAverage, latest_checkpoint, load_checkpoint, save_checkpoint
from cm3.training.stopping import is_due, stop_signal


def run(config: ModelRun) -> Path | None:
    """Train a model, or go on with an interrupted run, and export it.

    Returns:
        The model folder, or None where the run was stopped by SIGTERM after saving a checkpoint.
    """
    start_distributed()
    accumulation = config.accumulation_steps(world_size())
    output, yaml = Path(config.output), dump_config(config, stage="model")
    if is_main():
        print(yaml, flush=True)
        write_text(output / "config.yaml", yaml)
    barrier()

    train_data, validation_data = open_data(config)
    loader = make_loader(config, train_data, evaluation=False)
    if loader.num_too_long:
        report(
            f"left out {loader.num_too_long} of {len(train_data)} documents, longer than "
            f"data.sequence_length={config.data.sequence_length}"
        )

    torch.manual_seed(config.seed)
    module = LossModule(Transformer(config.model), train_data.vocabulary, config)
    module.model.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        for block in module.model.blocks:
            block.compile(dynamic=False)
    engine = Engine(
        module,
        make_optimizer(module, config.optimizer),
        deepspeed_config(
            micro_batch_rows=config.micro_batch_rows,
            accumulation_steps=accumulation,
            zero_stage=config.zero_stage,
            bf16=config.precision == "bf16",
            gradient_clip=config.optimizer.gradient_clip,
            offload_optimizer=config.offload_optimizer,
        ),
    )
    average = WeightAverage(module, config.ema_decay) if config.ema_decay else None
    state = RunState(step=0, tokens=0, seconds=0.0, loader=loader.state(), tokenizer_hash=train_data.tokenizer_hash)
    if checkpoint := latest_checkpoint(output / "checkpoints"):
        state = load_checkpoint(checkpoint, engine, average, train_data.tokenizer_hash)
        loader.load_state(state.loader)
        report(f"resumed from {checkpoint}")

    writer = MetricsWriter(output, config.steps, state.step) if is_main() else None
    peak = peak_flops(engine.device, next(module.parameters()).dtype) * world_size()
    flops = flops_per_token(config.model, mean_context(config, train_data))
    batches, window, stopped = iter(loader), Window(engine), False
    with stop_signal() as stop_requested:
        while state.step < config.steps and not stopped:
            step = state.step + 1
            torch.manual_seed((config.seed << 32) + step * world_size() + rank())  # dropout depends on the place only
            micro_batches = [next(batches) for _ in range(accumulation)]
            shares = [target_weight(batch) for batch in micro_batches]
            total_weight, tokens, stops = engine.sum_over_processes(
                [
                    sum(shares),
                    sum(int((batch["document_ids_BT"] >= 0).sum()) for batch in micro_batches),
                    stop_requested(),
                ]
            )
            learning_rate = learning_rate_at(step, config.steps, config.optimizer)
            engine.set_learning_rate(learning_rate)
            for batch, share in zip(micro_batches, shares, strict=True):
                loss, sums = engine(batch["ids_BT"], batch["document_ids_BT"], batch["weights_BT"])
                engine.backward(loss * (share / total_weight))
                window.add(sums)
            if average:
                average.update(step)
            seconds = window.lap(tokens)
            state = RunState(
                step, state.tokens + int(tokens), state.seconds + seconds, loader.state(), state.tokenizer_hash
            )
            stopped = stops > 0

            if step % config.log_interval == 0 or step == config.steps:
                values = window.values()
                values["gradient_norm"] = engine.gradient_norm()
                values["learning_rate"] = learning_rate
                values["mfu"] = values["tokens_per_second"] * flops / peak
                values["eta_seconds"] = (config.steps - step) * state.seconds / step
                values["tokens"] = state.tokens
                if writer:
                    writer.training(step, values)
            if is_due(step, config.evaluation_interval) and step < config.steps and validation_data:
                with average.applied() if average else nullcontext():
                    validation = evaluate(engine, config, validation_data)
                if writer:
                    writer.validation(step, validation)
            if is_due(step, config.checkpoint_interval) or stopped or step == config.steps:
                save_checkpoint(output / "checkpoints", engine, state, average, yaml, config.keep_checkpoints)
            window.start_lap()

    if state.step < config.steps:
        if writer:
            writer.close()
        report(f"stopped at step {state.step} of {config.steps}; the same command goes on from there")
        return None
    with average.applied() if average else nullcontext():
        validation = evaluate(engine, config, validation_data) if validation_data else {}
    if writer:
        if validation:
            writer.validation(state.step, validation)
        writer.close()
    return export_model(output / "model", engine, average, config, state, validation)


class LossModule(nn.Module):
    """The transformer and its loss in one forward, as the engine wants it."""

    def __init__(self, model: Transformer, vocabulary: Vocabulary, config: ModelRun) -> None:
        super().__init__()
        self.model = model
        self._image_range = (vocabulary.image_range.start, vocabulary.image_range.stop)
        self._z_loss_weight = config.z_loss_weight

    def forward(self, ids_BT: Tensor, document_ids_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro batch, a mean over its targets, and its sums for `Window`.

        A plain tuple: DeepSpeed hooks the tensors of tuples, lists and dictionaries only, and without its hooks bf16
        gradients of one micro batch leak into the next.
        """
        out = next_token_loss(
            self.model,
            ids_BT,
            document_ids_BT,
            image_range=self._image_range,
            weights_BT=weights_BT,
            z_loss_weight=self._z_loss_weight,
        )
        sums = (out.text_loss_sum, out.text_count, out.image_loss_sum, out.image_count)
        return out.loss, torch.stack([value.detach().double() for value in sums])


def open_data(config: ModelRun) -> tuple[ShardedDocuments, ShardedDocuments | None]:
    """Open the prepared folders of a run.

    Raises:
        ConfigError: training and validation data were prepared with different tokenizers, or the model has
            another vocabulary.
    """
    train = ShardedDocuments(config.data.train)
    validation = ShardedDocuments(config.data.validation) if config.data.validation else None
    if validation and validation.tokenizer_hash != train.tokenizer_hash:
        raise ConfigError(
            f"data.validation={config.data.validation} was prepared with other tokenizers than "
            f"data.train={config.data.train}; prepare both with the same ones"
        )
    vocabulary = train.vocabulary
    if vocabulary.size != config.model.vocabulary_size:
        raise ConfigError(
            f"model.vocabulary_size={config.model.vocabulary_size}, but the vocabulary of {config.data.train} has "
            f"{vocabulary.size} ids; set model.vocabulary_size={vocabulary.size}"
        )
    return train, validation


def make_loader(config: ModelRun, data: ShardedDocuments, *, evaluation: bool) -> PackedLoader:
    """Return the micro batches of this process: endless for training, one fixed pass for evaluation."""
    return PackedLoader(
        data,
        data.vocabulary,
        config.objective,
        sequence_length=config.data.sequence_length,
        rows=config.micro_batch_rows,
        seed=0 if evaluation else config.seed,
        packing=config.data.packing,
        rank=rank(),
        world_size=world_size(),
        evaluation=evaluation,
    )


def mean_context(config: ModelRun, data: ShardedDocuments) -> float:
    """Return how many tokens a token attends to on average: half of its document, or of its row of a stream."""
    if config.data.packing == "stream":
        return config.data.sequence_length / 2
    lengths = data.lengths[data.lengths <= config.data.sequence_length].astype(float)
    return float((lengths**2).sum() / lengths.sum() / 2)


def target_weight(batch: Mapping[str, Tensor]) -> float:
    """Return the sum of the weights of a micro batch's targets."""
    _, is_target_BT = shift_targets(batch["ids_BT"], batch["document_ids_BT"])
    return float((batch["weights_BT"].roll(-1, dims=1) * is_target_BT).sum())


@torch.no_grad()
def evaluate(engine: Engine, config: ModelRun, data: ShardedDocuments) -> dict[str, float]:
    """Return the mean losses on the first `evaluation_rows` rows of held-out data: the same rows every time."""
    num_batches = math.ceil(config.evaluation_rows / (config.micro_batch_rows * world_size()))
    window = Window(engine)
    engine.module.eval()
    for batch in itertools.islice(make_loader(config, data, evaluation=True), num_batches):
        _, sums = engine(batch["ids_BT"], batch["document_ids_BT"], batch["weights_BT"])
        window.add(sums)
    engine.module.train()
    return window.losses()


def report(message: str) -> None:
    """Print a line once, whatever the number of processes."""
    if is_main():
        print(message, flush=True)
