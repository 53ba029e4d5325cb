"""Instruction tasks of CM3Leon (arXiv 2309.02591, table 5): what is given, what is answered, and in which words."""

from collections.abc import Sequence
from dataclasses import dataclass

from cm3.errors import DataError

LOCATION_GRID = 256
"""Places in a picture are written in pixels of a picture of this size (CM3Leon, figure 15)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the user gives, what is answered, and how both are written as one document."""

    user: tuple[str, ...]
    """Fields that the user gives. A field is a picture if it is called `image` or ends in `_image`, else a text; texts
    and pictures are filled in their own order each, however they are mixed. A last text `name*` takes one text or
    more, joined by ", "."""
    assistant: tuple[str, ...]
    """Fields of the answer."""
    wordings: tuple[tuple[str, ...], ...]
    """Ways to write an example, each the segments of a document, text first. A picture is a segment of its own. In a
    text, [...] marks what has to be written as the answer; its space before is its own, for pieces of text carry
    the space before a word."""


def _conditioned(on: str) -> Task:
    return Task(
        user=("condition_image", "caption"),
        assistant=("image",),
        wordings=((f"Make high quality image from {on}", "{condition_image}", "{caption}", "{image}"),),
    )


def _described(*instructions: str) -> Task:
    texts = [f"{instruction}[ {{caption}}]" if instruction else "[{caption}]" for instruction in instructions]
    return Task(user=("image",), assistant=("caption",), wordings=tuple((text, "{image}") for text in texts))


TASKS: dict[str, Task] = {
    "generate": Task(user=("caption",), assistant=("image",), wordings=(("{caption}", "{image}"),)),
    "edit": Task(
        user=("image", "instruction"),
        assistant=("edited_image",),
        wordings=(("Edit first image following the instruction", "{image}", "{instruction}", "{edited_image}"),),
    ),
    "text_in_image": Task(user=("text",), assistant=("image",), wordings=(('draw "{text}"', "{image}"),)),
    "grounded": Task(
        user=("caption", "objects*"),
        assistant=("image",),
        wordings=(("Generate high quality image of {caption} with segmentations {objects}", "{image}"),),
    ),
    "edges": _conditioned("canny edge features"),
    "segmentation": _conditioned("a segmentation map"),
    "hed": _conditioned("hed features"),
    "pose": _conditioned("openpose features"),
    "depth": _conditioned("depth features"),
    "normals": _conditioned("3D norm features"),
    "scribble": _conditioned("children's scribbles"),
    "segment": Task(  # the way back from `segmentation`; the paper has no such task
        user=("image",),
        assistant=("map_image",),
        wordings=(("Make a segmentation map from the image", "{image}", "{map_image}"),),
    ),
    "caption": _described("", "Describe the given picture."),
    "long_caption": _described(
        "Describe the given picture in very detail.",
        "Describe all the objects in the given image in very detail.",
        "Generate a long caption for the given image.",
    ),
    "narration": _described(
        "Describe the given picture in very detail.",
        "Generate a long narration of what is happening in the given image.",
        "Generate a long caption for the given image.",
    ),
    "vqa": Task(
        user=("image", "question"),
        assistant=("answer",),
        wordings=(
            ("Question: {question} Answer:[ {answer}].", "{image}"),
            ("Question: {question}\n[{answer}]", "{image}"),
            ("Question: {question} The answer is[ {answer}].", "{image}"),
        ),
    ),
    "science": Task(  # context and options stand in the question, on lines of their own
        user=("image", "question"),
        assistant=("answer",),
        wordings=(("Question: {question}\nAnswer:[ {answer}].", "{image}"),),
    ),
    "explanation": Task(
        user=("image", "question"),
        assistant=("explanation", "answer"),
        wordings=(
            (
                "Question: {question}\nAnswer: Let's think step-by-step:[ {explanation} So the answer is {answer}].",
                "{image}",
            ),
        ),
    ),
}
"""The tasks of table 5 by name; VQA2, VizWiz and OKVQA are `vqa`, COCO and Flickr30k `caption`."""


def is_image_field(name: str) -> bool:
    """Whether a field of a task is a picture."""
    return name == "image" or name.endswith("_image")


def image_fields(names: Sequence[str]) -> list[str]:
    """The pictures among the fields of a task."""
    return [name for name in names if is_image_field(name)]


def located(name: str, box: Sequence[int | float], size: tuple[int, int]) -> str:
    """An object and its place as a text of the task `grounded`: `bottle at (199, 130) -> (204, 150)`.

    Args:
        name: What it is.
        box: Left, top, right and bottom in pixels of the picture.
        size: Width and height of the picture; the square in its middle is what a model sees.

    Raises:
        DataError: nothing of the box lies in that square.
    """
    side = min(size)
    offsets = [(size[0] - side) / 2, (size[1] - side) / 2] * 2
    scaled = [(place - offset) * LOCATION_GRID / side for place, offset in zip(box, offsets, strict=True)]
    left, top, right, bottom = (min(max(round(place), 0), LOCATION_GRID - 1) for place in scaled)
    if left >= right or top >= bottom:
        raise DataError(
            f"the box {tuple(box)} of {name!r} has no part in the middle square of a picture of {size[0]}x{size[1]} "
            "pixels; leave the object out"
        )
    return f"{name} at ({left}, {top}) -> ({right}, {bottom})"
