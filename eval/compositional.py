"""GenEval's six questions asked of procedural scenes: prompts in the scenes' grammar, graded by GenEval's rules on what
the oracle reads (arXiv 2310.11513; github.com/djghosh13/geneval, `evaluate_images.py`).

GenEval has 80 classes of objects, a learned detector and a learned reader of colours. Here a class is a shape, and
detector and reader are `cm3.eval.scenes.read_scene`, which learned nothing. So the figures are GenEval's in kind and
not comparable with published ones. The scenes' grammar names the colour of every object, also where only
the shape counts; what counts stands in the requirements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from cm3.data.scene_captions import StatedObject, Statement
from cm3.data.scene_world import COLORS, RELATIONS, SHAPES, SIZES, Scene, SceneObject
from cm3.data.scenes import NOVEL_PAIRS, split_of
from cm3.errors import DataError

Category = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
"""GenEval's names, in its order."""

KNOWN_SPLITS = ("train", "validation", "test")
"""Splits whose colours and shapes the prompts are drawn from."""

_COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
_BOX_SHARE = 0.1  # of the boxes' sides that an offset must exceed, GenEval's position threshold
_DIRECTION = 0.5  # least share of the offset along an axis, GenEval's


@dataclass(frozen=True)
class Requirement:
    """So many objects of a shape, of a colour, or lying so to those of an earlier requirement."""

    shape: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None
    """A relation, and the index of the requirement whose objects it refers to."""


@dataclass(frozen=True)
class CompositionalPrompt:
    """A prompt and how to grade its pictures: all requirements hold, and no count that is too many is reached."""

    category: Category
    text: str
    statement: Statement
    """What the text states, which is more than what counts."""
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()


def compositional_prompts(count: int, split: str = "test", seed: int = 0) -> list[CompositionalPrompt]:
    """So many prompts of each category; a pure function of its arguments.

    Args:
        count: Prompts of a category.
        split: The collection of (size, colour, shape) in every prompt is one that only this split may show.
        seed: Of the draws.

    Raises:
        DataError: a split that does not exist.
    """
    if split not in KNOWN_SPLITS:
        raise DataError(f"split {split!r} has no compositional prompts; choose one of {', '.join(KNOWN_SPLITS)}")
    return [
        _prompt(category, np.random.default_rng((seed, KNOWN_SPLITS.index(split), number, index)), split)
        for number, category in enumerate(CATEGORIES)
        for index in range(count)
    ]


def grade(scene: Scene, prompt: CompositionalPrompt) -> bool:
    """Whether what was read from a picture meets the prompt, by GenEval's rules.

    Of each shape the most striking objects count, as many as are asked for, and more of them are no fault unless
    excluded. Colours and positions are looked at only on those.
    """
    groups: list[Sequence[SceneObject] | None] = []
    for wanted in prompt.include:
        found = [item for item in scene.objects if item.shape == wanted.shape][: wanted.count]
        holds = len(found) == wanted.count
        if holds and wanted.color is not None:
            holds = all(item.color == wanted.color for item in found)
        if holds and wanted.position is not None:
            relation, index = wanted.position
            targets = groups[index]
            holds = targets is not None and all(
                relation in relative_positions(item, target) for item in found for target in targets
            )
        groups.append(found if holds else None)
    too_many = any(sum(item.shape == limit.shape for item in scene.objects) >= limit.count for limit in prompt.exclude)
    return None not in groups and not too_many


def relative_positions(first: SceneObject, second: SceneObject) -> set[str]:
    """How `first` lies to `second`: none, one or two relations, by the centres and sizes of their boxes.

    A tenth of both boxes' sides is taken off the offset along each axis; what remains must be more than half of
    the whole offset's length.
    """
    offset = np.array([first.x - second.x, first.y - second.y], dtype=np.float64)
    sides = SIZES[first.size] + SIZES[second.size]
    clear = np.maximum(np.abs(offset) - _BOX_SHARE * sides, 0) * np.sign(offset)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    right, down = clear / np.linalg.norm(offset)
    holds = {
        "left of": right < -_DIRECTION,
        "right of": right > _DIRECTION,
        "above": down < -_DIRECTION,
        "below": down > _DIRECTION,
    }
    return {relation for relation, true in holds.items() if true}


def _prompt(category: Category, rng: np.random.Generator, split: str) -> CompositionalPrompt:
    count = {"single_object": 1, "colors": 1, "counting": int(rng.integers(2, 5))}.get(category, 2)
    objects = next(kinds for kinds in _draws(category, count, rng) if _split(kinds) == split)
    if category == "single_object":
        return _with_grammar(category, objects, (Requirement(objects[0].shape),))
    if category == "colors":
        return _with_grammar(category, objects, (_colored(objects[0]),))
    if category == "counting":
        shape = objects[0].shape
        return _with_grammar(category, objects, (Requirement(shape, count),), (Requirement(shape, count + 1),))
    first, second = objects
    if category == "position":
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        include = (Requirement(second.shape), Requirement(first.shape, position=(relation, 0)))
        return _with_grammar(category, objects, include, relation=relation)
    if category == "color_attr":
        return _with_grammar(category, objects, (_colored(first), _colored(second)))
    return _with_grammar(category, objects, (Requirement(first.shape), Requirement(second.shape)))


def _draws(category: Category, count: int, rng: np.random.Generator) -> Iterator[tuple[StatedObject, ...]]:
    """Collections that a category can use: of one shape where it counts, else of different shapes and colours."""
    while True:
        shapes = rng.permutation(SHAPES).tolist()
        shapes = [shapes[0]] * count if category == "counting" else shapes[:count]
        colors = rng.permutation(list(COLORS)).tolist()[:count]
        sizes = [list(SIZES)[i] for i in rng.integers(len(SIZES), size=count)]
        objects = tuple(StatedObject(*kind) for kind in zip(sizes, colors, shapes, strict=True))
        if not any((item.color, item.shape) in NOVEL_PAIRS for item in objects):
            yield objects


def _split(objects: Sequence[StatedObject]) -> str:
    return split_of([(item.size or "", item.color, item.shape) for item in objects])


def _colored(item: StatedObject) -> Requirement:
    return Requirement(item.shape, color=item.color)


def _with_grammar(
    category: Category,
    objects: tuple[StatedObject, ...],
    include: tuple[Requirement, ...],
    exclude: tuple[Requirement, ...] = (),
    relation: str | None = None,
) -> CompositionalPrompt:
    """The prompt in the plainest words of the scenes' grammar; counts are said as "three shapes: ..."."""
    phrases = [f"a {item.size} {item.color} {item.shape}" for item in objects]
    *firsts, last = phrases
    joiner = f" {relation} " if relation else " and "
    joined = joiner.join([", ".join(firsts), last]) if firsts else last
    text = f"{_COUNT_WORDS[len(objects)]} shapes: {joined}" if category == "counting" else joined
    relations = ((0, relation, 1),) if relation else ()
    return CompositionalPrompt(category, text, Statement(objects, relations), include, exclude)
