"""The procedural world's tasks: each lets the model act on held-out scenes and grades it with the oracle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from cm3.config import check_seed
from cm3.data.scene_world import COLORS, SHAPES, SIDE, SIZES, SceneObject
from cm3.data.scenes import NOVEL_PAIRS, SceneDataset
from cm3.drawing import RankerName
from cm3.eval.image_metrics import psnr
from cm3.eval.protocol import BOOTSTRAP, NORMAL, WILSON, protocol, ranking
from cm3.eval.report import Estimate, TaskResult, mean, ratio, share
from cm3.eval.scenes import CaptionScore, SceneScore, caption_score, matches, read_scene
from cm3.eval.task import fingerprint
from cm3.pipeline import CM3


@dataclass(frozen=True, kw_only=True)
class SceneSet:
    """Which scenes a task uses."""

    split: str = "test"
    """`validation` and `test` share no attribute combination with training; `novel` has unseen colour-shape pairs."""
    seed: int = 0
    """Seed of the scenes, and of the sampling."""
    size: int = 200
    """Number of scenes."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def open(self) -> SceneDataset:
        """The scenes, with captions and statements."""
        return SceneDataset(self.split, self.seed, self.size)

    def record(self) -> dict[str, Any]:
        """The part of a protocol record that says which scenes were used."""
        return {**asdict(self), "captions": fingerprint(example.caption for example in self.open())}

    def protocol(self, model: CM3, **parts: Any) -> dict[str, Any]:
        """The whole record of a task on these scenes; `parts` are fields of `cm3.eval.protocol.Protocol`."""
        return protocol(model, (example.caption for example in self.open()), references=self.record(), **parts)


@dataclass(frozen=True, kw_only=True)
class SceneReconstruction:
    """Encode and decode scenes with the image tokenizer, and read them back."""

    scenes: SceneSet = SceneSet()
    """The scenes to encode."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        images = [example.image for example in self.scenes.open()]
        decoded = model.reconstruct(images)
        pairs = list(zip(images, decoded, strict=True))
        exact = [_same(read_scene(before), read_scene(after)) for before, after in pairs]
        metrics = {
            "scenes read back exactly": share(exact),
            "PSNR (dB)": mean([psnr(before, after) for before, after in pairs]),
        }
        record = self.scenes.protocol(
            model,
            preprocessing="64x64 as drawn",
            metrics={"exactly": "same background, shapes, colours and sizes", "PSNR": "RGB together, peak 255"},
            interval=f"shares: {WILSON}; PSNR: {NORMAL}",
        )
        return TaskResult("scene reconstruction", metrics, record, time.monotonic() - start)


def _same(first: Any, second: Any) -> bool:
    def kinds(scene: Any) -> list[tuple[str, str, str]]:
        return sorted((item.shape, item.color, item.size) for item in scene.objects)

    return first.background == second.background and kinds(first) == kinds(second)


@dataclass(frozen=True, kw_only=True)
class SceneGeneration:
    """Draw held-out captions once for each guidance scale, and grade the pictures."""

    scenes: SceneSet = SceneSet()
    """The captions to draw."""
    guidance_scales: tuple[float, ...] = (3.0, 1.0)
    """Every scale gets the same captions and seeds; 1 is guidance off."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 = off."""
    top_p: float = 1.0
    """Nucleus size; 1 = off."""
    best_of: int = 1
    """Candidates a picture, of which the best by `rank` is graded."""
    rank: RankerName | None = None
    """How it is chosen, see `CM3.draw`."""
    batch_size: int = 50
    """Captions drawn at a time; the pictures do not depend on it."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        examples = list(self.scenes.open())
        metrics: dict[str, Estimate] = {}
        chosen: dict[str, Any] = {"best_of": self.best_of, "rank": self.rank}
        sampling: dict[str, Any] = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        for scale in self.guidance_scales:
            scores: list[SceneScore] = []
            clock = time.monotonic()
            for first in range(0, len(examples), self.batch_size):
                batch = examples[first : first + self.batch_size]
                captions = [example.caption for example in batch]
                images = model.generate(captions, seed=self.scenes.seed, guidance_scale=scale, **chosen, **sampling)
                scores += [
                    matches(read_scene(drawn[0]), example.statement)
                    for drawn, example in zip(images, batch, strict=True)
                ]
            seconds = (time.monotonic() - clock) / len(examples)
            metrics |= {
                f"{name}, guidance {scale:g}": share([pick(score) for score in scores])
                for name, pick in _PICTURE_MEASURES.items()
            }
            metrics[f"seconds a picture in batches of {self.batch_size}, guidance {scale:g}"] = mean([seconds])
        record = self.scenes.protocol(
            model,
            sampling=model.settings(**sampling),
            guidance_scales=self.guidance_scales,
            retrieve=0,
            seed=self.scenes.seed,
            samples_per_prompt=1,
            re_ranking=ranking(self.best_of, self.rank),
            metrics={"grader": "cm3.eval.scenes.matches on what read_scene sees"},
            interval=WILSON,
        )
        return TaskResult("scene generation", metrics, record, time.monotonic() - start)


_PICTURE_MEASURES: dict[str, Callable[[SceneScore], bool | None]] = {
    "shape, colour and count right": lambda score: score.attributes_right,
    "relations right": lambda score: score.relations_right,
    "background right": lambda score: score.background_right,
    "exact scene": lambda score: score.exact,
}


@dataclass(frozen=True, kw_only=True)
class SceneCaptioning:
    """Caption rendered scenes greedily, and grade what the captions state."""

    scenes: SceneSet = SceneSet()
    """The scenes to caption."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        examples = list(self.scenes.open())
        captions = model.caption([example.image for example in examples], temperature=0.0)
        scores: list[CaptionScore] = [
            caption_score(example.scene, caption) for example, caption in zip(examples, captions, strict=True)
        ]
        objects = [score.objects for score in scores]
        metrics = {
            "objects with all attributes right": ratio([score.objects_right for score in scores], objects),
            "spurious objects for each object": ratio([score.spurious for score in scores], objects),
            "captions in the grammar": share([score.parsed for score in scores]),
            "relations right": share([score.relations_right for score in scores]),
            "exact caption": share([score.exact for score in scores]),
        }
        record = self.scenes.protocol(
            model,
            preprocessing="64x64 as drawn",
            sampling=model.settings(temperature=0.0),
            retrieve=0,
            seed=0,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={"grader": "cm3.eval.scenes.caption_score"},
            interval=f"shares of captions: {WILSON}; shares of objects: {BOOTSTRAP}",
            details={"decoding": "greedy"},
        )
        return TaskResult("scene captioning", metrics, record, time.monotonic() - start)


