"""Tokenised documents to ids of the joint vocabulary and back without loss.

A text segment is its piece ids (none for an empty text), an image segment its codes in raster order. What stands
around them is the layout of the vocabulary, see `cm3.tokenizers.layout`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from cm3.errors import DataError
from cm3.tokenizers.layout import Layout
from cm3.tokenizers.segments import ANSWERS, ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.vocabulary import Vocabulary


def document_to_ids(document: TokenizedDocument, vocabulary: Vocabulary) -> np.ndarray:
    """The ids of a document in the layout of the vocabulary, int64 of shape (T,).

    Where the layout has turns, an answer of whole segments is one: `turn_end` stands before it and after it.

    Raises:
        DataError: a text token is special (its place in the layout would be ambiguous) or out of range, or an
            image code is out of range.
    """
    parts: list[Any] = [vocabulary.mark("start")]
    turns = _answer_turns(document, vocabulary.layout)
    for index, segment in enumerate(document.segments):
        if index:
            parts.append(vocabulary.mark("between"))
        if index in turns:
            parts.append(vocabulary.mark("turn_end"))
        if isinstance(segment, ImageCodes):
            parts.append(vocabulary.mark("image_start"))
            parts.append(vocabulary.codes_to_ids(segment.codes_HW.ravel()))
            parts.append(vocabulary.mark("image_end"))
            continue
        ids = vocabulary.text_to_ids(segment.tokens)
        is_text = vocabulary.is_text(ids)
        if not is_text.all():
            place = int(np.argmin(is_text))
            raise DataError(
                f"token {place} of text segment {index} is {vocabulary.describe(int(ids[place]))}, not text; "
                "leave special ids to the document layout"
            )
        parts.append(ids)
    parts.append(vocabulary.mark("end"))
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def segment_places(document: TokenizedDocument, layout: Layout) -> list[int]:
    """Where the tokens of every segment begin among the ids of `document_to_ids`, and last how many ids there are."""
    turns = _answer_turns(document, layout)
    places, place = [], 1
    for index, segment in enumerate(document.segments):
        framed = layout.image_start is not None and isinstance(segment, ImageCodes)
        place += (index > 0 and layout.between is not None) + (index in turns) + framed
        places.append(place)
        place += _num_tokens(segment) + framed
    return [*places, place + 1]


def _answer_turns(document: TokenizedDocument, layout: Layout) -> set[int]:
    """The segments with which an answer of whole segments begins, or what comes after one."""
    if layout.turn_end is None:
        return set()
    first = document.metadata.get("retrieved", 0)
    whole = {
        first + segment
        for segment, start, stop in document.metadata.get(ANSWERS, ())
        if (start, stop) == (0, _num_tokens(document.segments[first + segment]))
    }
    return {index for index in range(1, len(document.segments)) if (index in whole) != (index - 1 in whole)}


def _num_tokens(segment: TextTokens | ImageCodes) -> int:
    return segment.codes_HW.size if isinstance(segment, ImageCodes) else len(segment.tokens)


def document_from_ids(
    ids: np.ndarray | Sequence[int], vocabulary: Vocabulary, grid: tuple[int, int]
) -> TokenizedDocument:
    """The exact inverse of `document_to_ids` for images of `grid` (height, width in codes).

    Where the layout parts texts by nothing, texts that follow one another come back as one, and an empty text only
    where it is the whole document. Turns are not read.

    Raises:
        DataError: the ids are no document; the message names the place and the id found there.
    """
    layout = vocabulary.layout
    ids = np.asarray(ids, dtype=np.int64)
    if ids.ndim != 1 or len(ids) < 2:
        raise DataError(f"a document is at least {layout.start} {layout.end}, found ids of shape {ids.shape}")
    marks = [*vocabulary.mark("between"), *vocabulary.mark("image_start"), *vocabulary.mark("image_end")]
    inside = vocabulary.is_image(ids) | vocabulary.is_text(ids) | np.isin(ids, marks)
    inside[[0, -1]] = ids[[0, -1]] == [*vocabulary.mark("start"), *vocabulary.mark("end")]
    if not inside.all():
        raise _misplaced(ids, int(np.argmin(inside)), vocabulary, f"a document is {_rule(layout)}")
    return TokenizedDocument(
        tuple(_segment_from_ids(ids, *bounds, vocabulary, grid) for bounds in _segment_bounds(ids, vocabulary))
    )


def _rule(layout: Layout) -> str:
    if layout.between is not None:
        return f"{layout.start}, text or images parted by {layout.between}, {layout.end}"
    return f"{layout.start}, text and images, each image in {layout.image_start} and {layout.image_end}, {layout.end}"


def _segment_bounds(ids: np.ndarray, vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """Start and stop of every segment, the frame of an image included."""
    if between := vocabulary.mark("between"):
        places = [0, *np.flatnonzero(ids == between[0]).tolist(), len(ids) - 1]
        return [(place + 1, stop) for place, stop in pairwise(places)]
    (image_start,), (image_end,) = vocabulary.mark("image_start"), vocabulary.mark("image_end")
    cuts = {1, len(ids) - 1, *np.flatnonzero(ids == image_start).tolist()}
    cuts |= set((np.flatnonzero(ids == image_end) + 1).tolist())
    return list(pairwise(sorted(cuts))) or [(1, 1)]


def _segment_from_ids(
    ids: np.ndarray, start: int, stop: int, vocabulary: Vocabulary, grid: tuple[int, int]
) -> TextTokens | ImageCodes:
    """The segment `ids[start:stop]` of text and image ids, and the frame of an image where the layout has one."""
    frame = [*vocabulary.mark("image_start"), *vocabulary.mark("image_end")]
    first, last = start, stop
    if frame and start < stop and ids[start] == frame[0]:
        if ids[stop - 1] != frame[1]:
            rule = f"the image that begins at ids[{start}] ends in {vocabulary.layout.image_end}"
            raise _misplaced(ids, stop - 1, vocabulary, rule)
        first, last = start + 1, stop - 1
    kinds = np.where(vocabulary.is_image(ids[first:last]), 1, np.where(vocabulary.is_text(ids[first:last]), 0, 2))
    wanted = int(first > start) if frame else int(len(kinds) and kinds[0])
    if (kinds != wanted).any():
        place = first + int(np.argmax(kinds != wanted))
        between = vocabulary.layout.between
        rule = f"the segment that begins at ids[{start}] mixes text and image; put {between} between them"
        if frame:
            rule = (
                f"images, and nothing else, stand in {vocabulary.layout.image_start} and {vocabulary.layout.image_end}"
            )
        raise _misplaced(ids, place, vocabulary, rule)
    if not wanted:
        return TextTokens(vocabulary.ids_to_text(ids[first:last]))
    if last - first != grid[0] * grid[1]:
        raise DataError(
            f"ids[{first}:{last}] are an image of {last - first} codes; one of {grid[0]}x{grid[1]} codes has "
            f"{grid[0] * grid[1]}"
        )
    return ImageCodes(vocabulary.ids_to_codes(ids[first:last]).reshape(grid))


def _misplaced(ids: np.ndarray, place: int, vocabulary: Vocabulary, rule: str) -> DataError:
    return DataError(f"ids[{place}]={ids[place]} is {vocabulary.describe(int(ids[place]))}; {rule}")
