"""The compositional score of scenes as a task, and tasks that write pictures for GenEval's and DPG-Bench's programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from cm3.config import check_seed
from cm3.errors import ConfigError
from cm3.eval.compositional import CATEGORIES, compositional_prompts, grade
from cm3.eval.exporters import new_folder, read_dpg_prompts, read_geneval_prompts, write_dpg, write_geneval
from cm3.eval.protocol import WILSON, protocol
from cm3.eval.report import Estimate, TaskResult, average, mean, proportion
from cm3.eval.scenes import read_scene
from cm3.pipeline import CM3


@dataclass(frozen=True, kw_only=True)
class DrawingPlan:
    """How the pictures of a list of prompts are drawn."""

    guidance_scale: float = 3.0
    """Guidance towards the prompt; 1 is off."""
    samples_per_prompt: int = 4
    """Pictures of each prompt; GenEval and DPG-Bench have four, and all of them count."""
    seed: int = 0
    """Sample i of every prompt is drawn with seed + i."""
    batch_size: int = 16
    """Prompts at a time; the pictures do not depend on it."""

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 1 or self.batch_size < 1:
            raise ConfigError("samples_per_prompt and batch_size must be at least 1")
        check_seed(self.seed)

    def draw(self, model: CM3, prompts: Sequence[str]) -> list[list[PILImage.Image]]:
        """The pictures of each prompt."""
        drawn: list[list[PILImage.Image]] = []
        for first in range(0, len(prompts), self.batch_size):
            drawn += model.generate(
                list(prompts[first : first + self.batch_size]),
                num_images=self.samples_per_prompt,
                seed=self.seed,
                guidance_scale=self.guidance_scale,
            )
        return drawn

    def record(self, model: CM3) -> dict[str, Any]:
        """The parts of a protocol record that it decides."""
        return {
            "sampling": model.settings(guidance_scale=self.guidance_scale),
            "retrieve": 0,
            "seed": self.seed,
            "samples_per_prompt": self.samples_per_prompt,
            "re_ranking": "none",
        }


@dataclass(frozen=True, kw_only=True)
class CompositionalGeneration:
    """GenEval's six categories on scenes, graded by the oracle: the share of right pictures of each, and their mean."""

    prompts_per_category: int = 50
    """Prompts of each of the six categories; GenEval has about 92."""
    split: str = "test"
    """`test` and `validation` share no collection of objects with training."""
    drawing: DrawingPlan = DrawingPlan()
    """How the pictures are drawn."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        prompts = compositional_prompts(self.prompts_per_category, self.split, self.drawing.seed)
        texts = [prompt.text for prompt in prompts]
        pictures = self.drawing.draw(model, texts)
        metrics: dict[str, Estimate] = {}
        for category in CATEGORIES:
            right = [
                sum(grade(read_scene(image), prompt) for image in samples) / len(samples)
                for prompt, samples in zip(prompts, pictures, strict=True)
                if prompt.category == category
            ]
            metrics[category] = proportion(sum(right), len(right))
        metrics["overall"] = average(list(metrics.values()))
        record = protocol(
            model,
            texts,
            **self.drawing.record(model),
            metrics={
                "categories": "GenEval's rules on what the scene oracle reads, share of pictures; no GenEval score",
                "overall": "unweighted mean of the six",
            },
            interval=f"{WILSON} with one count for each prompt, since its pictures resemble one another; overall: "
            "Zou and Donner 2008",
            details={"split": self.split, "detector": "cm3.eval.scenes.read_scene"},
        )
        return TaskResult("compositional generation", metrics, record, time.monotonic() - start)


@dataclass(frozen=True, kw_only=True)
class GenEvalPictures:
    """Draw GenEval's prompts into its folder layout, for its own `evaluate_images.py` to score."""

    prompts: str
    """GenEval's prompts/evaluation_metadata.jsonl."""
    folder: str
    """Where the pictures go; new or empty."""
    drawing: DrawingPlan = DrawingPlan()
    """How the pictures are drawn."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        prompts = read_geneval_prompts(self.prompts)
        new_folder(self.folder)  # before hours of drawing
        texts = [prompt.text for prompt in prompts]
        folder = write_geneval(self.folder, prompts, self.drawing.draw(model, texts))
        next_step = f"python evaluation/evaluate_images.py {folder} --outfile results.jsonl"
        return _written("GenEval pictures", model, texts, self.drawing, next_step, start)


@dataclass(frozen=True, kw_only=True)
class DpgPictures:
    """Draw DPG-Bench's prompts into its folder layout, for its own `compute_dpg_bench.py` to score."""

    prompts: str
    """DPG-Bench's folder dpg_bench/prompts."""
    folder: str
    """Where the pictures go; new or empty."""
    drawing: DrawingPlan = DrawingPlan()
    """How the pictures are drawn; one or four samples."""

    def __post_init__(self) -> None:
        if self.drawing.samples_per_prompt not in (1, 4):
            raise ConfigError(
                f"samples_per_prompt={self.drawing.samples_per_prompt}, and DPG-Bench reads 1 or 4; choose one of these"
            )

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        prompts = read_dpg_prompts(self.prompts)
        new_folder(self.folder)
        pictures = self.drawing.draw(model, list(prompts.values()))
        arguments = write_dpg(Path(self.folder), dict(zip(prompts, pictures, strict=True)))
        next_step = f"accelerate launch dpg_bench/compute_dpg_bench.py {' '.join(arguments)}"
        return _written("DPG-Bench pictures", model, list(prompts.values()), self.drawing, next_step, start)


def _written(
    name: str, model: CM3, texts: Sequence[str], drawing: DrawingPlan, next_step: str, start: float
) -> TaskResult:
    print(f"score the pictures with: {next_step}", flush=True)
    seconds = time.monotonic() - start
    record = protocol(model, texts, **drawing.record(model), interval="none", details={"next": next_step})
    metrics = {"seconds a picture": mean([seconds / (len(texts) * drawing.samples_per_prompt)])}
    return TaskResult(name, metrics, record, seconds)
