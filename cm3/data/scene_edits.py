"""Edits of the procedural scenes: an instruction, the scene before it, and the one scene that must come out.

No instruction is ambiguous. The words for an object fit one object of the scene only; a new place is named by
a region of the picture or by a side of another object, and the object is then put at the region's anchor, or
in line with the other object at the nearest free place. Whatever the instruction does not name stays.

The scenes before and after both belong to the split (`cm3.data.scenes.split_of`), so that no split ever shows
a collection of objects of another one, on neither side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from cm3.data.scene_phrases import (
    REGIONS,
    anchor_of,
    indefinite,
    kinds_of,
    pick,
    pick_kind,
    references,
    region_of,
    sentence,
)
from cm3.data.scene_world import (
    BACKGROUNDS,
    COLORS,
    MARGIN,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    SceneObject,
    relation_holds,
)
from cm3.data.scenes import sample_scene, split_of

EDITS = ("recolor", "resize", "reshape", "remove", "add", "move", "background")
PLACE_SLACK = 4.0  # pixels by which a relation may miss in a picture and still count as followed

_MOST_OBJECTS = 4
_STEP = 4  # pixels between lattice points
_RELATION_WORDS = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
_WORDINGS = {
    "recolor": (
        "make {x} {color}",
        "paint {x} {color}",
        "turn {x} {color}",
        "change the color of {x} to {color}",
        "{x} should be {color}",
    ),
    "large": ("make {x} large", "make {x} bigger", "enlarge {x}", "change the size of {x} to large"),
    "small": ("make {x} small", "make {x} smaller", "shrink {x}", "change the size of {x} to small"),
    "reshape": (
        "turn {x} into a {shape}",
        "change {x} into a {shape}",
        "make {x} a {shape}",
        "change the shape of {x} to a {shape}",
    ),
    "remove": ("remove {x}", "delete {x}", "erase {x}", "take {x} away", "get rid of {x}"),
    "add": ("add {new} {at}", "draw {new} {at}", "put {new} {at}", "insert {new} {at}", "there should be {new} {at}"),
    "move": ("move {x} {to}", "shift {x} {to}", "put {x} {at}", "place {x} {at}"),
    "background": (
        "change the background to {background}",
        "make the background {background}",
        "paint the background {background}",
        "turn the background {background}",
        "use a {background} background",
    ),
}


@dataclass(frozen=True)
class Place:
    """Where an instruction wants an object: in a region of the picture, or at a side of another object."""

    region: str | None = None
    relation: str | None = None
    landmark: SceneObject | None = None

    def holds(self, item: SceneObject) -> bool:
        """Whether an object lies there; relations may miss by `PLACE_SLACK`."""
        if self.landmark is None or self.relation is None:
            return region_of(item) == self.region
        return relation_holds(item, self.relation, self.landmark, PLACE_SLACK)


@dataclass(frozen=True)
class SceneEdit:
    """An instruction and what it does to a scene."""

    kind: str
    """One of `EDITS`."""
    before: Scene
    target: SceneObject | None = None
    """The object of `before` that is changed, moved or removed; None for add and background."""
    result: SceneObject | None = None
    """What becomes of it, or what is added; None for remove and background."""
    place: Place | None = None
    """Where move and add put the result; elsewhere `result` keeps the middle of `target`."""
    background: str | None = None
    """The new background; None if it stays."""
    instruction: str = ""

    @property
    def kept(self) -> tuple[SceneObject, ...]:
        """The objects that the instruction leaves alone."""
        return tuple(item for item in self.before.objects if item != self.target)

    @property
    def after(self) -> Scene:
        """The scene that must come out."""
        changed = [self.result if item == self.target else item for item in self.before.objects]
        added = [self.result] if self.target is None else []
        return Scene(
            self.background or self.before.background, tuple(item for item in changed + added if item is not None)
        )


def sample_edit(rng: np.random.Generator, split: str = "train", kind: str | None = None) -> SceneEdit:
    """Draw an edit of a kind, or of any, whose scenes before and after belong to a split.

    Raises:
        DataError: the kind does not exist.
    """
    kind = pick_kind(rng, EDITS, kind)
    while True:
        before = sample_scene(rng, split)
        options = [edit for edit in _options(kind, before) if split_of(kinds_of(edit.after)) == split]
        if not options:
            continue
        edit = pick(rng, options)
        if kind in ("add", "move"):
            placed = _placed(edit)
            if not placed:
                continue
            edit = pick(rng, placed)
        return replace(edit, instruction=sentence(_word(edit, rng), rng))


def keeps_margins(objects: Sequence[SceneObject]) -> bool:
    """Whether all objects lie in the picture and apart from each other, as in every scene."""
    for item in objects:
        near = SIZES[item.size] // 2 + MARGIN
        if not (near <= item.x <= SIDE - near and near <= item.y <= SIDE - near):
            return False
    return all(
        max(abs(one.x - two.x), abs(one.y - two.y)) >= _distance_apart(one, two)
        for one, two in combinations(objects, 2)
    )


def _distance_apart(one: SceneObject, two: SceneObject) -> int:
    return (SIZES[one.size] + SIZES[two.size]) // 2 + MARGIN


def _options(kind: str, before: Scene) -> list[SceneEdit]:
    """All edits of a kind that lead to a scene of pairwise different objects; places are chosen later."""
    if kind == "background":
        return [SceneEdit(kind, before, background=name) for name in BACKGROUNDS if name != before.background]
    if kind == "add":
        if len(before.objects) == _MOST_OBJECTS:
            return []
        new = [SceneObject(shape, color, size, 0, 0) for shape in SHAPES for color in COLORS for size in SIZES]
        return [edit for item in new if _all_differ(edit := SceneEdit(kind, before, result=item))]
    if kind == "remove":
        return [SceneEdit(kind, before, target=item) for item in before.objects if len(before.objects) > 1]
    if kind == "move":
        return [SceneEdit(kind, before, target=item, result=item) for item in before.objects]
    attribute = {"recolor": "color", "resize": "size", "reshape": "shape"}[kind]
    values: dict[str, Sequence[Any]] = {"color": tuple(COLORS), "size": tuple(SIZES), "shape": SHAPES}
    edits = []
    for item in before.objects:
        for value in values[attribute]:
            edit = SceneEdit(kind, before, target=item, result=replace(item, **{attribute: value}))
            if edit.result != item and _all_differ(edit) and keeps_margins(edit.after.objects):
                edits.append(edit)
    return edits


def _all_differ(edit: SceneEdit) -> bool:
    kinds = kinds_of(edit.after)
    return len(set(kinds)) == len(kinds)


def _placed(edit: SceneEdit) -> list[SceneEdit]:
    """The edit with its result at each free place at which `edit.target` does not lie yet."""
    assert edit.result is not None
    result, landmarks = edit.result, edit.kept
    found = []
    for region in REGIONS:
        x, y = anchor_of(region)
        found.append((Place(region=region), replace(result, x=x, y=y)))
    for landmark in landmarks:
        for relation in RELATIONS:
            in_line = _line(result, relation, landmark)
            nearest = next((item for item in in_line if keeps_margins((*landmarks, item))), None)
            if nearest is not None:
                found.append((Place(relation=relation, landmark=landmark), nearest))
    return [
        replace(edit, result=item, place=place)
        for place, item in found
        if keeps_margins((*landmarks, item)) and not (edit.target is not None and place.holds(edit.target))
    ]


def _line(item: SceneObject, relation: str, landmark: SceneObject) -> Iterator[SceneObject]:
    """The object at each lattice point straight on one side of the landmark, the nearest first."""
    right, down = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
    first = -(-_distance_apart(item, landmark) // _STEP) * _STEP
    for distance in range(first, SIDE, _STEP):
        yield replace(item, x=landmark.x + right * distance, y=landmark.y + down * distance)


def _word(edit: SceneEdit, rng: np.random.Generator) -> str:
    """Put an edit into words."""
    wordings = _WORDINGS[edit.kind if edit.kind != "resize" or edit.result is None else edit.result.size]
    words = {"background": edit.background or ""}
    if edit.target is not None:
        words["x"] = pick(rng, references(edit.before, edit.target)).words
    if edit.result is not None:
        item = edit.result
        words |= {"color": item.color, "shape": item.shape}
        words["new"] = indefinite(f"{item.size} {item.color} {item.shape}")
    if edit.place is not None:
        if edit.place.landmark is not None and edit.place.relation is not None:
            landmark = pick(rng, references(edit.before, edit.place.landmark)).words
            words["to"] = words["at"] = f"{_RELATION_WORDS[edit.place.relation]} {landmark}"
        else:
            words |= {"to": f"to the {edit.place.region}", "at": f"in the {edit.place.region}"}
    return pick(rng, wordings).format(**words)
