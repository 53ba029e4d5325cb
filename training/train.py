"""Training of the CM3 transformer: one loop, read from top to bottom.

The loss is the mean over all targets of a step (CM3Leon section 2.2), whatever its split into processes and micro
batches.
"""

import dataclasses
import itertools
import math
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from cm3.checkpoint import remove_leftovers, require_no_mount, write_text
from cm3.config import dump_config
from cm3.data.loader import PackedLoader
from cm3.data.mixture import Mixture, open_documents
from cm3.data.shards import ShardedDocuments
from cm3.distributed import barrier, is_main, rank, world_size
from cm3.errors import ConfigError
from cm3.eval.machine import MatrixPeak
from cm3.model.config import flops_per_token
from cm3.model.sequence_parallel import join_sequence_group
from cm3.pretrained import resolve_model
from cm3.training.average import WeightAverage
from cm3.training.config import ModelRun
from cm3.training.engine import Engine, deepspeed_config, from_main, start_distributed, training_device
from cm3.training.export import export_adapter, export_model
from cm3.training.initial import initial_weights, make_transformer
from cm3.training.loss import LossModule, num_tokens, target_weight
from cm3.training.memory_use import MemoryUse
from cm3.training.metrics import MetricsWriter, Window
from cm3.training.nonfinite import SkippedSteps, check_divergence
from cm3.training.optimizer import learning_rate_at, make_optimizer
from cm3.training.samples import SampleSheets
from cm3.training.state import RunState, is_verifiable, load_checkpoint, newest_checkpoint, save_checkpoint
from cm3.training.stopping import is_due, stop_report, stop_signal
from cm3.training.trackers import open_trackers, require_wandb


