"""What a training of the image tokenizer reports: console lines, metrics.jsonl, grids of reconstructions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cm3.checkpoint import atomic_path
from cm3.tokenizers.image import model_to_pixels, pixels_to_model
from cm3.training.codebook import CodebookUsage
from cm3.training.image_tokenizer_config import ImageTokenizerRun
from cm3.training.image_tokenizer_state import ImageTokenizerState
from cm3.training.metrics import duration, open_metrics
from cm3.training.pixels import open_pixels

GRID_PICTURES = 16
MAX_PSNR = 99.0


class ImageTokenizerReport:
    """Writes the same numbers to the console and `metrics.jsonl`; holds the validation pictures."""

    def __init__(self, config: ImageTokenizerRun, start_step: int = 0) -> None:
        """Read the validation pictures, and open the files of a run that goes on after `start_step`."""
        self._config = config
        self._output = Path(config.output)
        self._validation_BHWC: np.ndarray | None = None
        if config.validation is not None:
            source = open_pixels([config.validation], config.vqgan.image_size, config.max_images_in_memory)
            self._validation_BHWC = source.pixels(np.arange(min(len(source), config.evaluation_images)))
        self._file = open_metrics(self._output / "metrics.jsonl", start_step)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Report a training step; `values` has the keys of `training_line`."""
        print(training_line(step, self._config.steps, values), flush=True)
        self._write("train", step, values)

    def evaluation(self, state: ImageTokenizerState) -> None:
        """Evaluate on the validation pictures, if there are any; draw the first ones above their copies."""
        if self._validation_BHWC is None:
            return
        fake_BHWC, values = evaluate(state, self._validation_BHWC, self._config)
        rows = [np.concatenate(pixels_BHWC[:GRID_PICTURES], 1) for pixels_BHWC in (self._validation_BHWC, fake_BHWC)]
        with atomic_path(self._output / "samples" / f"step_{state.step:07d}.png") as path:
            Image.fromarray(np.concatenate(rows)).save(path)
        print(
            f"step {state.step}/{self._config.steps} | validation psnr {values['psnr']:.2f} dB | codes "
            f"{values['used_codes']}/{self._config.vqgan.num_codes} perplexity {values['perplexity']:.0f}",
            flush=True,
        )
        self._write("validation", state.step, values)

    def _write(self, split: str, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"split": split, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close `metrics.jsonl`."""
        self._file.close()


@torch.no_grad()
def evaluate(
    state: ImageTokenizerState, pixels_BHWC: np.ndarray, config: ImageTokenizerRun
) -> tuple[np.ndarray, dict[str, float]]:
    """Reconstructions, and their mean PSNR (of a picture at most 99 dB) and codebook usage."""
    parts, counts_Q = [], torch.zeros(config.vqgan.num_codes, dtype=torch.int64)
    for start in range(0, len(pixels_BHWC), config.batch_size):
        part_BHWC = torch.from_numpy(pixels_BHWC[start : start + config.batch_size]).to(state.device)
        with state.autocast():
            codes_BP = state.model.encode(pixels_to_model(part_BHWC))
            image_BCHW = state.model.decode(codes_BP, config.vqgan.grid)
        parts.append(model_to_pixels(image_BCHW).cpu().numpy())
        counts_Q += torch.bincount(codes_BP.flatten().cpu(), minlength=len(counts_Q))
    fake_BHWC = np.concatenate(parts)
    error_B = np.square(fake_BHWC.astype(np.float64) - pixels_BHWC).mean((1, 2, 3))
    psnr_B = np.minimum(10 * np.log10(255**2 / np.maximum(error_B, 1e-9)), MAX_PSNR)
    usage = CodebookUsage.of_counts(counts_Q)
    values = {"psnr": float(psnr_B.mean()), "used_codes": usage.used_codes, "perplexity": usage.perplexity}
    return fake_BHWC, values


def training_line(step: int, total_steps: int, values: dict[str, float]) -> str:
    """Return the console line of a training step."""
    parts = [f"step {step}/{total_steps}"]
    parts.append(f"loss {values['loss']:.4f} (l1 {values['l1']:.4f} commitment {values['commitment']:.4f})")
    if "perceptual" in values:
        parts.append(f"lpips {values['perceptual']:.3f}")
    if "adversarial" in values:
        balance = f"x{values['adaptive_weight']:.2f}"
        parts.append(f"gan {values['adversarial']:.3f} {balance} d {values['discriminator']:.3f}")
    usage = f"codes {values['used_codes']:.0f} perplexity {values['perplexity']:.0f}"
    parts.append(f"{usage} revived {values['revived_codes']:.0f} separated {values['separated_codes']:.0f}")
    parts.append(f"grad {values['gradient_norm']:.2f} | lr {values['learning_rate']:.1e}")
    parts.append(f"{values['images_per_second']:.0f} img/s | eta {duration(values['eta_seconds'])}")
    return " | ".join(parts)
