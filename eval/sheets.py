"""Sheets of what a task drew, to be looked at beside its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image as PILImage

from cm3.gallery import contact_sheet
from cm3.pipeline import CM3

ROWS = 8
"""Documents on a sheet, evenly spread over the set."""


def pairs_sheet(
    model: CM3,
    captions: Sequence[str],
    originals: Sequence[PILImage.Image],
    drawn: Mapping[str, Sequence[PILImage.Image]],
) -> PILImage.Image:
    """One row a caption: its original with the model's caption of it, the round trip, and what was drawn.

    Args:
        captions: Of all documents.
        originals: Their pictures.
        drawn: By what is to stand below them, pictures drawn of all captions.
    """
    chosen = np.linspace(0, len(captions) - 1, min(ROWS, len(captions))).round().astype(int).tolist()
    shown = [originals[index] for index in chosen]
    round_trips, described = model.reconstruct(shown), model.caption(shown, temperature=0.0)
    rows = []
    for place, index in enumerate(chosen):
        pictures = [shown[place], round_trips[place], *(pictures[index] for pictures in drawn.values())]
        below = [f"original, captioned: {described[place]}", "through the image tokenizer", *drawn]
        rows.append((captions[index], pictures, below))
    return contact_sheet(rows)
