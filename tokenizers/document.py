"""Documents: sequences of text and image segments, to ids of the joint vocabulary and back without loss.

A text segment is its piece ids (none for an empty text), an image segment its codes in raster order. What stands
around them is the layout of the vocabulary, see `cm3.tokenizers.layout`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from cm3.errors import DataError, ModelFilesError
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.json_text import JsonTextTokenizer
from cm3.tokenizers.layout import Layout
from cm3.tokenizers.text import TextTokenizer
from cm3.tokenizers.vocabulary import Vocabulary

TEXT_TOKENIZER_FILE = "tokenizer.model"
JSON_TEXT_TOKENIZER_FILE = "tokenizer.json"
"""What an imported model has in its place."""

ANSWERS = "answers"
"""Key of `TokenizedDocument.metadata`: [segment, first token, stop token] of every answer of an instruction, codes of a
picture being tokens. Segments count from the first one that is not retrieved context."""
VOCABULARY_FILE = "vocabulary.json"


@dataclass(frozen=True)
class Text:
    """A text segment; it may be empty."""

    text: str


@dataclass(frozen=True)
class Image:
    """An image segment."""

    pixels: PIL.Image.Image


@dataclass(frozen=True)
class Document:
    """At least one segment of text or image, in reading order, and whatever is known about them."""

    segments: tuple[Text | Image, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_segments(self.segments)


@dataclass(frozen=True, eq=False)
class TextTokens:
    """A text segment as piece ids of the text tokenizer, int32 of shape (tokens,)."""

    tokens: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _integers(self.tokens, np.int32, 1, "text tokens"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextTokens) and np.array_equal(self.tokens, other.tokens)


@dataclass(frozen=True, eq=False)
class ImageCodes:
    """An image segment as codebook indices, uint16 of shape (height, width) of the code grid."""

    codes_HW: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes_HW", _integers(self.codes_HW, np.uint16, 2, "image codes"))
        if not self.codes_HW.size:
            raise DataError(f"an image needs at least one code, found a grid of {self.codes_HW.shape}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageCodes) and np.array_equal(self.codes_HW, other.codes_HW)


@dataclass(frozen=True)
class TokenizedDocument:
    """A `Document` whose segments are token arrays."""

    segments: tuple[TextTokens | ImageCodes, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_segments(self.segments)


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


class DocumentTokenizer:
    """Text tokenizer, image tokenizer and the vocabulary that joins their ids.

    Raises:
        ModelFilesError: the vocabulary has not as many text or image ids as the tokenizers.
    """

    def __init__(self, text: TextTokenizer | JsonTextTokenizer, image: ImageTokenizer, vocabulary: Vocabulary) -> None:
        found = (text.size, image.num_codes)
        expected = (vocabulary.text_size, vocabulary.image_range.size)
        if found != expected:
            raise ModelFilesError(
                f"the tokenizers have {found[0]} text pieces and {found[1]} image codes, the vocabulary "
                f"{expected[0]} and {expected[1]}; use the files of one model"
            )
        self.text = text
        self.image = image
        self.vocabulary = vocabulary

    def tokenize(self, documents: Sequence[Document]) -> list[TokenizedDocument]:
        """Tokenize documents; the images of all of them are encoded together."""
        images = [part.pixels for document in documents for part in document.segments if isinstance(part, Image)]
        codes_BHW = iter(self.image.encode(images).reshape(-1, *self.image.grid))

        def tokens(part: Text | Image) -> TextTokens | ImageCodes:
            if isinstance(part, Image):
                return ImageCodes(next(codes_BHW))
            return TextTokens(np.array(self.text.encode(part.text), dtype=np.int32))

        return [TokenizedDocument(tuple(map(tokens, document.segments)), document.metadata) for document in documents]

    def detokenize(self, document: TokenizedDocument) -> Document:
        """The text as it was, and the images as the image tokenizer decodes them."""
        codes = [part.codes_HW.ravel() for part in document.segments if isinstance(part, ImageCodes)]
        images = iter(self.image.decode(np.stack(codes)) if codes else [])

        def content(part: TextTokens | ImageCodes) -> Text | Image:
            if isinstance(part, ImageCodes):
                return Image(next(images))
            return Text(self.text.decode(part.tokens.tolist()))

        return Document(tuple(map(content, document.segments)), document.metadata)

    def to_ids(self, document: TokenizedDocument) -> np.ndarray:
        """The ids of a document, int64 of shape (T,), see `document_to_ids`.

        Raises:
            DataError: as `document_to_ids`, or an image has another grid than the image tokenizer's.
        """
        for index, part in enumerate(document.segments):
            if isinstance(part, ImageCodes) and part.codes_HW.shape != self.image.grid:
                raise DataError(
                    f"segment {index} is an image of {part.codes_HW.shape} codes, this tokenizer's have "
                    f"{self.image.grid}; tokenize the picture again"
                )
        return document_to_ids(document, self.vocabulary)

    def from_ids(self, ids: np.ndarray | Sequence[int]) -> TokenizedDocument:
        """The exact inverse of `to_ids`, see `document_from_ids`."""
        return document_from_ids(ids, self.vocabulary, self.image.grid)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over both tokenizers and the vocabulary; shards and checkpoints carry it."""
        parts = (self.text.hash, self.image.hash, self.vocabulary.hash)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` or `tokenizer.json`, the image tokenizer's files and `vocabulary.json`."""
        folder = Path(folder)
        is_json = isinstance(self.text, JsonTextTokenizer)
        names = (JSON_TEXT_TOKENIZER_FILE, TEXT_TOKENIZER_FILE)
        name, stale = names if is_json else reversed(names)
        self.text.save(folder / name)
        (folder / stale).unlink(missing_ok=True)
        self.image.save(folder)
        self.vocabulary.save(folder / VOCABULARY_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> "DocumentTokenizer":
        """Read what `save` wrote. Raises ModelFilesError where files are missing or do not fit together."""
        folder = Path(folder)
        return cls(load_text_tokenizer(folder), ImageTokenizer.load(folder), Vocabulary.load(folder / VOCABULARY_FILE))


def load_text_tokenizer(folder: str | Path) -> TextTokenizer | JsonTextTokenizer:
    """The text tokenizer of a folder; that of an imported model needs the vocabulary beside it."""
    folder = Path(folder)
    if has_json_text_tokenizer(folder):
        return JsonTextTokenizer.load(folder / JSON_TEXT_TOKENIZER_FILE, Vocabulary.load(folder / VOCABULARY_FILE))
    return TextTokenizer.load(folder / TEXT_TOKENIZER_FILE)


def has_json_text_tokenizer(folder: str | Path) -> bool:
    """Whether the text tokenizer of a folder is that of an imported model; its vocabulary then is, too."""
    folder = Path(folder)
    return (folder / JSON_TEXT_TOKENIZER_FILE).is_file() and not (folder / TEXT_TOKENIZER_FILE).is_file()


def _require_segments(segments: tuple[Any, ...]) -> None:
    if not segments:
        raise DataError("a document needs at least one segment; put an empty text where there is nothing")


def _integers(values: Any, dtype: type[np.integer], ndim: int, what: str) -> np.ndarray:
    """`values` as an array of `dtype`, refused rather than wrapped where they do not fit."""
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer) or array.ndim != ndim:
        raise DataError(f"{what} must be integers in {ndim} dimension(s), found {array.dtype} of shape {array.shape}")
    limits = np.iinfo(dtype)
    if array.dtype != dtype and array.size and (array.min() < limits.min or array.max() > limits.max):
        raise DataError(f"{what} must lie in {limits.min}..{limits.max}, found {array.min()}..{array.max()}")
    return array.astype(dtype, copy=False)
