"""The CM3 objective: spans of a document are replaced by sentinels and moved to its end (CM3Leon, section 2.2).

    </s> a circle <break> IMAGE </s>   ->   </s> <sentinel:0> <break> IMAGE </s> <sentinel:0> a circle <eoss>

Plain NumPy on token ids, after Aghajanyan et al. 2022 (arXiv 2201.07520, section 2) and the whole-segment
rotation of CM3Leon's code. Other than there, boundaries are `<break>` and `</s>` and every other special id,
no span is empty, none touches a boundary, and no moved span is ever cut off.

    T ids of a document   M ids of the masked document   N spans
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from cm3.errors import ConfigError, DataError
from cm3.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Mask:
    """What is to be masked in a document."""

    kind: Literal["spans", "box", "answers"]
    """spans: drawn at random; box: a span for each row of codes of a box of an image; answers: those of an
    instruction."""
    num_spans: int

    def within(self, room: int) -> Mask:
        """As much of it as there is room for: fewer spans, a lower box, the answers all or none."""
        if self.num_spans <= room:
            return self
        return replace(self, num_spans=0 if self.kind == "answers" else room)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """How documents are masked, and how much each target counts."""

    name: Literal["cm3", "causal"] = "cm3"
    """cm3: spans are masked and moved to the end; causal: plain next-token prediction."""
    span_count: Literal["poisson", "fixed", "one"] = "poisson"
    """Spans of a document: Poisson with mean `span_rate`; always `span_rate`, rounded; always one."""
    span_rate: float = 1.0
    """Mean number of spans."""
    min_spans: int = 0
    """Fewest spans drawn. 0 leaves e^-span_rate of the documents plain (CM3Leon); CM3 used 1."""
    max_spans: int = 511
    """Most spans drawn; the vocabulary's sentinels are a limit too."""
    box_probability: float = 0.0
    """Chance that a box of an image is masked instead, one span for each of its rows of codes, as box infilling
    asks for them."""
    max_box_rows: int = 8
    """Most rows of a box; its rows are drawn evenly up to this, its columns up to the image's width."""
    answer_probability: float = 0.0
    """Chance that the answers of an instruction are masked instead of spans at random, and so are what is asked for.
    An answer that ends its document stays in its place, where it is asked for anyway."""
    rotation_probability: float = 0.5
    """Chance that a document's spans are whole segments (a caption, an image) instead of stretches of any
    length. At 0 a short caption is practically never masked, and guidance and captioning are not
    learnt; our choice, the paper gives none."""
    sentinel_loss_weight: float = 1.0
    """Weight of sentinels as targets: 1 in CM3Leon, 0 in CM3."""
    retrieved_loss_weight: float = 1.0
    """Weight of the tokens of retrieved documents as targets: 1 in CM3Leon, 0.1 in RA-CM3."""
    instruction_loss_weight: float = 1.0
    """Weight of what is no answer as targets, in documents that have answers: 1 in CM3Leon, 0 to learn from the
    answers only (and then with answer_probability 1)."""

    def __post_init__(self) -> None:
        for field in ("box_probability", "answer_probability", "rotation_probability"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ConfigError(f"objective.{field}={getattr(self, field)} is no probability; choose 0 to 1")
        if self.max_box_rows < 1:
            raise ConfigError(f"objective.max_box_rows={self.max_box_rows}; choose 1 or more")
        if not 0 <= self.min_spans <= self.max_spans:
            raise ConfigError(
                f"objective.min_spans={self.min_spans} and max_spans={self.max_spans}; choose 0 <= min <= max"
            )
        for field in ("span_rate", "sentinel_loss_weight", "retrieved_loss_weight", "instruction_loss_weight"):
            if getattr(self, field) < 0:
                raise ConfigError(f"objective.{field}={getattr(self, field)} is negative; choose 0 or more")

    @property
    def ids_per_span(self) -> int:
        """How many ids a span adds to a sequence: its sentinel twice, and `<eoss>`."""
        return 3

    def draw_masks(
        self, vocabulary: Vocabulary, rng: np.random.Generator, num_answers_D: Int[np.ndarray, " D"]
    ) -> list[Mask]:
        """Draw what to mask in each of D documents (CM3, section 2).

        Args:
            vocabulary: Its sentinels are a limit.
            rng: Source of the draws.
            num_answers_D: Answers of each document that have to be moved, -1 of one that is no instruction.
        """
        size = len(num_answers_D)
        if self.name == "causal":
            return [Mask("spans", 0)] * size
        vocabulary.sentinel_id(0)  # says what to do where there is none
        if self.span_count == "poisson":
            counts = rng.poisson(self.span_rate, size)
        else:
            counts = np.full(size, 1 if self.span_count == "one" else round(self.span_rate))
        counts = np.clip(counts, self.min_spans, min(self.max_spans, vocabulary.num_sentinels))
        masks = [Mask("spans", count) for count in counts.tolist()]
        if self.box_probability:
            rows = rng.integers(1, min(self.max_box_rows, vocabulary.num_sentinels), size, endpoint=True)
            for place in np.flatnonzero(rng.random(size) < self.box_probability):
                masks[place] = Mask("box", int(rows[place]))
        if self.answer_probability:
            for place in np.flatnonzero((rng.random(size) < self.answer_probability) & (num_answers_D >= 0)):
                fits = num_answers_D[place] <= vocabulary.num_sentinels
                masks[place] = Mask("answers", int(num_answers_D[place]) if fits else 0)
        return masks

    def mask_document(
        self,
        ids_T: Int[np.ndarray, " T"],
        weights_T: Float[np.ndarray, " T"],
        vocabulary: Vocabulary,
        rng: np.random.Generator,
        mask: Mask,
        answers: Int[np.ndarray, "N 2"],
    ) -> tuple[Int[np.ndarray, " M"], Float[np.ndarray, " M"]]:
        """Mask a document and weigh its ids, the weights moved along.

        Args:
            ids_T: A whole document.
            weights_T: Loss weight of each id.
            vocabulary: Names the boundaries and sentinels.
            rng: Source of the spans.
            mask: What to mask.
            answers: Start and stop of its answers; none of one that is no instruction.
        """
        if mask.kind == "answers":
            spans = answers if mask.num_spans else answers[:0]
        else:
            spans = draw_spans(ids_T, vocabulary, self, rng, mask=mask)
        if not len(answers):
            return self._moved(ids_T, weights_T, spans, vocabulary)
        is_answer_T = np.zeros(len(ids_T), dtype=bool)
        for start, stop in answers.tolist():
            is_answer_T[start : stop + (not len(spans))] = True  # with the id that ends one in its place
        weights_T = np.where(is_answer_T, weights_T, weights_T * self.instruction_loss_weight)
        return self._moved(ids_T, weights_T, spans, vocabulary, self.instruction_loss_weight)

    def mask_block(
        self,
        ids_T: Int[np.ndarray, " T"],
        weights_T: Float[np.ndarray, " T"],
        vocabulary: Vocabulary,
        rng: np.random.Generator,
    ) -> tuple[Int[np.ndarray, " M"], Float[np.ndarray, " M"]]:
        """Mask a block of a token stream without making it longer; metaseq cuts at the same end.

        The overflow is cut from the end of the block before its spans are moved: spans that reach into the
        part cut off are shortened or left out, so that every sentinel keeps its target.
        """
        spans = draw_spans(ids_T, vocabulary, self, rng)
        fits = spans[:, 0] < len(ids_T) - self.ids_per_span * np.arange(1, len(spans) + 1)
        spans = spans[: np.flatnonzero(fits)[-1] + 1 if fits.any() else 0]
        kept = len(ids_T) - self.ids_per_span * len(spans)
        return self._moved(ids_T[:kept], weights_T[:kept], np.minimum(spans, kept), vocabulary)

    def _moved(
        self,
        ids_T: Int[np.ndarray, " T"],
        weights_T: Float[np.ndarray, " T"],
        spans: np.ndarray,
        vocabulary: Vocabulary,
        factor: float = 1.0,
    ) -> tuple[Int[np.ndarray, " M"], Float[np.ndarray, " M"]]:
        """The masked ids and their weights; those of sentinels are multiplied by a factor."""
        sentinel_weights = np.full(len(spans), self.sentinel_loss_weight * factor)
        return move_spans(ids_T, spans, vocabulary), _joined(weights_T, spans, sentinel_weights, 1)


def mask_spans(
    ids_T: Int[np.ndarray, " T"],
    vocabulary: Vocabulary,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    *,
    max_length: int | None = None,
    mask: Mask | None = None,
) -> Int[np.ndarray, " M"]:
    """Mask a document.

    Args:
        ids_T: `</s> segment <break> segment ... </s>`, or any piece of a stream of such documents.
        vocabulary: Names the boundaries and sentinels.
        config: How many spans, and which.
        rng: Source of the spans; make it from (seed, epoch, document), so that the masks of each epoch
            differ.
        max_length: Where the result would be longer, spans are left out at random; a moved span is never cut.
        mask: How many spans to draw, or how many rows of a box; None draws that too. Fewer are masked where spans
            would overlap or be empty, or the document has no image for the box.

    Returns:
        The masked ids; three more for each span.

    Raises:
        DataError: if the document holds sentinels already, or is by itself longer than `max_length`.
    """
    spans = draw_spans(ids_T, vocabulary, config, rng, max_length=max_length, mask=mask)
    return move_spans(ids_T, spans, vocabulary)


def draw_spans(
    ids_T: Int[np.ndarray, " T"],
    vocabulary: Vocabulary,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    *,
    max_length: int | None = None,
    mask: Mask | None = None,
) -> Int[np.ndarray, "N 2"]:
    """Draw the spans to mask (CM3, section 2); arguments as in `mask_spans`.

    Returns:
        [number of spans, 2]: start and stop of each, sorted, disjoint, none empty, each inside one segment.
    """
    length = len(ids_T)
    if max_length is not None and length > max_length:
        raise DataError(f"a document of {length} ids was to be masked within {max_length}; raise that or split it")
    if mask is None:
        mask = config.draw_masks(vocabulary, rng, np.array([-1]))[0]
    num_spans = mask.num_spans
    boundary, unmaskable = _tables(vocabulary)
    if unmaskable[ids_T].any():
        raise DataError("a document to be masked holds sentinels or <eoss> already; pass it unmasked")
    if num_spans == 0:
        return np.empty((0, 2), dtype=np.int64)
    segments = _segments(boundary[ids_T])
    if mask.kind == "box":
        spans = _draw_box(segments[vocabulary.is_image(ids_T[segments[:, 0]])], num_spans, rng)
        return spans if max_length is None or length + config.ids_per_span * len(spans) <= max_length else spans[:0]
    rotate = rng.random() < config.rotation_probability
    if rotate and (num_spans == 1 or num_spans < len(segments)) and len(segments):
        spans = segments[rng.choice(len(segments), num_spans, replace=False)]
    else:
        spans = _draw_stretches(length, segments, num_spans, rng)
    if max_length is not None:
        spans = rng.permutation(spans)[: (max_length - length) // config.ids_per_span]
    return spans[np.argsort(spans[:, 0])]


def move_spans(
    ids_T: Int[np.ndarray, " T"], spans: Int[np.ndarray, "N 2"], vocabulary: Vocabulary
) -> Int[np.ndarray, " M"]:
    """Replace sorted disjoint spans by sentinels and append them, `<sentinel:i> span <eoss>` each."""
    if not len(spans):
        return ids_T.copy()  # also where the vocabulary has no sentinels
    return _joined(ids_T, spans, vocabulary.sentinel_id(0) + np.arange(len(spans)), vocabulary.eoss_id)


def unmask(ids_T: Int[np.ndarray, " T"], vocabulary: Vocabulary) -> Int[np.ndarray, " M"]:
    """Put every moved span back: the inverse of `mask_spans`.

    Raises:
        DataError: if the sentinels and `<eoss>` do not form masked spans.
    """
    first = vocabulary.sentinel_id(0)
    places = np.flatnonzero((ids_T >= first) & (ids_T < first + vocabulary.num_sentinels))
    ends = np.flatnonzero(ids_T == vocabulary.eoss_id)
    count = len(ends)
    holes, starts = places[:count], places[count:]
    well_formed = (
        len(places) == 2 * count
        and np.array_equal(ids_T[places], first + np.tile(np.arange(count), 2))
        and np.all(starts < ends)
        and np.array_equal(starts[1:], ends[:-1] + 1)
        and (count == 0 or ends[-1] == len(ids_T) - 1)
    )
    if not well_formed:
        raise DataError(
            f"{len(places)} sentinels and {count} <eoss> do not form masked spans; each needs its "
            "sentinel in place and `<sentinel> span <eoss>` at the end, in the same order"
        )
    if count == 0:
        return ids_T.copy()
    pieces = []
    for previous, hole, start, end in zip(np.append(-1, holes[:-1]), holes, starts, ends, strict=True):
        pieces += [ids_T[previous + 1 : hole], ids_T[start + 1 : end]]
    return np.concatenate([*pieces, ids_T[holes[-1] + 1 : starts[0]]])


def _draw_box(images: np.ndarray, num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """The rows of a box in one of the images, each a square of codes in raster order; none if there is no image."""
    images = images[(images[:, 1] - images[:, 0]) >= num_rows**2]
    sides = np.sqrt(images[:, 1] - images[:, 0]).astype(np.int64)
    squares = np.flatnonzero(sides**2 == images[:, 1] - images[:, 0])
    if not len(squares):
        return np.empty((0, 2), dtype=np.int64)
    chosen = rng.choice(squares)
    side = sides[chosen]
    num_columns = rng.integers(1, side, endpoint=True)
    top, left = rng.integers(0, side - num_rows, endpoint=True), rng.integers(0, side - num_columns, endpoint=True)
    starts = images[chosen, 0] + (top + np.arange(num_rows)) * side + left
    return np.stack([starts, starts + num_columns], axis=1)


def _draw_stretches(length: int, segments: np.ndarray, num_spans: int, rng: np.random.Generator) -> np.ndarray:
    """Stretches between two uniform points: one, or the first disjoint ones of num_spans^2 candidates.

    Each is clipped to the segment that it overlaps most; what is empty then is left out.
    """
    points = np.sort(rng.random((num_spans**2, 2)), axis=1) * length
    starts = np.maximum(points[:, 0].astype(np.int64), 1)
    stops = np.floor(points[:, 1] + 0.5).astype(np.int64)
    chosen: list[tuple[int, int]] = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if start < stop and all(stop <= other[0] or other[1] <= start for other in chosen):
            chosen.append((start, stop))
            if len(chosen) == num_spans:
                break
    if not chosen or not len(segments):
        return np.empty((0, 2), dtype=np.int64)
    spans = np.array(chosen)
    overlaps = np.minimum(spans[:, None, 1], segments[:, 1]) - np.maximum(spans[:, None, 0], segments[:, 0])
    home = segments[overlaps.argmax(axis=1)]
    spans = np.stack([np.maximum(spans[:, 0], home[:, 0]), np.minimum(spans[:, 1], home[:, 1])], axis=1)
    return spans[spans[:, 0] < spans[:, 1]]


def _segments(boundary_T: np.ndarray) -> np.ndarray:
    """[number of segments, 2]: start and stop of the runs of tokens that are no boundaries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], boundary_T, [True]])))
    return edges.reshape(-1, 2)


def _joined(values_T: np.ndarray, spans: np.ndarray, sentinels: np.ndarray, end: int) -> np.ndarray:
    """The source with a sentinel for each span, then each span between its sentinel and an end."""
    if not len(spans):
        return values_T.copy()
    source, moved, position = [], [], 0
    marks = sentinels.astype(values_T.dtype).reshape(-1, 1)
    last = np.array([end], dtype=values_T.dtype)
    for (start, stop), mark in zip(spans.tolist(), marks, strict=True):
        source += [values_T[position:start], mark]
        moved += [mark, values_T[start:stop], last]
        position = stop
    return np.concatenate([*source, values_T[position:], *moved])


@lru_cache(maxsize=8)
def _tables(vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """By id: whether it bounds segments (anything but text and image codes), and whether masking makes it."""
    ids = np.arange(vocabulary.size)
    boundary = ~(vocabulary.is_text(ids) | vocabulary.is_image(ids))
    if not vocabulary.num_sentinels:
        return boundary, np.zeros_like(boundary)
    first = vocabulary.sentinel_id(0)
    made = (ids == vocabulary.eoss_id) | ((ids >= first) & (ids < first + vocabulary.num_sentinels))
    return boundary, made
