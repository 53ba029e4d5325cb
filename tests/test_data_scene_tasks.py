"""The source of instruction examples: pure, mixed as asked, disjoint splits, and rows that the format reads."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from cm3.data.instruct import InstructFile
from cm3.data.scene_edits import SceneEdit
from cm3.data.scene_letters import Writing
from cm3.data.scene_phrases import kinds_of
from cm3.data.scene_questions import SceneQuestion
from cm3.data.scene_tasks import DEFAULT_MIX, TASKS, SceneTasks, write_jsonl
from cm3.data.scenes import SceneDataset, split_of
from cm3.errors import DataError
from cm3.tokenizers.document import Image, Text
from cm3.tokenizers.instruct import lay_out

EVEN = dict.fromkeys(TASKS, 1.0)


def collections_of(example):
    """The collections of objects that the pictures of an example show."""
    truth = example.truth
    if isinstance(truth, Writing):
        return []
    scenes = [truth.before, truth.after] if isinstance(truth, SceneEdit) else [getattr(truth, "scene", truth)]
    return [tuple(sorted(kinds_of(scene))) for scene in scenes]


@pytest.fixture(scope="module")
def examples():
    return {split: list(SceneTasks(split, 120, seed=1, mix=EVEN)) for split in ("train", "validation", "test", "novel")}


def test_examples_are_a_pure_function_of_their_index():
    source = SceneTasks("train", 30, seed=5)
    assert len(source) == 30 and [source[i] for i in (17, 3)] == [list(source)[17], SceneTasks("train", 9, seed=5)[3]]
    assert source[3] != SceneTasks("train", 30, seed=6)[3] and source[3] != SceneTasks("test", 30, seed=5)[3]
    plain = {item.scene for item in SceneDataset("train", 5, 30)}
    assert not plain & {example.truth for example in source if example.task == "grounded"}
    with pytest.raises(IndexError, match="example 30 was asked for; the source has 30"):
        source[30]


def test_splits_share_no_collection_of_objects(examples):
    shown = {split: {one for item in items for one in collections_of(item)} for split, items in examples.items()}
    for one, two in combinations(shown, 2):
        assert not shown[one] & shown[two]
    for split, found in shown.items():
        assert all(split_of(list(kinds)) == split for kinds in found)


def test_every_task_occurs_by_its_weight(examples):
    assert {example.task for example in examples["train"]} == set(TASKS) - {"writing"} | {"generate"}
    assert set(DEFAULT_MIX) == set(TASKS) and sum(DEFAULT_MIX.values()) == pytest.approx(1)
    drawn = Counter(example.task for example in SceneTasks("train", 300, seed=2, mix={"vqa": 3, "segment": 1}))
    assert set(drawn) == {"vqa", "segment"} and abs(drawn["vqa"] / 300 - 0.75) < 0.1


def test_the_answer_is_what_the_truth_says(examples):
    for example in examples["validation"]:
        if isinstance(example.truth, SceneQuestion):
            assert example.answer == example.truth.answer and example.texts == (example.truth.question,)
        if isinstance(example.truth, SceneEdit):
            assert example.texts == (example.truth.instruction,) and example.images[0] != example.answer
        assert all(image.size == (64, 64) and image.mode == "RGB" for image in example.images)


@pytest.mark.parametrize("layout", ["text_first", "image_first"])
def test_every_example_fits_its_template(examples, layout):
    for example in examples["train"]:
        document = lay_out(example.turns, task=example.task, layout=layout)
        places = document.metadata["answer_characters"]
        answers = [document.segments[segment] for segment, _, _ in places]
        if isinstance(example.answer, str):
            ((_, first, stop),) = places
            assert answers[0].text[first:stop].strip() == example.answer
        else:
            assert [answer.pixels for answer in answers] == [example.answer]


def test_a_document_by_hand():
    example = next(iter(SceneTasks("test", 1, mix={"edit": 1})))
    instruction, before = example.texts[0], example.images[0]
    assert lay_out(example.turns, task="edit").segments == (
        Text("Edit first image following the instruction"),
        Image(before),
        Text(instruction),
        Image(example.answer),
    )


def test_written_rows_are_read_back(examples, tmp_path):
    written = examples["test"][:40]
    path = write_jsonl(written, tmp_path / "rows")
    file = InstructFile(path)
    assert len(file) == 40 and path.name == "rows.jsonl"
    for index, example in enumerate(written):
        expected = lay_out(example.turns, task=example.task)
        found = file.document(index, seed=0)
        assert found.metadata["task"] == example.task and found.metadata["id"] == f"{index:06d}"
        pictures = [[part.pixels for part in one.segments if isinstance(part, Image)] for one in (expected, found)]
        assert pictures[0] == pictures[1]
        assert all(text in " ".join(file.texts(index)) for text in example.texts)
    row = json.loads(path.read_text("utf-8").splitlines()[0])
    assert list(row) == ["id", "task", "turns"] and [turn["role"] for turn in row["turns"]] == ["user", "assistant"]
    stored = sorted(path.parent.glob("images/*.png"))
    assert stored[0].name == "000001.png" and np.all([len(file.name) == 10 for file in stored])


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="is not empty; give a new folder"):
        write_jsonl(SceneTasks("train", 1), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"split": "dev"}, "split 'dev' of the scenes does not exist; choose one of train"),
        ({"mix": {"paint": 1}}, "task 'paint' of the scenes does not exist; choose among edit"),
        ({"mix": {"edit": 0}}, "must not be negative, and one must be positive"),
        ({"mix": {"edit": 2, "vqa": -1}}, "must not be negative, and one must be positive"),
        ({"mix": {}}, "must not be negative, and one must be positive"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(DataError, match=message):
        SceneTasks(**{"split": "train", "size": 3, **settings})
