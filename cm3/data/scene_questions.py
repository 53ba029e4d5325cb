"""Questions about the procedural scenes, made so that the question alone says little about its answer.

Open questions draw the answer first, all answers of a kind equally likely, and then scenes until one fits.
Yes-or-no questions are always drawn from a scene in which they are true; for "no" the scene is then replaced
by one in which the same words are false, so that no wording occurs more often with one answer.
`cm3.eval.scene_instruct.question_prior` measures what a guess from the question alone reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from cm3.data.scene_phrases import Reference, indefinite, pick, pick_kind, references, sentence
from cm3.data.scene_world import COLORS, RELATIONS, SHAPES, SIDE, SIZES, Scene, SceneObject, relation_holds
from cm3.data.scenes import sample_scene

QUESTIONS = ("count", "color", "shape", "size", "relation", "yes or no")
DIRECTIONS = {"left of": "left", "right of": "right", "above": "above", "below": "below"}

_VALUES: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES)}
_WORDINGS = {
    "count": ("how many {x} are there?", "how many {x} do you see?", "how many {x} are in the picture?"),
    "color": ("what color is {x}?", "what is the color of {x}?", "which color does {x} have?"),
    "shape": ("what shape is {x}?", "what is the shape of {x}?", "which shape does {x} have?"),
    "size": ("is {x} large or small?", "what size is {x}?", "what is the size of {x}?"),
    "relation": (
        "is {x} left, right, above or below {y}?",
        "where is {x} relative to {y}?",
        "in which direction from {y} is {x}?",
    ),
}
_EXISTENCE = ("is there {x}?", "does the picture show {x}?", "do you see {x}?")
_HARD_SHARE = 0.5  # share of scenes without the object asked for that show one of some of its attributes

Drawn = tuple[Scene, str, str]
"""A scene, a question about it, and the answer."""


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene, and its one answer: a number in digits, or one word."""

    kind: str
    """One of `QUESTIONS`."""
    scene: Scene
    question: str
    answer: str


def sample_question(rng: np.random.Generator, split: str = "train", kind: str | None = None) -> SceneQuestion:
    """Draw a question of a kind, or of any, about a scene of a split.

    Raises:
        DataError: the kind does not exist.
    """
    kind = pick_kind(rng, QUESTIONS, kind)
    scene, question, answer = _SAMPLERS[kind](rng, split)
    return SceneQuestion(kind, scene, sentence(question, rng), answer)


def _count(rng: np.random.Generator, split: str) -> Drawn:
    attribute = pick(rng, ("", *_VALUES))
    answer = int(rng.integers(4)) + (attribute == "")  # one to four objects in all, none to three of one kind
    while True:
        scene = sample_scene(rng, split)
        if attribute:
            present = [getattr(item, attribute) for item in scene.objects]
            nouns = [_plural(attribute, value) for value in _VALUES[attribute] if present.count(value) == answer]
        else:
            nouns = ["objects"] if len(scene.objects) == answer else []
        if nouns:
            return scene, pick(rng, _WORDINGS["count"]).format(x=pick(rng, nouns)), str(answer)


def _plural(attribute: str, value: str) -> str:
    if attribute != "shape":
        return f"{value} objects"
    return f"{value}es" if value.endswith("s") else f"{value}s"


def _attribute(attribute: str) -> Callable[[np.random.Generator, str], Drawn]:
    def sample(rng: np.random.Generator, split: str) -> Drawn:
        answer = pick(rng, _VALUES[attribute])
        while True:
            scene = sample_scene(rng, split)
            having = [item for item in scene.objects if getattr(item, attribute) == answer]
            named = [reference for item in having for reference in references(scene, item, hidden=attribute)]
            if named:
                return scene, pick(rng, _WORDINGS[attribute]).format(x=pick(rng, named).words), answer

    return sample


def _relation(rng: np.random.Generator, split: str) -> Drawn:
    wanted = pick(rng, RELATIONS)
    while True:
        scene = sample_scene(rng, split)
        # On a diagonal two relations hold; only what has one answer is asked.
        pairs = [(x, y) for x, y in permutations(scene.objects, 2) if _relations_between(x, y) == [wanted]]
        if pairs:
            x, y = (pick(rng, references(scene, item)).words for item in pick(rng, pairs))
            return scene, pick(rng, _WORDINGS["relation"]).format(x=x, y=y), DIRECTIONS[wanted]


def _relations_between(x: SceneObject, y: SceneObject) -> list[str]:
    return [relation for relation in RELATIONS if relation_holds(x, relation, y)]


def _yes_or_no(rng: np.random.Generator, split: str) -> Drawn:
    truth = bool(rng.integers(2))
    ask = pick(rng, (_ask_existence, _ask_attribute, _ask_relation))
    scene, question = ask(rng, split, truth)
    return scene, question, "yes" if truth else "no"


def _ask_existence(rng: np.random.Generator, split: str, truth: bool) -> tuple[Scene, str]:
    scene = sample_scene(rng, split)
    item = pick(rng, scene.objects)
    used = pick(rng, (("shape",), ("color",), ("color", "shape"), ("size", "shape"), ("size", "color", "shape")))
    asked = Reference(**{name: getattr(item, name) if name in used else None for name in ("size", "color", "shape")})
    parts = [Reference(**{**dict.fromkeys(("size", "color", "shape")), name: getattr(item, name)}) for name in used]
    hard = len(used) > 1 and rng.random() < _HARD_SHARE
    while not truth and (_shows(scene, asked) or (hard and not any(_shows(scene, part) for part in parts))):
        scene = sample_scene(rng, split)
    return scene, pick(rng, _EXISTENCE).format(x=indefinite(asked.words.removeprefix("the ")))


def _shows(scene: Scene, asked: Reference) -> bool:
    return any(asked.fits(item) for item in scene.objects)


def _ask_attribute(rng: np.random.Generator, split: str, truth: bool) -> tuple[Scene, str]:
    attribute = pick(rng, tuple(_VALUES))
    while True:
        scene = sample_scene(rng, split)
        item = pick(rng, scene.objects)
        named = references(scene, item, hidden=attribute)
        if named:
            break
    asked, value = pick(rng, named), getattr(item, attribute)
    while not truth and ((other := asked.meant(scene)) is None or getattr(other, attribute) == value):
        scene = sample_scene(rng, split)
    return scene, f"is {asked.words} {indefinite(value) if attribute == 'shape' else value}?"


def _ask_relation(rng: np.random.Generator, split: str, truth: bool) -> tuple[Scene, str]:
    options: Sequence[tuple[SceneObject, str, SceneObject]] = ()
    while not options:
        scene = sample_scene(rng, split)
        options = [(x, name, y) for x, y in permutations(scene.objects, 2) for name in _relations_between(x, y)]
    x, relation, y = pick(rng, options)
    words = [pick(rng, references(scene, item)).words for item in (x, y)]
    question = f"is {words[0]} {relation} {words[1]}?"
    return (scene if truth else _mirrored(scene, relation)), question


def _mirrored(scene: Scene, relation: str) -> Scene:
    """The scene mirrored along the axis of a relation, which turns the relation round and keeps all margins."""
    if relation in ("left of", "right of"):
        return replace(scene, objects=tuple(replace(item, x=SIDE - item.x) for item in scene.objects))
    return replace(scene, objects=tuple(replace(item, y=SIDE - item.y) for item in scene.objects))


_SAMPLERS: dict[str, Callable[[np.random.Generator, str], Drawn]] = {
    "count": _count,
    **{attribute: _attribute(attribute) for attribute in _VALUES},
    "relation": _relation,
    "yes or no": _yes_or_no,
}
