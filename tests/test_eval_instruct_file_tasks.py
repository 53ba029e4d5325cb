"""Evaluation on rows of instruction data: figures by hand, groups, baselines, and rows that cannot be used."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cm3.data.conditions import edge_map
from cm3.errors import ConfigError, DataError
from cm3.eval.instruct_file_tasks import InstructionAnswers, InstructionEdits
from cm3.eval.instruct_set import InstructionSet
from cm3.eval.question_guesses import guesses
from cm3.pipeline import CM3

LEVELS = {"dark": 40, "middle": 100, "light": 200}


@pytest.fixture(scope="module")
def model(model_folder):
    return CM3.from_pretrained(model_folder)


def part(said):
    return {"image": f"{said}.png"} if said in LEVELS or said == "half" else {"text": said}


def row(task, given, answered, id=None):
    sides = (("user", given), ("assistant", answered))
    turns = [{"role": role, "content": [part(said) for said in parts]} for role, parts in sides]
    return {"turns": turns, **({"task": task} if task else {}), **({"id": id} if id else {})}


def write(folder, rows):
    """Rows with their pictures, plain ones of 16x16 and one that is half dark, half light."""
    for name, level in LEVELS.items():
        Image.new("RGB", (16, 16), (level,) * 3).save(folder / f"{name}.png")
    half = np.full((16, 16, 3), LEVELS["dark"], np.uint8)
    half[:, 8:] = LEVELS["light"]
    Image.fromarray(half).save(folder / "half.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(folder / "rows.jsonl")


QUESTIONS = [
    row("vqa", ["dark", "How many stars?"], ["two"], "0.0"),
    row("vqa", ["light", "How many stars?"], ["Two."], "0.1"),
    row("vqa", ["dark", "how many  stars?"], ["3"], "1.0"),
    row("vqa", ["dark", "Which letter?"], ["a"], "2.0"),
    row(None, ["Hello."], ["Hello!"], "3.0"),
    row("edit", ["dark", "make it light"], ["light"], "4.0"),
]
EDITS = [
    row("edit", ["dark", "make it light"], ["light"], "light/0"),
    row("edit", ["dark", "make it light"], ["light"], "light/1"),
    row("edit", ["light", "make it a bit darker"], ["middle"], "dark/0"),
    row("generate", ["a light picture"], ["light"], "dark/1"),
]


def reply(monkeypatch, *answers):
    """A model that gives these answers in turn, whatever it is asked."""
    asked, left = [], list(answers)

    def instruct(self, task, contents, **options):
        asked.append((task, contents, options))
        return [left.pop(0) for _ in contents]

    monkeypatch.setattr(CM3, "instruct", instruct)
    return asked


def plain(level):
    return Image.new("RGB", (16, 16), (level,) * 3)


def test_answers_are_compared_after_the_official_normalisation(model, tmp_path, monkeypatch):
    asked = reply(monkeypatch, "2", "three", "The 3", "A")
    rows = InstructionSet(path=write(tmp_path, QUESTIONS))
    result = InstructionAnswers(rows=rows, max_new_tokens=7, sampling={"vqa": {"temperature": 0.5}}).run(model)
    assert result.metrics["exact answer, all"].value == 0.75 and result.metrics["exact answer, all"].count == 4
    # Rows 0 and 2 teach "3", the later one of two equally frequent answers, for rows 1 and 3; row 1 teaches "2" for
    # rows 0, where it is right, and 2.
    assert result.metrics["exact answer from the question alone, all"].value == 0.25
    assert result.metrics["gain over the question alone, all"].value == 0.5
    [(task, contents, options)] = asked
    assert task == "vqa" and contents[0][0] == "How many stars?" and contents[0][1].getpixel((0, 0)) == (40, 40, 40)
    assert (options["max_new_tokens"], options["temperature"], options["guidance_scale"]) == (7, 0.5, 1.0)
    assert result.protocol["references"]["number"] == result.protocol["num_prompts"] == 4


def test_groups_come_from_the_table_that_the_rows_were_made_of(model, tmp_path, monkeypatch):
    reply(monkeypatch, "2", "2", "2", "b")
    pq.write_table(pa.table({"kind": ["tower", "scatter", "tower"]}), tmp_path / "test.parquet")
    path = write(tmp_path, QUESTIONS[:4])
    rows = InstructionSet(path=path, group_by="kind", table=str(tmp_path))
    metrics = InstructionAnswers(rows=rows).run(model).metrics
    shares = {name: (value.value, value.count) for name, value in metrics.items() if name.startswith("exact answer, ")}
    assert shares == {
        "exact answer, all": (0.5, 4),
        "exact answer, kind=scatter": (0, 1),
        "exact answer, kind=tower": (pytest.approx(2 / 3), 3),
    }
    reply(monkeypatch, "2")
    one = InstructionSet(path=path, group_by="task", limit=1)
    assert InstructionAnswers(rows=one).run(model).metrics["exact answer, task=vqa"].count == 1
    reply(monkeypatch, *"2222")
    pq.write_table(pa.table({"kind": ["tower", "scatter"]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"rows.jsonl:4: the id '2.0' names no row of .*, which has 2; check table"):
        InstructionAnswers(rows=rows).run(model)


def test_the_guess_can_learn_from_other_rows(model, tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    known = [row("vqa", ["dark", "How many stars?"], [answer]) for answer in ("3", "3", "2")]
    reply(monkeypatch, *"2222")
    task = InstructionAnswers(
        rows=InstructionSet(path=write(tmp_path, QUESTIONS)), prior=write(tmp_path / "train", known)
    )
    assert task.run(model).metrics["exact answer from the question alone, all"].value == 0.25


def test_guesses_by_hand():
    known = [
        ("count", "how many?", "1"),
        ("count", "how many?", "2"),
        ("count", "how many?", "2"),
        ("color", "?", "red"),
    ]
    asked = [("count", "how many?", "9"), ("count", "new", "9"), ("color", "new", "9"), ("shape", "new", "9")]
    assert guesses(asked, known) == ["2", "2", "red", ""]
    halves = [("a", "q", "x"), ("a", "q", "y"), ("a", "q", "x"), ("a", "q", "y")]
    assert guesses(halves) == ["y", "x", "y", "x"]  # the other half knows other answers only
    assert guesses([]) == []


def test_edits_are_compared_with_a_copy_and_with_the_round_trip(model, tmp_path, monkeypatch):
    asked = reply(monkeypatch, plain(190), plain(40), plain(90))
    rows = InstructionSet(path=write(tmp_path, EDITS), group_by="id")
    result = InstructionEdits(rows=rows, sampling={"edit": {"image_guidance_scale": 1.5}}).run(model)
    values = {name: value.value for name, value in result.metrics.items()}
    assert asked[0][2] == {"seed": 0, "image_guidance_scale": 1.5}
    assert result.metrics["closer than the copy, all"].count == 3
    assert values["closer than the copy, id=light"] == 0.5  # a copy is no closer than the copy
    assert values["closer than the copy, id=dark"] == 1
    assert values["pixel distance (levels), id=light"] == (10 + 160) / 2
    assert values["pixel distance (levels) copying the picture, id=light"] == 160
    assert values["pixel distance (levels) copying the picture, id=dark"] == 100
    decoded = model.reconstruct([plain(100)])[0]
    distance = np.abs(np.asarray(decoded, float) - 100).mean()
    assert values["pixel distance (levels) round trip of the answer, id=dark"] == pytest.approx(distance)
    assert values["PSNR (dB), id=dark"] == pytest.approx(20 * np.log10(255 / 10))


def test_a_perfect_edit_has_a_finite_figure(model, tmp_path, monkeypatch):
    reply(monkeypatch, plain(200), plain(200), plain(100))
    values = InstructionEdits(rows=InstructionSet(path=write(tmp_path, EDITS))).run(model).metrics
    assert values["PSNR (dB), all"].value == 100 and values["SSIM, all"].value == pytest.approx(1)
    assert values["closer than the copy, all"].value == values["closer than the round trip of the copy, all"].value == 1


def test_a_condition_that_rows_leave_out_is_computed(model, tmp_path, monkeypatch):
    asked = reply(monkeypatch, plain(0))
    rows = InstructionSet(path=write(tmp_path, [row("edges", ["two halves"], ["half"])]))
    InstructionEdits(rows=rows).run(model)
    [(task, [[text, image]], _)] = asked
    wanted = edge_map(Image.open(tmp_path / "half.png").convert("RGB"))
    assert (task, text) == ("edges", "two halves") and image.tobytes() == wanted.tobytes() and image.getbbox()


def test_random_weights_get_through_both_and_repeat_themselves(model, tmp_path):
    rows = InstructionSet(path=write(tmp_path, [*QUESTIONS, *EDITS]))
    for task in (InstructionAnswers(rows=rows, max_new_tokens=3, batch_size=3), InstructionEdits(rows=rows)):
        result = task.run(model)
        assert result.metrics == task.run(model).metrics and json.dumps(result.protocol)


def test_files_that_cannot_be_used_are_named(model, tmp_path):
    path = write(tmp_path, QUESTIONS[4:])
    with pytest.raises(ConfigError, match="group_by='kind' is a column of a table; name it with `table`"):
        InstructionSet(path=path, group_by="kind")
    with pytest.raises(ConfigError, match="limit=0 leaves no rows"):
        InstructionSet(path=path, limit=0)
    with pytest.raises(DataError, match="has no row of a task that is answered with text"):
        InstructionSet(path=path).texts()
    with pytest.raises(DataError, match="no row of a task that is answered with a picture of a picture"):
        InstructionSet(path=write(tmp_path, EDITS[3:])).edits()
    with pytest.raises(DataError, match="rows.jsonl:1: group_by is id, and the id '0.0' has no / after a group"):
        InstructionSet(path=write(tmp_path, QUESTIONS[:1]), group_by="id").texts()
    (tmp_path / "rows.jsonl").write_text('{"task": "vqa"}\n')
    with pytest.raises(DataError, match="rows.jsonl:1: turns must be a list.*`cm3 validate .*` names all faults"):
        InstructionSet(path=path).texts()
