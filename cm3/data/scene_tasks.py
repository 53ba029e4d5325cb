"""Instruction examples from the procedural scenes: one seeded source with random access over all tasks.

Every example is a pure function of (seed, split, mix, index). All scenes of an example, before and after an
edit alike, belong to the split, so train, validation and test share no collection of objects; written words
have their own disjoint splits (`cm3.data.scene_letters`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from cm3.checkpoint import atomic_path
from cm3.data.conditions import edge_map
from cm3.data.instruct_rows import ImageFile, InstructRow
from cm3.data.scene_edits import SceneEdit, sample_edit
from cm3.data.scene_grounding import (
    full_caption,
    grounded_texts,
    long_caption,
    sample_conditioned_scene,
    segmentation_map,
)
from cm3.data.scene_letters import Writing, draw_writing, sample_writing, writing_request
from cm3.data.scene_phrases import box_of
from cm3.data.scene_questions import SceneQuestion, sample_question
from cm3.data.scene_world import SIDE, Scene, render
from cm3.data.scenes import SPLITS, sample_scene
from cm3.errors import DataError
from cm3.tokenizers import document, instruct_tasks
from cm3.tokenizers.instruct import ANSWER_BOXES, ANSWER_CHARACTERS, Layout, lay_out

ROWS_FILE = "rows.jsonl"

_MOST_MARGIN = 6  # pixels between an object and its box

_STREAM = 1  # sets the random numbers of an example apart from those of the plain scene of the same index

Truth = SceneEdit | SceneQuestion | Scene | Writing


@dataclass(frozen=True)
class InstructionExample:
    """What a user says and shows, and the right answer."""

    task: str
    """Name of a template in `cm3.tokenizers.instruct_tasks`."""
    texts: tuple[str, ...]
    """The texts that the template takes from the user, such as the instruction of an edit; may be empty."""
    images: tuple[Image.Image, ...]
    """The pictures that it takes from the user; may be empty."""
    answer: str | Image.Image
    truth: Truth
    """What the answer is graded against by `cm3.eval.scene_instruct`."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom of the part of the answer that is asked for, the rest being given; None is all."""

    @property
    def turns(self) -> tuple[tuple[document.Text | document.Image, ...], ...]:
        """The user's turn and the assistant's, as `cm3.tokenizers.instruct.lay_out` takes them."""
        user: tuple[str | Image.Image, ...] = (*self.texts, *self.images)
        return tuple(
            tuple(document.Text(part) if isinstance(part, str) else document.Image(part) for part in turn)
            for turn in (user, (self.answer,))
        )

    def document(self, layout: Layout = "text_first", wording: int = 0) -> document.Document:
        """The example laid out as a document that knows its answers."""
        laid_out = lay_out(self.turns, task=self.task, layout=layout, wording=wording)
        if self.box is None:
            return laid_out
        places = {ANSWER_CHARACTERS: [], ANSWER_BOXES: [[len(laid_out.segments) - 1, *self.box]]}
        return replace(laid_out, metadata={**laid_out.metadata, **places})


def _edit(rng: np.random.Generator, split: str) -> InstructionExample:
    edit = sample_edit(rng, split)
    return InstructionExample("edit", (edit.instruction,), (render(edit.before),), render(edit.after), edit)


def _vqa(rng: np.random.Generator, split: str) -> InstructionExample:
    asked = sample_question(rng, split)
    return InstructionExample("vqa", (asked.question,), (render(asked.scene),), asked.answer, asked)


def _grounded(rng: np.random.Generator, split: str) -> InstructionExample:
    scene = sample_scene(rng, split)
    return InstructionExample("grounded", grounded_texts(scene, rng), (), render(scene), scene)


def _segment(rng: np.random.Generator, split: str) -> InstructionExample:
    scene = sample_scene(rng, split)
    return InstructionExample("segment", (), (render(scene),), segmentation_map(scene), scene)


def _segmentation(rng: np.random.Generator, split: str) -> InstructionExample:
    scene = sample_conditioned_scene(rng, split)
    conditions = (segmentation_map(scene),)
    return InstructionExample("segmentation", (full_caption(scene),), conditions, render(scene), scene)


def _edges(rng: np.random.Generator, split: str) -> InstructionExample:
    scene = sample_conditioned_scene(rng, split)
    picture = render(scene)
    return InstructionExample("edges", (full_caption(scene),), (edge_map(picture),), picture, scene)


def _writing(rng: np.random.Generator, split: str) -> InstructionExample:
    writing = sample_writing(rng, split)
    # The template of `text_in_image` has no place for colours; these requests are whole sentences.
    return InstructionExample("generate", (writing_request(writing, rng),), (), draw_writing(writing), writing)


def _long_caption(rng: np.random.Generator, split: str) -> InstructionExample:
    scene = sample_scene(rng, split)
    return InstructionExample("long_caption", (), (render(scene),), long_caption(scene), scene)


