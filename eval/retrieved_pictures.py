"""Pictures of things that only retrieved documents show: does the context help to draw what training never did?"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image as PILImage

from cm3.config import check_seed
from cm3.errors import ConfigError, DataError
from cm3.eval.document_tasks import ALL, PairSet, caption_of, picture_of
from cm3.eval.matching import chance_of_recall, nearer_than_others, own_ranks, recall
from cm3.eval.protocol import NORMAL, WILSON, protocol
from cm3.eval.report import Estimate, TaskResult, share
from cm3.eval.retrieval_tasks import mean_score, require_all_documents
from cm3.gallery import contact_sheet
from cm3.generation.context import ContextDocument
from cm3.pipeline import CM3
from cm3.tokenizers.document import Document, Image, ImageCodes, Text, TokenizedDocument

Contexts = Sequence[Sequence[ContextDocument]]
"""The documents retrieved for each caption."""

_SHEET_ROWS = 8
_NEAREST = (1, 10)


@dataclass(frozen=True, kw_only=True)
class RetrievedPictureMatching:
    """Draw captions behind 0, 1, 2, ... documents that they retrieve, and compare with their originals by small pixels.

    The measure: how many originals of other captions are farther from a drawn picture than its own one (chance is a
    half), and how often its own is among the k nearest. The encoder that retrieves has no part in it. A picture that
    copies a document is near the original as far as two pictures of one thing are, so the first document's own
    picture is measured beside the drawn ones: only what is beyond it was drawn as the caption says.
    """

    pairs: PairSet
    """The captions to draw, with their originals, which must not be in the memory."""
    memory: str
    """Folder of the memory, made with the model's tokenizers."""
    within: str | None = None
    """A column; an original has those of the same value as rivals. Null: all."""
    subject_column: str | None = None
    """A column with a name for what is shown; how often a retrieved document's text holds it is counted. Null: not."""
    documents: tuple[int, ...] = (0, 1, 2)
    """Numbers of retrieved documents to compare."""
    max_similarity: float = 0.9
    """Documents more similar than this to a caption, or to one another, are left out."""
    guidance_scale: float = 2.0
    """Guidance towards the caption."""
    unconditional_context: Literal["keep", "drop"] = "keep"
    """Whether what guidance compares with keeps the retrieved documents, see `CM3.draw`."""
    temperature: float = 0.5
    """Sampling temperature."""
    thumbnail_side: int = 16
    """Pictures are compared at this size (box filter), by mean squared difference of RGB."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 64
    """Pictures drawn at a time; the pictures do not depend on it."""

    def __post_init__(self) -> None:
        if not self.documents or max(self.documents) < 1:
            raise ConfigError(f"documents={list(self.documents)} retrieves none; name a number of 1 or more")
        check_seed(self.seed)

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        columns = [column for column in (self.within, self.subject_column) if column is not None]
        documents = self.pairs.open(*columns)
        groups = [document.metadata[self.within] if self.within else ALL for document in documents]
        model.use_memory(self.memory, max_similarity=self.max_similarity)
        requests = [Document((Text(caption_of(document)),)) for document in documents]
        found = model.retrieved(requests, max(self.documents))
        score = mean_score(self.memory, found)
        refuse_originals(self.memory, documents, model.tokenizer.tokenize(documents), found)

        shown = {f"{count} documents": dict(enumerate(self._draw(model, documents, count))) for count in self.documents}
        shown["the first document itself"] = {
            number: first[0] for number, items in enumerate(found) if (first := _pictures(model, items[:1]))
        }
        originals = [picture_of(document) for document in documents]
        metrics: dict[str, Estimate] = {}
        chance: dict[str, float] = {}
        for name, pictures in shown.items():
            ranks = own_ranks(pictures, originals, groups, self.thumbnail_side)
            for group, members in self.pairs.groups(documents):
                own = [ranks[number] for number in members if number in ranks]
                metrics[f"nearer to its original than to another, {name}, {group}"] = nearer_than_others(own)
                for k in _NEAREST:
                    metrics[f"recall@{k}, {name}, {group}"] = recall(own, k)
                    chance.setdefault(f"recall@{k}, {group}", round(chance_of_recall(own, k), 4))
        if self.subject_column:
            named = named_by(found, [str(document.metadata[self.subject_column]) for document in documents])
            for count in self.documents:
                if count:
                    metrics[f"subject named by one of {count} documents"] = share(any(row[:count]) for row in named)

        sampling = {"guidance_scale": self.guidance_scale, "temperature": self.temperature}
        record = protocol(
            model,
            [caption_of(document) for document in documents],
            references=self.pairs.record(documents),
            preprocessing=f"central square, box filter to {self.thumbnail_side}x{self.thumbnail_side}",
            sampling=model.settings(**sampling),
            retrieve=max(self.documents),
            memory=self.memory,
            seed=self.seed,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={
                "nearer": "share of the other originals that are farther, by mean squared difference of small RGB "
                "pictures, one at the same distance for a half; chance 0.5",
                "recall@k": "fewer than k of the other originals are nearer",
            },
            interval=f"nearer: {NORMAL}; the rest: {WILSON}",
            details={
                "rivals": f"originals of the same {self.within}" if self.within else "all other originals",
                "chance": chance,
                "max_similarity": self.max_similarity,
                "unconditional_context": self.unconditional_context,
                "mean score": score,
            },
        )
        sheet = self._sheet(model, documents, found, shown)
        return TaskResult("picture matching with retrieval", metrics, record, time.monotonic() - start, sheet)

    def _draw(self, model: CM3, documents: Sequence[Document], count: int) -> list[PILImage.Image]:
        drawn: list[PILImage.Image] = []
        for first in range(0, len(documents), self.batch_size):
            samples = model.draw(
                [caption_of(document) for document in documents[first : first + self.batch_size]],
                seed=self.seed,
                retrieve=count,
                unconditional_context=self.unconditional_context,
                guidance_scale=self.guidance_scale,
                temperature=self.temperature,
            )
            require_all_documents(samples, count)
            drawn += [drawings[0].image for drawings in samples]
        return drawn

    def _sheet(
        self,
        model: CM3,
        documents: Sequence[Document],
        found: Contexts,
        shown: Mapping[str, Mapping[int, PILImage.Image]],
    ) -> PILImage.Image:
        """A row a caption: the original, the retrieved documents, and what was drawn."""
        rows = []
        for number in np.linspace(0, len(documents) - 1, min(_SHEET_ROWS, len(documents))).round().astype(int).tolist():
            entries = [("original, not given", picture_of(documents[number]))]
            for item in found[number]:
                entries += [(f"found: {item.text}", picture) for picture in _pictures(model, [item])]
            entries += [(f"drawn, {count} documents", shown[f"{count} documents"][number]) for count in self.documents]
            below, pictures = zip(*entries, strict=True)
            rows.append((caption_of(documents[number]), pictures, below))
        return contact_sheet(rows)


def refuse_originals(
    memory: str, documents: Sequence[Document], tokenized: Sequence[TokenizedDocument], found: Contexts
) -> None:
    """Raise DataError where what was retrieved for a document is the document, by its row or by its picture's codes."""
    for document, own, items in zip(documents, tokenized, found, strict=True):
        for item in items:
            if item.document.metadata.get("row") == document.metadata["row"] or _codes(item.document) == _codes(own):
                raise DataError(
                    f"{memory} holds the original of {document.metadata['row']} (as row {item.row}), which would show "
                    "the model what it is to draw; leave these pictures out of the memory"
                )


def named_by(found: Contexts, names: Sequence[str]) -> list[list[bool]]:
    """For each caption, of each of its documents whether its text holds the caption's name as whole words."""
    return [[_names(item.text, name) for item in items] for items, name in zip(found, names, strict=True)]


def _names(text: str, name: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE))


def _codes(document: TokenizedDocument) -> list[ImageCodes]:
    return [part for part in document.segments if isinstance(part, ImageCodes)]


def _pictures(model: CM3, items: Sequence[ContextDocument]) -> list[PILImage.Image]:
    """The pictures of documents, as the image tokenizer decodes them."""
    segments = [part for item in items for part in model.tokenizer.detokenize(item.document).segments]
    return [part.pixels for part in segments if isinstance(part, Image)]
