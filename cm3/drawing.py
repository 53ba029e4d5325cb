"""Drawing: pictures of prompts, with how each came about: its seed, retrieved documents, scores of its rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image as PILImage

from cm3.errors import RequestError
from cm3.gallery import contact_sheet
from cm3.generation.context import ContextDocument, context_record, fitted_request
from cm3.generation.request import Request
from cm3.generation.rerank import caption_likelihood, choose, own_likelihood
from cm3.generation.settings import check_negative
from cm3.generation.trained import TrainedModel
from cm3.retrieval.encoder import Encoder, open_encoder
from cm3.tokenizers.document import Document, Image, Text

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
    left_out: tuple[ContextDocument, ...] = ()
    """Documents that were retrieved, too, but for which the context had no room."""

    def record(self) -> dict[str, Any]:
        """What `settings.json` says about it."""
        entry: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed}
        entry |= context_record(self.retrieved, self.left_out)
        if self.scores:
            entry |= {"scores": {name: list(values) for name, values in self.scores.items()}, "chosen": self.chosen}
        return entry


def draw(
    model: TrainedModel,
    prompts: Sequence[str],
    *,
    num_images: int,
    seed: int,
    negative: str,
    retrieve: int,
    unconditional_context: Literal["keep", "drop"],
    best_of: int,
    rank: RankerName | None,
    ranker: str | Path,
    sampling: Mapping[str, Any],
) -> list[list[Drawing]]:
    """For each prompt its drawings; arguments as in `CM3.draw`."""
    model.tokenizer.image.require_decoder()
    if num_images < 1:
        raise RequestError(f"num_images={num_images}; ask for at least 1")
    if unconditional_context not in ("keep", "drop"):
        raise RequestError(f"unconditional_context={unconditional_context!r} is unknown; choose keep or drop")
    if isinstance(prompts, str):
        raise RequestError(f"prompts={prompts!r} is one text, draw takes a list of them; write [{prompts!r}]")
    for text in prompts:
        if not isinstance(text, str):
            raise RequestError(f"a prompt is {type(text).__name__}, not a text; say what to draw in words")
        if not text.strip():
            raise RequestError('the prompt is empty; say what to draw, such as "a small green star"')
    rankers, settings = check_ranking(best_of, rank), model.sampling(sampling)
    check_negative(negative, settings)
    if not prompts:
        return []
    found = model.retrieved([Document((Text(text),)) for text in prompts], retrieve)
    requests, counts = [], []
    for text, items in zip(prompts, found, strict=True):
        make = partial(
            model.prompts.text_to_image,
            model.tokenizer.text.encode(text),
            negative=model.pieces(negative),
            unconditional_context=unconditional_context,
            seeds=tuple(range(seed, seed + num_images * best_of)),
        )
        request, count = fitted_request(make, items, model.transformer.config.max_positions)
        requests.append(request)
        counts.append(count)
    outputs = model.engine.run(requests, settings)
    codes_NP = np.stack([model.prompts.image_codes(ids).ravel() for samples in outputs for ids in samples])
    pictures = model.tokenizer.image.decode(codes_NP)
    scores = {name: _scores(name, model, prompts, requests, outputs, pictures, ranker) for name in rankers}
    drawings = []
    for start in range(0, len(pictures), best_of):
        number, first_seed = start // (num_images * best_of), seed + start % (num_images * best_of)
        rivals = {name: tuple(values[start : start + best_of]) for name, values in scores.items()}
        best = choose(rivals) if rivals else 0
        retrieved, left_out = tuple(found[number][: counts[number]]), tuple(found[number][counts[number] :])
        drawings.append(
            Drawing(pictures[start + best], prompts[number], first_seed + best, retrieved, rivals, best, left_out)
        )
    return [drawings[start : start + num_images] for start in range(0, len(drawings), num_images)]


def _scores(
    name: str,
    model: TrainedModel,
    prompts: Sequence[str],
    requests: Sequence[Request],
    outputs: Sequence[Sequence[np.ndarray]],
    pictures: Sequence[PILImage.Image],
    ranker: str | Path,
) -> list[float]:
    """What a ranker says of each picture, all candidates of the first prompt first."""
    if name == "clip":
        return fit(open_encoder(ranker, str(model.device)), prompts, pictures)
    if name == "likelihood":
        likelihoods = own_likelihood(model.transformer, model.tokenizer.vocabulary, requests, outputs)
        return [score for samples in likelihoods for score in samples]
    texts = [model.tokenizer.text.encode(text) for text, samples in zip(prompts, outputs, strict=True) for _ in samples]
    grids = [model.prompts.image_codes(ids) for samples in outputs for ids in samples]
    return caption_likelihood(model.transformer, model.prompts, texts, grids)


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
            raise RequestError(
                f"best_of={best_of} needs a ranker to choose by; give rank=NAME, one of {', '.join(RANKERS)}"
            )
        return ()
    if rank not in RANKERS:
        raise RequestError(f"rank={rank!r} is unknown; choose one of {', '.join(RANKERS)}")
    if best_of == 1:
        raise RequestError(f"rank={rank!r} has one candidate a picture to choose from; set best_of to 2 or more")
    return RANKERS[rank]


def fit(encoder: Encoder, prompts: Sequence[str], pictures: Sequence[PILImage.Image]) -> list[float]:
    """Cosine of each picture with its prompt; the pictures come prompt after prompt, equally many of each."""
    text_NE, image_NE = encoder.encode_texts(prompts), encoder.encode_images(pictures)
    fits: list[float] = (np.repeat(text_NE, len(pictures) // len(prompts), axis=0) * image_NE).sum(axis=1).tolist()
    return fits


def retrieval_sheet(model: TrainedModel, samples: Sequence[Sequence[Drawing]]) -> PILImage.Image:
    """A contact sheet of what `CM3.draw` returned: for each prompt the documents before it, with their scores and in
    their order, and the pictures drawn."""
    rows: list[tuple[str, list[PILImage.Image], list[str]]] = []
    for drawings in samples:
        found = drawings[0].retrieved
        images, captions = [], []
        for item in found:
            segments = model.tokenizer.detokenize(item.document).segments
            pictures = [part.pixels for part in segments if isinstance(part, Image)]
            images += pictures
            captions += [f"{item.score:.3f} {item.text}"] * len(pictures)
        if images:
            rows.append((f"retrieved for: {drawings[0].prompt}", images, captions))
        rows.append((f"drawn: {drawings[0].prompt}", [drawing.image for drawing in drawings], []))
    return contact_sheet(rows)
