"""Words for objects mean one object, regions tile the picture, and small words are spelled right."""

import numpy as np
import pytest

from cm3.data.scene_phrases import (
    REGIONS,
    Reference,
    anchor_of,
    box_of,
    counted,
    enumeration,
    indefinite,
    pick_kind,
    references,
    region_of,
    sentence,
)
from cm3.data.scene_world import SIZES, Scene, SceneObject, render_array
from cm3.data.scenes import SceneDataset
from cm3.errors import DataError

RED = SceneObject("circle", "red", "large", 18, 30)
BLUE = SceneObject("circle", "blue", "small", 46, 30)
GREEN = SceneObject("square", "green", "small", 46, 50)
THREE = Scene("white", (RED, BLUE, GREEN))


def test_references_are_all_phrases_that_mean_one_object():
    assert {reference.words for reference in references(THREE, BLUE)} == {
        "the blue object",
        "the blue circle",
        "the small circle",
        "the small blue object",
        "the small blue circle",
    }
    assert {reference.words for reference in references(THREE, GREEN, hidden="color")} == {
        "the square",
        "the small square",
    }
    assert references(Scene("white", (RED, BLUE)), BLUE, hidden="shape")[0].shape is None


def test_references_of_all_scenes_mean_their_object():
    for item in SceneDataset("train", 5, 60):
        for one in item.scene.objects:
            named = references(item.scene, one)
            assert Reference(one.size, one.color, one.shape) in named
            assert all(reference.meant(item.scene) == one for reference in named)


def test_a_phrase_that_fits_several_or_none_means_nothing():
    assert Reference(None, None, "circle").meant(THREE) is None
    assert Reference(None, None, "star").meant(THREE) is None
    assert Reference(None, None, "square").meant(THREE) == GREEN


def test_regions_are_ninths_and_hold_their_anchors():
    assert region_of(SceneObject("star", "red", "small", 21, 22)) == "center left"
    assert region_of(SceneObject("star", "red", "small", 22, 21)) == "top center"
    assert region_of(SceneObject("star", "red", "small", 43, 63)) == "bottom right"
    for region in REGIONS:
        x, y = anchor_of(region)
        assert region_of(SceneObject("star", "red", "small", x, y)) == region
        assert all(min(x, y) - side // 2 >= 2 and max(x, y) + side // 2 <= 62 for side in SIZES.values())


def test_boxes_are_what_is_painted():
    for size in SIZES:
        item = SceneObject("square", "red", size, 30, 22)
        rows, columns = np.nonzero((render_array(Scene("white", (item,))) != 255).any(axis=2))
        assert box_of(item) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_small_words():
    assert [indefinite(words) for words in ("red circle", "orange star")] == ["a red circle", "an orange star"]
    assert [enumeration(list(parts)) for parts in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
    assert [counted(number) for number in (1, 3)] == ["one object", "three objects"]
    written = {sentence("draw it", np.random.default_rng(seed)) for seed in range(60)}
    assert written == {"draw it", "Draw it."}
    assert {sentence("is it?", np.random.default_rng(seed)) for seed in range(60)} == {"is it?", "Is it?"}


def test_an_unknown_kind_is_named():
    with pytest.raises(DataError, match="kind 'rotate' does not exist; choose one of move, add"):
        pick_kind(np.random.default_rng(0), ("move", "add"), "rotate")
