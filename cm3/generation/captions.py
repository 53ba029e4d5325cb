"""Captions: the masked text of `</s> <mask> <break> image </s>`, filled in (CM3Leon section 2.2).

A model that answers in turns is asked for one instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cm3.generation.prompts import Codes
from cm3.generation.request import Request
from cm3.generation.trained import UNGUIDED, Picture, TrainedModel
from cm3.generation.turns import TurnPrompts
from cm3.tokenizers.document import Document, Image, ImageCodes, TextTokens, TokenizedDocument

MAX_CAPTION_TOKENS = 128
"""Longest caption in text tokens."""
QUESTION = "What do you see?"
"""Asked after the picture in turns, as in the examples of Chameleon's code."""


def caption(
    model: TrainedModel, images: Sequence[Picture], *, seed: int, retrieve: int, sampling: Mapping[str, Any]
) -> list[str]:
    """A caption of each picture; arguments as in `CM3.caption`."""
    pictures = [model.square(image) for image in images]
    if not pictures:
        return []
    found = model.retrieved([Document((Image(picture),)) for picture in pictures], retrieve)
    requests = [
        _request(model, codes_HW, [item.document for item in items], seed).fitted(
            model.transformer.config.max_positions
        )
        for codes_HW, items in zip(model.encode(pictures), found, strict=True)
    ]
    settings = model.sampling({"temperature": 0.0, **sampling, **UNGUIDED})
    return [model.text_of(samples[0]) for samples in model.engine.run(requests, settings)]


def _request(model: TrainedModel, codes_HW: Codes, context: Sequence[TokenizedDocument], seed: int) -> Request:
    budget: dict[str, Any] = {"context": context, "max_new_tokens": MAX_CAPTION_TOKENS, "seeds": (seed,)}
    if isinstance(model.prompts, TurnPrompts):
        question = TextTokens(np.array(model.tokenizer.text.encode(QUESTION)))
        return model.prompts.words([ImageCodes(codes_HW), question], **budget)
    return model.prompts.infill_text([], [], codes_HW, **budget)
