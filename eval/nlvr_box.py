"""Tasks on single boxes of the NLVR corpus, graded by reading shapes, colours and sizes from the pixels."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Image

from cm3.config import check_seed
from cm3.data.sources import SourceConfig
from cm3.drawing import RankerName
from cm3.errors import DataError
from cm3.eval.document_tasks import PairSet, caption_of, picture_of, square_of
from cm3.eval.image_metrics import psnr
from cm3.eval.nlvr_reader import BoxKind, kinds, parse_box_caption, read_box
from cm3.eval.protocol import BOOTSTRAP, NORMAL, WILSON, protocol, ranking
from cm3.eval.report import Estimate, TaskResult, mean, ratio, share
from cm3.eval.sheets import pairs_sheet
from cm3.pipeline import CM3
from cm3.tokenizers.document import Document
from cm3.tokenizers.image import to_square

Kinds = Counter[BoxKind]


def _read(images: Sequence[Image]) -> list[Kinds]:
    return [kinds(read_box(image)) for image in images]


def _stated(documents: Sequence[Document]) -> list[Kinds]:
    """The objects that the captions name, which are all objects of the pictures."""
    found = []
    for document in documents:
        named = parse_box_caption(caption_of(document))
        if named is None:
            raise DataError(
                f"{document.metadata['row']}: caption {caption_of(document)!r} is not an exact description of a "
                "box; set source.text_columns to the column that holds them"
            )
        found.append(named)
    return found


@dataclass(frozen=True, kw_only=True)
class BoxReconstruction:
    """Encode and decode boxes with the image tokenizer, and read them back; tests the reader on the originals too."""

    source: SourceConfig
    """The boxes."""
    objects_column: str = "objects"
    """Column with the truth: a JSON list of objects with `shape`, `color` and `size`."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        columns = dict.fromkeys((*self.source.metadata_columns, self.objects_column))
        pairs = PairSet(source=replace(self.source, metadata_columns=tuple(columns)))
        documents = pairs.open()
        truth = [_listed(document, self.objects_column) for document in documents]
        before = [to_square(picture_of(document), model.image_size) for document in documents]
        after = model.reconstruct(before)
        read_before, read_after = _read(before), _read(after)
        metrics = {
            "originals read exactly": share([a == b for a, b in zip(read_before, truth, strict=True)]),
            "round trip read as the original": share([a == b for a, b in zip(read_after, read_before, strict=True)]),
            "PSNR (dB)": mean([psnr(*pair) for pair in zip(before, after, strict=True)]),
        }
        record = protocol(
            model,
            references=pairs.record(documents),
            preprocessing=square_of(model),
            metrics={"read": "cm3.eval.nlvr_reader", "PSNR": "RGB together, peak 255"},
            interval=f"shares: {WILSON}; PSNR: {NORMAL}",
        )
        return TaskResult("box reconstruction", metrics, record, time.monotonic() - start)


def _listed(document: Document, column: str) -> Kinds:
    """The objects that a column lists."""
    try:
        listed = json.loads(document.metadata[column])
        return Counter(BoxKind(item["size"], item["color"], item["shape"]) for item in listed)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{document.metadata['row']}: column {column!r} must hold a JSON list of objects with shape, color and "
            f"size ({type(error).__name__}: {error})"
        ) from error


@dataclass(frozen=True, kw_only=True)
class BoxGeneration:
    """Draw the captions of boxes once for each guidance scale, and read the pictures."""

    source: SourceConfig
    """The captions to draw; exact descriptions."""
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
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 64
    """Captions drawn at a time; the pictures do not depend on it."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        pairs = PairSet(source=self.source)
        documents = pairs.open()
        captions, wanted = [caption_of(document) for document in documents], _stated(documents)
        chosen: dict[str, Any] = {"best_of": self.best_of, "rank": self.rank}
        sampling: dict[str, Any] = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        metrics: dict[str, Estimate] = {}
        drawn: dict[str, list[Image]] = {}
        for scale in self.guidance_scales:
            pictures: list[Image] = []
            for first in range(0, len(captions), self.batch_size):
                batch = captions[first : first + self.batch_size]
                images = model.generate(batch, seed=self.seed, guidance_scale=scale, **chosen, **sampling)
                pictures += [samples[0] for samples in images]
            for name, value in _picture_metrics(_read(pictures), wanted).items():
                metrics[f"{name}, guidance {scale:g}"] = value
            drawn[f"guidance {scale:g}"] = pictures
        record = protocol(
            model,
            captions,
            references=pairs.record(documents),
            sampling=model.settings(**sampling),
            guidance_scales=self.guidance_scales,
            retrieve=0,
            seed=self.seed,
            samples_per_prompt=1,
            re_ranking=ranking(self.best_of, self.rank),
            metrics={"grader": "cm3.eval.nlvr_reader against the caption"},
            interval=f"shares of pictures: {WILSON}; shares of objects: {BOOTSTRAP}",
        )
        sheet = pairs_sheet(model, captions, [picture_of(document) for document in documents], drawn)
        return TaskResult("box generation", metrics, record, time.monotonic() - start, sheet)


def _picture_metrics(drawn: Sequence[Kinds], wanted: Sequence[Kinds]) -> dict[str, Estimate]:
    pairs = list(zip(drawn, wanted, strict=True))
    shared, stated = [(a & b).total() for a, b in pairs], [b.total() for _, b in pairs]
    return {
        "all objects right": share([a == b for a, b in pairs]),
        "all shapes and colours right": share([_without_sizes(a) == _without_sizes(b) for a, b in pairs]),
        "number of objects right": share([a.total() == b.total() for a, b in pairs]),
        "objects right": ratio(shared, stated),
        "spurious objects for each object": ratio([(a - b).total() for a, b in pairs], stated),
    }


def _without_sizes(objects: Kinds) -> Counter[tuple[str, str]]:
    return Counter((kind.color, kind.shape) for kind in objects.elements())


@dataclass(frozen=True, kw_only=True)
class BoxCaptioning:
    """Caption boxes greedily, and compare the objects that the captions name with those in the boxes."""

    source: SourceConfig
    """The boxes, with exact descriptions as captions."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        pairs = PairSet(source=self.source)
        documents = pairs.open()
        truth = _stated(documents)
        written = model.caption([picture_of(document) for document in documents], temperature=0.0)
        parsed = [parse_box_caption(caption) for caption in written]
        named = [Counter() if objects is None else objects for objects in parsed]
        counts = [objects.total() for objects in truth]
        graded = list(zip(named, truth, strict=True))
        metrics = {
            "objects with all attributes right": ratio([(a & b).total() for a, b in graded], counts),
            "spurious objects for each object": ratio([(a - b).total() for a, b in graded], counts),
            "captions in the grammar": share([objects is not None for objects in parsed]),
            "exact caption": share([a == b for a, b in graded]),
        }
        record = protocol(
            model,
            [caption_of(document) for document in documents],
            references=pairs.record(documents),
            preprocessing=square_of(model),
            sampling=model.settings(temperature=0.0),
            retrieve=0,
            seed=0,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={"grader": "cm3.eval.nlvr_reader.parse_box_caption against the box's caption"},
            interval=f"shares of captions: {WILSON}; shares of objects: {BOOTSTRAP}",
            details={"decoding": "greedy"},
        )
        return TaskResult("box captioning", metrics, record, time.monotonic() - start)
