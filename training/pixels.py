"""Batches of pixels for the image tokenizer: one uint8 array where it fits, else read as needed."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
from PIL import Image as PILImage
from tqdm import tqdm

from cm3.data.sources import RowReport, Source, SourceConfig, open_source
from cm3.errors import DataError
from cm3.tokenizers.document import Document, Image
from cm3.tokenizers.image import to_square


class PixelSource(Protocol):
    """Square RGB pictures of one size by index."""

    def __len__(self) -> int: ...

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """uint8 pictures (B, H, W, 3)."""


class ArrayPixels:
    """Pictures held in memory."""

    def __init__(self, pixels_BHWC: np.ndarray) -> None:
        self.pixels_BHWC = pixels_BHWC

    def __len__(self) -> int:
        return len(self.pixels_BHWC)

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels_BHWC[indices]


class JoinedPixels:
    """The pictures of several sources, one source after the other."""

    def __init__(self, parts: Sequence[PixelSource]) -> None:
        self._parts = parts
        self._starts = list(accumulate((len(part) for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        return np.concatenate([self._read(int(index)) for index in indices])

    def _read(self, index: int) -> np.ndarray:
        number = bisect_right(self._starts, index) - 1
        return self._parts[number].pixels(np.array([index - self._starts[number]]))


class SourcePixels:
    """The first picture of each document, read when asked for; a bad row gives way to the next one."""

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self._size = size

    def __len__(self) -> int:
        return len(self._source)

    @property
    def report(self) -> RowReport:
        """Rows that could not be used."""
        return self._source.report

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self._read(int(index)) for index in indices])

    def _read(self, index: int) -> np.ndarray:
        for offset in range(len(self)):
            self.report.read += 1
            try:
                images = document_images(self._source[(index + offset) % len(self)])
                if images:
                    return np.asarray(to_square(images[0], self._size))
                raise DataError(f"row {index + offset} has no picture")
            except DataError as error:
                self.report.add_bad(str(error))
                self.report.check(max(len(self), self.report.read), self._source.config.max_bad_fraction)
        raise DataError("no row has a picture")


def document_images(document: Document) -> list[PILImage.Image]:
    """The pictures of a document."""
    return [segment.pixels for segment in document.segments if isinstance(segment, Image)]


def open_pixels(configs: Sequence[SourceConfig], size: int, max_in_memory: int) -> PixelSource:
    """Pictures of sources: read once into memory if they have at most `max_in_memory` rows, else read as needed.

    Raises:
        DataError: a source has no picture, or too many bad rows.
    """
    sources = [open_source(config) for config in configs]
    num_rows = sum(len(source) for source in sources)
    if num_rows > max_in_memory:
        print(f"{num_rows} pictures are more than max_images_in_memory={max_in_memory}: read as needed", flush=True)
        return JoinedPixels([SourcePixels(source, size) for source in sources])
    return ArrayPixels(np.stack([pixels for source in sources for pixels in _all_pixels(source, size)]))


def _all_pixels(source: Source, size: int) -> Iterator[np.ndarray]:
    """Every picture of every good row."""
    config, found = source.config, False
    rows = tqdm(source, total=len(source), desc=f"{config.kind} {config.split}", unit=" rows", disable=None)
    for document in rows:
        for image in document_images(document):
            found = True
            yield np.asarray(to_square(image, size))
    if source.report.bad:
        print(f"skipped {source.report.bad} rows: {'; '.join(source.report.bad_rows)}", flush=True)
    if not found:
        raise DataError(f"the source {config.kind} {config.path} holds no pictures; check path and image_column")


def training_pixels(source: PixelSource, batch_size: int, seed: int, step: int, flip: bool) -> np.ndarray:
    """The batch of a step, a pure function of (seed, step): random pictures, mirrored at random if `flip`."""
    rng = np.random.default_rng((seed, step))
    pixels_BHWC = source.pixels(rng.integers(len(source), size=batch_size))
    if flip:
        mirrored_B = rng.random(batch_size) < 0.5
        pixels_BHWC = np.where(mirrored_B[:, None, None, None], pixels_BHWC[:, :, ::-1], pixels_BHWC)
    return np.ascontiguousarray(pixels_BHWC)
