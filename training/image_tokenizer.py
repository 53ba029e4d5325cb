"""Training of the image tokenizer (`stage: image_tokenizer`): VQ-GAN (Esser et al. 2021).

One process. The codebook is learned by moving averages (`cm3.training.codebook`); the rest by Adam on
absolute and squared error, commitment, and, where switched on, LPIPS and a PatchGAN with adaptive weight.
"""

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from cm3.checkpoint import new_folder, require_no_mount, write_text
from cm3.config import dump_config
from cm3.data.sources import open_source
from cm3.tokenizers.image import ImageTokenizer, pixels_to_model
from cm3.training.discriminator import adaptive_weight, discriminator_loss, generator_loss
from cm3.training.image_tokenizer_config import ImageTokenizerRun
from cm3.training.image_tokenizer_report import ImageTokenizerReport
from cm3.training.image_tokenizer_state import ImageTokenizerState
from cm3.training.perceptual import LPIPS
from cm3.training.pixels import PixelSource, open_pixels, training_pixels
from cm3.training.stopping import is_due, stop_report, stop_signal

INITIALIZATION_VECTORS_PER_CODE = 20
"""Latents that k-means sees for each code."""


def run(config: ImageTokenizerRun) -> Path | None:
    """Train an image tokenizer, or go on with an interrupted run.

    Returns:
        The folder with `image_tokenizer.safetensors` and `image_tokenizer.json`, or None where the run was
        stopped by SIGTERM after saving a checkpoint.

    Raises:
        DataError: there are no pictures, or too many rows are bad.
        ModelFilesError: the checkpoint is of another network, or the LPIPS weights cannot be read.
    """
    for source in filter(None, (config.data, *config.more_data.values(), config.validation)):
        open_source(source)  # what is missing is said before the settings are printed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    perceptual = _load_perceptual(config, device)
    output, yaml = Path(config.output), dump_config(config, stage="image_tokenizer")
    require_no_mount(output / "tokenizer")
    print(yaml, flush=True)
    write_text(output / "config.yaml", yaml)
    data = open_pixels([config.data, *config.more_data.values()], config.vqgan.image_size, config.max_images_in_memory)

    torch.manual_seed(config.seed)
    state = ImageTokenizerState(config, device)
    checkpoint = output / "checkpoint.safetensors"
    if checkpoint.exists():
        state.load(checkpoint)
        print(f"resumed from {checkpoint} at step {state.step}", flush=True)
    report = ImageTokenizerReport(config, state.step)
    print(f"{state.num_parameters / 1e6:.2f}M parameters, {len(data)} pictures, {device.type}", flush=True)

    start, first_step, stopped = time.perf_counter(), state.step, False
    with stop_signal() as stop_requested:
        while state.step < config.steps and not stopped:
            if state.step == config.quantize_from_step:
                _initialize_codebook(state, data, config)
            image_BCHW = _training_batch(state.step, data, config, device)
            values = train_step(state, image_BCHW, config, perceptual)
            state.step += 1
            stopped = stop_requested()

            if state.step % config.log_interval == 0 or state.step == config.steps:
                seconds_per_step = (time.perf_counter() - start) / (state.step - first_step)
                values |= state.codebook.report()
                values["images_per_second"] = config.batch_size / seconds_per_step
                values["eta_seconds"] = (config.steps - state.step) * seconds_per_step
                report.training(state.step, {name: float(value) for name, value in values.items()})
            if is_due(state.step, config.evaluation_interval) and state.step < config.steps:
                report.evaluation(state)
            if is_due(state.step, config.checkpoint_interval) or stopped or state.step == config.steps:
                state.save(checkpoint)

    if state.step < config.steps:
        report.close()
        print(stop_report(state.step, config.steps, checkpoint), flush=True)
        return None
    tokenizer = ImageTokenizer(state.model, config.export_precision)
    report.evaluation(state)
    report.close()
    with new_folder(output / "tokenizer") as folder:
        tokenizer.save(folder)
    print(f"wrote {output / 'tokenizer'}", flush=True)
    return output / "tokenizer"


