"""Rows of COCO: which captions are drawn, Karpathy's split, paths that a source can follow."""

import json

import pytest
from PIL import Image

from cm3.data.sources import SourceConfig, open_source
from cm3.errors import DataError
from cm3.eval.coco_rows import fid_rows, karpathy_rows, main


@pytest.fixture
def captions(tmp_path):
    """Captions of 20 pictures, two or three each; a 21st picture has none."""
    images = [{"id": id, "file_name": f"{id}.jpg"} for id in range(21)]
    annotations = [
        {"id": 100 * n + id, "image_id": id, "caption": f" {id}/{n} "}
        for n in range(3)
        for id in range(20)
        if n < 2 or id % 2
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    return path


def test_pictures_differ_and_each_has_one_of_its_captions(captions):
    rows = fid_rows(captions, "val", count=20, seed=1)
    assert sorted(row["id"] for row in rows) == list(range(20))
    for row in rows:
        assert row["captions"] == [f"{row['id']}/{n}" for n in range(3 if row["id"] % 2 else 2)]
        assert row["text"] in row["captions"] and row["image"] == f"val/{row['id']}.jpg"
    assert len({row["text"].partition("/")[2] for row in rows}) == 3  # not always the first one


def test_the_draw_depends_on_the_seed_alone(captions):
    rows = fid_rows(captions, "val", count=5, seed=1)
    assert rows == fid_rows(captions, "val", count=5, seed=1) != fid_rows(captions, "val", count=5, seed=2)
    with pytest.raises(DataError, match="has 20 captioned pictures, 21 were asked for; ask for fewer"):
        fid_rows(captions, "val", count=21)


@pytest.fixture
def karpathy(tmp_path):
    images = [
        {
            "split": split,
            "filepath": "val2014",
            "filename": f"{id}.png",
            "cocoid": id,
            "sentences": [{"raw": f"A {word}."} for word in ("dog", "hound")],
        }
        for id, split in enumerate(("train", "test", "restval", "test"))
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images}))
    return path


def test_karpathys_split_has_all_captions(karpathy):
    first, second = karpathy_rows(karpathy, "coco")
    assert first == {"image": "coco/val2014/1.png", "text": "A dog.", "captions": ["A dog.", "A hound."], "id": 1}
    assert second["id"] == 3
    with pytest.raises(DataError, match="has no pictures of the split 'dev'"):
        karpathy_rows(karpathy, "coco", split="dev")


def test_rows_lead_to_their_pictures_wherever_they_are_written(karpathy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco/val2014").mkdir(parents=True)
    for id in (1, 3):
        Image.new("RGB", (8, 8), (id, 0, 0)).save(tmp_path / f"coco/val2014/{id}.png")
    main(["karpathy", str(karpathy), "--images", "coco", "--out", "rows/test.jsonl"])
    assert "rows/test.jsonl: 2 rows" in capsys.readouterr().out
    config = SourceConfig(kind="jsonl", path="rows/test.jsonl", metadata_columns=("captions",))
    documents = list(open_source(config))
    assert [document.segments[1].pixels.getpixel((0, 0)) for document in documents] == [(1, 0, 0), (3, 0, 0)]
    assert documents[0].metadata["captions"] == ["A dog.", "A hound."]


def test_other_files_are_refused(karpathy, captions, tmp_path):
    with pytest.raises(DataError, match="is no file of COCO captions"):
        fid_rows(karpathy, "val")
    with pytest.raises(DataError, match="is not Karpathy's dataset_coco.json"):
        karpathy_rows(captions, "val")
    with pytest.raises(DataError, match="cannot read .*nowhere.json"):
        fid_rows(tmp_path / "nowhere.json", "val")