def run(config: ModelRun) -> Path | None:
    """Train a model or its adapters, or go on with an interrupted run, and export what was trained.

    Returns:
        The folder of the model or of the adapter; None where the run was stopped by SIGTERM after saving a checkpoint.

    Raises:
        ConfigError: settings that do not fit each other, the data, the number of processes, or the model to start from.
        ModelFilesError: no checkpoint of the run is good, one cannot be written, or there is no model to start from.
        DivergedError: too many steps in a row had a loss or gradient that is not finite.
    """
    start_distributed()
    if config.wandb_project is not None:
        require_wandb()
    accumulation = config.accumulation_steps(world_size())
    output, yaml = Path(config.output), dump_config(config, stage="model")
    result = output / ("adapter" if config.lora.rank else "model")
    from_main(lambda: require_no_mount(result))
    if config.initialize_from is not None:
        source = config.initialize_from
        from_main(lambda: (output / "checkpoints").is_dir() or resolve_model(source))
    train_data, validation_data = open_data(config)  # what is missing is said before the settings are printed
    if is_main():
        print(yaml, flush=True)
        for folder in (output, output / "checkpoints", output / "model", output / "adapter", output / "samples"):
            remove_leftovers(folder)  # of this run, where it was killed
        write_text(output / "config.yaml", yaml)
    barrier()

    sheets = SampleSheets(config, validation_data) if config.sample_interval else None
    loader = make_loader(config, train_data, evaluation=False)
    if loader.num_too_long:
        report(
            f"left out {loader.num_too_long} of {len(train_data)} documents, longer than "
            f"data.sequence_length={config.data.sequence_length}"
        )
    if isinstance(train_data, Mixture):
        for count in train_data.counts(loader.usable):
            report(str(count))

    memory_use = MemoryUse(training_device())
    report(memory_use.expected(config, world_size()))
    torch.manual_seed(config.seed)
    transformer, base_hash = make_transformer(config, train_data.tokenizer_hash)
    group = join_sequence_group(config.sequence_parallel)
    module = LossModule(transformer, train_data.vocabulary, config, group)
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
    state = RunState(
        step=0,
        tokens=0,
        seconds=0.0,
        loader=loader.state(),
        tokenizer_hash=train_data.tokenizer_hash,
        base_hash=base_hash,
    )
    if checkpoint := from_main(lambda: newest_checkpoint(output / "checkpoints")):
        state = load_checkpoint(checkpoint, engine, average, train_data.tokenizer_hash, base_hash)
        loader.load_state(state.loader)
        unverified = "" if is_verifiable(checkpoint) else " (unverified: it has no checksums)"
        report(f"resumed from {checkpoint}{unverified}")
    elif config.initialize_from is not None and not config.lora.rank:
        weights = initial_weights(config, train_data.tokenizer_hash)
        engine.load_state("weights", weights)
        if average:
            average.load(weights)
        report(f"starting from the weights of {config.initialize_from}")
        del weights

    writer = None
    if is_main():
        trackers = open_trackers(output, config.wandb_project, dataclasses.asdict(config))
        writer = MetricsWriter(output, config.steps, state.step, trackers)
    skipped_steps = SkippedSteps(output, train_data, state.step) if is_main() else None
    peak = MatrixPeak(engine.device, next(module.parameters()).dtype)
    peak.measure()
    flops = flops_per_token(config.model, mean_context(config, train_data))
    if config.initialize_from is not None and not checkpoint and config.evaluation_interval and validation_data:
        validation = evaluate(engine, config, validation_data)
        if writer:
            writer.validation(0, validation)
    batches, window, stopped = iter(loader), Window(engine), False
    with stop_signal() as stop_requested:
        while state.step < config.steps and not stopped:
            step = state.step + 1
            torch.manual_seed((config.seed << 32) + step * world_size() + rank())  # dropout depends on the place only
            micro_batches, rows = [], []
            for _ in range(accumulation):
                micro_batches.append(next(batches))
                rows += loader.batch_documents
            shares = [target_weight(batch, group) for batch in micro_batches]
            total_weight, tokens, stops = engine.sum_over_processes(
                [
                    sum(shares),
                    sum(num_tokens(batch, group) for batch in micro_batches),
                    stop_requested(),
                ]
            )
            learning_rate = learning_rate_at(step, config.steps, config.optimizer)
            engine.set_learning_rate(learning_rate)
            losses, sums = [], []
            for batch, share in zip(micro_batches, shares, strict=True):
                loss, batch_sums = engine(batch["ids_BT"], batch["document_ids_BT"], batch["weights_BT"])
                engine.backward(loss * (share / (total_weight or 1.0)))
                losses.append(loss.detach())
                sums.append(batch_sums)
            applied = engine.applied()
            if applied:
                window.add(sum(sums))
                if average:
                    average.update(step)
            seconds = window.lap(tokens)
            state = RunState(
                step=step,
                tokens=state.tokens + int(tokens),
                seconds=state.seconds + seconds,
                loader=loader.state(),
                tokenizer_hash=state.tokenizer_hash,
                base_hash=base_hash,
                samples=zlib.crc32(np.concatenate(rows).astype(np.int64).tobytes(), state.samples),
                skipped=state.skipped + (not applied),
                skipped_in_row=0 if applied else state.skipped_in_row + 1,
            )
            stopped = stops > 0
            if not applied:
                report(f"step {step}/{config.steps} | SKIPPED: loss or gradient is not finite")
                all_losses = gather_losses(engine, config, losses, shares)
                if skipped_steps:
                    skipped_steps.write(step, all_losses, rows)
                check_divergence(state, config.max_nonfinite_steps, output)

            if step % config.log_interval == 0 or step == config.steps:
                values = window.values()
                values["gradient_norm"] = engine.gradient_norm()
                values["learning_rate"] = learning_rate
                peak.measure(1)
                values["mfu"] = values["tokens_per_second"] * flops / (peak.flops_per_second * world_size())
                values["eta_seconds"] = (config.steps - step) * state.seconds / step
                values["tokens"] = state.tokens
                values["skipped"] = state.skipped
                if writer:
                    writer.training(step, values | {"samples": f"{state.samples:08x}"})
            if is_due(step, config.evaluation_interval) and step < config.steps and validation_data:
                with average.applied() if average else nullcontext():
                    validation = evaluate(engine, config, validation_data)
                if writer:
                    writer.validation(step, validation)
            if sheets and (is_due(step, config.sample_interval) or step == config.steps):
                sheets.draw(step, engine, average, writer)
            if is_due(step, config.checkpoint_interval) or stopped or step == config.steps:
                save_checkpoint(
                    output / "checkpoints",
                    engine,
                    state,
                    average,
                    yaml,
                    keep=config.keep_checkpoints,
                    keep_every_steps=config.keep_every_steps,
                )
            window.start_lap()

    if used := memory_use.measured():
        report(used)
    if state.step < config.steps:
        if writer:
            writer.close()
        report(stop_report(state.step, config.steps, output / "checkpoints"))
        return None
    with average.applied() if average else nullcontext():
        validation = evaluate(engine, config, validation_data) if validation_data else {}
    if writer:
        if validation:
            writer.validation(state.step, validation)
        writer.close()
    if config.lora.rank:
        return export_adapter(result, engine, average, config, state, validation)
    return export_model(result, engine, average, config, state, validation)


