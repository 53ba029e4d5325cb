"""Scenes as boxes, maps, edges and long captions: exact, and enough to know the scene."""

import re

import numpy as np
import pytest
from PIL import Image

from cm3.data.conditions import edge_map
from cm3.data.scene_captions import parse_caption
from cm3.data.scene_grounding import (
    SEGMENT_COLORS,
    full_caption,
    grounded_texts,
    long_caption,
    object_mask,
    parse_long_caption,
    sample_conditioned_scene,
    segmentation_map,
)
from cm3.data.scene_phrases import box_of, kinds_of, region_of
from cm3.data.scene_world import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, SceneObject, render
from cm3.data.scenes import SceneDataset, split_of
from cm3.eval.scenes import matches

BOX = re.compile(r"(?:(large|small) )?(\w+) (\w+) at \((\d+), (\d+)\) -> \((\d+), (\d+)\)")
RED = SceneObject("circle", "red", "large", 14, 30)
BLUE = SceneObject("square", "blue", "small", 46, 50)
PAIR = Scene("gray", (RED, BLUE))


def test_grounded_texts_in_the_words_of_the_paper():
    found = {grounded_texts(PAIR, np.random.default_rng(seed)) for seed in range(30)}
    caption = "two objects on a gray background"
    plain = "red circle at (8, 72) -> (104, 168)", "blue square at (156, 172) -> (212, 228)"
    sized = f"large {plain[0]}", f"small {plain[1]}"
    assert found == {(caption, *order) for one in (plain, sized) for order in (one, one[::-1])}


def test_boxes_in_words_are_the_boxes_of_the_painter():
    for item in SceneDataset("test", 3, 40):
        _, *stated = grounded_texts(item.scene, np.random.default_rng(0))
        read = set()
        for text in stated:
            size, color, shape, *corners = BOX.fullmatch(text).groups()
            box = tuple(int(corner) / 4 for corner in corners)  # from the grid of 256 to pixels
            assert size in (None, {24: "large", 14: "small"}[box[2] - box[0]])
            read.add((color, shape, box))
        assert read == {(one.color, one.shape, box_of(one)) for one in item.scene.objects}


def test_full_captions_leave_nothing_open():
    for index in range(40):
        scene = sample_conditioned_scene(np.random.default_rng(index), "train")
        statement = parse_caption(full_caption(scene))
        assert statement.background == scene.background and matches(scene, statement).exact
        assert all(item.size for item in statement.objects)
        assert len({(item.shape, item.size) for item in scene.objects}) == len(scene.objects)
        assert split_of(kinds_of(scene)) == "train"


def test_maps_hold_the_class_of_every_pixel():
    pixels = np.asarray(segmentation_map(PAIR))
    expected = np.zeros((64, 64, 3), dtype=np.uint8)
    expected[43:57, 39:53] = SEGMENT_COLORS["square"]
    ys, xs = np.mgrid[:64, :64]
    disk = (xs + 0.5 - 14) ** 2 + (ys + 0.5 - 30) ** 2
    np.testing.assert_array_equal(pixels[disk > 13**2], expected[disk > 13**2])
    assert (pixels[disk < 11**2] == SEGMENT_COLORS["circle"]).all()


def test_masks_are_the_painted_pixels():
    for shape in SHAPES:
        item = SceneObject(shape, "red", "large", 30, 30)
        painted = np.asarray(render(Scene("black", (item,))))[..., 0] > COLORS["red"][0] / 2
        assert (painted != object_mask(item)).sum() <= 4, shape  # rounding of pixels covered by half


def test_colours_of_the_map_are_far_apart():
    palette = np.array(list(SEGMENT_COLORS.values()), dtype=float)
    distances = np.linalg.norm(palette[:, None] - palette[None], axis=2)
    assert set(SEGMENT_COLORS) == {"background", *SHAPES}
    assert distances[~np.eye(len(palette), dtype=bool)].min() == 128


def test_the_edge_of_a_step_is_one_line():
    pixels = np.full((8, 8, 3), 255, dtype=np.uint8)
    pixels[:, 4:] = (255, 230, 40)
    edges = np.asarray(edge_map(Image.fromarray(pixels)))
    assert (edges.any(axis=(0, 2)) == [False] * 4 + [True] + [False] * 3).all() and set(np.unique(edges)) == {0, 255}
    assert not np.asarray(edge_map(Image.new("RGB", (8, 8), "gray"))).any()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_objects_of_every_colour_have_edges_round_them(background):
    for color in COLORS:
        item = SceneObject("square", color, "large", 30, 30)
        edges = np.asarray(edge_map(render(Scene(background, (item,)))))[..., 0] > 0
        assert edges[18:42, 17:43].any(axis=1).all() and edges[17:43, 18:42].any(axis=0).all()
        assert not edges[21:39, 21:39].any() and 80 <= edges.sum() <= 100  # a ring of 24 x 24, a pixel wide


def test_long_captions_by_hand():
    assert long_caption(PAIR) == (
        "There are two objects on a gray background. A large red circle is in the center left. "
        "A small blue square is in the bottom right."
    )
    assert long_caption(Scene("navy", (BLUE,))) == (
        "There is one object on a navy background. A small blue square is in the bottom right."
    )


def test_long_captions_are_read_back():
    for item in SceneDataset("train", 4, 60):
        background, objects = parse_long_caption(long_caption(item.scene))
        assert background == item.scene.background
        truth = [(kind, region_of(one)) for kind, one in zip(kinds_of(item.scene), item.scene.objects)]
        assert sorted(objects) == sorted(truth)
    assert parse_long_caption(long_caption(PAIR).upper().replace(". ", ".   ")) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A red circle.",
        "There are two objects on a gray background.",
        "There are two objects on a gray background. A large red circle is in the center left.",
        "There is one object on a gray background. A red circle is in the center left.",
        "There is one object on a gray background. A large red circle is in the middle.",
        "There is one object on a beige background. A large red circle is in the center.",
    ],
)
def test_other_texts_are_no_long_captions(text):
    assert parse_long_caption(text) is None


def test_every_object_size_has_its_box():
    assert {size: box_of(SceneObject("star", "red", size, 30, 30)) for size in SIZES} == {
        "small": (23, 23, 37, 37),
        "large": (18, 18, 42, 42),
    }