def train_step(
    state: ImageTokenizerState, image_BCHW: Tensor, config: ImageTokenizerRun, perceptual: LPIPS | None
) -> dict[str, Tensor | float]:
    """One optimiser step of the network, the codebook and, once it has started, the discriminator.

    Returns:
        The parts of the loss and the norm of the gradient, detached and still on the device.
    """
    quantize = state.step >= config.quantize_from_step
    frozen = config.freeze_codes_from_step is not None and state.step >= config.freeze_codes_from_step
    state.model.encoder.requires_grad_(not frozen)
    start_step = config.adversarial.start_step
    adversarial = state.discriminator if start_step is not None and state.step >= start_step else None
    with state.autocast():
        out = state.model(image_BCHW, quantize)
        fake_BCHW = out.reconstruction_BCHW
        error_BCHW = fake_BCHW - image_BCHW
        values = {"l1": error_BCHW.abs().mean()}
        loss = values["l1"] + config.squared_error_weight * error_BCHW.square().mean()
        if perceptual:
            values["perceptual"] = perceptual(fake_BCHW, image_BCHW)
            loss = loss + config.perceptual_weight * values["perceptual"]
        if adversarial:
            values["adversarial"] = generator_loss(adversarial(fake_BCHW))
            values["adaptive_weight"] = adaptive_weight(loss, values["adversarial"], state.model.last_layer_weight)
            loss = loss + config.adversarial.weight * values["adaptive_weight"] * values["adversarial"]
        values["commitment"] = out.commitment_loss
        loss = loss + config.commitment_weight * out.commitment_loss

    learning_rate = learning_rate_at(state.step, config)
    values["gradient_norm"] = state.update_model(loss, learning_rate, config.gradient_clip)
    if quantize and not frozen:
        state.codebook.update(out.latents_NE, out.codes_BP)
    if adversarial:
        with state.autocast():
            values["discriminator"] = discriminator_loss(adversarial(image_BCHW), adversarial(fake_BCHW.detach()))
        state.update_discriminator(values["discriminator"])
    values["loss"] = loss
    detached = {name: value.detach() for name, value in values.items()}
    return {**detached, "learning_rate": learning_rate}


def learning_rate_at(step: int, config: ImageTokenizerRun) -> float:
    """Linear warm-up, then a cosine to 0 at the end; the first step is 0."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _load_perceptual(config: ImageTokenizerRun, device: torch.device) -> LPIPS | None:
    if config.perceptual_weights is None:
        print("perceptual_weights is not set: training without the perceptual loss (LPIPS)", flush=True)
        return None
    loss = LPIPS.load(config.perceptual_weights).to(device)
    print(f"perceptual loss (LPIPS) with the weights {config.perceptual_weights}", flush=True)
    return loss


@torch.no_grad()
def _initialize_codebook(state: ImageTokenizerState, data: PixelSource, config: ImageTokenizerRun) -> None:
    """k-means over the latents of random pictures."""
    height, width = config.vqgan.grid
    num_batches = -(-INITIALIZATION_VECTORS_PER_CODE * config.vqgan.num_codes // (config.batch_size * height * width))
    latents = []
    for batch in range(num_batches):
        image_BCHW = _training_batch(config.steps + batch, data, config, state.device)
        with state.autocast():
            latents.append(state.model(image_BCHW).latents_NE)
    state.codebook.initialize(torch.cat(latents))


def _training_batch(step: int, data: PixelSource, config: ImageTokenizerRun, device: torch.device) -> Tensor:
    """The pictures of a step, a pure function of (seed, step)."""
    pixels_BHWC = training_pixels(data, config.batch_size, config.seed, step, config.horizontal_flip)
    return pixels_to_model(torch.from_numpy(pixels_BHWC).to(device))
