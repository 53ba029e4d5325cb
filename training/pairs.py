"""Pairs of a text and a picture by index, for training the retriever: kept in memory where they fit."""

import numpy as np

from cm3.data.sources import SourceConfig, open_source
from cm3.errors import DataError
from cm3.tokenizers.document import Text
from cm3.tokenizers.image import to_square
from cm3.training.pixels import document_images

Pair = tuple[str, np.ndarray]
"""A text, and the uint8 pixels (H, W, 3) of its picture."""


class Pairs:
    """The first text and picture of each document, read when asked for; a bad row gives way to the next one.

    Args:
        config: Must name a text and an image column.
        size: Side that pictures are cropped and resized to.
        max_in_memory: Sources of at most so many rows are read once and kept.
    """

    def __init__(self, config: SourceConfig, size: int, max_in_memory: int) -> None:
        if not config.text_columns or config.image_column is None:
            raise DataError("pairs need texts and pictures; name text_columns and image_column")
        self._source = open_source(config)
        self._size = size
        self._kept: dict[int, Pair] | None = {} if len(self._source) <= max_in_memory else None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        """The pair of a row, or of the next good row.

        Raises:
            DataError: too many rows are bad.
        """
        if self._kept is None:
            return self._read(index)
        if index not in self._kept:
            self._kept[index] = self._read(index)
        return self._kept[index]

    def batch(self, batch_size: int, seed: int, step: int) -> list[Pair]:
        """The pairs of a training step, no row twice: a pure function of (seed, step)."""
        rng = np.random.default_rng((seed, step))
        return [self[int(index)] for index in rng.choice(len(self), size=batch_size, replace=False, shuffle=False)]

    def _read(self, index: int) -> Pair:
        report = self._source.report
        for offset in range(len(self)):
            report.read += 1
            try:
                document = self._source[(index + offset) % len(self)]
                text = next(part.text for part in document.segments if isinstance(part, Text))
                return text, np.asarray(to_square(document_images(document)[0], self._size))
            except DataError as error:
                report.add_bad(str(error))
                report.check(max(len(self), report.read), self._source.config.max_bad_fraction)
        raise DataError("no row has a text and a picture")
