"""What retrieved documents are worth: the study of CM3Leon section 7.1 at any scale."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cm3.data.scene_captions import StatedObject
from cm3.data.scene_world import SceneObject
from cm3.drawing import Drawing
from cm3.errors import ConfigError
from cm3.eval.document_tasks import PairSet, caption_of, square_of
from cm3.eval.protocol import BOOTSTRAP, WILSON, protocol
from cm3.eval.report import Estimate, TaskResult, ratio, share
from cm3.eval.scene_tasks import SceneSet
from cm3.eval.scenes import matches, read_scene
from cm3.generation.context import ContextDocument, ContextFinder
from cm3.model.loss import next_token_loss
from cm3.pipeline import CM3
from cm3.tokenizers.document import Document, Text, TokenizedDocument

_GRADER = "cm3.eval.scenes.matches on what read_scene sees"


@dataclass(frozen=True, kw_only=True)
class RetrievedLikelihood:
    """Bits of held-out pairs behind 0, 1, 2, ... documents that their captions retrieve; only the pairs count.

    The control: as many documents as the most, those that the next pair retrieved. What they take off is not what
    retrieval is worth, but any documents.
    """

    pairs: PairSet
    """The held-out documents."""
    memory: str
    """Folder of the memory, made with the model's tokenizers."""
    documents: tuple[int, ...] = (0, 1, 2)
    """Numbers of retrieved documents to compare."""
    max_similarity: float = 0.9
    """Documents more similar than this to a caption, or to one another, are left out."""

    @torch.inference_mode()
    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        documents = self.pairs.open()
        tokenized = model.tokenizer.tokenize(documents)
        finder = ContextFinder(
            self.memory,
            model.tokenizer,
            encoder=None,
            device=str(model.device),
            max_similarity=self.max_similarity,
        )
        # with its metadata, by which a row that is in the memory is not found for itself
        requests = [Document((Text(caption_of(document)),), document.metadata) for document in documents]
        found = finder.find(requests, max(self.documents))
        contexts = {f"{count} documents": [items[:count] for items in found] for count in self.documents}
        if max(self.documents):
            contexts[f"{max(self.documents)} documents of the next pair"] = [*found[1:], *found[:1]]
        metrics: dict[str, Estimate] = {}
        for context, lists in contexts.items():
            scores = [_own_bits(model, items, document) for items, document in zip(lists, tokenized, strict=True)]
            text_bits, text_ids, image_bits, image_codes = zip(*scores, strict=True)
            for group, members in self.pairs.groups(documents):
                for name, bits, units in (
                    ("bits per image code", image_bits, image_codes),
                    ("bits per text id", text_bits, text_ids),
                ):
                    metrics[f"{name}, {context}, {group}"] = ratio(
                        [bits[i] for i in members], [units[i] for i in members]
                    )
        record = protocol(
            model,
            [caption_of(document) for document in documents],
            references=self.pairs.record(documents),
            preprocessing=square_of(model),
            retrieve=max(self.documents),
            memory=self.memory,
            metrics={"bits": "-log2 p, left to right, of the pair itself; </s> and <break> count with the text"},
            interval=BOOTSTRAP,
            details={"max_similarity": self.max_similarity, "mean score": mean_score(self.memory, found)},
        )
        return TaskResult("likelihood with retrieval", metrics, record, time.monotonic() - start)


def _own_bits(model: CM3, context: list[ContextDocument], document: TokenizedDocument) -> tuple[float, int, float, int]:
    """Bits and number of the text ids, bits and number of the image codes of a document behind its context."""
    own = len(model.tokenizer.to_ids(document)) - 1  # without the first </s>
    segments = [part for item in context for part in item.document.segments]
    whole = TokenizedDocument((*segments, *document.segments))
    ids_BT = torch.as_tensor(model.tokenizer.to_ids(whole), device=model.device)[None]
    weights_BT = torch.zeros(ids_BT.shape, device=model.device)
    weights_BT[:, -own:] = 1.0
    images = model.tokenizer.vocabulary.image_range
    out = next_token_loss(model.transformer, ids_BT, image_range=(images.start, images.stop), weights_BT=weights_BT)
    return (
        float(out.text_loss_sum) / math.log(2),
        int(out.text_count),
        float(out.image_loss_sum) / math.log(2),
        int(out.image_count),
    )


@dataclass(frozen=True, kw_only=True)
class RetrievedSceneGeneration:
    """Draw scenes behind 0, 1, 2, ... documents that their captions retrieve, and grade the pictures."""

    scenes: SceneSet = SceneSet()
    """The captions to draw. Split `novel` needs what no training scene shows."""
    memory: str
    """Folder of the memory, made with the model's tokenizers."""
    documents: tuple[int, ...] = (0, 1, 2)
    """Numbers of retrieved documents to compare."""
    max_similarity: float = 0.9
    """Documents more similar than this to a caption, or to one another, are left out."""
    guidance_scale: float = 2.0
    """Guidance towards the caption; what it is compared with keeps the retrieved documents."""
    temperature: float = 0.5
    """Sampling temperature."""
    batch_size: int = 50
    """Pictures drawn at a time; the pictures do not depend on it."""

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        examples = list(self.scenes.open())
        sampling: dict[str, Any] = {"guidance_scale": self.guidance_scale, "temperature": self.temperature}
        model.use_memory(self.memory, max_similarity=self.max_similarity)
        metrics: dict[str, Estimate] = {}
        for count in self.documents:
            scores, found = [], []
            for first in range(0, len(examples), self.batch_size):
                batch = examples[first : first + self.batch_size]
                captions = [example.caption for example in batch]
                drawings = model.draw(captions, seed=self.scenes.seed, retrieve=count, **sampling)
                require_all_documents(drawings, count)
                for drawn, example in zip(drawings, batch, strict=True):
                    scene = read_scene(drawn[0].image)
                    scores.append(matches(scene, example.statement))
                    found.append((_kinds(scene.objects) & _kinds(example.statement.objects)).total())
            stated = [len(example.statement.objects) for example in examples]
            metrics[f"stated objects found by shape and colour, {count} documents"] = ratio(found, stated)
            metrics[f"shape, colour and count right, {count} documents"] = share(
                score.attributes_right for score in scores
            )
        record = self.scenes.protocol(
            model,
            sampling=model.settings(**sampling),
            retrieve=max(self.documents),
            memory=self.memory,
            seed=self.scenes.seed,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={"grader": _GRADER},
            interval=f"shares of pictures: {WILSON}; of objects: {BOOTSTRAP}",
            details={"max_similarity": self.max_similarity},
        )
        return TaskResult("scene generation with retrieval", metrics, record, time.monotonic() - start)


def _kinds(objects: Iterable[SceneObject | StatedObject]) -> Counter[tuple[str, str]]:
    return Counter((item.shape, item.color) for item in objects)


def require_all_documents(drawings: Sequence[Sequence[Drawing]], count: int) -> None:
    """Raise ConfigError where the context had no room for all documents: the figure would be of fewer of them."""
    if any(drawing.left_out for drawn in drawings for drawing in drawn):
        raise ConfigError(f"documents={count} do not fit the model's context behind every caption; compare fewer")


def mean_score(memory: str, found: Sequence[Sequence[ContextDocument]]) -> float:
    """The mean score of what was retrieved; raises ConfigError where that is nothing at all."""
    scores = [item.score for items in found for item in items]
    if not scores:
        raise ConfigError(f"{memory} holds no document for any of the captions; raise max_similarity or index more")
    return round(float(np.mean(scores)), 4)
