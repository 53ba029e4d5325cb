"""Completion: a document written on from its beginning, in text and pictures as the model chooses."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cm3.errors import RequestError
from cm3.generation.trained import UNGUIDED, TrainedModel
from cm3.tokenizers.document import Document


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
    request = model.prompts.complete(
        tokenized.segments,
        max_new_tokens=room if max_new_tokens is None else min(room, max_new_tokens),
        seeds=(seed,),
    )
    new_ids = model.engine.run([request], model.sampling({**sampling, **UNGUIDED}))[0][0]
    ids = np.concatenate([np.asarray(request.prompt_ids), new_ids])
    return model.tokenizer.detokenize(model.tokenizer.from_ids(ids))
