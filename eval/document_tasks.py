"""Tasks on any captioned pictures: round trip of the image tokenizer, captions, and pictures drawn from captions."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image as PILImage

from cm3.config import check_seed, to_dict
from cm3.data.sources import SourceConfig, open_source
from cm3.errors import DataError
from cm3.eval.caption_metrics import bleu_counts, bleu_of_counts, cider
from cm3.eval.caption_words import caption_words
from cm3.eval.image_metrics import psnr, ssim
from cm3.eval.matching import thumbnail
from cm3.eval.protocol import BOOTSTRAP, NORMAL, WILSON, protocol
from cm3.eval.report import Estimate, TaskResult, mean, of_sums, proportion
from cm3.eval.sheets import pairs_sheet
from cm3.eval.task import fingerprint
from cm3.pipeline import CM3, MAX_CAPTION_TOKENS
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

    def open(self, *columns: str) -> list[Document]:
        """All usable rows as documents of a text and a picture, with these columns among their metadata."""
        source = self.source
        wanted = [self.group_by, *columns]
        missing = [column for column in wanted if column is not None and column not in source.metadata_columns]
        if missing:
            source = replace(source, metadata_columns=(*source.metadata_columns, *missing))
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


def square_of(model: CM3) -> str:
    """How pictures are prepared for a model, for protocol records."""
    return f"central square, Lanczos to {model.image_size}x{model.image_size}, RGB of 8 bits"


def picture_of(document: Document) -> PILImage.Image:
    """The first picture of a document."""
    return next(part.pixels for part in document.segments if isinstance(part, Image))


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Encode and decode pictures with the image tokenizer: PSNR and SSIM of each, averaged."""

    pairs: PairSet
    """The pictures."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        documents = self.pairs.open()
        before = [to_square(picture_of(document), model.image_size) for document in documents]
        pictures = list(zip(before, model.reconstruct(before), strict=True))
        measures = {
            "PSNR (dB)": [psnr(*pair) for pair in pictures],
            "SSIM": [ssim(*pair) for pair in pictures],
        }
        metrics = {
            f"{name}, {group}": mean([values[i] for i in members])
            for group, members in self.pairs.groups(documents)
            for name, values in measures.items()
        }
        record = protocol(
            model,
            references=self.pairs.record(documents),
            preprocessing=square_of(model),
            metrics={
                "PSNR": "RGB together, peak 255, mean over pictures",
                "SSIM": "Gaussian 11x11, sigma 1.5, mean over channels; as scikit-image with gaussian_weights=True, "
                "use_sample_covariance=False",
            },
            interval=NORMAL,
        )
        return TaskResult("reconstruction", metrics, record, time.monotonic() - start)


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """Caption pictures greedily and compare with their captions: BLEU, CIDEr-D, equality, and F1 of the words."""

    pairs: PairSet
    """The pictures with their captions."""
    references_column: str | None = None
    """A column with a list of captions of each picture, as COCO has five; null compares with the one caption."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        documents = self.pairs.open(*([self.references_column] if self.references_column else []))
        references = [self._references(document) for document in documents]
        written = model.caption([picture_of(document) for document in documents], temperature=0.0)
        words = [caption_words(text) for text in written]
        wanted = [[caption_words(text) for text in texts] for texts in references]
        counts, agreement = bleu_counts(words, wanted), cider(words, wanted)
        metrics: dict[str, Estimate] = {}
        for group, members in self.pairs.groups(documents):
            metrics[f"CIDEr-D, {group}"] = mean(agreement[members].tolist())
            for n, estimate in enumerate(of_sums(counts[members], bleu_of_counts), 1):
                metrics[f"BLEU-{n}, {group}"] = estimate
            same = sum(written[i] in references[i] for i in members)
            metrics[f"caption equal, {group}"] = proportion(same, len(members))
            closest = [max(word_f1(written[i], text) for text in references[i]) for i in members]
            metrics[f"word F1, {group}"] = mean(closest)
        record = protocol(
            model,
            references={
                **self.pairs.record(documents),
                "references": fingerprint("\n".join(texts) for texts in references),
                "column": self.references_column,
            },
            preprocessing=square_of(model),
            sampling=model.settings(temperature=0.0),
            retrieve=0,
            seed=0,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={
                "CIDEr-D": "as pycocoevalcap 1.2, at most 10, papers print 100 times it; idf from the references of "
                f"all {len(documents)} pictures, also for groups",
                "BLEU": "as pycocoevalcap 1.2, corpus, closest reference length",
                "words": "like PTBTokenizer 3.4.1 in lower case, for F1 split at blanks with case kept",
            },
            interval=f"CIDEr-D, F1: {NORMAL}; BLEU: {BOOTSTRAP}; equality: {WILSON}",
            details={"decoding": "greedy", "max_caption_tokens": MAX_CAPTION_TOKENS},
        )
        return TaskResult("captioning", metrics, record, time.monotonic() - start)

    def _references(self, document: Document) -> list[str]:
        if self.references_column is None:
            return [caption_of(document)]
        found = document.metadata[self.references_column]
        texts = [text for text in found if isinstance(text, str)] if isinstance(found, (list, tuple)) else []
        if not texts or len(texts) != len(found):
            raise DataError(
                f"{document.metadata['row']}: column {self.references_column!r} holds {found!r:.60}; "
                "references are a list of one or more texts"
            )
        return texts


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

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        documents = self.pairs.open()
        originals_NF = np.stack([thumbnail(picture_of(document), self.thumbnail_side) for document in documents])
        metrics: dict[str, Estimate] = {}
        pictures: dict[str, list[PILImage.Image]] = {}
        for scale in self.guidance_scales:
            drawn: list[PILImage.Image] = []
            for first in range(0, len(documents), self.batch_size):
                captions = [caption_of(document) for document in documents[first : first + self.batch_size]]
                images = model.generate(captions, seed=self.seed, guidance_scale=scale)
                drawn += [samples[0] for samples in images]
            pictures[f"guidance {scale:g}"] = drawn
            ranks = []
            for index, picture in enumerate(drawn):
                distances_N = ((originals_NF - thumbnail(picture, self.thumbnail_side)) ** 2).mean(1)
                ranks.append(int((distances_N < distances_N[index]).sum()))
            for group, members in self.pairs.groups(documents):
                for k in (1, 10):
                    hits = sum(ranks[i] < k for i in members)
                    name = f"recall@{k} of {len(documents)}, guidance {scale:g}, {group}"
                    metrics[name] = proportion(hits, len(members))
        captions = [caption_of(document) for document in documents]
        record = protocol(
            model,
            captions,
            references=self.pairs.record(documents),
            preprocessing=f"central square, box filter to {self.thumbnail_side}x{self.thumbnail_side}",
            sampling=model.settings(),
            guidance_scales=self.guidance_scales,
            retrieve=0,
            seed=self.seed,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={"recall@k": "rank of the original by mean squared difference of small RGB pictures"},
            interval=WILSON,
        )
        sheet = pairs_sheet(model, captions, [picture_of(document) for document in documents], pictures)
        return TaskResult("picture matching", metrics, record, time.monotonic() - start, sheet)
