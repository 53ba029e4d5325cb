"""The procedural scenes: geometry, splits, captions and their inverse."""

import hashlib
from itertools import combinations

import numpy as np
import pytest

from cm3.data.scene_captions import StatedObject, Statement, parse_caption
from cm3.data.scene_world import (
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    relation_holds,
    render,
    render_array,
    shape_mask,
)
from cm3.data.scenes import NOVEL_PAIRS, SPLITS, SceneDataset, example, sample_scene, split_of
from cm3.errors import DataError

SIDE = 64
MANY = 400


@pytest.fixture(scope="module")
def examples():
    return {split: list(SceneDataset(split, seed=1, size=MANY)) for split in SPLITS}


def kinds_of(scene):
    return [(item.size, item.color, item.shape) for item in scene.objects]


def test_examples_are_a_pure_function_of_seed_split_and_index():
    assert example(3, "test", 17) == example(3, "test", 17)
    assert example(3, "test", 17) != example(4, "test", 17) != example(4, "test", 18)
    dataset = SceneDataset("test", seed=3, size=20)
    assert len(dataset) == 20 and dataset[17] == list(dataset)[17] == example(3, "test", 17)


def test_pictures_stay_what_they_were():
    """Trained tokenizers and models depend on every pixel; a change here needs them trained again."""
    pixels = b"".join(render_array(example(0, "train", index).scene).tobytes() for index in range(50))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "c4ab2300dd434b88"


def test_objects_keep_their_margins_and_differ(examples):
    for item in examples["train"] + examples["novel"]:
        assert 1 <= len(item.scene.objects) <= 4
        assert len(set(kinds_of(item.scene))) == len(item.scene.objects)
        for one in item.scene.objects:
            half = SIZES[one.size] // 2
            assert min(one.x, one.y) - half >= 2 and max(one.x, one.y) + half <= SIDE - 2
        for one, two in combinations(item.scene.objects, 2):
            touching = (SIZES[one.size] + SIZES[two.size]) // 2
            assert max(abs(one.x - two.x), abs(one.y - two.y)) >= touching + 2


def test_everything_occurs(examples):
    scenes = [item.scene for item in examples["train"]]
    counts = np.bincount([len(scene.objects) for scene in scenes], minlength=5)[1:] / MANY
    np.testing.assert_allclose(counts, [0.25, 0.35, 0.25, 0.15], atol=0.08)
    assert len({scene.background for scene in scenes}) == 4
    drawn = {(one.color, one.shape) for scene in scenes for one in scene.objects}
    assert drawn == {(color, shape) for color in COLORS for shape in SHAPES} - NOVEL_PAIRS


def test_splits_share_no_attribute_combination(examples):
    combinations_of = {
        split: {tuple(sorted(kinds_of(item.scene))) for item in items} for split, items in examples.items()
    }
    for one, two in combinations(SPLITS, 2):
        assert not combinations_of[one] & combinations_of[two]
    for split, items in examples.items():
        for item in items:
            pairs = {(one.color, one.shape) for one in item.scene.objects}
            assert bool(pairs & NOVEL_PAIRS) == (split == "novel")


def test_every_split_has_single_objects_of_its_own():
    alone = [split_of([(size, color, shape)]) for size in SIZES for color in COLORS for shape in SHAPES]
    assert alone.count("novel") == 2 * len(NOVEL_PAIRS)
    assert min(alone.count("validation"), alone.count("test")) >= 2


def test_four_large_objects_always_find_a_place():
    rng = np.random.default_rng(0)
    crowded = [scene for scene in (sample_scene(rng) for _ in range(1500)) if len(scene.objects) == 4]
    assert any(all(item.size == "large" for item in scene.objects) for scene in crowded)


def test_unknown_split_names_the_choices():
    with pytest.raises(DataError, match="train, validation, test, novel"):
        example(0, "dev", 0)
    with pytest.raises(IndexError):
        SceneDataset("train", 0, 5)[5]


def test_render_paints_plain_colours_at_the_right_place():
    scene = Scene("navy", (SceneObject("square", "red", "small", 20, 40),))
    image = render(scene)
    assert image.size == (SIDE, SIDE) and image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels[33:47, 13:27] == COLORS["red"]).all()
    assert (pixels == (15, 25, 85)).all(axis=2).sum() == SIDE * SIDE - 14 * 14


