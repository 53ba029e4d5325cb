"""Tasks on any captioned pictures: round trip of the image tokenizer, captions, and pictures drawn from captions."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image as PILImage

from cm3.config import to_dict
from cm3.data.sources import SourceConfig, open_source
from cm3.eval.images import psnr
from cm3.eval.report import Estimate, TaskResult, mean, proportion
from cm3.eval.task import fingerprint
from cm3.pipeline import CM3
from cm3.tokenizers.document import Document, Image, Text
from cm3.tokenizers.image import to_square

ALL = "all"
"""Name of the group that holds every row."""


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Captioned pictures, reported as a whole and by group."""

    source: SourceConfig
    """The rows."""
    group_by: str | None = None
    """A column of the rows; figures are given for each of its values, and for all rows."""

    def open(self) -> list[Document]:
        """All usable rows as documents of a text and a picture."""
        source = self.source
        if self.group_by is not None and self.group_by not in source.metadata_columns:
            source = replace(source, metadata_columns=(*source.metadata_columns, self.group_by))
        return list(open_source(source))

    def groups(self, documents: Iterable[Document]) -> Iterator[tuple[str, list[int]]]:
        """Names of the groups and the indices of their documents."""
        members: dict[str, list[int]] = defaultdict(list)
        for index, document in enumerate(documents):
            members[ALL].append(index)
            if self.group_by is not None:
                members[f"{self.group_by}={document.metadata[self.group_by]}"].append(index)
        yield from sorted(members.items())

    def record(self, documents: Iterable[Document]) -> dict[str, object]:
        """The part of a protocol record that says which rows were used."""
        return {
            "source": to_dict(self.source),
            "captions": fingerprint(caption_of(document) for document in documents),
        }


def caption_of(document: Document) -> str:
    """The texts of a document, joined."""
    return " ".join(part.text for part in document.segments if isinstance(part, Text))


def picture_of(document: Document) -> PILImage.Image:
    """The first picture of a document."""
    return next(part.pixels for part in document.segments if isinstance(part, Image))


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Encode and decode pictures with the image tokenizer: PSNR of each, averaged."""

    pairs: PairSet
    """The pictures."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        documents = self.pairs.open()
        before = [to_square(picture_of(document), model.image_size) for document in documents]
        values = [psnr(*pair) for pair in zip(before, model.reconstruct(before), strict=True)]
        metrics = {
            f"PSNR (dB), {group}": mean([values[i] for i in members]) for group, members in self.pairs.groups(documents)
        }
        return TaskResult("reconstruction", metrics, self.pairs.record(documents), time.monotonic() - start)


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """Caption pictures greedily and compare with their captions: equality, and F1 of the words as multisets."""

    pairs: PairSet
    """The pictures with their captions."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        documents = self.pairs.open()
        written = model.caption([picture_of(document) for document in documents], temperature=0.0)
        wanted = [caption_of(document) for document in documents]
        metrics: dict[str, Estimate] = {}
        for group, members in self.pairs.groups(documents):
            same = sum(written[i] == wanted[i] for i in members)
            metrics[f"caption equal, {group}"] = proportion(same, len(members))
            metrics[f"word F1, {group}"] = mean([word_f1(written[i], wanted[i]) for i in members])
        protocol = {
            **self.pairs.record(documents),
            "decoding": "greedy",
            "words": "split at blanks, case kept",
        }
        return TaskResult("captioning", metrics, protocol, time.monotonic() - start)


def word_f1(written: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the words of `written`, counted with repeats."""
    first, second = Counter(written.split()), Counter(wanted.split())
    shared = sum((first & second).values())
    total = sum(first.values()) + sum(second.values())
    return 2 * shared / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class PictureMatching:
    """Draw each caption and look for its original among the originals of all rows, by distance of small pixels.

    Recall@k: the original is among the k nearest of n; drawing at random gives k / n.
    """

    pairs: PairSet
    """The captions to draw, with their originals."""
    guidance_scales: tuple[float, ...] = (3.0, 1.0)
    """Every scale gets the same captions and seeds; 1 is guidance off."""
    seed: int = 0
    """Seed of the sampling."""
    thumbnail_side: int = 16
    """Pictures are compared at this size (box filter), by mean squared difference of RGB."""
    batch_size: int = 64
    """Pictures drawn at a time."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        documents = self.pairs.open()
        originals_NF = np.stack([self._thumbnail(picture_of(document)) for document in documents])
        metrics: dict[str, Estimate] = {}
        for scale in self.guidance_scales:
            drawn: list[PILImage.Image] = []
            for first in range(0, len(documents), self.batch_size):
                captions = [caption_of(document) for document in documents[first : first + self.batch_size]]
                pictures = model.generate(captions, seed=self.seed, guidance_scale=scale)
                drawn += [samples[0] for samples in pictures]
            ranks = []
            for index, picture in enumerate(drawn):
                distances_N = ((originals_NF - self._thumbnail(picture)) ** 2).mean(1)
                ranks.append(int((distances_N < distances_N[index]).sum()))
            for group, members in self.pairs.groups(documents):
                for k in (1, 10):
                    hits = sum(ranks[i] < k for i in members)
                    name = f"recall@{k} of {len(documents)}, guidance {scale:g}, {group}"
                    metrics[name] = proportion(hits, len(members))
        protocol = {**self.pairs.record(documents), "seed": self.seed, "thumbnail_side": self.thumbnail_side}
        return TaskResult("picture matching", metrics, protocol, time.monotonic() - start)

    def _thumbnail(self, image: PILImage.Image) -> np.ndarray:
        side = self.thumbnail_side
        small = to_square(image, max(image.size)).resize((side, side), PILImage.Resampling.BOX)
        return np.asarray(small, dtype=np.float32).ravel()
