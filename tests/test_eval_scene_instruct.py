"""Graders of the instruction tasks: the truth gets full marks, copies and perturbed answers do not."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cm3.data.conditions import edge_map
from cm3.data.scene_edits import EDITS, Place, SceneEdit, sample_edit
from cm3.data.scene_grounding import long_caption, segmentation_map
from cm3.data.scene_letters import Writing, draw_writing, sample_writing
from cm3.data.scene_questions import QUESTIONS, SceneQuestion, sample_question
from cm3.data.scene_tasks import DEFAULT_MIX, InstructionExample, SceneTasks
from cm3.data.scene_world import Scene, SceneObject, render
from cm3.errors import DataError
from cm3.eval.scene_instruct import (
    AnswerVerdict,
    EditVerdict,
    ObjectsVerdict,
    WritingVerdict,
    grade,
    grade_edit,
    grade_long_caption,
    grade_map,
    grade_objects,
    grade_writing,
    instruction_metrics,
    normalized,
    question_prior,
)
from cm3.eval.scene_readers import UNLABELLED, read_map, read_word

RED = SceneObject("circle", "red", "large", 14, 30)
BLUE = SceneObject("square", "blue", "small", 46, 30)
STAR = SceneObject("star", "green", "small", 46, 54)
PAIR = Scene("gray", (RED, BLUE))
RECOLOR = SceneEdit("recolor", PAIR, target=RED, result=replace(RED, color="yellow"))
RESIZE = SceneEdit("resize", PAIR, target=BLUE, result=replace(BLUE, size="large"))
REMOVE = SceneEdit("remove", PAIR, target=BLUE)
ADD = SceneEdit("add", PAIR, result=replace(STAR, x=50, y=50), place=Place(region="bottom right"))
MOVE = SceneEdit("move", PAIR, target=BLUE, result=replace(BLUE, x=14, y=50), place=Place(region="bottom left"))
BESIDE = SceneEdit(
    "move", PAIR, target=BLUE, result=replace(BLUE, x=14, y=54), place=Place(relation="below", landmark=RED)
)
GROUND = SceneEdit("background", PAIR, background="navy")
BY_HAND = {"recolor": RECOLOR, "resize": RESIZE, "remove": REMOVE, "add": ADD, "move": MOVE, "beside": BESIDE}
BY_HAND["background"] = GROUND


def picture(background, *objects):
    return render(Scene(background, objects))


@pytest.fixture(scope="module")
def examples():
    return list(SceneTasks("test", 96, seed=3, mix=dict.fromkeys(DEFAULT_MIX, 1.0)))


@pytest.fixture(scope="module")
def verdicts(examples):
    return [grade(example, example.answer) for example in examples]


def test_the_truth_gets_full_marks(verdicts):
    assert all(verdict.exact for verdict in verdicts)
    edits = [verdict for verdict in verdicts if isinstance(verdict, EditVerdict)]
    assert edits and all(verdict == EditVerdict(True, True, 0.0) for verdict in edits)


def test_a_copy_of_the_given_picture_gets_nothing_but_what_it_kept(examples):
    for example in examples:
        if not example.images or isinstance(example.answer, str):
            continue
        verdict = grade(example, example.images[0])
        assert not verdict.exact
        if example.task == "edit":
            assert verdict == EditVerdict(edit_right=False, others_kept=True, outside_error=0.0)


def test_copying_never_follows_an_edit_of_any_kind():
    for index in range(70):
        edit = sample_edit(np.random.default_rng((4, index)), "train", EDITS[index % len(EDITS)])
        assert grade_edit(edit, render(edit.before)) == EditVerdict(False, True, 0.0)


@pytest.mark.parametrize("name", BY_HAND)
def test_edits_by_hand(name):
    edit = BY_HAND[name]
    assert grade_edit(edit, render(edit.after)) == EditVerdict(True, True, 0.0)
    assert not grade_edit(edit, render(edit.before)).edit_right
    blank = grade_edit(edit, picture(edit.after.background))
    assert not blank.others_kept and not blank.exact and blank.edit_right == (name in ("remove", "background"))
    extra = Scene(edit.after.background, (*edit.after.objects, replace(STAR, color="pink", x=54, y=10)))
    verdict = grade_edit(edit, render(extra))
    assert verdict.edit_right and not verdict.others_kept
    assert (verdict.outside_error > 0) == (name != "background")  # there, the ground is what may change
    other_ground = Scene("white", edit.after.objects)
    verdict = grade_edit(edit, render(other_ground))
    assert (verdict.edit_right, verdict.others_kept) == ((False, True) if name == "background" else (True, False))


@pytest.mark.parametrize(
    "edit, drawn, edit_right, others_kept",
    [
        (RECOLOR, (replace(RED, color="pink"), BLUE), False, True),  # another colour
        (RECOLOR, (replace(RED, color="yellow", x=18), BLUE), False, True),  # moved besides
        (RECOLOR, (replace(RED, color="yellow", x=16), BLUE), True, True),  # within the slack
        (RECOLOR, (replace(RED, color="yellow"), replace(BLUE, color="yellow")), True, False),  # both painted
        (RECOLOR, (RED, replace(BLUE, color="yellow")), False, False),  # the wrong one painted
        (RECOLOR, (replace(RED, color="yellow"),), True, False),  # the other one lost
        (RECOLOR, (replace(RED, color="yellow"), replace(BLUE, y=35)), True, False),  # the other one moved
        (RESIZE, (RED, replace(BLUE, size="large", color="cyan")), False, True),
        (REMOVE, (BLUE,), False, False),  # the wrong one removed
        (REMOVE, (RED, replace(BLUE, color="pink")), False, True),  # replaced instead
        (ADD, (RED, BLUE, replace(STAR, x=14, y=54)), False, True),  # at a wrong place
        (ADD, (RED, BLUE, replace(STAR, x=46, y=48)), True, True),  # elsewhere in the region
        (ADD, (RED, BLUE, replace(STAR, x=50, y=50, color="pink")), False, True),  # in a wrong colour
        (MOVE, (RED, BLUE, replace(BLUE, x=14, y=50)), False, True),  # copied, not moved
        (MOVE, (RED, replace(BLUE, x=46, y=50)), False, True),  # moved elsewhere
        (BESIDE, (RED, replace(BLUE, x=22, y=54)), True, True),  # a bit aside, still below
        (BESIDE, (RED, replace(BLUE, x=46, y=54)), False, True),  # beside, not below
    ],
)
def test_wrong_edits_fail_where_they_are_wrong(edit, drawn, edit_right, others_kept):
    verdict = grade_edit(edit, picture("gray", *drawn))
    assert (verdict.edit_right, verdict.others_kept) == (edit_right, others_kept)
    assert verdict.exact == (edit_right and others_kept)


def test_pixels_outside_count_and_inside_do_not():
    after = np.asarray(render(RECOLOR.after)).copy()
    after[50:54, 0:64] += 10
    touched = 28 * 28  # the box of 24 x 24 with its margin: columns 0 to 27, rows 16 to 43
    expected = 4 * 64 * 10 / (64 * 64 - touched)
    assert grade_edit(RECOLOR, Image.fromarray(after)).outside_error == pytest.approx(expected)
    inside = np.asarray(render(RECOLOR.after)).copy()
    inside[28:32, 10:14] += 3
    assert grade_edit(RECOLOR, Image.fromarray(inside)).outside_error == 0


def test_verdicts_bear_the_blur_and_noise_of_a_decoder():
    rng = np.random.default_rng(0)
    verdicts = []
    for example in SceneTasks("validation", 48, seed=9, mix={"edit": 1, "segment": 1, "segmentation": 1, "writing": 1}):
        soft = np.asarray(example.answer.filter(ImageFilter.GaussianBlur(0.5)), dtype=float)
        noisy = (soft + rng.normal(0, 8, soft.shape)).clip(0, 255).astype(np.uint8)
        verdicts.append(grade(example, Image.fromarray(noisy)).exact)
    assert np.mean(verdicts) >= 0.95


@pytest.mark.parametrize(
    "given, same",
    [
        ("2", "Two."),
        ("red", " the Red "),
        ("circle", "a circle!"),
        ("yes", "YES"),
    ],
)
def test_answers_are_compared_after_normalisation(given, same):
    assert normalized(given) == normalized(same)
    example = InstructionExample("vqa", ("?",), (), given, SceneQuestion("count", PAIR, "?", given))
    assert grade(example, same) == AnswerVerdict(True)
    for wrong in ("", "3", "not", f"{given} {given}"):
        assert grade(example, wrong) == AnswerVerdict(False)


@pytest.mark.parametrize(
    "background, drawn, right, spurious, ground",
    [
        ("gray", (RED, BLUE), 2, 0, True),
        ("gray", (replace(RED, x=16), BLUE), 2, 0, True),
        ("gray", (replace(RED, x=17), BLUE), 1, 1, True),
        ("gray", (replace(RED, color="orange"), BLUE), 1, 1, True),
        ("gray", (RED, replace(BLUE, size="large")), 1, 1, True),
        ("gray", (replace(RED, x=46), replace(BLUE, x=14)), 0, 2, True),
        ("white", (RED, BLUE, STAR), 2, 1, False),
        ("gray", (), 0, 0, True),
    ],
)
def test_objects_must_fill_their_boxes(background, drawn, right, spurious, ground):
    verdict = grade_objects(PAIR, picture(background, *drawn))
    assert verdict == ObjectsVerdict(2, right, spurious, ground)
    assert verdict.exact == (right == 2 and not spurious and ground)


@pytest.mark.parametrize(
    "drawn, right, spurious",
    [
        ((RED, BLUE), 2, 0),
        ((replace(RED, color="pink"), BLUE), 2, 0),  # a map knows no colours
        ((replace(RED, x=15), BLUE), 2, 0),
        ((replace(RED, x=18), BLUE), 1, 0),
        ((replace(RED, x=20), BLUE), 1, 1),
        ((replace(RED, shape="star"), BLUE), 1, 0),
        ((RED, replace(BLUE, size="large")), 1, 1),
        ((RED, BLUE, STAR), 2, 1),
        ((), 0, 0),
    ],
)
def test_maps_are_graded_by_objects(drawn, right, spurious):
    assert grade_map(PAIR, segmentation_map(Scene("navy", drawn))) == ObjectsVerdict(2, right, spurious, True)


def test_a_map_needs_its_palette():
    assert grade_map(PAIR, render(PAIR)) == ObjectsVerdict(2, 0, 0, False)
    labels = read_map(segmentation_map(PAIR))
    assert labels[30, 14] == 1 and labels[30, 46] == 2 and labels[60, 60] == 0
    assert (read_map(Image.new("RGB", (64, 64), "white")) == UNLABELLED).all()


@pytest.mark.parametrize(
    "text, right, spurious, ground",
    [
        (long_caption(PAIR), 2, 0, True),
        (
            "There are two objects on a gray background. A small blue square is in the center right. "
            "A large red circle is in the center left.",
            2,
            0,
            True,
        ),
        (long_caption(replace(PAIR, background="white")), 2, 0, False),
        (long_caption(Scene("gray", (RED, replace(BLUE, x=34)))), 1, 1, True),
        (long_caption(Scene("gray", (RED, replace(BLUE, color="cyan")))), 1, 1, True),
        (long_caption(Scene("gray", (RED,))), 1, 0, True),
        (long_caption(Scene("gray", (RED, BLUE, STAR))), 2, 1, True),
        ("a red circle and a blue square", 0, 0, False),
    ],
)
def test_long_captions_are_graded_by_objects(text, right, spurious, ground):
    assert grade_long_caption(PAIR, text) == ObjectsVerdict(2, right, spurious, ground)


@pytest.mark.parametrize(
    "drawn, right, color, ground",
    [
        (Writing("HAT", "red", "gray"), 3, True, True),
        (Writing("HAL", "red", "gray"), 2, True, True),
        (Writing("TAH", "red", "gray"), 1, True, True),
        (Writing("HA", "red", "gray"), 0, True, True),
        (Writing("HAT", "blue", "gray"), 3, False, True),
        (Writing("HAT", "red", "navy"), 3, True, False),
    ],
)
def test_words_are_graded_by_letters(drawn, right, color, ground):
    wanted = Writing("HAT", "red", "gray")
    assert grade_writing(wanted, draw_writing(drawn)) == WritingVerdict(3, right, color, ground)


def test_words_are_read_shifted_blurred_and_noisy_and_other_pictures_are_no_words():
    rng = np.random.default_rng(0)
    for index in range(25):
        writing = sample_writing(rng, "train")
        pixels = np.asarray(draw_writing(writing).filter(ImageFilter.GaussianBlur(0.8)), dtype=float)
        pixels = np.roll(pixels, tuple(rng.integers(-2, 3, size=2)), axis=(0, 1)) + rng.normal(0, 12, pixels.shape)
        assert read_word(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))) == writing, index
    assert read_word(Image.new("RGB", (64, 64), "gray")) is None
    assert read_word(render(PAIR)) is None and read_word(edge_map(render(PAIR))) is None
    assert grade_writing(Writing("A", "red", "gray"), render(PAIR)) == WritingVerdict(1, 0, False, False)


def test_answers_of_the_wrong_sort_are_named(examples):
    edit = next(example for example in examples if example.task == "edit")
    question = next(example for example in examples if example.task == "vqa")
    with pytest.raises(DataError, match="task 'edit' is answered with a picture, this answer is text"):
        grade(edit, "done")
    with pytest.raises(DataError, match="task 'vqa' is answered with text, this answer is a picture"):
        grade(question, edit.answer)
    for grader, truth in ((grade_edit, RECOLOR), (grade_map, PAIR), (grade_writing, Writing("A", "red", "gray"))):
        with pytest.raises(DataError, match="64x64"):
            grader(truth, Image.new("RGB", (32, 32)))


def asked(question, answer, kind="count"):
    truth = SceneQuestion(kind, PAIR, question, answer)
    return InstructionExample("vqa", (question,), (), answer, truth)


def test_the_prior_by_hand():
    constant = [asked("is it?", "yes", "yes or no") for _ in range(10)]
    assert question_prior(constant)["all"].value == 1
    told = [asked(f"which of {i % 2}?", str(i % 2)) for i in np.random.default_rng(0).integers(2, size=40)]
    assert question_prior(told)["count"].value == 1  # the words give it away
    pairs = [asked("how many?", answer) for _ in range(20) for answer in ("1", "1", "2", "2")]
    assert question_prior(pairs)["count"].value == pytest.approx(0.5)
    new = [asked(f"how many {i}?", "1") for i in range(10)]
    assert question_prior(new)["all"].value == 1  # unknown words: the most frequent answer of the kind
    assert question_prior([]) == {}


def test_questions_give_little_away():
    examples = []
    for index in range(900):
        truth = sample_question(np.random.default_rng((7, index)), "train", QUESTIONS[index % len(QUESTIONS)])
        examples.append(InstructionExample("vqa", (truth.question,), (), truth.answer, truth))
    prior = question_prior(examples)
    chance = {"count": 1 / 4, "color": 1 / 8, "shape": 1 / 5, "size": 1 / 2, "relation": 1 / 4, "yes or no": 1 / 2}
    assert set(prior) == {*chance, "all"}
    for kind, share in chance.items():
        assert prior[kind].value < share + 0.13, kind
    assert prior["all"].value < 0.37


def test_metrics_name_tasks_and_kinds(examples, verdicts):
    metrics = instruction_metrics(examples, verdicts)
    for task in ("edit", "vqa", "grounded", "segment", "segmentation", "edges", "writing", "long_caption"):
        count = sum(example.task == {"writing": "generate"}.get(task, task) for example in examples)
        assert metrics[f"{task}: exact"].value == 1 and metrics[f"{task}: exact"].count == count
    assert metrics["edit: change outside (levels)"].value == 0
    assert metrics["segment: objects right"].value == metrics["writing: letters right"].value == 1
    kinds = {example.truth.kind for example in examples if example.task == "edit"}
    assert {name for name in metrics if name.startswith("edit ") and name.endswith(": exact")} == {
        f"edit {kind}: exact" for kind in kinds
    }
    half = instruction_metrics([examples[0]] * 2, [EditVerdict(True, True, 0.0), EditVerdict(True, False, 3.0)])
    assert [value.value for name, value in half.items() if name.endswith(": exact")][0] == 0.5