@pytest.mark.parametrize("size", SIZES)
def test_shapes_are_distinct_and_fill_their_box(size):
    masks = [shape_mask(shape, SIZES[size]) for shape in SHAPES]
    for mask in masks:
        assert min(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) > 0.05
        assert 0.25 < mask.mean() <= 1
    for one, two in combinations(masks, 2):
        assert np.minimum(one, two).sum() / np.maximum(one, two).sum() < 0.82
    with pytest.raises(ValueError):
        masks[0][0, 0] = 1  # masks are shared


def test_relations_hold_when_clear():
    middle = SceneObject("circle", "red", "small", 30, 30)

    def at(x, y):
        return SceneObject("square", "blue", "small", x, y)

    assert relation_holds(at(18, 30), "left of", middle) and relation_holds(middle, "right of", at(18, 30))
    assert relation_holds(at(30, 10), "above", middle) and not relation_holds(at(30, 10), "below", middle)
    assert not relation_holds(at(19, 30), "left of", middle)
    assert not relation_holds(at(14, 10), "left of", middle)
    assert relation_holds(at(14, 10), "left of", middle, slack=4)


def test_captions_state_the_truth_and_can_be_read_back(examples):
    for items in examples.values():
        for item in items:
            assert parse_caption(item.caption) == item.statement, item.caption
            assert len(item.statement.objects) == len(item.scene.objects)
            named = []
            for stated in item.statement.objects:
                fitting = [
                    one
                    for one in item.scene.objects
                    if (one.color, one.shape) == (stated.color, stated.shape) and stated.size in (None, one.size)
                ]
                assert len(fitting) == 1, item.caption
                named += fitting
            assert len(set(named)) == len(named)
            for first, relation, second in item.statement.relations:
                assert relation_holds(named[first], relation, named[second]), item.caption
            assert item.statement.background in (None, item.scene.background)


def test_captions_vary_and_mostly_state_sizes(examples):
    items = examples["train"]
    assert len({item.caption for item in items}) > 0.9 * MANY
    assert np.mean([item.statement.objects[0].size is not None for item in items]) > 0.8
    assert 0.4 < np.mean([item.statement.background is not None for item in items]) < 0.6
    several = [item for item in items if len(item.scene.objects) > 1]
    assert np.mean([bool(item.statement.relations) for item in several]) > 0.6
    words = " ".join(item.caption for item in items)
    for wanted in (
        "left of",
        "right of",
        "above",
        "below",
        "a picture of",
        "two objects: ",
        ", and ",
        "an orange",
    ):
        assert wanted in words
    assert not any(mistake in words for mistake in ("a orange", "an large", "  ", "one shapes"))


@pytest.mark.parametrize(
    "caption, statement",
    [
        ("a small green star", Statement((StatedObject("small", "green", "star"),))),
        ("An orange circle.", Statement((StatedObject(None, "orange", "circle"),))),
        (
            "a large red circle left of a small blue square",
            Statement(
                (StatedObject("large", "red", "circle"), StatedObject("small", "blue", "square")),
                ((0, "left of", 1),),
            ),
        ),
        (
            "two shapes: a red circle and a blue square, on a black background",
            Statement((StatedObject(None, "red", "circle"), StatedObject(None, "blue", "square")), (), "black"),
        ),
        (
            "red cross over pink star, which is to the right of cyan circle, and red square",
            Statement(
                tuple(
                    StatedObject(None, *words.split())
                    for words in ("red cross", "pink star", "cyan circle", "red square")
                ),
                ((0, "above", 1), (1, "right of", 2)),
            ),
        ),
    ],
)
def test_parse_caption(caption, statement):
    assert parse_caption(caption) == statement


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog",
        "a red circles",
        "a red circle left of",
        "a red circle and",
        "a red circle a blue square",
        "three objects: a red circle",
        "a red circle on a beige background",
        "a red circle and a dog",
    ],
)
def test_captions_outside_the_grammar_are_refused(caption):
    assert parse_caption(caption) is None
