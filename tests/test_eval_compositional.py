"""Compositional prompts and their grading, by hand-made scenes and by GenEval's recorded geometry.

How the fixture was made: `relative_position` of GenEval's `evaluate_images.py` (commit 16f1681) on the boxes of these
objects. On 5,000 random pairs of objects it gave the same relations as ours.
"""

from collections import Counter
from dataclasses import replace

import pytest

from cm3.data.scene_captions import parse_caption
from cm3.data.scene_world import Scene, SceneObject, render
from cm3.data.scenes import NOVEL_PAIRS, split_of
from cm3.errors import DataError
from cm3.eval.compositional import (
    CATEGORIES,
    CompositionalPrompt,
    Requirement,
    compositional_prompts,
    grade,
    relative_positions,
)
from cm3.eval.scenes import matches, read_scene

PROMPTS = compositional_prompts(12)
GENEVAL_POSITIONS = [
    ((10, 30, "small"), (40, 30, "small"), {"left of"}),
    ((30, 30, "small"), (32, 30, "small"), set()),
    ((30, 30, "large"), (36, 30, "large"), set()),
    ((30, 30, "small"), (44, 44, "small"), {"above", "left of"}),
    ((30, 30, "large"), (44, 40, "large"), {"left of"}),
    ((30, 50, "small"), (34, 20, "large"), {"below"}),
    ((20, 20, "large"), (24, 30, "large"), set()),
]


def thing(shape="circle", color="red", x=30, y=30, size="small"):
    return SceneObject(shape, color, size, x, y)


def scene(*objects):
    return Scene("white", objects)


def asks(*include, exclude=()):
    return CompositionalPrompt("two_object", "", PROMPTS[0].statement, include, exclude)


@pytest.mark.parametrize(("first", "second", "relations"), GENEVAL_POSITIONS)
def test_positions_are_those_of_geneval(first, second, relations):
    (ax, ay, a_size), (bx, by, b_size) = first, second
    assert relative_positions(thing(x=ax, y=ay, size=a_size), thing(x=bx, y=by, size=b_size)) == relations


def test_objects_on_one_spot_have_no_position():
    assert relative_positions(thing(), thing()) == set()


def test_prompts_are_in_the_grammar_and_state_what_they_say():
    for prompt in PROMPTS:
        assert parse_caption(prompt.text) == prompt.statement, prompt.text


def test_every_category_has_its_prompts_from_its_split():
    assert Counter(prompt.category for prompt in PROMPTS) == dict.fromkeys(CATEGORIES, 12)
    for prompt in PROMPTS:
        kinds = [(item.size, item.color, item.shape) for item in prompt.statement.objects]
        assert split_of(kinds) == "test" and not {(c, s) for _, c, s in kinds} & NOVEL_PAIRS
    assert compositional_prompts(12) == PROMPTS
    assert compositional_prompts(12, seed=1) != PROMPTS
    assert {p.text for p in PROMPTS}.isdisjoint(p.text for p in compositional_prompts(12, "train"))


def test_categories_ask_what_geneval_asks():
    by_category = {category: [p for p in PROMPTS if p.category == category] for category in CATEGORIES}
    for prompt in by_category["counting"]:
        shapes = {item.shape for item in prompt.statement.objects}
        count = len(prompt.statement.objects)
        assert len(shapes) == 1 and 2 <= count <= 4
        assert prompt.include == (Requirement(*shapes, count),)
        assert prompt.exclude == (Requirement(*shapes, count + 1),)
    assert {len(p.statement.objects) for p in by_category["counting"]} == {2, 3, 4}
    for prompt in by_category["color_attr"]:
        (a, b) = prompt.include
        assert a.color != b.color and a.shape != b.shape and a.color and b.color
    for prompt in by_category["position"]:
        ((_, relation, _),) = prompt.statement.relations
        first, second = prompt.statement.objects
        assert prompt.include == (Requirement(second.shape), Requirement(first.shape, position=(relation, 0)))
    assert all(p.include[0].color is None for p in by_category["single_object"] + by_category["two_object"])
    assert all(p.include[0].color is not None for p in by_category["colors"])


def test_extra_objects_are_no_fault_unless_excluded():
    one = asks(Requirement("circle"))
    assert grade(scene(thing()), one) and grade(scene(thing(), thing(x=50), thing("star")), one)
    assert not grade(scene(thing("star")), one)
    exactly_two = asks(Requirement("circle", 2), exclude=(Requirement("circle", 3),))
    assert [grade(scene(*[thing(x=10 * i) for i in range(n)]), exactly_two) for n in range(5)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert grade(scene(thing(), thing(x=50), thing("star")), exactly_two)


def test_colors_count_on_the_most_striking_object_only():
    red = asks(Requirement("circle", color="red"))
    assert grade(scene(thing(color="red"), thing(color="blue")), red)
    assert not grade(scene(thing(color="blue"), thing(color="red")), red)
    both = asks(Requirement("circle", color="red"), Requirement("star", color="blue"))
    assert grade(scene(thing(), thing("star", "blue", 50)), both)
    assert not grade(scene(thing(color="blue"), thing("star", "red", 50)), both)  # colours exchanged


def test_positions_refer_to_the_objects_of_an_earlier_requirement():
    left = asks(Requirement("star"), Requirement("circle", position=("left of", 0)))
    assert grade(scene(thing(x=10), thing("star", x=50)), left)
    assert not grade(scene(thing(x=50), thing("star", x=10)), left)
    assert not grade(scene(thing(x=10)), left)
    missing = asks(Requirement("star", color="blue"), Requirement("circle", position=("left of", 0)))
    assert not grade(scene(thing(x=10), thing("star", "red", x=50)), missing)


PLACES = ((14, 14), (50, 50), (50, 14), (14, 50))


@pytest.mark.parametrize("category", [category for category in CATEGORIES if category != "position"])
def test_a_picture_of_the_prompt_is_right_and_of_nothing_wrong(category):
    for prompt in [p for p in PROMPTS if p.category == category][:4]:
        objects = [
            SceneObject(item.shape, item.color, item.size, x, y)
            for item, (x, y) in zip(prompt.statement.objects, PLACES)
        ]
        read = read_scene(render(scene(*objects)))
        assert grade(read, prompt) and matches(read, prompt.statement).exact
        assert not grade(read_scene(render(scene())), prompt)
        wrong = [replace(item, shape="star" if item.shape != "star" else "cross") for item in objects]
        assert not grade(read_scene(render(scene(*wrong))), prompt)


def test_a_picture_of_a_position_is_right_one_way_round():
    for prompt in [p for p in PROMPTS if p.category == "position"][:4]:
        ((_, relation, _),) = prompt.statement.relations
        spots = {"left of": ((14, 30), (50, 30)), "above": ((30, 14), (30, 50))}
        spots |= {"right of": spots["left of"][::-1], "below": spots["above"][::-1]}
        pairs = list(zip(prompt.statement.objects, spots[relation], strict=True))
        drawn = [SceneObject(item.shape, item.color, item.size, x, y) for item, (x, y) in pairs]
        assert grade(read_scene(render(scene(*drawn))), prompt)
        turned = [replace(a, x=b.x, y=b.y) for a, b in zip(drawn, drawn[::-1], strict=True)]
        assert not grade(read_scene(render(scene(*turned))), prompt)


def test_splits_without_such_prompts_are_named():
    with pytest.raises(DataError, match="split 'novel' has no compositional prompts; choose one of train, validation"):
        compositional_prompts(1, "novel")