def _infill(rng: np.random.Generator, split: str) -> InstructionExample:
    scene = sample_scene(rng, split)
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    left, top, right, bottom = (int(place) for place in box_of(item))
    before, after = rng.integers(0, _MOST_MARGIN, 2, endpoint=True), rng.integers(0, _MOST_MARGIN, 2, endpoint=True)
    left, top = max(left - int(before[0]), 0), max(top - int(before[1]), 0)
    box = (left, top, min(right + int(after[0]), SIDE), min(bottom + int(after[1]), SIDE))
    name = f"a {item.size} {item.color} {item.shape}"
    return InstructionExample("generate", (name,), (), render(scene), scene, box)


TASKS: dict[str, Callable[[np.random.Generator, str], InstructionExample]] = {
    "edit": _edit,
    "vqa": _vqa,
    "grounded": _grounded,
    "segment": _segment,
    "segmentation": _segmentation,
    "edges": _edges,
    "writing": _writing,
    "long_caption": _long_caption,
    "infill": _infill,
}
"""What a source may hold. `segment` asks for the map of a picture, `segmentation` for the picture of a map, `infill`
for a box around an object; all have the template of their name but `writing` and `infill`, which have that of
`generate`."""
DEFAULT_MIX = {
    **{"edit": 0.4, "vqa": 0.2, "grounded": 0.1},
    **dict.fromkeys(("segment", "segmentation", "edges", "writing", "long_caption"), 0.06),
}


@dataclass(frozen=True)
class SceneTasks:
    """The first `size` instruction examples of a split, as a sequence."""

    split: str
    size: int
    seed: int = 0
    mix: Mapping[str, float] = field(default_factory=lambda: DEFAULT_MIX)
    """Weight of each task among `TASKS`; the share of an example's task is its weight over their sum."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"split {self.split!r} of the scenes does not exist; choose one of {', '.join(SPLITS)}")
        unknown = [task for task in self.mix if task not in TASKS]
        if unknown:
            raise DataError(f"task {unknown[0]!r} of the scenes does not exist; choose among {', '.join(TASKS)}")
        if min(self.mix.values(), default=0) < 0 or sum(self.mix.values()) <= 0:
            raise DataError(f"the weights {dict(self.mix)} of the tasks must not be negative, and one must be positive")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> InstructionExample:
        if not 0 <= index < self.size:
            raise IndexError(f"example {index} was asked for; the source has {self.size}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index, _STREAM))
        weights = np.array([self.mix.get(task, 0.0) for task in TASKS])
        task = list(TASKS)[rng.choice(len(TASKS), p=weights / weights.sum())]
        return TASKS[task](rng, self.split)

    def name(self, index: int) -> str:
        """What an example is called in reports."""
        return f"scene_tasks:{self.split}:{index}"

    def document(self, index: int, layout: Layout = "text_first", seed: int = 0) -> document.Document:
        """An example laid out as a document that knows its answers, in a wording drawn by `seed`."""
        example = self[index]
        wordings = instruct_tasks.TASKS[example.task].wordings
        wording = int(np.random.default_rng((seed, index)).integers(len(wordings)))
        laid_out = example.document(layout, wording)
        return replace(laid_out, metadata={**laid_out.metadata, "row": self.name(index)})

    def texts(self, index: int, seed: int = 0) -> list[str]:
        """The texts of that document."""
        segments = self.document(index, seed=seed).segments
        return [part.text for part in segments if isinstance(part, document.Text)]

    def __iter__(self) -> Iterator[InstructionExample]:
        return (self[index] for index in range(self.size))


def write_jsonl(examples: Iterable[InstructionExample], folder: str | Path) -> Path:
    """Write `rows.jsonl` in the format of `cm3.data.instruct`, and its pictures as PNG under `images/`.

    Returns the path of the rows.

    Raises:
        DataError: the folder exists and is not empty, or an example asks for a box, for which there is no such format.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; give a new folder, or remove it first")
    with atomic_path(folder) as temporary:
        (temporary / "images").mkdir(parents=True)
        names = (f"images/{number:06d}.png" for number in count(1))

        def stored(part: document.Text | document.Image) -> document.Text | ImageFile:
            if isinstance(part, document.Text):
                return part
            name = next(names)
            part.pixels.save(temporary / name)
            return ImageFile(name)

        with (temporary / ROWS_FILE).open("w", encoding="utf-8") as lines:
            for index, example in enumerate(examples):
                if example.box is not None:
                    raise DataError(f"example {index} asks for a box of a picture; leave infill out of the mix")
                turns = tuple(tuple(stored(part) for part in turn) for turn in example.turns)
                lines.write(InstructRow(id=f"{index:06d}", task=example.task, turns=turns).to_json() + "\n")
    return folder / ROWS_FILE
