"""What a typed name leads to: kinds of files and folders, the Hub's data sets, and names that lead nowhere."""

import pytest

from cm3.data.named_source import named_kind
from cm3.errors import RequestError


def test_what_is_here_has_its_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    names = ("scenes", "photos", "photos/", "rows.jsonl", "data/*.parquet", str(tmp_path / "a.tar"))
    expected = ("scenes", "folder", "folder", "jsonl", "parquet", "webdataset")
    assert tuple(map(named_kind, names)) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nofolder", "nofolder is no file or folder here; check the path, or give kind=hub for a data set of the Hub"),
        ("nofolder/", "is no file or folder here"),
        ("photos/new", "photos/new is no file or folder here"),  # as photos is here
        ("../elsewhere", "is no file or folder here"),
        ("./photo", "is no file or folder here"),
        ("a/b/c", "a/b/c is no file or folder here"),
        ("rows.csv", "rows.csv does not end as any kind of rows; say with kind=NAME how they are stored"),
        ("no-one/nothing", r"no-one/nothing is no file or folder here and could not be had from the Hub \(.+\); check"),
    ],
)
def test_what_leads_nowhere_is_said_in_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "rows.csv").write_text("text")
    with pytest.raises(RequestError, match=message) as raised:
        named_kind(name)
    assert "\n" not in str(raised.value)


def test_a_data_set_that_was_fetched_needs_no_network():
    from pathlib import Path

    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE, "datasets--cm3-tests--rows")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "README.md").write_text("rows")
    assert named_kind("cm3-tests/rows") == "hub"
