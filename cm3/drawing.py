"""A drawn picture with all that is known about how it came about: seed, retrieved documents, scores of its rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image as PILImage

from cm3.errors import RequestError
from cm3.generation.context import ContextDocument
from cm3.generation.settings import SamplingSettings
from cm3.retrieval.encoder import Encoder

RankerName = Literal["likelihood", "caption", "clip", "both"]
RANKERS: dict[str, tuple[str, ...]] = {
    "likelihood": ("likelihood",),
    "caption": ("caption",),
    "clip": ("clip",),
    "both": ("likelihood", "clip"),
}
"""The scores that each way of ranking adds up."""


@dataclass(frozen=True)
class Drawing:
    """One picture, the best of its candidates where there were several."""

    image: PILImage.Image
    """The picture."""
    prompt: str
    """What was to be drawn."""
    seed: int
    """Draws this picture again, alone."""
    retrieved: tuple[ContextDocument, ...] = ()
    """The documents of the context, in their order."""
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By ranker the scores of all candidates, in the order of their seeds; empty without ranking."""
    chosen: int = 0
    """Which of the candidates this is."""

    def record(self) -> dict[str, Any]:
        """What `settings.json` says about it."""
        entry: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed}
        if self.retrieved:
            entry["retrieved"] = [document.record() for document in self.retrieved]
        if self.scores:
            entry |= {"scores": {name: list(values) for name, values in self.scores.items()}, "chosen": self.chosen}
        return entry


def ranking_summary(drawings: Sequence[Drawing]) -> dict[str, dict[str, float]]:
    """By ranker the mean score of the first candidates ("first": no ranking) and of the chosen ones ("chosen")."""
    return {
        name: {
            "first": float(np.mean([drawing.scores[name][0] for drawing in drawings])),
            "chosen": float(np.mean([drawing.scores[name][drawing.chosen] for drawing in drawings])),
        }
        for name in (drawings[0].scores if drawings else ())
    }


def check_ranking(best_of: int, rank: str | None) -> tuple[str, ...]:
    """The rankers of a request; raises RequestError for candidates without a ranker, or a ranker without them."""
    if best_of < 1:
        raise RequestError(f"best_of={best_of}; ask for at least 1 candidate a picture")
    if rank is None:
        if best_of > 1:
            raise RequestError(f"best_of={best_of} needs a ranker to choose by; set rank to {', '.join(RANKERS)}")
        return ()
    if rank not in RANKERS:
        raise RequestError(f"rank={rank!r} is unknown; choose one of {', '.join(RANKERS)}")
    if best_of == 1:
        raise RequestError(f"rank={rank!r} has one candidate a picture to choose from; set best_of to 2 or more")
    return RANKERS[rank]


def check_negative(negative: str, settings: SamplingSettings) -> None:
    """Refuse a negative prompt that nothing would be compared with."""
    if negative.strip() and settings.guidance_scale == 1 and settings.sampler not in ("cd-k", "mixed"):
        raise RequestError(
            f"negative={negative!r} has no effect at guidance_scale=1; raise guidance_scale, or choose sampler='cd-k'"
        )


def fit(encoder: Encoder, prompts: Sequence[str], pictures: Sequence[PILImage.Image]) -> list[float]:
    """Cosine of each picture with its prompt; the pictures come prompt after prompt, equally many of each."""
    text_NE, image_NE = encoder.encode_texts(prompts), encoder.encode_images(pictures)
    fits: list[float] = (np.repeat(text_NE, len(pictures) // len(prompts), axis=0) * image_NE).sum(axis=1).tolist()
    return fits