def open_data(config: ModelRun) -> tuple[ShardedDocuments | Mixture, ShardedDocuments | None]:
    """Open the prepared folders of a run.

    Raises:
        ConfigError: training and validation data were prepared with different tokenizers, or the model has
            another vocabulary.
    """
    train = open_documents(
        config.data.train,
        config.data.weights,
        min_repetition=config.data.min_repetition,
        max_repetition=config.data.max_repetition,
        check=config.data.check_shards,
    )
    held_out, check = config.data.validation, config.data.check_shards
    validation = ShardedDocuments(held_out, check=check) if held_out else None
    if validation and validation.tokenizer_hash != train.tokenizer_hash:
        raise ConfigError(
            f"data.validation={config.data.validation} was prepared with other tokenizers than "
            f"{train}; prepare both with the same ones"
        )
    vocabulary = train.vocabulary
    if vocabulary.size != config.model.vocabulary_size:
        raise ConfigError(
            f"model.vocabulary_size={config.model.vocabulary_size}, but the vocabulary of {train} has "
            f"{vocabulary.size} ids; set model.vocabulary_size={vocabulary.size}"
        )
    return train, validation


def make_loader(config: ModelRun, data: ShardedDocuments | Mixture, *, evaluation: bool) -> PackedLoader:
    """Return the micro batches of this process, the same for all that share rows: endless for training, one fixed pass
    for evaluation."""
    return PackedLoader(
        data,
        data.vocabulary,
        config.objective,
        sequence_length=config.data.sequence_length,
        rows=config.micro_batch_rows,
        seed=0 if evaluation else config.seed,
        packing=config.data.packing,
        rank=rank() // config.sequence_parallel,
        world_size=world_size() // config.sequence_parallel,
        evaluation=evaluation,
    )


def mean_context(config: ModelRun, data: ShardedDocuments | Mixture) -> float:
    """Return how many tokens a token attends to on average: half of its document, or of its row of a stream."""
    if config.data.packing == "stream":
        return config.data.sequence_length / 2
    usable = np.flatnonzero(data.lengths[: len(data)] <= config.data.sequence_length)
    lengths = data.lengths[data.members(usable, config.seed, 0)].astype(float)
    return float((lengths**2).sum() / lengths.sum() / 2)


@torch.no_grad()
def evaluate(engine: Engine, config: ModelRun, data: ShardedDocuments) -> dict[str, float]:
    """Return the mean losses on the first `evaluation_rows` rows of held-out data: the same rows every time."""
    rows_at_once = config.micro_batch_rows * world_size() // config.sequence_parallel
    num_batches = math.ceil(config.evaluation_rows / rows_at_once)
    window = Window(engine)
    engine.module.eval()
    for batch in itertools.islice(make_loader(config, data, evaluation=True), num_batches):
        _, sums = engine(batch["ids_BT"], batch["document_ids_BT"], batch["weights_BT"])
        window.add(sums)
    engine.module.train()
    return window.losses()


def gather_losses(engine: Engine, config: ModelRun, losses: list[torch.Tensor], weights: list[float]) -> list[float]:
    """Return the losses of a step's micro batches in the order of its rows, those of all processes. A collective.

    Args:
        engine: Sums over processes.
        config: Of the run.
        losses: The mean loss of each of this process's micro batches, or of its parts of them.
        weights: What each is a mean over: the sum of the weights of its targets.
    """
    sums = torch.zeros(2, len(losses), world_size() // config.sequence_parallel, dtype=torch.float64)
    share = torch.tensor(weights, dtype=torch.float64)
    sums[:, :, rank() // config.sequence_parallel] = torch.stack([torch.stack(losses).double().cpu() * share, share])
    loss, weight = torch.tensor(engine.sum_over_processes(sums.flatten().tolist()), dtype=torch.float64).chunk(2)
    return (loss / weight.where(weight != 0, 1.0)).tolist()


def report(message: str) -> None:
    """Print a line once, whatever the number of processes."""
    if is_main():
        print(message, flush=True)
