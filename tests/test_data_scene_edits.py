"""Edits of scenes: unambiguous words, exactly one change, splits kept, and an oracle that can read them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.data.scene_edits import EDITS, Place, keeps_margins, sample_edit
from cm3.data.scene_phrases import Reference, kinds_of, region_of
from cm3.data.scene_world import BACKGROUNDS, COLORS, LATTICE, RELATIONS, SHAPES, SIZES, Scene, SceneObject, render
from cm3.data.scenes import split_of
from cm3.errors import DataError
from cm3.eval.scenes import read_scene

REFERENCE = re.compile(rf"the (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|object)\b")
RED = SceneObject("circle", "red", "large", 14, 30)
BLUE = SceneObject("square", "blue", "small", 46, 30)

edits = st.builds(
    lambda seed, split, kind: (sample_edit(np.random.default_rng(seed), split, kind), split),
    st.integers(0, 10**6),
    st.sampled_from(["train", "train", "validation", "novel"]),
    st.sampled_from(EDITS),
)


def same_objects(one, two):
    return one.background == two.background and set(one.objects) == set(two.objects)


@given(edits)
def test_both_scenes_belong_to_the_split_and_keep_its_rules(drawn):
    edit, split = drawn
    for scene in (edit.before, edit.after):
        assert split_of(kinds_of(scene)) == split
        assert 1 <= len(scene.objects) <= 4 and len(set(kinds_of(scene))) == len(scene.objects)
        assert keeps_margins(scene.objects)
        assert all(item.x in LATTICE and item.y in LATTICE for item in scene.objects)


@given(edits)
def test_exactly_what_the_kind_says_changes(drawn):
    edit, _ = drawn
    gone = set(edit.before.objects) - set(edit.after.objects)
    new = set(edit.after.objects) - set(edit.before.objects)
    assert (edit.before.background != edit.after.background) == (edit.kind == "background")
    assert (len(gone), len(new)) == {"background": (0, 0), "add": (0, 1), "remove": (1, 0)}.get(edit.kind, (1, 1))
    assert set(edit.kept) == set(edit.before.objects) - gone
    changed = {"recolor": {"color"}, "resize": {"size"}, "reshape": {"shape"}}.get(edit.kind)
    if gone and new:
        one, two = gone.pop(), new.pop()
        differing = {name for name in ("shape", "color", "size", "x", "y") if getattr(one, name) != getattr(two, name)}
        assert differing == changed if changed else differing and differing <= {"x", "y"}


@given(edits)
def test_words_for_objects_fit_one_object_each(drawn):
    edit, _ = drawn
    landmarks = [edit.place.landmark] if edit.place and edit.place.landmark else []
    meant = [item for item in (edit.target, *landmarks) if item is not None]
    found = REFERENCE.findall(edit.instruction.lower())
    assert len(found) == len(meant)
    for (size, color, shape), item in zip(found, meant, strict=True):
        reference = Reference(size or None, color or None, None if shape == "object" else shape)
        assert reference.meant(edit.before) == item


@given(edits)
def test_words_name_the_change(drawn):
    edit, _ = drawn
    text = edit.instruction.lower()
    if edit.kind in ("recolor", "reshape"):
        value = edit.result.color if edit.kind == "recolor" else edit.result.shape
        assert re.search(rf"\b{value}\b", REFERENCE.sub("", text))
    if edit.kind == "resize":
        said = any(word in REFERENCE.sub("", text) for word in ("large", "bigger", "enlarge"))
        assert said == (edit.result.size == "large")
    if edit.kind == "add":
        assert f"{edit.result.size} {edit.result.color} {edit.result.shape}" in text
    if edit.kind == "background":
        assert edit.after.background in text and "background" in text
    if edit.place is not None:
        words = edit.place.region or edit.place.relation
        assert words in text


@given(edits)
def test_places_hold_the_result_and_not_what_was_there(drawn):
    edit, _ = drawn
    if edit.place is None:
        return
    assert edit.place.holds(edit.result)
    assert edit.target is None or not edit.place.holds(edit.target)
    if edit.place.landmark is None:
        assert region_of(edit.result) == edit.place.region
        return
    landmark, relation = edit.place.landmark, edit.place.relation
    along = "x" if relation in ("left of", "right of") else "y"
    across = "y" if along == "x" else "x"
    assert getattr(edit.result, across) == getattr(landmark, across)
    assert (getattr(edit.result, along) < getattr(landmark, along)) == (relation in ("left of", "above"))
    distance = abs(getattr(edit.result, along) - getattr(landmark, along))
    for nearer in range(0, int(distance), 4):  # no lattice point between is free
        sign = -1 if relation in ("left of", "above") else 1
        moved = replace(edit.result, **{along: getattr(landmark, along) + sign * nearer})
        assert not keeps_margins((*edit.kept, moved))


def test_a_place_by_hand():
    assert Place(region="center left").holds(RED) and not Place(region="center").holds(RED)
    right = Place(relation="right of", landmark=RED)
    assert right.holds(BLUE) and not Place(relation="above", landmark=RED).holds(BLUE)
    assert right.holds(replace(BLUE, x=22)) and not right.holds(replace(BLUE, x=21))  # 12 pixels less 4


def test_margins_by_hand():
    assert keeps_margins((RED, BLUE))
    assert keeps_margins((RED, replace(BLUE, x=35))) and not keeps_margins((RED, replace(BLUE, x=34)))  # 12 + 2 + 7
    assert not keeps_margins((replace(RED, x=13),)) and not keeps_margins((replace(BLUE, y=56),))


def test_edits_are_drawn_by_the_seed_alone_and_of_every_kind():
    drawn = [sample_edit(np.random.default_rng(seed)) for seed in range(80)]
    assert drawn[:20] == [sample_edit(np.random.default_rng(seed)) for seed in range(20)]
    assert {edit.kind for edit in drawn} == set(EDITS)
    placed = [edit.place for edit in drawn if edit.place]
    assert {place.relation for place in placed} >= set(RELATIONS) and any(place.region for place in placed)
    assert {edit.background for edit in drawn if edit.background} == set(BACKGROUNDS)
    with pytest.raises(DataError, match="kind 'rotate' does not exist; choose one of recolor"):
        sample_edit(np.random.default_rng(0), "train", "rotate")


def test_every_kind_has_several_wordings():
    for kind in EDITS:
        texts = [sample_edit(np.random.default_rng(seed), "train", kind).instruction.lower() for seed in range(40)]
        assert len({REFERENCE.sub("", text).split()[0] for text in texts}) >= 3, kind


def recovered(count, seed):
    right = []
    for index in range(count):
        edit = sample_edit(np.random.default_rng((seed, index)), "train", EDITS[index % len(EDITS)])
        right.append(same_objects(read_scene(render(edit.after)), edit.after))
    return np.mean(right)


def test_the_oracle_reads_edited_scenes_exactly():
    assert recovered(200, seed=1) >= 0.995


@pytest.mark.slow
def test_the_oracle_reads_5000_edited_scenes_exactly():
    assert recovered(5000, seed=2) >= 0.995


def test_after_by_hand():
    edit = replace(sample_edit(np.random.default_rng(0), "train", "remove"), before=Scene("gray", (RED, BLUE)))
    assert replace(edit, target=RED, result=None).after == Scene("gray", (BLUE,))
    assert replace(edit, target=RED, result=replace(RED, color="green")).after.objects[0].color == "green"
    assert replace(edit, target=None, background="navy").after == Scene("navy", (RED, BLUE))
