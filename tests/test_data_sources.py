"""Sources: the same three rows in every layout, and what becomes of bad ones."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image as PILImage

from cm3.data.scenes import example
from cm3.data.sources import SourceConfig, fingerprint, kind_of, open_source
from cm3.errors import ConfigError, DataError

CAPTIONS = ["one", "two\nlines", "drei – Übung"]


def picture(value: int) -> PILImage.Image:
    return PILImage.new("RGB", (8, 6), (value, 0, 255 - value))


def png(value: int) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, format="PNG")
    return file.getvalue()


def make_parquet(folder, captions=CAPTIONS):
    import pandas as pd

    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(captions))]
    other = [f"other {i}" for i in range(len(captions))]
    pd.DataFrame({"image": images, "text": captions, "other": other}).to_parquet(folder / "train.parquet")
    pd.DataFrame({"image": images[:1], "text": ["held out"], "other": other[:1]}).to_parquet(
        folder / "validation.parquet"
    )
    return {"kind": "parquet", "path": str(folder)}


def make_hub(folder):
    make_parquet(folder)
    return {"kind": "hub", "path": str(folder)}


def make_jsonl(folder):
    (folder / "pictures").mkdir()
    rows = []
    for i, caption in enumerate(CAPTIONS):
        (folder / "pictures" / f"{i}.png").write_bytes(png(i))
        rows.append(json.dumps({"image": f"pictures/{i}.png", "text": caption}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    return {"kind": "jsonl", "path": str(folder / "rows.jsonl")}


def make_folder(folder):
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{i}.png").write_bytes(png(i))
        (folder / f"{i}.txt").write_text(caption + "\n", encoding="utf-8")
    return {"kind": "folder", "path": str(folder)}


def make_folder_with_jsonl(folder):
    config = make_folder(folder)
    rows = [json.dumps({"file_name": f"{i}.png", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return config


def make_folder_with_csv(folder):
    config = make_folder(folder)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "text"), *((f"{i}.png", c) for i, c in enumerate(CAPTIONS))])
    return config


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_webdataset(folder):
    first = [("000.png", png(0)), ("000.txt", CAPTIONS[0].encode())]
    second = [("part/001.png", png(1)), ("part/001.json", json.dumps({"caption": CAPTIONS[1]}).encode())]
    third = [("002.extra.json", b"{}"), ("002.json", json.dumps({"text": CAPTIONS[2]}).encode())]
    write_tar(folder / "0.tar", [*first, *second])
    write_tar(folder / "1.tar", [*third, ("002.png", png(2))])
    return {"kind": "webdataset", "path": str(folder / "*.tar")}


MAKERS = [
    make_parquet,
    make_hub,
    make_jsonl,
    make_folder,
    make_folder_with_jsonl,
    make_folder_with_csv,
    make_webdataset,
]


@pytest.mark.parametrize("make", MAKERS)
def test_every_layout_gives_the_same_documents(make, tmp_path):
    config = SourceConfig(**make(tmp_path))
    source = open_source(config)
    documents = list(source)
    assert [document.segments[0].text for document in documents] == CAPTIONS
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(np.asarray(document.segments[1].pixels), np.asarray(picture(i)))
    assert len(source) == 3
    assert source[1].segments[0] == documents[1].segments[0]
    assert list(open_source(config).texts()) == CAPTIONS
    assert (source.report.read, source.report.kept, source.report.bad) == (3, 3, 0)


@pytest.mark.parametrize("make", MAKERS)
def test_the_kind_of_a_layout_is_seen(make, tmp_path):
    made = make(tmp_path)
    expected = "parquet" if make is make_hub else made["kind"]  # the same files
    assert kind_of(made["path"]) == expected
    if made["kind"] == "webdataset":
        assert kind_of(str(tmp_path)) == kind_of(str(tmp_path / "0.tar")) == "webdataset"


def test_the_kind_of_what_is_no_folder_here(tmp_path):
    assert kind_of("scenes") == "scenes"
    assert kind_of("owner/name") == "hub"
    assert kind_of("missing/*.parquet") == kind_of("missing.parquet") == "parquet"
    (tmp_path / "data").mkdir()
    assert kind_of(str(tmp_path)) == "folder"
    (tmp_path / "data" / "train-00000.parquet").touch()
    assert kind_of(str(tmp_path)) == "parquet"


def test_a_fingerprint_changes_with_the_files(tmp_path):
    path = make_folder(tmp_path)["path"]
    before = fingerprint(path)
    assert len(before) == 6 and fingerprint(path) == before
    (tmp_path / "0.txt").write_text("another")
    assert fingerprint(path) != before
    assert [name for name, _, _ in fingerprint(str(tmp_path / "1.txt"))] == [str(tmp_path / "1.txt")]
    assert fingerprint("") == fingerprint("owner/name") == []


@pytest.mark.parametrize("make", MAKERS)
def test_text_only_and_image_only(make, tmp_path):
    made = make(tmp_path)
    texts = open_source(SourceConfig(**made, image_column=None))
    images = open_source(SourceConfig(**made, text_columns=()))
    assert [len(document.segments) for document in texts] == [1, 1, 1]
    assert [document.segments[0].pixels.getpixel((0, 0))[0] for document in images] == [0, 1, 2]


def test_metadata_columns_of_a_table_and_of_json_lines(tmp_path):
    for make in (make_parquet, make_hub):
        (folder := tmp_path / make.__name__).mkdir()
        source = open_source(SourceConfig(**make(folder), metadata_columns=("other", "text")))
        for index, document in enumerate(source):
            expected = {"row": document.metadata["row"], "other": f"other {index}", "text": CAPTIONS[index]}
            assert document.metadata == expected
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "kind": null}\n{"text": "b"}\n', encoding="utf-8")
    settings = {"image_column": None, "metadata_columns": ("kind",), "max_bad_fraction": 0.5}
    source = open_source(SourceConfig(kind="jsonl", path=str(rows), **settings))
    assert [document.metadata["kind"] for document in source] == [None]
    assert "no column 'kind'" in source.report.bad_rows[0]


def test_metadata_columns_of_folders_and_tars(tmp_path):
    for make in (make_folder, make_folder_with_csv, make_webdataset):
        (folder := tmp_path / make.__name__).mkdir()
        source = open_source(SourceConfig(**make(folder), image_column="image", metadata_columns=("text",)))
        assert [document.metadata["text"] for document in source] == CAPTIONS


def test_scenes_are_the_examples_of_their_split():
    source = open_source(SourceConfig(kind="scenes", split="validation", seed=3, limit=2))
    document = source[1]
    expected = example(3, "validation", 1)
    assert len(source) == 2
    assert document.segments[0].text == expected.caption
    assert document.segments[1].pixels.tobytes() == expected.image.tobytes()


def test_split_limit_and_glob_of_parquet(tmp_path):
    made = make_parquet(tmp_path)
    held_out = open_source(SourceConfig(**made, split="validation"))
    assert [document.segments[0].text for document in held_out] == ["held out"]
    assert len(open_source(SourceConfig(**made, limit=2))) == 2
    with pytest.raises(DataError, match=r"holds no test\*\.parquet"):  # never another split in its place
        open_source(SourceConfig(**made, split="test"))
    assert len(open_source(SourceConfig(kind="parquet", path=str(tmp_path / "*.parquet")))) == 4


def test_several_text_columns_are_drawn_by_the_seed_and_skip_empty_ones(tmp_path):
    made = make_parquet(tmp_path, captions=["a", None, "c", "d", "e", "f", "g", " "])
    config = SourceConfig(**made, text_columns=("text", "other"))
    drawn = [document.segments[0].text for document in open_source(config)]
    assert drawn == [document.segments[0].text for document in open_source(config)]
    assert drawn[1] == "other 1" and drawn[7] == "other 7"
    assert {len(text) for text in drawn} == {1, 7}
    assert len(list(open_source(config).texts())) == 14


def test_bad_rows_are_counted_named_and_skipped(tmp_path):
    made = make_jsonl(tmp_path)
    bad = [
        '{"image": "missing.png", "text": "no such file"}',
        '{"image": "pictures/broken.png", "text": "broken"}',
        "not json",
        '["a list"]',
        '{"image": "pictures/0.png", "text": ""}',
        '{"image": "pictures/0.png"}',
        '{"image": null, "text": "no image"}',
    ]
    (tmp_path / "pictures" / "broken.png").write_bytes(png(0)[:40])
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(bad))
    source = open_source(SourceConfig(**made, max_bad_fraction=0.9))
    assert [document.segments[0].text for document in source] == CAPTIONS
    assert (source.report.read, source.report.bad) == (10, 7)
    assert [reason.split(": ")[0] for reason in source.report.bad_rows] == [
        f"{tmp_path}/rows.jsonl:{line}" for line in range(5, 12)
    ]
    for word, reason in zip(
        ["missing.png", "", "JSON", "list", "no text", "no column 'text'", "no image"], source.report.bad_rows
    ):
        assert word in reason
    with pytest.raises(DataError, match=r"rows\.jsonl:7: not valid JSON"):
        source[5]


def test_a_bad_line_of_a_folder_s_metadata_is_a_bad_row(tmp_path):
    made = make_folder_with_jsonl(tmp_path)
    with (tmp_path / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write('\nnot json\n{"file_name": "0.png", "text": "half \\ud83d"}\n')
    source = open_source(SourceConfig(**made, max_bad_fraction=0.9))
    assert [document.segments[0].text for document in source] == CAPTIONS
    for reason, (line, word) in zip(source.report.bad_rows, [(4, "JSON"), (5, "Unicode")], strict=True):
        assert reason.startswith(f"{tmp_path}/metadata.jsonl:{line}: ") and word in reason


def test_metadata_of_a_spreadsheet_has_a_byte_order_mark(tmp_path):
    made = make_folder_with_csv(tmp_path)
    path = tmp_path / "metadata.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [document.segments[0].text for document in open_source(SourceConfig(**made))] == CAPTIONS
    path.write_bytes(b"file_name,text\n0.png,\xff\n")
    with pytest.raises(DataError, match=r"metadata\.csv is not a CSV file in UTF-8"):
        open_source(SourceConfig(**made))


def test_too_many_bad_rows_stop_the_reading(tmp_path):
    config = SourceConfig(**make_folder(tmp_path), max_bad_fraction=0.4)
    (tmp_path / "1.txt").unlink()
    assert len(list(open_source(config))) == 2
    (tmp_path / "2.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"2 of 3 rows are bad, more than .*0\.4 .*1\.txt is missing"):
        list(open_source(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "parquet", "path": "nowhere"}, "nowhere holds no Parquet files"),
        ({"kind": "jsonl", "path": "nowhere"}, "nowhere is not a file"),
        ({"kind": "folder", "path": "nowhere"}, "nowhere is not a folder"),
        ({"kind": "webdataset", "path": "nowhere"}, "nowhere holds no tar files"),
        ({"kind": "hub", "path": "./nowhere"}, "./nowhere/train did not open"),
    ],
)
def test_a_path_that_does_not_exist_is_named(settings, message):
    with pytest.raises(DataError, match=message):
        open_source(SourceConfig(**settings))


def test_a_missing_column_an_empty_folder_and_a_compressed_tar(tmp_path):
    made = make_parquet(tmp_path)
    with pytest.raises(DataError, match="no column 'label'; choose among image, text, other"):
        open_source(SourceConfig(**made, text_columns=("label",)))
    (tmp_path / "validation.parquet").write_bytes(b"broken")
    with pytest.raises(DataError, match="validation did not open"):
        open_source(SourceConfig(**made, split="validation"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no rows"):
        open_source(SourceConfig(kind="folder", path=str(tmp_path / "empty")))
    with tarfile.open(tmp_path / "rows.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match="not a readable, uncompressed tar"):
        open_source(SourceConfig(kind="webdataset", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "scenes"}, "set limit"),
        ({"kind": "jsonl"}, "needs a path"),
        ({"kind": "jsonl", "path": "x", "text_columns": (), "image_column": None}, "at least one column"),
        ({"kind": "jsonl", "path": "x", "limit": 0}, "limit=0"),
        ({"kind": "jsonl", "path": "x", "metadata_columns": ("row",)}, "may not name 'row'"),
        ({"kind": "jsonl", "path": "x", "max_bad_fraction": 2.0}, "max_bad_fraction=2.0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SourceConfig(**settings)


def test_rows_are_chosen_by_the_values_of_their_columns(tmp_path):
    import pandas as pd

    pixels = io.BytesIO()
    PILImage.new("RGB", (4, 4)).save(pixels, "PNG")
    table = {"text": list("abcdef"), "style": ["x", "y", "z"] * 2, "size": [1, 1, 1, 2, 2, 2]}
    pd.DataFrame({**table, "image": [{"bytes": pixels.getvalue(), "path": "p.png"}] * 6}).to_parquet(
        tmp_path / "train.parquet"
    )
    arguments = {"kind": "parquet", "path": str(tmp_path)}
    source = open_source(SourceConfig(**arguments, where={"style": ["z", "y"], "size": ["2"]}))
    found = [(document.segments[0].text, document.metadata["row"]) for document in source]
    assert found == [("e", f"{tmp_path}/train:4"), ("f", f"{tmp_path}/train:5")]  # numbers of the file
    with pytest.raises(DataError, match="no rows for kind=parquet, where={'style': \\['w'\\]}; check path and split"):
        open_source(SourceConfig(**arguments, where={"style": ["w"]}))
    with pytest.raises(DataError, match="has no column 'color'; choose among text, style, size, image"):
        open_source(SourceConfig(**arguments, where={"color": ["w"]}))
    with pytest.raises(ConfigError, match="where chooses rows of parquet and hub, found kind=scenes; leave it out"):
        SourceConfig(kind="scenes", limit=1, where={"style": ["z"]})
