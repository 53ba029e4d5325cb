"""Exact verdicts on the instruction tasks of the procedural scenes, and what their questions give away.

Pictures are read by the oracle (`cm3.eval.scenes`) and by `cm3.eval.scene_readers`; no learned part is involved.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from cm3.data.scene_edits import SceneEdit
from cm3.data.scene_grounding import SEGMENT_COLORS, object_mask, parse_long_caption
from cm3.data.scene_letters import Writing
from cm3.data.scene_phrases import COUNT_WORDS, box_of, kinds_of, region_of
from cm3.data.scene_questions import SceneQuestion
from cm3.data.scene_tasks import InstructionExample
from cm3.data.scene_world import MARGIN, SIDE, Scene, SceneObject, render_array, shape_mask
from cm3.errors import DataError
from cm3.eval.question_guesses import guesses
from cm3.eval.report import Estimate, mean, ratio, share
from cm3.eval.scene_readers import read_map, read_word
from cm3.eval.scenes import read_scene

BOX_SLACK = 2  # pixels by which an object may leave its place, or its box; half a step of the scenes' lattice
LEAST_OVERLAP = 0.7  # intersection over union from which on an object of a segmentation map is right

_MOST_STRAY_PIXELS = 25  # pixels of one class that a segmentation map may show away from the objects
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class EditVerdict:
    """How a picture follows an edit; copying the picture before gives `others_kept` and an `outside_error` of 0."""

    edit_right: bool
    """What the instruction asks for is there, at its place, and what it replaces is gone."""
    others_kept: bool
    """All other objects and, unless it is edited, the background are as before, and nothing else has appeared."""
    outside_error: float
    """Mean difference to the picture before, in levels of 255, over the pixels that the edit does not touch."""

    @property
    def exact(self) -> bool:
        return self.edit_right and self.others_kept


@dataclass(frozen=True)
class AnswerVerdict:
    """Whether a question got its answer, after `normalized`."""

    exact: bool


@dataclass(frozen=True)
class ObjectsVerdict:
    """How the objects of a picture, a map or a long caption agree with a scene."""

    objects: int
    """Objects in the scene."""
    objects_right: int
    """Objects with the right shape, colour and size in their box (in a caption: region; in a map: class and area)."""
    spurious: int
    """Objects that the scene does not hold; in a map, classes with stray pixels."""
    background_right: bool

    @property
    def exact(self) -> bool:
        return self.objects_right == self.objects and self.spurious == 0 and self.background_right


@dataclass(frozen=True)
class WritingVerdict:
    """How a written word agrees with the word asked for."""

    letters: int
    letters_right: int
    """Letters at their place in a word of the right length; 0 if no word was read."""
    color_right: bool
    background_right: bool

    @property
    def exact(self) -> bool:
        return self.letters_right == self.letters and self.color_right and self.background_right


Verdict = EditVerdict | AnswerVerdict | ObjectsVerdict | WritingVerdict


def grade(example: InstructionExample, answer: str | Image.Image) -> Verdict:
    """Grade an answer to an example.

    Raises:
        DataError: a text where a picture is due, a picture where a text is due, or a picture that is not 64x64.
    """
    truth = example.truth
    if isinstance(answer, str) != isinstance(example.answer, str):
        due, found = ("text", "a picture") if isinstance(example.answer, str) else ("a picture", "text")
        raise DataError(f"task {example.task!r} is answered with {due}, this answer is {found}; check the task")
    if isinstance(answer, str):
        if isinstance(truth, SceneQuestion):
            return AnswerVerdict(normalized(answer) == normalized(truth.answer))
        assert isinstance(truth, Scene), example.task
        return grade_long_caption(truth, answer)
    if isinstance(truth, SceneEdit):
        return grade_edit(truth, answer)
    if isinstance(truth, Writing):
        return grade_writing(truth, answer)
    assert isinstance(truth, Scene), example.task
    return grade_map(truth, answer) if example.task == "segment" else grade_objects(truth, answer)


def grade_edit(edit: SceneEdit, image: Image.Image) -> EditVerdict:
    """Read the picture after an edit and compare it with what the instruction asks for."""
    seen = read_scene(image)
    left = list(seen.objects)
    taken = [_take(left, item) for item in edit.kept]
    followed = edit.background in (None, seen.background)
    if edit.result is not None:
        alike = [item for item in left if _alike(item, edit.result)]
        there = [item for item in alike if _lies_right(item, edit)]
        followed = bool(there)
        for item in (there or alike)[:1]:  # where it lies wrong, that is a fault of the edit and of nothing else
            left.remove(item)
    touched_HW = _touched(edit)
    # What is left over where the edit acts was to go; elsewhere it is a change that nobody asked for.
    ground_edited = edit.background is not None
    astray = [ground_edited or not touched_HW[int(item.y), int(item.x)] for item in left]
    difference_HWC = np.abs(render_array(edit.before).astype(float) - np.asarray(image.convert("RGB")))
    return EditVerdict(
        edit_right=followed and all(astray),
        others_kept=all(taken) and not any(astray) and (ground_edited or seen.background == edit.before.background),
        outside_error=float(difference_HWC[~touched_HW].mean()),
    )


def _lies_right(item: SceneObject, edit: SceneEdit) -> bool:
    """Whether an object lies where the result of an edit is wanted."""
    assert edit.result is not None
    return _near(item, edit.result) if edit.place is None else edit.place.holds(item)


def _touched(edit: SceneEdit) -> np.ndarray:
    """The pixels that an edit may change: the boxes of target and result with their margin, or the background."""
    touched_HW = np.zeros((SIDE, SIDE), dtype=bool)
    if edit.background is not None:
        touched_HW[:] = True
        for item in edit.before.objects:
            left, top, right, bottom = box_of(item)
            touched_HW[top:bottom, left:right] &= shape_mask(item.shape, right - left) < 1
    for item in filter(None, (edit.target, edit.result)):
        left, top, right, bottom = box_of(item)
        touched_HW[top - MARGIN : bottom + MARGIN, left - MARGIN : right + MARGIN] = True
    return touched_HW


def grade_objects(scene: Scene, image: Image.Image) -> ObjectsVerdict:
    """Read a picture; each object of the scene must lie in its box, give or take `BOX_SLACK`."""
    seen = read_scene(image)
    left = list(seen.objects)
    right = sum([_take(left, item) for item in scene.objects])
    return ObjectsVerdict(len(scene.objects), right, len(left), seen.background == scene.background)


def _take(left: list[SceneObject], wanted: SceneObject) -> bool:
    """Remove the wanted object from those left, if it is there."""
    found = next((item for item in left if _alike(item, wanted) and _near(item, wanted)), None)
    if found is not None:
        left.remove(found)
    return found is not None


def _alike(item: SceneObject, wanted: SceneObject) -> bool:
    return replace(item, x=0, y=0) == replace(wanted, x=0, y=0)


def _near(item: SceneObject, wanted: SceneObject) -> bool:
    return max(abs(item.x - wanted.x), abs(item.y - wanted.y)) <= BOX_SLACK


def grade_map(scene: Scene, image: Image.Image) -> ObjectsVerdict:
    """Read a segmentation map; near each object its class must cover what the object covers."""
    classes = list(SEGMENT_COLORS)
    labels_HW = read_map(image)
    away_HW = np.ones((SIDE, SIDE), dtype=bool)
    right = 0
    for item in scene.objects:
        left, top, end, bottom = box_of(item)
        around = slice(top - BOX_SLACK, bottom + BOX_SLACK), slice(left - BOX_SLACK, end + BOX_SLACK)
        away_HW[around] = False
        drawn_HW, mask_HW = labels_HW[around] == classes.index(item.shape), object_mask(item)[around]
        right += (drawn_HW & mask_HW).sum() >= LEAST_OVERLAP * (drawn_HW | mask_HW).sum()
    stray = Counter(labels_HW[away_HW].tolist())
    spurious = sum(stray[classes.index(name)] > _MOST_STRAY_PIXELS for name in classes if name != "background")
    ground = 2 * stray[classes.index("background")] > int(away_HW.sum())
    return ObjectsVerdict(len(scene.objects), int(right), spurious, ground)


def grade_writing(writing: Writing, image: Image.Image) -> WritingVerdict:
    """Read a written word and compare it letter by letter."""
    seen = read_word(image)
    if seen is None:
        return WritingVerdict(len(writing.word), 0, False, False)
    same_length = len(seen.word) == len(writing.word)
    return WritingVerdict(
        letters=len(writing.word),
        letters_right=sum(a == b for a, b in zip(seen.word, writing.word)) if same_length else 0,
        color_right=seen.color == writing.color,
        background_right=seen.background == writing.background,
    )


def grade_long_caption(scene: Scene, text: str) -> ObjectsVerdict:
    """Compare the objects and regions that a long caption names, in any order, with those of the scene."""
    parsed = parse_long_caption(text)
    if parsed is None:
        return ObjectsVerdict(len(scene.objects), 0, 0, False)
    background, named = parsed
    truth = Counter(zip(kinds_of(scene), map(region_of, scene.objects)))
    right = (Counter(named) & truth).total()
    return ObjectsVerdict(len(scene.objects), right, len(named) - right, background == scene.background)


def normalized(answer: str) -> str:
    """An answer without case, punctuation and articles, and with small numbers as digits."""
    words = [word.strip(".,;:!?\"'") for word in answer.lower().split()]
    digits = {word: str(number) for number, word in enumerate(COUNT_WORDS)}
    return " ".join(digits.get(word, word) for word in words if word and word not in _ARTICLES)


def question_prior(examples: Sequence[InstructionExample]) -> dict[str, Estimate]:
    """The share of questions that `guesses` from the question alone get right, for each kind and "all"."""
    asked = [example.truth for example in examples if isinstance(example.truth, SceneQuestion)]
    right: dict[str, list[bool]] = defaultdict(list)
    for item, guess in zip(asked, guesses([(item.kind, normalized(item.question), item.answer) for item in asked])):
        right[item.kind].append(guess == item.answer)
        right["all"].append(guess == item.answer)
    return {kind: share(values) for kind, values in right.items()}


def instruction_metrics(examples: Sequence[InstructionExample], verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    """The metrics of each task, and of edits and questions also by kind, under names like "edit move: exact"."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for example, verdict in zip(examples, verdicts, strict=True):
        task = "writing" if isinstance(example.truth, Writing) else example.task
        groups[task].append(verdict)
        if isinstance(example.truth, SceneEdit | SceneQuestion):
            groups[f"{task} {example.truth.kind}"].append(verdict)
    metrics: dict[str, Estimate] = {}
    for group, members in sorted(groups.items()):
        metrics[f"{group}: exact"] = share([verdict.exact for verdict in members])
        if edits := [verdict for verdict in members if isinstance(verdict, EditVerdict)]:
            metrics[f"{group}: edit right"] = share([verdict.edit_right for verdict in edits])
            metrics[f"{group}: all else unchanged"] = share([verdict.others_kept for verdict in edits])
            metrics[f"{group}: change outside (levels)"] = mean([verdict.outside_error for verdict in edits])
        if scenes := [verdict for verdict in members if isinstance(verdict, ObjectsVerdict)]:
            counts = [verdict.objects for verdict in scenes]
            metrics[f"{group}: objects right"] = ratio([verdict.objects_right for verdict in scenes], counts)
            metrics[f"{group}: spurious objects for each object"] = ratio([v.spurious for v in scenes], counts)
        if words := [verdict for verdict in members if isinstance(verdict, WritingVerdict)]:
            letters = [verdict.letters for verdict in words]
            metrics[f"{group}: letters right"] = ratio([verdict.letters_right for verdict in words], letters)
    return metrics
