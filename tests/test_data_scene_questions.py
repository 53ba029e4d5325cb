"""Questions about scenes: answers that a second reading of the words confirms, and balance."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.data.scene_edits import keeps_margins
from cm3.data.scene_phrases import Reference, kinds_of
from cm3.data.scene_questions import DIRECTIONS, QUESTIONS, sample_question
from cm3.data.scene_world import CLEAR, COLORS, SHAPES, SIZES
from cm3.data.scenes import split_of
from cm3.errors import DataError

NAMED = re.compile(rf"(the|an?) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|object)\b")

questions = st.builds(
    lambda seed, split, kind: (sample_question(np.random.default_rng(seed), split, kind), split),
    st.integers(0, 10**6),
    st.sampled_from(["train", "train", "test", "novel"]),
    st.sampled_from(QUESTIONS),
)


def named(text):
    """(article, reference) of each object that the words name."""
    return [
        (article, Reference(size or None, color or None, None if shape == "object" else shape))
        for article, size, color, shape in NAMED.findall(text)
    ]


def holds(x, relation, y):
    """Whether x lies clearly on that side of y, by its own arithmetic."""
    right, down = x.x - y.x, x.y - y.y
    along = {"left": -right, "right": right, "above": -down, "below": down}[relation]
    return along >= CLEAR and along == max(abs(right), abs(down))


def answered(kind, scene, text):
    """The answer, found from the words and the scene; asserts that what the words presuppose is there."""
    text = text.lower()
    if kind == "count":
        noun = re.match(r"how many (.+?) (?:are|do) ", text)[1]
        stem = noun.removesuffix(" objects").removesuffix("es" if noun == "crosses" else "s")
        fitting = [item for item in scene.objects if noun == "objects" or stem in (item.size, item.color, item.shape)]
        return str(len(fitting))
    references = named(text)
    if kind == "yes or no" and references[0][0] != "the":  # existence
        assert len(references) == 1
        return "yes" if any(references[0][1].fits(item) for item in scene.objects) else "no"
    meant = [reference.meant(scene) for article, reference in references if article == "the"]
    assert None not in meant
    if kind in ("color", "shape", "size"):
        return getattr(meant[0], kind)
    if kind == "relation":
        x, y = reversed(meant) if text.startswith("in which direction from") else meant
        (answer,) = [name for name in DIRECTIONS.values() if holds(x, name, y)]
        return answer
    if len(meant) == 2:
        relation = next(name for name in DIRECTIONS.values() if f" {name} " in text)
        return "yes" if holds(meant[0], relation, meant[1]) else "no"
    value = text.removesuffix("?").split()[-1]
    return "yes" if value in (meant[0].size, meant[0].color, meant[0].shape) else "no"


@given(questions)
def test_answers_are_right_and_scenes_belong_to_the_split(drawn):
    question, split = drawn
    assert answered(question.kind, question.scene, question.question) == question.answer
    assert split_of(kinds_of(question.scene)) == split and keeps_margins(question.scene.objects)
    assert question.question.endswith("?")


@given(questions)
def test_the_question_does_not_say_its_answer(drawn):
    question, _ = drawn
    if question.kind in ("color", "shape"):
        assert question.answer not in question.question.lower().split(" is ")[-1].rstrip("?").split()


def test_every_answer_of_a_kind_is_about_as_likely():
    expected = {
        "color": dict.fromkeys(COLORS, 1 / 8),
        "shape": dict.fromkeys(SHAPES, 1 / 5),
        "size": dict.fromkeys(SIZES, 1 / 2),
        "relation": dict.fromkeys(DIRECTIONS.values(), 1 / 4),
        "yes or no": {"yes": 1 / 2, "no": 1 / 2},
        "count": {"0": 3 / 16, "1": 4 / 16, "2": 4 / 16, "3": 4 / 16, "4": 1 / 16},
    }
    count = 240
    for kind, shares in expected.items():
        answers = Counter(sample_question(np.random.default_rng((1, i)), "train", kind).answer for i in range(count))
        assert set(answers) == set(shares)
        for answer, share in shares.items():
            sigma = np.sqrt(share * (1 - share) / count)
            assert abs(answers[answer] / count - share) < 4 * sigma, (kind, answer)


def test_yes_and_no_are_asked_in_the_same_words():
    drawn = [sample_question(np.random.default_rng((2, i)), "train", "yes or no") for i in range(400)]
    words = {answer: Counter() for answer in ("yes", "no")}
    for item in drawn:
        words[item.answer].update(set(re.findall(r"[a-z]+", item.question.lower())))
    totals = {answer: sum(item.answer == answer for item in drawn) for answer in words}
    for word in set(words["yes"]) | set(words["no"]):
        yes, no = (words[answer][word] / totals[answer] for answer in ("yes", "no"))
        share = (yes + no) / 2
        assert abs(yes - no) < 4 * np.sqrt(share * (1 - share) * (1 / totals["yes"] + 1 / totals["no"])) + 1e-9, word


def test_a_missing_object_is_often_half_there():
    asked = [sample_question(np.random.default_rng((3, i)), "train", "yes or no") for i in range(300)]
    absent = [item for item in asked if item.answer == "no" and named(item.question.lower())[0][0] != "the"]
    near = []
    for item in absent:
        reference = named(item.question.lower())[0][1]
        stated = [value for value in (reference.size, reference.color, reference.shape) if value]
        if len(stated) > 1:
            pairs = product(stated, item.scene.objects)
            near.append(any(value in (one.size, one.color, one.shape) for value, one in pairs))
    assert len(near) > 15 and np.mean(near) > 0.5


def test_questions_are_drawn_by_the_seed_alone_and_of_every_kind():
    drawn = [sample_question(np.random.default_rng(seed)) for seed in range(60)]
    assert drawn[:15] == [sample_question(np.random.default_rng(seed)) for seed in range(15)]
    assert {item.kind for item in drawn} == set(QUESTIONS)
    with pytest.raises(DataError, match="kind 'weight' does not exist; choose one of count"):
        sample_question(np.random.default_rng(0), "train", "weight")
