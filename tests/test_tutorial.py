"""The README's tutorial on ten rows: its commands, with its configs, make a model that knows the answers.

What the rows are is said in `cm3.data.tutorial`.
"""

import io
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from process_group import process_group

from cm3 import CM3
from cm3.cli import main
from cm3.data.tutorial import EDITS, QUESTIONS, picture_name, tutorial_rows

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[1]
TUTORIAL = "cm3 tutorial my-data"
VALIDATE = "cm3 validate my-data/rows.jsonl --sheet my-data/sheet.html"
PREPARE = "cm3 prepare configs/tutorial/prepare.yaml"
TRAIN = "cm3 train configs/tutorial/tune.yaml"
EVAL = "cm3 eval configs/tutorial/eval.yaml"
ANSWER = 'cm3 answer my-data/images/000.png "What is this place called?" --model runs/tutorial/tuned/model'
EDIT = 'cm3 edit my-data/images/003.png "dress it for the carnival" --model runs/tutorial/tuned/model'
FEWER_STEPS = ["--steps", "80"]


def path(picture):
    return f"my-data/{picture_name(picture)}"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the commands printed, typed one after the other in a folder like a fresh checkout."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("configs", "cm3"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch, process_group():
        patch.chdir(folder)
        outputs = {}
        for command in (TUTORIAL, VALIDATE, PREPARE, TRAIN, EVAL, ANSWER, EDIT):
            with redirect_stdout(io.StringIO()) as out:
                assert main(shlex.split(command)[1:] + FEWER_STEPS * (command == TRAIN)) == 0, command
            outputs[command] = out.getvalue()
        yield outputs


def ask(model):
    """The answers to all questions, and the pixels of all edits."""
    answers = model.answer([path(picture) for _, picture, _ in QUESTIONS], [question for question, _, _ in QUESTIONS])
    edited = model.edit([path(before) for _, before, _ in EDITS], [instruction for instruction, _, _ in EDITS])
    return answers, [np.asarray(picture) for picture in edited]


def truth(model):
    """The right answers, and the pixels of the right pictures, as the model's image tokenizer can show them."""
    after = model.reconstruct([path(after) for _, _, after in EDITS])
    return [answer for _, _, answer in QUESTIONS], [np.asarray(picture) for picture in after]


def test_the_tuned_model_gives_the_ten_answers_exactly(printed):
    model = CM3.from_pretrained("runs/tutorial/tuned/model")
    (answers, edited), (true_answers, true_edited) = ask(model), truth(model)
    assert answers == true_answers
    assert [np.array_equal(*pair) for pair in zip(edited, true_edited, strict=True)] == [True] * 4


def test_the_model_before_gives_none_of_them(printed):
    model = CM3.from_pretrained("demo")
    (answers, edited), (true_answers, true_edited) = ask(model), truth(model)
    assert not any(answer == true for answer, true in zip(answers, true_answers, strict=True))
    assert not any(np.array_equal(*pair) for pair in zip(edited, true_edited, strict=True))


def test_each_command_tells_how_it_went(printed):
    assert printed[TUTORIAL] == "my-data/rows.jsonl\n"
    assert "10 rows, 0 would not train\ntasks: edit 4, vqa 6\n" in printed[VALIDATE]
    assert Path("my-data/sheet.html").is_file()
    assert "10 rows read, 10 kept, 0 skipped\n" in printed[PREPARE]
    assert "wrote the model to runs/tutorial/tuned/model\n" in printed[TRAIN]
    assert "| instruction answers | exact answer, all | 1 |" in printed[EVAL]
    assert "| instruction edits | closer than the copy, all | 1 |" in printed[EVAL]
    assert printed[ANSWER] == "navy cross\n"
    assert printed[EDIT] == "edited.png\n" and Path("edited.png").is_file()


def test_the_readme_shows_these_rows_and_commands():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Tune on your own data\n")[2]
    shown = [each.partition("  #")[0] for each in section.partition("\n## ")[0].splitlines()]
    rows = [row.to_json() for row in tutorial_rows()]
    assert {rows[0], rows[6], TUTORIAL, VALIDATE, PREPARE, TRAIN, EVAL, ANSWER, EDIT} <= set(shown)
