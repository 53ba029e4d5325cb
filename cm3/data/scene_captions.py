"""The wording of the procedural scenes: captions from scenes, and what a caption states, read from its words.

A caption is `[lead] object (joiner object)* [background]`. A joiner is a relation ("left of"), which links
its two neighbours, or just a comma or "and". `describe` writes this grammar, `parse_caption` inverts it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from cm3.data.scene_world import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    relation_holds,
)


@dataclass(frozen=True)
class StatedObject:
    """An object as a caption names it; `size` is None where the caption leaves it open."""

    size: str | None
    color: str
    shape: str


@dataclass(frozen=True)
class Statement:
    """All that a caption states: exactly these objects, in order of mention, and how they lie.

    `relations` holds (index of the first object, relation, index of the second); `background` may be None.
    """

    objects: tuple[StatedObject, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


# Wordings of each relation; the first is the plain one.
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_LEADS = ("a picture of ", "an image of ", "a drawing of ", "there is ")
_COUNTS = ("one", "two", "three", "four")
_COUNTED = ("shape", "object")

_SIZE_SHARE = 0.85  # share of captions that state sizes
_BACKGROUND_SHARE = 0.5
_RELATION_SHARE = 0.7  # share of captions of several objects that state relations
_TERSE_SHARE = 0.08  # share of captions without articles
_SENTENCE_SHARE = 0.15  # share of captions with a capital letter and a full stop


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, Statement]:
    """Word a scene: the caption and exactly what it states. Every object is named, nothing false is said."""
    order = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    kinds = {(item.color, item.shape) for item in order}
    with_sizes = rng.random() < _SIZE_SHARE or len(kinds) < len(order)
    objects = tuple(StatedObject(item.size if with_sizes else None, item.color, item.shape) for item in order)
    relations = _choose_relations(order, rng)
    background = scene.background if rng.random() < _BACKGROUND_SHARE else None
    statement = Statement(objects, relations, background)
    text = _word(statement, rng)
    if rng.random() < _SENTENCE_SHARE:
        text = f"{text[0].upper()}{text[1:]}."
    return text, statement


def _choose_relations(order: list[SceneObject], rng: np.random.Generator) -> tuple[tuple[int, str, int], ...]:
    """Clear relations between consecutive objects: none at all, or at least one."""
    if len(order) < 2 or rng.random() >= _RELATION_SHARE:
        return ()
    pairs = len(order) - 1
    stated = rng.random(pairs) < 0.6
    stated[rng.integers(pairs)] = True
    relations = []
    for i in np.flatnonzero(stated).tolist():
        holding = [name for name in RELATIONS if relation_holds(order[i], name, order[i + 1])]
        if holding:
            relations.append((i, holding[rng.integers(len(holding))], i + 1))
    return tuple(relations)


def _word(statement: Statement, rng: np.random.Generator) -> str:
    """Put a statement into words."""
    terse = rng.random() < _TERSE_SHARE
    relation_of = {second: relation for _, relation, second in statement.relations}
    last = len(statement.objects) - 1
    text = _phrase(statement.objects[0], terse)
    for i in range(1, last + 1):
        if i in relation_of:
            words = _RELATION_WORDS[relation_of[i]]
            relation = words[0] if rng.random() < 0.75 else words[1]
            joiner = f", which is {relation} " if i - 1 in relation_of else f" {relation} "
        elif statement.relations:
            joiner = ", and " if i == last or i + 1 in relation_of else ", "
        else:
            joiner = " and " if i == last and not terse else ", "
        text += joiner + _phrase(statement.objects[i], terse)
    return _with_background(_lead(last + 1, terse, rng) + text, statement.background, rng)


def _phrase(item: StatedObject, terse: bool) -> str:
    words = f"{item.size} {item.color} {item.shape}" if item.size else f"{item.color} {item.shape}"
    return words if terse else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _lead(count: int, terse: bool, rng: np.random.Generator) -> str:
    draw = rng.random()
    if terse or draw < 0.6:
        return ""
    if draw < 0.8:
        noun = _COUNTED[rng.integers(len(_COUNTED))]
        return f"{_COUNTS[count - 1]} {noun}{'s' if count > 1 else ''}: "
    return _LEADS[rng.integers(len(_LEADS))]


def _with_background(text: str, background: str | None, rng: np.random.Generator) -> str:
    if background is None:
        return text
    draw = rng.random()
    if draw < 0.7:
        return f"{text} on a {background} background"
    if draw < 0.85:
        return f"{text}, on a {background} background"
    return f"on a {background} background{',' if ': ' in text else ':'} {text}"


_OBJECT = re.compile(rf"(?:an? )?(?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?![a-z])")
_MEANING = {wording: relation for relation, wordings in _RELATION_WORDS.items() for wording in wordings}
_JOINER = re.compile(rf"(?:,? (?:which is )?({'|'.join(sorted(_MEANING, key=len, reverse=True))})|, and|,| and) ")
_COUNT_LEAD = re.compile(rf"({'|'.join(_COUNTS)}) (?:{'|'.join(_COUNTED)})s?: ")
_BACKGROUND = "|".join(BACKGROUNDS)
_BACKGROUND_FIRST = re.compile(rf"on a ({_BACKGROUND}) background[:,] ")
_BACKGROUND_LAST = re.compile(rf",? on a ({_BACKGROUND}) background$")


def parse_caption(text: str) -> Statement | None:
    """Read back what a caption states; None if the words are outside the grammar or contradict themselves.

    Case, repeated blanks and a final full stop do not matter.
    """
    rest = " ".join(text.lower().split()).removesuffix(".")
    background = None
    if found := _BACKGROUND_FIRST.match(rest):
        background, rest = found[1], rest[found.end() :]
    elif found := _BACKGROUND_LAST.search(rest):
        background, rest = found[1], rest[: found.start()]
    count = None
    if found := _COUNT_LEAD.match(rest):
        count, rest = _COUNTS.index(found[1]) + 1, rest[found.end() :]
    else:
        rest = next((rest.removeprefix(lead) for lead in _LEADS if rest.startswith(lead)), rest)

    objects: list[StatedObject] = []
    relations: list[tuple[int, str, int]] = []
    at = 0
    while found := _OBJECT.match(rest, at):
        objects.append(StatedObject(found[1], found[2], found[3]))
        at = found.end()
        if at == len(rest):
            break
        joiner = _JOINER.match(rest, at)
        if joiner is None:
            return None
        at = joiner.end()
        if joiner[1]:
            relations.append((len(objects) - 1, _MEANING[joiner[1]], len(objects)))
    complete = found is not None and at == len(rest)
    if not complete or (count is not None and count != len(objects)):
        return None
    return Statement(tuple(objects), tuple(relations), background)
