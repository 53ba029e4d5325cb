"""Documents: sequences of text and image segments, to ids of the joint vocabulary and back without loss.

Layout of CM3Leon (arXiv 2309.02591, figures 8 and 9): `</s> segment <break> segment ... </s>`. A text segment
is its piece ids (none for an empty text), an image segment its codes in raster order.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from cm3.errors import DataError, ModelFilesError
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.text import TextTokenizer
from cm3.tokenizers.vocabulary import Vocabulary

TEXT_TOKENIZER_FILE = "tokenizer.model"
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
    """The ids of a document, int64 of shape (T,): `</s> segment <break> segment ... </s>`.

    Raises:
        DataError: a text token is special (its place in the layout would be ambiguous) or out of range, or an
            image code is out of range.
    """
    parts = [np.array([vocabulary.eos_id])]
    for index, segment in enumerate(document.segments):
        if index:
            parts.append(np.array([vocabulary.break_id]))
        if isinstance(segment, ImageCodes):
            parts.append(vocabulary.codes_to_ids(segment.codes_HW.ravel()))
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
    parts.append(np.array([vocabulary.eos_id]))
    return np.concatenate(parts).astype(np.int64)


def document_from_ids(
    ids: np.ndarray | Sequence[int], vocabulary: Vocabulary, grid: tuple[int, int]
) -> TokenizedDocument:
    """The exact inverse of `document_to_ids` for images of `grid` (height, width in codes).

    Raises:
        DataError: the ids are no document; the message names the place and the id found there.
    """
    ids = np.asarray(ids, dtype=np.int64)
    if ids.ndim != 1 or len(ids) < 2:
        raise DataError(f"a document is at least </s> </s>, found ids of shape {ids.shape}")
    inside = vocabulary.is_image(ids) | vocabulary.is_text(ids) | (ids == vocabulary.break_id)
    inside[[0, -1]] = ids[[0, -1]] == vocabulary.eos_id
    if not inside.all():
        rule = "a document is </s>, text or images parted by <break>, </s>"
        raise _misplaced(ids, int(np.argmin(inside)), vocabulary, rule)
    bounds = [0, *np.flatnonzero(ids == vocabulary.break_id).tolist(), len(ids) - 1]
    return TokenizedDocument(
        tuple(
            _segment_from_ids(ids, start + 1, stop, vocabulary, grid)
            for start, stop in zip(bounds, bounds[1:], strict=False)
        )
    )


def _segment_from_ids(
    ids: np.ndarray, start: int, stop: int, vocabulary: Vocabulary, grid: tuple[int, int]
) -> TextTokens | ImageCodes:
    """The segment `ids[start:stop]` of text and image ids."""
    is_image = vocabulary.is_image(ids[start:stop])
    if not is_image.any():
        return TextTokens(vocabulary.ids_to_text(ids[start:stop]))
    if not is_image.all():
        place = start + int(np.argmax(is_image != is_image[0]))
        rule = f"the segment that begins at ids[{start}] mixes text and image; put <break> between them"
        raise _misplaced(ids, place, vocabulary, rule)
    if stop - start != grid[0] * grid[1]:
        raise DataError(
            f"ids[{start}:{stop}] are an image of {stop - start} codes; one of {grid[0]}x{grid[1]} codes has "
            f"{grid[0] * grid[1]}"
        )
    return ImageCodes(vocabulary.ids_to_codes(ids[start:stop]).reshape(grid))


def _misplaced(ids: np.ndarray, place: int, vocabulary: Vocabulary, rule: str) -> DataError:
    return DataError(f"ids[{place}]={ids[place]} is {vocabulary.describe(int(ids[place]))}; {rule}")


class DocumentTokenizer:
    """Text tokenizer, image tokenizer and the vocabulary that joins their ids.

    Raises:
        ModelFilesError: the vocabulary has not as many text or image ids as the tokenizers.
    """

    def __init__(self, text: TextTokenizer, image: ImageTokenizer, vocabulary: Vocabulary) -> None:
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
        """Write `tokenizer.model`, the image tokenizer's files and `vocabulary.json`."""
        folder = Path(folder)
        self.text.save(folder / TEXT_TOKENIZER_FILE)
        self.image.save(folder)
        self.vocabulary.save(folder / VOCABULARY_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> "DocumentTokenizer":
        """Read what `save` wrote. Raises ModelFilesError where files are missing or do not fit together."""
        folder = Path(folder)
        return cls(
            TextTokenizer.load(folder / TEXT_TOKENIZER_FILE),
            ImageTokenizer.load(folder),
            Vocabulary.load(folder / VOCABULARY_FILE),
        )


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
