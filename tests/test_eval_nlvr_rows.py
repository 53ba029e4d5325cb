"""Instruction rows of NLVR: whole boxes in one square, sentences with their truth, descriptions of all pictures."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cm3.data.instruct import InstructFile
from cm3.errors import DataError
from cm3.eval.nlvr_reader import read_box
from cm3.eval.nlvr_rows import GAP, GAP_COLOR, convert, main, mosaic

GROUND, YELLOW = (211, 211, 211), (255, 255, 0)


def picture():
    """Three boxes with gaps; in box n a yellow square of 20 pixels at 30n from the left."""
    pixels_HWC = np.full((100, 400, 3), GAP_COLOR, np.uint8)
    for number in range(3):
        left = 150 * number
        pixels_HWC[:, left : left + 100] = GROUND
        pixels_HWC[40:60, left + 30 * number : left + 30 * number + 20] = YELLOW
    return Image.fromarray(pixels_HWC)


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": "x.png"}


@pytest.fixture
def table(tmp_path):
    rows = {
        "image": [png(picture())] * 4,
        "sentence": ["There is a yellow block.", None, "no blue block ", "there is none"],
        "label": [1, -1, 1, 0],
        "text": [f"description {number}" for number in range(4)],
    }
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    return tmp_path


def test_every_box_is_whole_and_in_its_corner():
    square = mosaic(picture())
    step = 100 + GAP
    assert square.size == (step + 100, step + 100)
    for number, (left, top) in enumerate(((0, 0), (step, 0), (0, step))):
        box = square.crop((left, top, left + 100, top + 100))
        [item] = read_box(box)
        assert (item.kind.color, item.kind.shape, item.kind.size) == ("yellow", "square", "medium")
        assert abs(item.x - 30 * number) <= 1 and abs(item.y - 40) <= 1
    rest = np.asarray(square)[step:, step:].reshape(-1, 3)
    assert (rest == GAP_COLOR).all() and (np.asarray(square)[100:step] == GAP_COLOR).all()
    with pytest.raises(DataError, match="has 400x100 pixels, this one 200x50; give those of the corpus"):
        mosaic(picture().resize((200, 50)))


def test_sentences_become_questions_and_pictures_without_one_are_left_out(table):
    report = convert(str(table), "train", "vqa", table / "rows")
    assert (report.written, report.skipped) == (3, 0)
    file = InstructFile(report.path)
    assert [file.row(index).id for index in range(3)] == ["0", "2", "3"]
    said = [
        [part.text for turn in file.row(index).turns for part in turn if hasattr(part, "text")] for index in range(3)
    ]
    assert said == [
        ["There is a yellow block. True or false?", "true"],
        ["no blue block. True or false?", "true"],
        ["there is none. True or false?", "false"],
    ]
    document = file.document(0)
    assert document.metadata["task"] == "vqa" and document.segments[-1].pixels.size == (228, 228)


def test_descriptions_are_of_all_pictures(table, capsys):
    main([str(table), "--task", "long_caption", "--out", str(table / "rows"), "--limit", "2"])
    file = InstructFile(table / "rows" / "instruct.jsonl")
    assert [file.row(index).turns[1][0].text for index in range(len(file))] == ["description 0", "description 1"]
    assert "2 rows written, 0 skipped" in capsys.readouterr().out


def test_resized_pictures_are_skipped_with_a_reason(table):
    rows = {"image": [png(picture()), png(picture().resize((64, 16)))], "sentence": ["a", "b"], "label": [0, 1]}
    pq.write_table(pa.table({**rows, "text": ["c", "d"]}), table / "train.parquet")
    report = convert(str(table), "train", "vqa", table / "rows")
    assert (report.written, report.skipped) == (1, 1) and "row 1: a picture of NLVR" in report.reasons[0]
