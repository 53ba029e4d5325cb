"""Instruction tasks: rows of turns laid out as documents that know where their answers stand (CM3Leon, table 5).

    turns       IMAGE, "How many circles?"   ->   "two"
    document    "Question: How many circles? Answer: two."  <break>  IMAGE
    ids         </s> Question: How many circles? Answer: two . <break> IMAGE </s>
    answer                                              ^^^

Text stands before the picture even where the picture is given and the text is asked for, as in the paper: the
answer is then masked and filled in at the end. Tokens of an answer are never shared with the words around it.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from cm3.errors import DataError
from cm3.tokenizers.document import Document, DocumentTokenizer, Image, ImageCodes, Text, TextTokens, TokenizedDocument
from cm3.tokenizers.document_ids import segment_places
from cm3.tokenizers.image import box_mask, mask_runs
from cm3.tokenizers.instruct_tasks import TASKS, image_fields, is_image_field
from cm3.tokenizers.layout import CM3_LAYOUT
from cm3.tokenizers.layout import Layout as DocumentLayout
from cm3.tokenizers.segments import ANSWERS

Layout = Literal["text_first", "image_first", "turns"]
"""text_first: as the paper's templates have it; image_first: the pictures that the user gives come first; turns: an
answer in words is a turn of its own behind what the user gives, as it is; for models whose vocabulary has turns."""

ANSWER_CHARACTERS = "answer_characters"
"""Key of `Document.metadata`: [segment, first character, stop character] of every answer; a picture counts as one
character."""

ANSWER_BOXES = "answer_boxes"
"""Key of `Document.metadata`: [segment, left, top, right, bottom] of every answer that is a box of a square picture, in
its pixels. Each run of codes that the box touches, in raster order, is then an answer of its own."""

_FIELD = re.compile(r"\{(\w+)\}")


def check_fit(task: str, turns: Sequence[Sequence[Any]]) -> None:
    """Check that turns hold what a task needs; whatever is no `Text` counts as a picture.

    Raises:
        DataError: there is no such task, or the turns hold something else.
    """
    _bind(task, turns)


def lay_out(
    turns: Sequence[Sequence[Text | Image]],
    *,
    task: str | None = None,
    layout: Layout = "text_first",
    wording: int = 0,
) -> Document:
    """Write turns as a document; `metadata["answer_characters"]` says where the answers stand.

    Args:
        turns: What the user gives, the answer, what the user gives then, ... An answer that is missing at the end
            makes a prompt: where the answer is part of a text, its place is empty; else the document ends before it.
        task: Name in `TASKS`. Where the answer is in words and the user asks in words, further exchanges about the
            same pictures may follow; they are written below each other in the one text. None: a conversation, every
            segment as it is and where it is, in any layout.
        layout: Order of a task's segments.
        wording: Which of the task's wordings, counted on from the first after the last.

    Raises:
        DataError: as `check_fit`.
    """
    if task is None:
        return _conversation(turns)
    exchanges = _bind(task, turns)
    template, values = TASKS[task], exchanges[0]
    if layout == "turns" and not image_fields(template.assistant):
        return _conversation(turns)
    parts = template.wordings[wording % len(template.wordings)]
    if layout == "image_first":
        parts = tuple(
            sorted(parts, key=lambda part: part not in {f"{{{name}}}" for name in image_fields(template.user)})
        )
    segments: list[Text | Image] = []
    places: list[list[int]] = []
    for part in parts:
        field = _FIELD.fullmatch(part)
        name = field[1] if field else ""
        if not is_image_field(name):
            text, spans = _filled(part, exchanges if "[" in part else exchanges[:1])
            places += [[len(segments), *span] for span in spans]
            segments.append(Text(text))
        elif name in values:
            if name in template.assistant:
                places.append([len(segments), 0, 1])
            segments.append(values[name])
    return Document(tuple(segments), {"task": task, ANSWER_CHARACTERS: places})


def tokenize_examples(tokenizer: DocumentTokenizer, documents: Sequence[Document]) -> list[TokenizedDocument]:
    """Tokenize documents, laid out here or not, so that no token reaches across the bounds of an answer.

    `metadata["answers"]` of the result says where the answers stand; `decode` gives the same text as without them.
    """
    bounds = [_bounds(document) for document in documents]
    cut = tokenizer.tokenize([cut_at_answers(document) for document in documents])
    return [_joined(*each) for each in zip(documents, bounds, cut, strict=True)]


def cut_at_answers(document: Document) -> Document:
    """The document with every text cut into pieces where an answer begins or ends."""
    pieces: list[Text | Image] = []
    for segment, bounds in zip(document.segments, _bounds(document), strict=True):
        if isinstance(segment, Text):
            pieces += [Text(segment.text[start:stop]) for start, stop in pairwise(bounds)]
        else:
            pieces.append(segment)
    return Document(tuple(pieces), document.metadata)


def answer_spans(document: TokenizedDocument, layout: DocumentLayout = CM3_LAYOUT) -> Int[np.ndarray, "N 2"]:
    """Start and stop of every answer among the ids of `document_to_ids` in a layout, in order."""
    starts = segment_places(document, layout)
    retrieved = document.metadata.get("retrieved", 0)
    places = document.metadata.get(ANSWERS, ())
    spans = [
        (starts[retrieved + segment] + first, starts[retrieved + segment] + stop) for segment, first, stop in places
    ]
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _conversation(turns: Sequence[Sequence[Text | Image]]) -> Document:
    segments: list[Text | Image] = []
    places: list[list[int]] = []
    for number, turn in enumerate(turns):
        for segment in turn:
            if number % 2:
                places.append([len(segments), 0, _characters(segment)])
            segments.append(segment)
    return Document(tuple(segments), {"task": None, ANSWER_CHARACTERS: places})


def _bind(task: str, turns: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """The fields of a task by name, for each exchange; those after the first have no pictures."""
    if task not in TASKS:
        raise DataError(f"there is no task {task!r}; choose among {', '.join(TASKS)}, or none for a conversation")
    user, assistant = TASKS[task].user, TASKS[task].assistant
    asked = tuple(name for name in user if not is_image_field(name))
    if not turns or len(turns) > 2 and (image_fields(assistant) or not asked):
        raise DataError(
            f"task {task!r} is one question and its answer, found {len(turns)} turns; leave the task out for a "
            "conversation, or make a row of each exchange"
        )
    exchanges: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        if number % 2:
            exchanges[-1] |= _fields(task, turn, "assistant", assistant)
        else:
            exchanges.append(_fields(task, turn, "user", asked if number else user))
    return exchanges


def _fields(task: str, turn: Sequence[Any], role: str, names: Sequence[str]) -> dict[str, Any]:
    """The fields of one turn by name."""
    texts = [part for part in turn if isinstance(part, Text)]
    images = [part for part in turn if not isinstance(part, Text)]
    text_names = [name for name in names if not is_image_field(name)]
    if text_names and text_names[-1].endswith("*") and len(texts) >= len(text_names):
        last = len(text_names) - 1
        texts[last:] = [Text(", ".join(part.text for part in texts[last:]))]
    if len(texts) != len(text_names) or len(images) != len(image_fields(names)):
        raise DataError(
            f"task {task!r} takes {_listed(names)} from the {role}, found {len(texts)} text(s) and "
            f"{len(images)} picture(s); give just these, or leave the task out"
        )
    named = dict(zip((name.rstrip("*") for name in text_names), texts, strict=True))
    return {**named, **dict(zip(image_fields(names), images, strict=True))}


def _listed(names: Sequence[str]) -> str:
    kinds = {True: "a picture", False: "a text"}
    described = [f"{'texts' if name.endswith('*') else kinds[is_image_field(name)]} ({name})" for name in names]
    return " and ".join(described)


def _filled(part: str, exchanges: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """A text of a template, filled in for each exchange, and the bounds of its answers; one not given is empty."""
    text, spans = "", []
    for exchange, values in enumerate(exchanges):
        text += "\n" if exchange else ""
        for number, piece in enumerate(re.split(r"[\[\]]", part)):
            given = all(name in values for name in _FIELD.findall(piece))
            filled = _FIELD.sub(lambda match, values=values: values[match[1]].text, piece) if given else ""
            if number % 2:
                spans.append((len(text), len(text) + len(filled)))
            text += filled
    return text, spans


def _characters(segment: Text | Image) -> int:
    return len(segment.text) if isinstance(segment, Text) else 1


def _bounds(document: Document) -> list[list[int]]:
    """For each segment its two ends and the bounds of its answers, sorted."""
    bounds = [[0, _characters(segment)] for segment in document.segments]
    for segment, first, stop in document.metadata.get(ANSWER_CHARACTERS, ()):
        bounds[segment] += [first, stop] if isinstance(document.segments[segment], Text) else []
    return [sorted(each) for each in bounds]


def _joined(document: Document, bounds: list[list[int]], cut: TokenizedDocument) -> TokenizedDocument:
    """The pieces of a cut document as its segments again, and the places of the answers in tokens."""
    pieces = iter(cut.segments)
    segments: list[TextTokens | ImageCodes] = []
    tokens_before: list[dict[int, int]] = []
    for places in bounds:
        parts = [next(pieces) for _ in pairwise(places)]
        lengths = [part.codes_HW.size if isinstance(part, ImageCodes) else len(part.tokens) for part in parts]
        tokens_before.append(dict(zip(places, np.cumsum([0, *lengths]).tolist(), strict=True)))
        texts = [part.tokens for part in parts if isinstance(part, TextTokens)]
        segments.append(TextTokens(np.concatenate(texts)) if texts else parts[0])
    metadata = dict(document.metadata)
    places_in_characters, boxes = metadata.pop(ANSWER_CHARACTERS, None), metadata.pop(ANSWER_BOXES, [])
    if places_in_characters is not None:
        answers: list[list[int]] = [
            [segment, tokens_before[segment][first], tokens_before[segment][stop]]
            for segment, first, stop in places_in_characters
        ]
        for segment, box in ((each[0], tuple(each[1:])) for each in boxes):
            picture, codes = document.segments[segment], segments[segment]
            assert isinstance(picture, Image) and isinstance(codes, ImageCodes)
            width, height = picture.pixels.size
            mask_HW = box_mask(box, (height, width), codes.codes_HW.shape)
            answers += [[segment, *run] for run in mask_runs(mask_HW)]
        metadata[ANSWERS] = sorted(answers)
    return TokenizedDocument(tuple(segments), metadata)
