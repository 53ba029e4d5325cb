"""Captions: the masked text of `</s> <mask> <break> image </s>`, filled in (CM3Leon section 2.2)."""

from collections.abc import Mapping, Sequence
from typing import Any

from cm3.generation.trained import UNGUIDED, Picture, TrainedModel
from cm3.tokenizers.document import Document, Image

MAX_CAPTION_TOKENS = 128
"""Longest caption in text tokens."""


def caption(
    model: TrainedModel, images: Sequence[Picture], *, seed: int, retrieve: int, sampling: Mapping[str, Any]
) -> list[str]:
    """A caption of each picture; arguments as in `CM3.caption`."""
    pictures = [model.square(image) for image in images]
    if not pictures:
        return []
    found = model.retrieved([Document((Image(picture),)) for picture in pictures], retrieve)
    requests = [
        model.prompts.infill_text(
            [],
            [],
            codes_HW,
            context=[item.document for item in items],
            max_new_tokens=MAX_CAPTION_TOKENS,
            seeds=(seed,),
        ).fitted(model.transformer.config.max_positions)
        for codes_HW, items in zip(model.encode(pictures), found, strict=True)
    ]
    settings = model.sampling({"temperature": 0.0, **sampling, **UNGUIDED})
    return [model.text_of(samples[0]) for samples in model.engine.run(requests, settings)]
