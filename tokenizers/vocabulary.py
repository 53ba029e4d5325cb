"""One id space for text, image codes and special ids, as a table of named contiguous ranges.

CM3Leon: 56,320 text ids, 8,192 image codes and its special ids share one embedding table (arXiv 2309.02591,
section 2.1). Chameleon orders the same parts differently, and writes its documents in another layout; its table is
another instance of `Vocabulary`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cm3.checkpoint import read_json, write_json
from cm3.errors import ConfigError, DataError, ModelFilesError
from cm3.tokenizers.layout import CM3_LAYOUT, Layout, Place

TEXT_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""The first pieces of every text tokenizer, in the order of their piece ids."""

NUM_IMAGE_SIZES = 64
"""Ids set aside to name the size of an image; like `<image_row_end>` unused while there is one grid."""


@dataclass(frozen=True)
class IdRange:
    """The ids `start .. start + size - 1`, all of one kind."""

    name: str
    kind: Literal["text", "image", "special"]
    start: int
    size: int

    @property
    def stop(self) -> int:
        """The first id after the range."""
        return self.start + self.size

    def __contains__(self, id: int) -> bool:
        return self.start <= id < self.stop


@dataclass(frozen=True)
class Vocabulary:
    """The table of ranges, the special ids by name, and what they mark. Immutable; equal when the contents are.

    The ranges may stand in any order and fill `[0, size)`. One of them holds the image codes (so that the
    output head can be sliced), one or more hold text: piece `i` of the text tokenizer is the i-th id of the
    text ranges, joined in the order of the table. Special ids lie in special ranges or among the text. There may be
    no sentinels; then no span of a document can be masked.

    Raises:
        ConfigError: the ranges overlap or leave a gap, or a special id is missing or misplaced.
    """

    ranges: tuple[IdRange, ...]
    special_ids: dict[str, int] = field(hash=False)
    layout: Layout = CM3_LAYOUT
    """How documents are written."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError(f"not a usable vocabulary: {'; '.join(problems)}")

    def _problems(self) -> Iterator[str]:
        end = 0
        for part in sorted(self.ranges, key=lambda part: part.start):
            if part.start != end or part.size < 1:
                yield f"range {part.name!r} is [{part.start}, {part.stop}), the next free id is {end}"
            end = part.stop
        if len({part.name for part in self.ranges}) < len(self.ranges):
            yield f"range names repeat in {[part.name for part in self.ranges]}"
        kinds = [part.kind for part in self.ranges]
        if kinds.count("image") != 1 or "text" not in kinds:
            yield f"it needs one image range and at least one text range, found {kinds}"
        required = [*TEXT_SPECIALS, *self.layout.names, *(["<eoss>"] if self.num_sentinels else [])]
        if missing := [name for name in dict.fromkeys(required) if name not in self.special_ids]:
            yield f"no id is named {', '.join(missing)}"
        if len(set(self.special_ids.values())) < len(self.special_ids):
            yield "two special names share an id"
        for name, id in self.special_ids.items():
            if not any(id in part for part in self.ranges if part.kind != "image"):
                yield f"{name}={id} is no text or special id"
        first = self.special_ids.get("<sentinel:0>", 0)
        if any(self.special_ids.get(f"<sentinel:{i}>") != first + i for i in range(self.num_sentinels)):
            yield "the ids of <sentinel:0>, <sentinel:1>, ... are not consecutive"

    @classmethod
    def build(cls, text_size: int, image_codes: int, num_sentinels: int = 512, multiple: int = 64) -> "Vocabulary":
        """Our own layout: text pieces (their ids as they are), image codes, then the special ids.

        These are `<break>`, `<eoss>`, the sentinels, `<image_row_end>`, the image sizes, and as many
        `<reserved:i>` as bring the size to a multiple of `multiple`.
        """
        ranges = [IdRange("text", "text", 0, text_size), IdRange("image", "image", text_size, image_codes)]
        special_ids = {name: id for id, name in enumerate(TEXT_SPECIALS)}

        def append(name: str, labels: list[str]) -> None:
            start = ranges[-1].stop
            ranges.append(IdRange(name, "special", start, len(labels)))
            special_ids.update({label: start + i for i, label in enumerate(labels)})

        append("break", ["<break>"])
        append("eoss", ["<eoss>"])
        append("sentinel", [f"<sentinel:{i}>" for i in range(num_sentinels)])
        append("image_row_end", ["<image_row_end>"])
        append("image_size", [f"<image_size:{i}>" for i in range(NUM_IMAGE_SIZES)])
        if num_reserved := -ranges[-1].stop % multiple:
            append("reserved", [f"<reserved:{i}>" for i in range(num_reserved)])
        return cls(tuple(ranges), special_ids)

    @cached_property
    def size(self) -> int:
        """Number of ids."""
        return sum(part.size for part in self.ranges)

    @cached_property
    def text_ranges(self) -> tuple[IdRange, ...]:
        """The text ranges in the order of the table."""
        return tuple(part for part in self.ranges if part.kind == "text")

    @cached_property
    def text_size(self) -> int:
        """Number of text pieces, the text tokenizer's special pieces included."""
        return sum(part.size for part in self.text_ranges)

    @cached_property
    def image_range(self) -> IdRange:
        """The ids of the image codes."""
        return next(part for part in self.ranges if part.kind == "image")

    @property
    def eos_id(self) -> int:
        """`</s>`, which closes a document, and in our layout opens it too."""
        return self.special_ids["</s>"]

    @property
    def pad_id(self) -> int:
        """`<pad>`, which fills rows."""
        return self.special_ids["<pad>"]

    @property
    def break_id(self) -> int:
        """`<break>`, which stands between two segments in our layout."""
        return self.special_ids["<break>"]

    @property
    def eoss_id(self) -> int:
        """`<eoss>`, which ends a moved span."""
        return self.special_ids["<eoss>"]

    @cached_property
    def num_sentinels(self) -> int:
        """Number of sentinels."""
        return sum(name.startswith("<sentinel:") for name in self.special_ids)

    def sentinel_id(self, index: int) -> int:
        """The id of `<sentinel:index>`. Raises ConfigError where the vocabulary has no such sentinel."""
        if not self.num_sentinels:
            raise ConfigError(
                "the vocabulary has no sentinels (a Chameleon's has none), so nothing can be masked or filled in; use "
                "objective.name=causal to train such a model"
            )
        if not 0 <= index < self.num_sentinels:
            raise ConfigError(f"<sentinel:{index}> asked, the vocabulary has {self.num_sentinels}; use fewer spans")
        return self.special_ids["<sentinel:0>"] + index

    def mark(self, place: Place) -> tuple[int, ...]:
        """The id that stands at a place of the layout; none where nothing does."""
        name = getattr(self.layout, place)
        return () if name is None else (self.special_ids[name],)

    def is_image(self, ids: Any) -> Any:
        """Which of `ids` (array or tensor of any shape) are image codes: booleans of the same shape."""
        return (ids >= self.image_range.start) & (ids < self.image_range.stop)

    def is_text(self, ids: Any) -> Any:
        """Which of `ids` (array or tensor of any shape) are text; `</s>` and the other specials are not."""
        found = ids != ids
        for part in self.text_ranges:
            found = found | ((ids >= part.start) & (ids < part.stop))
        for special in self._specials_among_text:
            found = found & (ids != special)
        return found

    def text_to_ids(self, pieces: Any) -> np.ndarray:
        """Text piece ids (any shape) to joint ids, int64. Raises DataError for a piece beyond `text_size`."""
        pieces = np.asarray(pieces, dtype=np.int64)
        ids = np.full_like(pieces, -1)
        for part, first in zip(self.text_ranges, self._first_pieces, strict=True):
            inside = (pieces >= first) & (pieces < first + part.size)
            ids[inside] = pieces[inside] - first + part.start
        self._require(ids >= 0, pieces, f"a text piece below {self.text_size}")
        return ids

    def ids_to_text(self, ids: Any) -> np.ndarray:
        """Joint ids (any shape) to text piece ids, int64. Raises DataError for an id outside the text."""
        ids = np.asarray(ids, dtype=np.int64)
        pieces = np.full_like(ids, -1)
        for part, first in zip(self.text_ranges, self._first_pieces, strict=True):
            inside = (ids >= part.start) & (ids < part.stop)
            pieces[inside] = ids[inside] - part.start + first
        self._require(pieces >= 0, ids, "a text id")
        return pieces

    def codes_to_ids(self, codes: Any) -> np.ndarray:
        """Codebook indices (any shape) to joint ids, int64. Raises DataError for a code out of range."""
        codes = np.asarray(codes, dtype=np.int64)
        num_codes = self.image_range.size
        self._require((codes >= 0) & (codes < num_codes), codes, f"an image code below {num_codes}")
        return np.asarray(codes + self.image_range.start)

    def ids_to_codes(self, ids: Any) -> np.ndarray:
        """Joint ids (any shape) to codebook indices, int64. Raises DataError for an id of another kind."""
        ids = np.asarray(ids, dtype=np.int64)
        self._require(self.is_image(ids), ids, "the id of an image code")
        return np.asarray(ids - self.image_range.start)

    def describe(self, id: int) -> str:
        """What an id stands for, in words for error messages."""
        if names := [name for name, special in self.special_ids.items() if special == id]:
            return names[0]
        for part in self.ranges:
            if id in part:
                return f"image code {id - part.start}" if part.kind == "image" else part.name
        return f"outside the vocabulary of {self.size}"

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the contents."""
        canonical = json.dumps(self._contents(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The contents and their hash as plain JSON values."""
        return {"hash": self.hash, **self._contents()}

    def _contents(self) -> dict[str, Any]:
        """The contents as plain JSON values; CM3Leon's layout, which once was the only one, is not named."""
        contents: dict[str, Any] = {
            "ranges": [asdict(part) for part in self.ranges],
            "special_ids": {**self.special_ids},
        }
        if self.layout != CM3_LAYOUT:
            contents["layout"] = asdict(self.layout)
        return contents

    @classmethod
    def from_json(cls, value: Any) -> "Vocabulary":
        """The inverse of `to_json`. Raises ModelFilesError for anything else."""
        try:
            ranges = tuple(IdRange(**part) for part in value["ranges"])
            vocabulary = cls(ranges, dict(value["special_ids"]), Layout(**value.get("layout", {})))
            stored = value["hash"]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFilesError(f"not a valid vocabulary ({error!r}); restore the file") from error
        if stored != vocabulary.hash:
            raise ModelFilesError(
                f"the vocabulary has hash {vocabulary.hash}, {stored} is stored with it; restore the file"
            )
        return vocabulary

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as a JSON file."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read what `save` wrote. Raises ModelFilesError where the file is missing or damaged."""
        return cls.from_json(read_json(path))

    @cached_property
    def _first_pieces(self) -> list[int]:
        """The piece id with which each text range begins."""
        sizes = [part.size for part in self.text_ranges]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @cached_property
    def _specials_among_text(self) -> list[int]:
        return [id for id in self.special_ids.values() if any(id in part for part in self.text_ranges)]

    def _require(self, good: Any, values: np.ndarray, what: str) -> None:
        if not good.all():
            raise DataError(f"expected {what}, found {values[~good].flat[0]}; do these ids belong to this vocabulary?")
