"""The oracle reads rendered scenes back, bears blur and noise, is not fooled, and grades as documented."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageFilter

from cm3.data.scene_captions import parse_caption
from cm3.data.scene_world import COLORS, Scene, SceneObject, render, render_array
from cm3.data.scenes import SceneDataset
from cm3.errors import DataError
from cm3.eval.scenes import MIXED, caption_score, matches, read_scene

RED = SceneObject("circle", "red", "large", 18, 30)
BLUE = SceneObject("square", "blue", "small", 46, 30)
PAIR = Scene("white", (RED, BLUE))


def same(one: Scene, two: Scene, tolerance: float) -> bool:
    """Equal but for the order of the objects and their places, up to a tolerance in pixels."""
    left = list(two.objects)
    for item in one.objects:
        found = next((other for other in left if _near(item, other, tolerance)), None)
        if found is None:
            return False
        left.remove(found)
    return not left and one.background == two.background


def _near(one, two, tolerance):
    alike = replace(one, x=0, y=0) == replace(two, x=0, y=0)
    return alike and max(abs(one.x - two.x), abs(one.y - two.y)) <= tolerance


def test_reads_rendered_scenes_back_exactly():
    scenes = [item.scene for split in ("train", "test", "novel") for item in SceneDataset(split, 7, 170)]
    assert np.mean([same(scene, read_scene(render(scene)), 0) for scene in scenes]) >= 0.995


def test_bears_blur_noise_and_displaced_objects():
    rng = np.random.default_rng(0)
    right = []
    for item in SceneDataset("train", 8, 60):
        moved = [
            replace(one, x=one.x + int(rng.integers(-1, 2)), y=one.y + int(rng.integers(-1, 2)))
            for one in item.scene.objects
        ]
        scene = Scene(item.scene.background, tuple(moved))
        soft = np.asarray(render(scene).filter(ImageFilter.GaussianBlur(0.8)), dtype=float)
        noisy = (soft + rng.normal(0, 8, soft.shape)).clip(0, 255).astype(np.uint8)
        right.append(same(scene, read_scene(noisy), 1))
    assert np.mean(right) >= 0.95


def test_reads_objects_off_the_lattice_by_two_pixels():
    for dx, dy in [(2, 0), (-2, 2), (1, -2)]:
        scene = Scene("gray", tuple(replace(item, x=item.x + dx, y=item.y + dy) for item in PAIR.objects))
        assert same(scene, read_scene(render(scene)), 0)


def test_an_empty_picture_holds_nothing():
    assert read_scene(render(Scene("navy", ()))) == Scene("navy", ())


def test_is_not_fooled_by_a_spare_blob_or_by_mixed_colours():
    blob = render_array(PAIR)
    blob[50:60, 10:24] = COLORS["green"]
    assert len(read_scene(blob).objects) == 3
    halves = render_array(PAIR)
    halves[30:42, 6:30][(halves[30:42, 6:30] != 255).any(axis=2)] = COLORS["green"]
    assert MIXED in [item.color for item in read_scene(halves).objects]


def test_another_size_is_refused():
    with pytest.raises(DataError, match="64x64"):
        read_scene(render(PAIR).resize((128, 128)))


@pytest.mark.parametrize(
    "caption, attributes, relations, exact",
    [
        ("a large red circle left of a small blue square", True, True, True),
        ("a blue square to the right of a red circle on a white background", True, True, True),
        ("a red circle and a blue square", True, None, True),
        ("a small red circle left of a small blue square", True, True, False),
        ("a red circle above a blue square", True, False, False),
        ("a red circle and a blue square on a black background", True, None, False),
        ("a red square left of a blue circle", False, False, False),
        ("a red circle", False, None, False),
        ("a red circle left of a blue square, and a green star", False, True, False),
    ],
)
def test_grades_pictures(caption, attributes, relations, exact):
    score = matches(PAIR, parse_caption(caption))
    assert (score.attributes_right, score.relations_right, score.exact) == (attributes, relations, exact)
    assert score.background_right == (None if "background" not in caption else "white" in caption)


def test_grades_shapes_and_colours_apart():
    score = matches(PAIR, parse_caption("a red square and a blue circle"))
    assert score.count_right and score.shapes_right and score.colors_right and not score.attributes_right


def test_relations_of_twins_must_hold_for_one_and_the_same_choice():
    twins = Scene("black", (RED, replace(RED, size="small", x=46, y=10), replace(BLUE, x=46, y=40)))
    assert matches(twins, parse_caption("a small red circle above a blue square, a large red circle")).exact
    swapped = parse_caption("a large red circle above a blue square, a small red circle")
    assert matches(twins, swapped).attributes_right and not matches(twins, swapped).relations_right


def test_true_captions_get_full_marks():
    for item in SceneDataset("validation", 2, 60):
        assert matches(item.scene, item.statement).exact
        score = caption_score(item.scene, item.caption)
        assert score.exact and score.objects_right == score.objects == len(item.scene.objects)
        assert score.spurious == 0 and score.relations_right is not False


@pytest.mark.parametrize(
    "caption, right, spurious, parsed",
    [
        ("a small blue square, and a red circle", 2, 0, True),
        ("a small red circle and a blue square", 1, 1, True),
        ("a red circle, a blue square and a green star", 2, 1, True),
        ("a red circle and a red circle", 1, 1, True),
        ("a red circle and a large red circle", 1, 1, True),
        ("a photograph of a horse", 0, 0, False),
    ],
)
def test_grades_captions(caption, right, spurious, parsed):
    score = caption_score(PAIR, caption)
    assert (score.parsed, score.objects, score.objects_right, score.spurious) == (parsed, 2, right, spurious)


@pytest.mark.slow
def test_reads_5000_rendered_scenes_back_exactly():
    scenes = [item.scene for item in SceneDataset("train", 11, 5000)]
    assert np.mean([same(scene, read_scene(render(scene)), 0) for scene in scenes]) >= 0.995
