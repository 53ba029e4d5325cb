"""The reader of NLVR boxes on pictures drawn here as the corpus draws them, its captions, and their grading."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cm3.errors import DataError
from cm3.eval.nlvr_reader import (
    COLORS,
    GROUND,
    SHAPES,
    SIDE,
    SIZES,
    BoxKind,
    BoxObject,
    kinds,
    parse_box_caption,
    read_box,
    shape_mask,
)

ALL_KINDS = [BoxKind(size, color, shape) for size in SIZES for color in COLORS for shape in SHAPES]


def draw(objects) -> Image.Image:
    """A box of 100x100, resized to 64x64."""
    pixels_HWC = np.full((SIDE, SIDE, 3), GROUND, dtype=np.float64)
    for (size, color, shape), x, y in objects:
        mask_HW1 = shape_mask(shape, size)[:, :, None]
        place = pixels_HWC[y : y + len(mask_HW1), x : x + len(mask_HW1)]
        place[:] = place * (1 - mask_HW1) + np.array(COLORS[color]) * mask_HW1
    picture = Image.fromarray(pixels_HWC.round().astype(np.uint8))
    return picture.resize((64, 64), Image.Resampling.LANCZOS)


def scatter(rng, count) -> list[BoxObject]:
    """Objects that do not overlap but may touch."""
    free_HW, objects = np.ones((SIDE, SIDE), dtype=bool), []
    while len(objects) < count:
        kind = ALL_KINDS[rng.integers(len(ALL_KINDS))]
        side = len(shape_mask(kind.shape, kind.size))
        x, y = rng.integers(SIDE - side + 1, size=2)
        if free_HW[y : y + side, x : x + side].all():
            free_HW[y : y + side, x : x + side] = False
            objects.append(BoxObject(kind, int(x), int(y)))
    return objects


@pytest.mark.parametrize("blur", [0.0, 0.7])
def test_reads_boxes_back(blur):
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 3, 4, 5, 6):
        objects = scatter(rng, count)
        found = read_box(draw(objects).filter(ImageFilter.GaussianBlur(blur)))
        assert kinds(found) == kinds(objects)
        for one, other in zip(sorted(found), sorted(objects)):
            assert one.kind == other.kind
            assert len(objects) > 1 or abs(one.x - other.x) + abs(one.y - other.y) <= 2


@pytest.mark.parametrize("colors", [("black",) * 4, ("blue", "blue", "yellow"), ("yellow",)])
def test_reads_the_touching_blocks_of_towers(colors):
    blocks = [BoxObject(BoxKind("medium", color, "square"), 40, 80 - 21 * i) for i, color in enumerate(colors)]
    found = read_box(draw(blocks))
    assert [item.kind.color for item in sorted(found, key=lambda item: -item.y)] == list(colors)
    assert kinds(found) == kinds(blocks)


def test_an_object_of_two_colours_does_not_count_as_either():
    picture = np.array(draw([BoxObject(BoxKind("large", "black", "circle"), 30, 30)]))
    picture[:, 29:][picture[:, 29:, 0] < 100] = COLORS["yellow"]
    large = [BoxKind("large", color, "circle") for color in COLORS]
    assert not set(large) & set(kinds(read_box(Image.fromarray(picture))))


def test_a_picture_that_is_not_square_is_refused():
    with pytest.raises(DataError, match="square picture, this one is 64x32"):
        read_box(Image.new("RGB", (64, 32)))


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("one large black square", {("large", "black", "square"): 1}),
        (
            "two small blue circles and one small yellow triangle",
            {("small", "blue", "circle"): 2, ("small", "yellow", "triangle"): 1},
        ),
        (
            "one large black circle, three medium blue squares and one small yellow circle",
            {("large", "black", "circle"): 1, ("medium", "blue", "square"): 3, ("small", "yellow", "circle"): 1},
        ),
        ("one small blue circle and one small blue circle", {("small", "blue", "circle"): 2}),
        ("a single yellow block", {("medium", "yellow", "square"): 1}),
        (
            "a tower of three blocks, from bottom to top: blue, black, blue",
            {("medium", "blue", "square"): 2, ("medium", "black", "square"): 1},
        ),
        ("a tower of two blocks, from bottom to top: blue, black, blue", None),
        ("a tower of one blocks, from bottom to top: red", None),
        ("one large red circle", None),
        ("one large black circle, and", None),
        ("", None),
    ],
)
def test_captions_are_parsed(caption, named):
    assert parse_box_caption(caption) == (None if named is None else Counter(named))


class Parrot:
    """Stands for a model: draws, decodes and captions what it was told, whatever is asked."""

    image_size = 64
    hash = "parrot"
    precision = "fp32"
    tokenizer = SimpleNamespace(hash="parrot")

    def __init__(self, drawn, captions):
        self._captions = captions
        self._drawn = [draw(objects).filter(ImageFilter.GaussianBlur(0.3)) for objects in drawn]

    def generate(self, prompts, **_):
        return [[picture] for picture in self._drawn[: len(prompts)]]

    def settings(self, **sampling):
        return sampling

    def reconstruct(self, images):
        return self._drawn

    def caption(self, images, **_):
        return self._captions


RIGHT = [BoxObject(BoxKind("large", "black", "square"), 5, 5), BoxObject(BoxKind("small", "blue", "circle"), 60, 60)]
OTHER_SIZE = [RIGHT[0], BoxObject(BoxKind("medium", "blue", "circle"), 60, 60)]
CAPTION = "one large black square and one small blue circle"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two rows of the same box."""
    from cm3.data.sources import SourceConfig

    folder = tmp_path_factory.mktemp("boxes")
    draw(RIGHT).save(folder / "box.png")
    objects = json.dumps([item.kind._asdict() for item in RIGHT])
    row = json.dumps({"image": "box.png", "text": CAPTION, "objects": objects, "kind": "scatter"})
    (folder / "rows.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    return SourceConfig(kind="jsonl", path=str(folder / "rows.jsonl"))


def test_what_a_model_makes_is_graded(source):
    from cm3.eval.nlvr_box import BoxCaptioning, BoxGeneration, BoxReconstruction

    model = Parrot([RIGHT, OTHER_SIZE], [CAPTION, "one large black square and two small blue circles"])
    metrics = {}
    for task in (BoxReconstruction, BoxGeneration, BoxCaptioning):
        metrics |= {
            f"{task.__name__}: {name}": value.value for name, value in task(source=source).run(model).metrics.items()
        }
    psnr = metrics.pop("BoxReconstruction: PSNR (dB)")
    assert psnr > 10
    generation = {
        "all objects right": 0.5,
        "all shapes and colours right": 1.0,
        "number of objects right": 1.0,
        "objects right": 0.75,
        "spurious objects for each object": 0.25,
    }
    assert metrics == {
        "BoxReconstruction: originals read exactly": 1.0,
        "BoxReconstruction: round trip read as the original": 0.5,
        **{f"BoxGeneration: {name}, guidance {scale}": value for scale in (3, 1) for name, value in generation.items()},
        "BoxCaptioning: objects with all attributes right": 1.0,
        "BoxCaptioning: spurious objects for each object": 0.25,
        "BoxCaptioning: captions in the grammar": 1.0,
        "BoxCaptioning: exact caption": 0.5,
    }


def test_rows_without_exact_descriptions_are_named(source):
    from dataclasses import replace

    from cm3.eval.nlvr_box import BoxCaptioning, BoxReconstruction

    with pytest.raises(DataError, match=r"rows\.jsonl:1: caption 'scatter' is not an exact description"):
        BoxCaptioning(source=replace(source, text_columns=("kind",))).run(Parrot([], []))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'kind' must hold a JSON list"):
        BoxReconstruction(source=source, objects_column="kind").run(Parrot([], []))