@dataclass(frozen=True, kw_only=True)
class SceneInfilling:
    """Empty a box around one object of a scene and ask for another object there, of the same size."""

    scenes: SceneSet = SceneSet()
    """The scenes in which a box is filled."""
    guidance_scale: float = 3.0
    """Guidance towards the prompt."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        inside, outside = [], []
        for index, example in enumerate(self.scenes.open()):
            rng = np.random.default_rng((self.scenes.seed, index))
            target, replacement = _choose_replacement(example.scene.objects, rng)
            left, top, right, bottom = box = _box_around(target)
            prompt = f"a {replacement.size} {replacement.color} {replacement.shape}"
            filled = model.infill(example.image, box=box, prompt=prompt, seed=index, guidance_scale=self.guidance_scale)
            before, after = np.array(example.image), np.array(filled)
            before[top:bottom, left:right] = after[top:bottom, left:right] = 0
            outside.append(bool((before == after).all()))
            inside.append(_holds(filled, replacement, box))
        metrics = {
            "prompt's object in the box": share(inside),
            "outside unchanged": share(outside),
        }
        record = self.scenes.protocol(
            model,
            preprocessing="64x64 as drawn",
            sampling=model.settings(guidance_scale=self.guidance_scale),
            retrieve=0,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={"grader": "read_scene sees the object with its centre in the box; outside equal bit for bit"},
            interval=WILSON,
            details={"prompt": "the new object only", "seeds": "the number of the scene"},
        )
        return TaskResult("scene infilling", metrics, record, time.monotonic() - start)


def _choose_replacement(objects: tuple[SceneObject, ...], rng: np.random.Generator) -> tuple[SceneObject, SceneObject]:
    """An object of the scene, and one of its size and place whose colour and shape the scene lacks and training has."""
    target = objects[rng.integers(len(objects))]
    taken = {(item.color, item.shape) for item in objects} | NOVEL_PAIRS
    kinds = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in taken]
    color, shape = kinds[rng.integers(len(kinds))]
    return target, replace(target, color=color, shape=shape)


def _box_around(item: SceneObject) -> tuple[int, int, int, int]:
    """The object's bounding box with two pixels of air, inside the picture: left, top, right, bottom."""
    reach = SIZES[item.size] // 2 + 2
    return (
        max(0, int(item.x) - reach),
        max(0, int(item.y) - reach),
        min(SIDE, int(item.x) + reach),
        min(SIDE, int(item.y) + reach),
    )


def _holds(image: Image.Image, wanted: SceneObject, box: tuple[int, int, int, int]) -> bool:
    """Whether the oracle sees the wanted shape and colour with its centre in the box."""
    left, top, right, bottom = box
    return any(
        (item.shape, item.color) == (wanted.shape, wanted.color) and left <= item.x < right and top <= item.y < bottom
        for item in read_scene(image).objects
    )
