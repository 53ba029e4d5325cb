"""The ten rows of the tutorial as `cm3 tutorial` writes them."""

import json

import numpy as np
import pytest
from PIL import Image

from cm3.cli import main
from cm3.data.instruct import InstructFile
from cm3.data.scenes import example
from cm3.data.tutorial import write_tutorial
from cm3.errors import DataError
from cm3.tokenizers.document import Text


def test_the_rows_are_read_back_with_their_pictures(tmp_path, capsys):
    folder = tmp_path / "my-data"
    assert main(["tutorial", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'rows.jsonl'}\n"
    file = InstructFile(folder / "rows.jsonl")
    assert len(file) == 10
    first, edit = (json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()[::6])
    assert first["task"] == "vqa" and edit["task"] == "edit"
    assert edit["turns"][1] == {"role": "assistant", "content": [{"image": "images/005.png"}]}
    documents = [file.document(number) for number in range(10)]
    texts = [[part.text for part in document.segments if isinstance(part, Text)] for document in documents]
    assert any("navy cross" in text for text in texts[0]) and any("carnival" in text for text in texts[6])
    for number in range(9):
        drawn = np.asarray(example(7, "train", number).image)
        assert np.array_equal(np.asarray(Image.open(folder / "images" / f"{number:03d}.png")), drawn)
    assert len(list((folder / "images").iterdir())) == 9


def test_it_may_be_written_again_but_over_nothing_else(tmp_path, capsys):
    path = write_tutorial(tmp_path / "new")
    (path.parent / "sheet.html").write_text("made by cm3 validate")
    (path.parent / "images" / "000.png").unlink()
    assert write_tutorial(path.parent) == path and (path.parent / "images" / "000.png").is_file()
    path.write_text(path.read_text() + path.read_text().splitlines()[0])
    own = path.read_text()
    with pytest.raises(DataError, match="is not empty, and nothing in it is to be overwritten; choose a new folder"):
        write_tutorial(path.parent)
    assert main(["tutorial", str(path.parent)]) == 2
    assert path.read_text() == own and "choose a new folder" in capsys.readouterr().err
