"""Completion: a document written on from its beginning, in text and pictures as the model chooses."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cm3.errors import RequestError
from cm3.generation.trained import UNGUIDED, TrainedModel
from cm3.tokenizers.document import Document, Image, ImageCodes, Text


def complete(
    model: TrainedModel,
    beginning: Document,
    *,
    max_new_tokens: int | None,
    seed: int,
    sampling: Mapping[str, Any],
) -> Document:
    """The whole document; arguments as in `CM3.complete`."""
    tokenized = model.tokenizer.tokenize([beginning])[0]
    length = len(model.tokenizer.to_ids(tokenized)) - 1
    max_positions = model.transformer.config.max_positions
    room = max_positions - length
    if room < 2:
        raise RequestError(
            f"the beginning takes {length} of the model's {max_positions} positions, which leaves no room; shorten it"
        )
    draws = model.tokenizer.image.has_decoder
    request = model.prompts.complete(
        tokenized.segments,
        images=draws,  # a model without a decoder of pictures writes text only
        max_new_tokens=room if max_new_tokens is None else min(room, max_new_tokens),
        seeds=(seed,),
    )
    new_ids = model.engine.run([request], model.sampling({**sampling, **UNGUIDED}))[0][0]
    whole = model.tokenizer.from_ids(np.concatenate([np.asarray(request.prompt_ids), new_ids]))
    if draws:
        return model.tokenizer.detokenize(whole)
    given = (part for part in beginning.segments if isinstance(part, Image))
    text = model.tokenizer.text
    return Document(
        tuple(
            next(given) if isinstance(part, ImageCodes) else Text(text.decode(part.tokens.tolist()))
            for part in whole.segments
        )
    )
