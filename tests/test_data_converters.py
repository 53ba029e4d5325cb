"""Foreign formats to instruction data: each becomes rows that can be laid out; what cannot is named."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from cm3.data.converter_formats import convert
from cm3.data.converters import ConvertOptions
from cm3.data.instruct import InstructFile
from cm3.errors import ConfigError, DataError
from cm3.eval.instruct_set import InstructionSet
from cm3.tokenizers.document import Image, Text

COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


def png(color) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), color).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """A folder with a picture of each colour."""
    (tmp_path / "pictures").mkdir()
    for color in COLORS:
        (tmp_path / "pictures" / f"{color}.png").write_bytes(png(color))
    return tmp_path / "pictures"


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def said(file, part) -> str:
    """A text, or the colour of a picture."""
    if isinstance(part, Text):
        return part.text
    pixel = PIL.Image.open(file.path.parent / part.path).getpixel((0, 0))
    return next(name for name, color in COLORS.items() if color == pixel)


def shown(path) -> list[list[str]]:
    """The turns of every row as words, pictures by their colour; every row is laid out on the way."""
    file = InstructFile(path)
    rows = []
    for index in range(len(file)):
        file.document(index)
        rows.append([" ".join(said(file, part) for part in turn) for turn in file.row(index).turns])
    return rows


def llava(*conversation, **rest):
    sides = ("human", "gpt")
    return {
        "conversations": [{"from": sides[number % 2], "value": value} for number, value in enumerate(conversation)],
        **rest,
    }


def test_llava_conversations(pictures, tmp_path):
    rows = [
        llava("<image>\nWhat is this?", "A square.", "Which colour?", "Red.", id=7, image="red.png"),
        llava("Compare <image> with <image>.", "They differ.", id="b", image=["red.png", "blue.png"]),
        llava("No mark", "Lime.", image="lime.png"),
        llava("Who are you?", "A model."),
        llava("Draw it", "<image>", image="blue.png"),
    ]
    bad = [
        llava("<image><image>", "x", image="red.png"),
        llava("<image> q", "x", image="missing.png"),
        llava("<image> q", "x", image="../pictures/red.png"),
        llava("<image> q", image="red.png"),
        {"conversations": [{"from": "system", "value": "Be kind."}]},
        {"image": "red.png"},
        "text",
        llava("q", "  "),
    ]
    path = write(tmp_path / "llava.json", rows + bad)
    report = convert("llava", path, tmp_path / "out", ConvertOptions(images=str(pictures)))
    assert shown(report.path) == [
        ["red What is this?", "A square.", "Which colour?", "Red."],
        ["Compare red with blue .", "They differ."],
        ["lime No mark", "Lime."],
        ["Who are you?", "A model."],
        ["Draw it", "blue"],
    ]
    assert [InstructFile(report.path).row(index).id for index in range(3)] == ["7", "b", None]
    assert (report.written, report.skipped) == (5, len(bad))
    for number, (reason, words) in enumerate(
        zip(
            report.reasons,
            [
                "2 <image> marks for 1 pictures",
                "missing.png is missing; give its folder with --images",
                "leaves this file's folder",
                "the turns end with the user's",
                "conversations[0] is from 'system', must be the user's",
                "no key 'conversations'; the object has 'image'",
                "an object with 'conversations' was expected, found str",
                "turns[1].content must be a list with a segment or more",
            ],
            strict=True,
        ),
        start=5,
    ):
        assert reason.startswith(f"row {number}: ") and words in reason, reason
    questions = convert("llava", path, tmp_path / "vqa", ConvertOptions(images=str(pictures), task="vqa", limit=1))
    assert shown(questions.path) == [["red What is this?", "A square.", "Which colour?", "Red."]]
    as_task = ConvertOptions(images=str(pictures), task="caption", limit=1)
    with pytest.raises(DataError, match="no row could be converted: row 0: task 'caption' is one question"):
        convert("llava", path, tmp_path / "task", as_task)
    assert not (tmp_path / "task" / "instruct.jsonl").exists()


COCO = {
    "images": [{"id": 1, "file_name": "red.png"}, {"id": 2, "file_name": "blue.png"}],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "A red square.\n"},
        {"id": 11, "image_id": 1, "caption": "Red."},
        {"id": 12, "image_id": 3, "caption": "No such picture."},
        {"id": 13, "image_id": 2, "caption": "Blue."},
    ],
}


def test_coco_captions(pictures, tmp_path):
    path = write(pictures / "captions.json", COCO)
    report = convert("coco", path, tmp_path / "out", ConvertOptions())
    assert shown(report.path) == [["red", "A red square."], ["red", "Red."], ["blue", "Blue."]]
    assert report.reasons == ["annotations[2]: image_id 3 is not among the images"]
    assert InstructFile(report.path).row(0).task == "caption" and InstructFile(report.path).row(2).id == "13"
    drawn = convert("coco", path, tmp_path / "edges", ConvertOptions(task="edges", limit=2))
    assert shown(drawn.path) == [["A red square.", "red"], ["Red.", "red"]]  # the edges are computed when it is read
    assert len(InstructFile(drawn.path).document(0).segments) == 4
    with pytest.raises(ConfigError, match="task 'vqa' needs question, answer, coco has image, caption; choose another"):
        convert("coco", path, tmp_path / "vqa", ConvertOptions(task="vqa"))


def test_vqav2_pairs(pictures, tmp_path):
    asked = [{"question_id": number, "image_id": number % 2, "question": f"q{number}?"} for number in range(4)]
    answers = [
        {"question_id": 0, "multiple_choice_answer": "yes", "answers": [{"answer": "no"}] * 3},
        {"question_id": 1, "answers": [{"answer": "two"}, {"answer": "one"}, {"answer": "one"}]},
        {"question_id": 2, "answers": []},
    ]
    (pictures / "COCO_val2014_000000000000.jpg").write_bytes(png("red"))
    (pictures / "COCO_val2014_000000000001.jpg").write_bytes(png("lime"))
    path = write(tmp_path / "questions.json", {"questions": asked, "data_subtype": "val2014"})
    options = {"annotations": str(write(tmp_path / "answers.json", {"annotations": answers})), "images": str(pictures)}
    report = convert("vqav2", path, tmp_path / "out", ConvertOptions(**options))
    assert shown(report.path) == [["red q0?", "yes"], ["lime q1?", "one"]]
    assert report.reasons == [
        "questions[2]: the annotation has no answers",
        "questions[3]: question_id 3 has no annotation",
    ]
    named = convert("vqav2", path, tmp_path / "named", ConvertOptions(**options, image_name="blue.png", limit=1))
    assert shown(named.path) == [["blue q0?", "yes"]]
    with pytest.raises(DataError, match="--image-name '{id}' does not fit image_id 0"):
        convert("vqav2", path, tmp_path / "wrong", ConvertOptions(**options, image_name="{id}"))
    with pytest.raises(ConfigError, match="has its answers in a second file; name it with --annotations"):
        convert("vqav2", path, tmp_path / "none", ConvertOptions())
    bare = write(tmp_path / "bare.json", {"questions": asked})
    with pytest.raises(ConfigError, match="no 'data_subtype'.*--image-name"):
        convert("vqav2", bare, tmp_path / "bare", ConvertOptions(**options))


def test_controlnet_folders(pictures, tmp_path):
    lines = [
        {"source": "red.png", "target": "blue.png", "prompt": "a square"},
        {"source": "none.png", "target": "blue.png", "prompt": "a square"},
    ]
    (pictures / "prompt.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    report = convert("controlnet", pictures, tmp_path / "out", ConvertOptions(task="depth"))
    assert shown(report.path) == [["red a square", "blue"]]
    assert "row 1 of prompt.json: the picture" in report.reasons[0]
    assert InstructFile(report.path).row(0).task == "depth"
    plain = convert("controlnet", pictures, tmp_path / "plain", ConvertOptions(task="generate"))
    assert shown(plain.path) == [["a square", "blue"]] * 2
    with pytest.raises(DataError, match="is not a folder; give the one that holds prompt.json"):
        convert("controlnet", pictures / "prompt.json", tmp_path / "file", ConvertOptions())


def parquet(path, **columns):
    import pandas as pd

    pd.DataFrame(columns).to_parquet(path)
    return path


def packed(*colors):
    return [{"bytes": png(color), "path": f"{color}.png"} for color in colors]


def test_instructpix2pix_parquet(tmp_path):
    table = {
        "original_image": packed("red", "red"),
        "edit_prompt": ["make it blue", "make it green"],
        "edited_image": packed("blue", "lime"),
    }
    report = convert("instructpix2pix", parquet(tmp_path / "a.parquet", **table), tmp_path / "out", ConvertOptions())
    assert shown(report.path) == [["red make it blue", "blue"], ["red make it green", "lime"]]
    files = [file for file in (tmp_path / "out" / "images").rglob("*") if file.is_file()]
    assert sorted(file.read_bytes() for file in files) == sorted(map(png, COLORS))  # equal pictures are one file
    renamed = {"input": table["original_image"], "text": table["edit_prompt"], "edited_image": table["edited_image"]}
    path = parquet(tmp_path / "b.parquet", **renamed)
    with pytest.raises(DataError, match="no column 'original_image'; choose among input, text, edited_image"):
        convert("instructpix2pix", path, tmp_path / "b", ConvertOptions())
    options = ConvertOptions(columns={"image": "input", "instruction": "text"}, limit=1)
    assert shown(convert("instructpix2pix", path, tmp_path / "b", options).path) == [["red make it blue", "blue"]]


def test_any_parquet_by_its_columns(tmp_path):
    table = {
        "image": [*packed("red", "blue", "lime"), None, {"bytes": b"no picture", "path": None}],
        "questions": [["q1?", "q2?"], ["q3?"], ["q4?", "q5?"], ["q6?"], ["q7?"]],
        "answer": [["a1", "a2"], ["a3"], ["a4"], ["a6"], ["a7"]],
        "number": [1, 2, 3, 4, 5],
    }
    path = parquet(tmp_path / "train.parquet", **table)
    report = convert("parquet", path, tmp_path / "out", ConvertOptions(task="vqa", columns={"question": "questions"}))
    assert shown(report.path) == [["red q1?", "a1"], ["red q2?", "a2"], ["blue q3?", "a3"]]
    assert [InstructFile(report.path).row(index).id for index in range(3)] == ["0.0", "0.1", "1.0"]
    assert report.reasons[0] == "row 2: lists of one row have different lengths (questions 2, answer 1)"
    assert report.reasons[1] == "row 3: column 'image' holds NoneType, not a picture or its path"
    assert report.reasons[2].startswith("row 4: a picture of 10 bytes cannot be read")
    captions = ConvertOptions(task="edges", columns={"caption": "number"})
    with pytest.raises(DataError, match="column 'number' holds int, not a text or a list of them"):
        convert("parquet", path, tmp_path / "int", captions)
    with pytest.raises(ConfigError, match="does not say what its rows are; name a task: --task generate|edit"):
        convert("parquet", path, tmp_path / "none", ConvertOptions())
    with pytest.raises(ConfigError, match="task 'vqa' has no field 'questions'; choose among image, question, answer"):
        convert("parquet", path, tmp_path / "none", ConvertOptions(task="vqa", columns={"questions": "question"}))
    with pytest.raises(ConfigError, match="there is no task 'vqq'"):
        convert("parquet", path, tmp_path / "none", ConvertOptions(task="vqq"))


def test_questions_of_a_picture_together(tmp_path):
    table = {"image": packed("red", "blue"), "question": [["q1?", "q2?"], ["q3?"]], "answer": [["a1", "a2"], ["a3"]]}
    path = parquet(tmp_path / "train.parquet", **table)
    report = convert("parquet", path, tmp_path / "out", ConvertOptions(task="vqa", together=True))
    assert shown(report.path) == [["red q1?", "a1", "q2?", "a2"], ["blue q3?", "a3"]]
    rows = InstructFile(report.path)
    assert [rows.row(index).id for index in range(2)] == ["0", "1"]
    asked = InstructionSet(path=str(report.path)).texts()
    assert [(request.texts, request.answer) for request in asked] == [
        (("q1?",), "a1"),
        (("q2?",), "a2"),
        (("q3?",), "a3"),
    ]
    assert [request.images[0].getpixel((0, 0)) for request in asked] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]


def test_parquet_with_paths_conditions_and_lists_of_objects(pictures, tmp_path):
    table = {
        "image": ["red.png", "lime.png"],
        "pose_image": packed("blue", "blue"),
        "caption": ["one", "two"],
        "objects": [["cat at (1, 2) -> (3, 4)", "dog at (5, 6) -> (7, 8)"], ["hat at (0, 0) -> (9, 9)"]],
    }
    path = parquet(pictures / "train.parquet", **table)
    posed = ConvertOptions(task="pose", columns={"condition_image": "pose_image"})
    assert shown(convert("parquet", path, tmp_path / "pose", posed).path) == [["blue one", "red"], ["blue two", "lime"]]
    grounded = convert("parquet", path, tmp_path / "grounded", ConvertOptions(task="grounded"))
    assert [len(InstructFile(grounded.path).row(index).turns[0]) for index in range(2)] == [3, 2]
    edges = convert("parquet", path, tmp_path / "edges", ConvertOptions(task="edges"))
    assert shown(edges.path) == [["one", "red"], ["two", "lime"]]


def test_pictures_are_linked_or_copied_and_a_link_is_never_replaced(pictures, tmp_path):
    path = write(pictures / "captions.json", COCO)
    linked = convert("coco", path, tmp_path / "linked", ConvertOptions())
    assert (tmp_path / "linked" / "source").resolve() == pictures.resolve()
    convert("coco", path, tmp_path / "linked", ConvertOptions())  # again
    copied = convert("coco", path, tmp_path / "copied", ConvertOptions(copy=True))
    for file in pictures.glob("*.png"):
        file.write_bytes(png("lime"))
    assert [row[0] for row in shown(linked.path)] == ["lime"] * 3
    assert [row[0] for row in shown(copied.path)] == ["red", "red", "blue"]
    assert not (tmp_path / "copied" / "source").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "red.png").write_bytes(png("red"))
    with pytest.raises(ConfigError, match="is there already and is no link to .*other; remove it or choose another"):
        convert("coco", path, tmp_path / "linked", ConvertOptions(images=str(tmp_path / "other")))


def test_inputs_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*none\.json: No such file"):
        convert("coco", tmp_path / "none.json", tmp_path / "out", ConvertOptions())
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json is not valid JSON"):
        convert("coco", tmp_path / "broken.json", tmp_path / "out", ConvertOptions())
    with pytest.raises(DataError, match="is neither a JSON list nor one JSON object a line"):
        convert("llava", tmp_path / "broken.json", tmp_path / "out", ConvertOptions())
    with pytest.raises(DataError, match="no row could be converted: there are no rows"):
        convert("llava", write(tmp_path / "empty.json", []), tmp_path / "out", ConvertOptions())
    with pytest.raises(DataError, match="no key 'images'"):
        convert("coco", write(tmp_path / "other.json", {"annotations": []}), tmp_path / "out", ConvertOptions())


def test_edges_of_a_converted_row_are_those_of_its_answer(tmp_path):
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, 8:] = 255
    PIL.Image.fromarray(half).save(tmp_path / "half.png")
    value = {"images": [{"id": 1, "file_name": "half.png"}], "annotations": [{"image_id": 1, "caption": "half"}]}
    report = convert("coco", write(tmp_path / "c.json", value), tmp_path / "out", ConvertOptions(task="edges"))
    _, condition, _, answer = InstructFile(report.path).document(0).segments
    assert isinstance(condition, Image) and isinstance(answer, Image)
    columns = np.flatnonzero(np.asarray(condition.pixels).any(axis=(0, 2)))
    assert 0 < len(columns) < 6 and columns.min() >= 6 and columns.max() <= 10
