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
from cm3.data.sources import SourceConfig, open_source
from cm3.errors import ConfigError, DataError
from cm3.pretrained import resolve_model
from cm3.tokenizers.document import DocumentTokenizer, Image, Text
from cm3.tokenizers.image import box_mask
from cm3.tokenizers.instruct import lay_out, tokenize_examples

EVEN = dict.fromkeys(DEFAULT_MIX, 1.0)


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
    assert {example.task for example in examples["train"]} == set(DEFAULT_MIX) - {"writing"} | {"generate"}
    assert set(DEFAULT_MIX) == set(TASKS) - {"infill"} and sum(DEFAULT_MIX.values()) == pytest.approx(1)
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


def test_infilling_asks_for_the_codes_of_a_box_around_the_object_it_names():
    tokenizer = DocumentTokenizer.load(resolve_model("demo"))
    for index in range(20):
        source = SceneTasks("train", 20, seed=4, mix={"infill": 1.0})
        example, laid_out = source[index], source.document(index)
        named = [item for item in example.truth.objects if f"a {item.size} {item.color} {item.shape}" in example.texts]
        left, top, right, bottom = example.box
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
        assert any(left <= item.x < right and top <= item.y < bottom for item in named)
        (tokenized,) = tokenize_examples(tokenizer, [laid_out])
        height, width = tokenized.segments[1].codes_HW.shape
        asked_HW = np.zeros((height, width), dtype=bool)
        for segment, first, stop in tokenized.metadata["answers"]:
            assert segment == 1
            asked_HW.ravel()[first:stop] = True
        np.testing.assert_array_equal(asked_HW, box_mask(example.box, (64, 64), (height, width)))
    with pytest.raises(DataError, match="example 0 asks for a box of a picture; leave infill out of the mix"):
        write_jsonl(SceneTasks("train", 1, mix={"infill": 1.0}), "somewhere")


def test_scene_tasks_are_a_kind_of_source():
    config = SourceConfig(kind="scene_tasks", split="test", limit=6, seed=2, tasks={"vqa": 1.0})
    source = open_source(config)
    documents = list(source)
    assert len(documents) == 6 and documents[5].metadata["row"] == "scene_tasks:test:5"
    assert all(document.metadata["task"] == "vqa" for document in documents)
    assert list(source.texts()) == [document.segments[0].text for document in documents]
    assert len({text.split(":")[1].split()[-1] for text in source.texts()}) > 1  # in several wordings
    with pytest.raises(ConfigError, match="kind=scene_tasks has no end; set limit"):
        SourceConfig(kind="scene_tasks")
    with pytest.raises(ConfigError, match="tasks are for kind=scene_tasks, found kind=scenes; leave them out"):
        SourceConfig(kind="scenes", limit=1, tasks={"vqa": 1.0})
    with pytest.raises(DataError, match="task 'chess' of the scenes does not exist"):
        open_source(SourceConfig(kind="scene_tasks", limit=1, tasks={"chess": 1.0}))
