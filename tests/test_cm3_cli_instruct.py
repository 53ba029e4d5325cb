"""`cm3 validate` and `cm3 convert`: what they print and the exit code."""

import argparse
import json

import PIL.Image
import pytest

from cm3 import cli_instruct
from cm3.data.converter_formats import FORMATS
from cm3.errors import RequestError

VERBS = {
    "validate": (cli_instruct.add_validate_arguments, cli_instruct.validate),
    "convert": (cli_instruct.add_convert_arguments, cli_instruct.convert),
}


@pytest.fixture
def cm3(capsys):
    """Run a verb and return its exit code and the lines that it printed."""

    def run(verb, *words):
        add_arguments, action = VERBS[verb]
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        code = action(parser.parse_args([str(word) for word in words]))
        return code or 0, capsys.readouterr().out.splitlines()

    return run


def test_convert_then_validate_then_the_sheet(cm3, model_folder, tmp_path):
    PIL.Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    captions = {
        "images": [{"id": 1, "file_name": "red.png"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "red"}, {"id": 2, "image_id": 2, "caption": "lost"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    rows = tmp_path / "out" / "instruct.jsonl"
    code, lines = cm3("convert", "coco", tmp_path / "captions.json", "--out", tmp_path / "out")
    assert code == 0
    assert lines == [
        "skipped annotations[1]: image_id 2 is not among the images",
        f"{rows}: 1 rows written, 1 skipped",
    ]
    code, lines = cm3("validate", rows, "--model", model_folder, "--sheet", tmp_path / "sheet.html")
    assert code == 0
    assert lines[:2] == ["1 rows, 0 would not train", "tasks: caption 1"]
    assert "longer than the context of 128: 0 rows (0.0%)" in lines  # the model's own length
    assert lines[-1] == str(tmp_path / "sheet.html") and "<mark>" in (tmp_path / "sheet.html").read_text()

    code, lines = cm3("validate", rows, "--model", model_folder, "--context-length", 12, "--layout", "image_first")
    assert code == 1 and lines[0].startswith(f"{rows}:1: the row has ")
    with rows.open("a") as file:
        file.write('{"turn": []}\n')
    code, lines = cm3("validate", rows, "--model", model_folder, "--max-faults", 1)
    assert code == 1
    assert lines[:2] == [f"{rows}:2: unknown key 'turn'; did you mean 'turns'?", "and 1 faults more"]
    with pytest.raises(RequestError, match="is no folder here"):
        cm3("validate", rows, "--model", "./nowhere")


def test_columns_are_pairs_and_formats_those_that_there_are(cm3, tmp_path, capsys):
    import pandas as pd

    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    table = {"before": [{"bytes": data}], "image": [{"bytes": data}], "words": ["same"]}
    pd.DataFrame(table).to_parquet(tmp_path / "a.parquet")
    words = ("parquet", tmp_path / "a.parquet", "--out", tmp_path / "out", "--task", "edit", "--columns")
    code, lines = cm3("convert", *words, "image=before", "instruction=words", "edited_image=image")
    assert (code, lines) == (0, [f"{tmp_path / 'out' / 'instruct.jsonl'}: 1 rows written, 0 skipped"])
    with pytest.raises(SystemExit):
        cm3("convert", *words, "image")
    assert "'image' is no pair; write FIELD=COLUMN" in capsys.readouterr().err
    assert cli_instruct.FORMATS == tuple(FORMATS)
