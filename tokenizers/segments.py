"""What documents are made of: text and image segments, as they are and as tokens."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image

from cm3.errors import DataError

ANSWERS = "answers"
"""Key of `TokenizedDocument.metadata`: [segment, first token, stop token] of every answer of an instruction, codes of a
picture being tokens. Segments count from the first one that is not retrieved context."""


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
