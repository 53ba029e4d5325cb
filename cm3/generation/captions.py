"""Captions: the masked text of `</s> <mask> <break> image </s>`, filled in (CM3Leon section 2.2).

A model that answers in turns is asked for one instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from cm3.generation.context import ContextDocument, context_record, fitted_request
from cm3.generation.prompts import Codes
from cm3.generation.request import Request
from cm3.generation.trained import UNGUIDED, Picture, TrainedModel
from cm3.generation.turns import TurnPrompts
from cm3.tokenizers.document import Document, Image, ImageCodes, TextTokens, TokenizedDocument

MAX_CAPTION_TOKENS = 128
"""Longest caption in text tokens."""
ROOM_BESIDE_DOCUMENTS = 32
"""Text tokens that retrieved documents leave room for."""
QUESTION = "What do you see?"
"""Asked after the picture in turns, as in the examples of Chameleon's code."""


@dataclass(frozen=True)
class Caption:
    """What the model says of a picture."""

    text: str
    """The caption."""
    retrieved: tuple[ContextDocument, ...] = ()
    """The documents of the context, in their order."""
    left_out: tuple[ContextDocument, ...] = ()
    """Documents that were retrieved, too, but for which the context had no room."""

    def record(self) -> dict[str, Any]:
        """What `cm3 caption --json` says about it."""
        return {"caption": self.text, **context_record(self.retrieved, self.left_out)}


def describe(
    model: TrainedModel, images: Sequence[Picture], *, seed: int, retrieve: int, sampling: Mapping[str, Any]
) -> list[Caption]:
    """A caption of each picture; arguments as in `CM3.describe`."""
    pictures = [model.square(image) for image in images]
    if not pictures:
        return []
    found = model.retrieved([Document((Image(picture),)) for picture in pictures], retrieve)
    max_positions = model.transformer.config.max_positions
    requests, counts = [], []
    for codes_HW, items in zip(model.encode(pictures), found, strict=True):
        request, count = fitted_request(partial(_request, model, codes_HW, seed), items, max_positions)
        requests.append(replace(request, max_new_tokens=MAX_CAPTION_TOKENS).fitted(max_positions))
        counts.append(count)
    settings = model.sampling({"temperature": 0.0, **sampling, **UNGUIDED})
    texts = [model.text_of(samples[0]).strip() for samples in model.engine.run(requests, settings)]
    return [
        Caption(text, tuple(items[:count]), tuple(items[count:]))
        for text, items, count in zip(texts, found, counts, strict=True)
    ]


def _request(model: TrainedModel, codes_HW: Codes, seed: int, *, context: Sequence[TokenizedDocument]) -> Request:
    """A caption of the least length that documents must leave room for."""
    budget: dict[str, Any] = {"context": context, "max_new_tokens": ROOM_BESIDE_DOCUMENTS, "seeds": (seed,)}
    if isinstance(model.prompts, TurnPrompts):
        question = TextTokens(np.array(model.tokenizer.text.encode(QUESTION)))
        return model.prompts.words([ImageCodes(codes_HW), question], **budget)
    return model.prompts.infill_text([], [], codes_HW, **budget)
