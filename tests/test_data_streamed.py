"""Streaming: rows of Parquet files where they lie equal those of the files fetched first, and no more is read."""

import io
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image as PILImage

from cm3.data.shards import ShardedDocuments, shard_path
from cm3.data.sources import SourceConfig, open_source
from cm3.data.streamed import UnreachableError
from cm3.errors import ConfigError, DataError
from cm3.tokenizers.document import DocumentTokenizer
from cm3.training.prepare import PrepareConfig, run

ROWS, GROUP = 7, 3
"""Rows of a file, and of its row groups: 3, 3, 1."""


class FarAway(MemoryFileSystem):
    """Files of another machine, which counts the bytes that are read, and lets a file be opened so many times only."""

    protocol = "faraway"
    store: dict = {}
    pseudo_dirs = [""]
    read: dict = {}
    opens_left: dict = {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("faraway://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            return super()._open(path, mode, **options)
        self.opens_left[path] = self.opens_left.get(path, 100) - 1
        if self.opens_left[path] < 0:
            raise PermissionError(f"{path}: cut off")
        return Counted(self.store[path].getvalue(), path)


class Counted(io.BytesIO):
    def __init__(self, content, path):
        super().__init__(content)
        self.path = path

    def read(self, size=-1):
        content = super().read(size)
        FarAway.read[self.path] = FarAway.read.get(self.path, 0) + len(content)
        return content


fsspec.register_implementation("faraway", FarAway, clobber=True)


def png(value):
    file = io.BytesIO()
    noise = PILImage.effect_noise((64, 64), 80 + value)
    PILImage.merge("RGB", [noise, noise, PILImage.new("L", (64, 64), value)]).save(file, "PNG")
    return file.getvalue()


def table(first):
    numbers = range(first, first + ROWS)
    return pa.table(
        {
            "image": [{"bytes": png(number), "path": f"{number}.png"} for number in numbers],
            "text": [f"caption {number}" for number in numbers],
            "unused": [np.random.default_rng(number).bytes(50_000) for number in numbers],
        }
    )


@pytest.fixture
def here(tmp_path):
    """Two files of seven rows in a folder."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(2):
        pq.write_table(table(number * ROWS), folder / f"train-{number}.parquet", row_group_size=GROUP)
    return folder


@pytest.fixture
def far(here):
    """The same two files on the other machine: the pattern of their address."""
    FarAway.store.clear()
    FarAway.opens_left = {}
    for path in sorted(here.iterdir()):
        with fsspec.open(f"faraway://bucket/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    FarAway.read = {}
    return "faraway://bucket/train-*.parquet"


def contents(source):
    return [(d.segments[0].text, d.segments[1].pixels.tobytes()) for d in source]


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_streamed_documents_are_those_of_the_files(here, kind):
    config = SourceConfig(kind=kind, path=str(here), metadata_columns=("text",))
    fetched, streamed = open_source(config), open_source(replace(config, stream=True))
    assert len(streamed) == len(fetched) == 2 * ROWS
    assert contents(streamed) == contents(fetched)
    assert [d.metadata for d in streamed] == [d.metadata for d in fetched]
    for index in (13, 0, 6, 7, 2):  # any order
        assert streamed[index].metadata == {"row": f"{here}/train:{index}", "text": f"caption {index}"}
    assert list(streamed.texts()) == list(fetched.texts())


def test_an_address_is_read_as_a_folder_here(here, far):
    streamed = open_source(SourceConfig(kind="parquet", path=far, stream=True))
    assert contents(streamed) == contents(open_source(SourceConfig(kind="parquet", path=str(here))))
    assert streamed[8].metadata["row"] == f"{far}:8"
    assert [file.removeprefix("faraway://").lstrip("/") for file in streamed.streamed_files] == [
        f"bucket/train-{number}.parquet" for number in range(2)
    ]


def test_only_the_row_groups_and_columns_in_use_are_read(here, far):
    source = open_source(SourceConfig(kind="parquet", path=far, stream=True))
    sizes = [path.stat().st_size for path in sorted(here.iterdir())]
    ends = dict(FarAway.read)
    assert sorted(ends) == ["/bucket/train-0.parquet", "/bucket/train-1.parquet"]
    assert list(source.texts()) == [f"caption {number}" for number in range(2 * ROWS)]
    texts = dict(FarAway.read)
    source[2 * ROWS - 1]  # alone in its row group
    assert FarAway.read["/bucket/train-0.parquet"] == texts["/bucket/train-0.parquet"] < sizes[0] / 2
    assert FarAway.read["/bucket/train-1.parquet"] - texts["/bucket/train-1.parquet"] < sizes[1] / 2
    source[0]
    before = dict(FarAway.read)
    source[2], source[1]
    assert FarAway.read == before  # of the same row group


def test_the_limit_spares_the_files_after_it(far, monkeypatch):
    monkeypatch.setattr("cm3.data.streamed._AT_A_TIME", 1)
    source = open_source(SourceConfig(kind="parquet", path=far, stream=True, limit=5))
    assert len(source) == 5 and len(contents(source)) == 5
    assert set(FarAway.read) == {"/bucket/train-0.parquet"}


def test_what_cannot_be_reached_is_no_bad_row(far):
    settings = {"kind": "parquet", "path": far, "stream": True, "max_bad_fraction": 1.0}
    source = open_source(SourceConfig(**settings))
    FarAway.opens_left = {"/bucket/train-1.parquet": 0}
    documents = iter(source)
    assert [next(documents).segments[0].text for _ in range(ROWS)] == [f"caption {number}" for number in range(ROWS)]
    message = r"bucket/train-1\.parquet cannot be read \(PermissionError: .*cut off\); check the connection"
    with pytest.raises(UnreachableError, match=message):
        next(documents)
    with pytest.raises(UnreachableError, match=message):
        list(source.texts())
    assert source.report.bad == 0
    with pytest.raises(UnreachableError, match=message):
        open_source(SourceConfig(**settings))


def test_a_bad_picture_is_a_bad_row(far):
    broken = table(0).set_column(0, "image", [[{"bytes": b"no picture", "path": "x"}] * ROWS])
    with fsspec.open("faraway://bucket/train-0.parquet", "wb") as file:
        pq.write_table(broken, file)
    source = open_source(SourceConfig(kind="parquet", path=far, stream=True, max_bad_fraction=0.5))
    assert len(list(source)) == ROWS
    assert source.report.bad == ROWS


def test_prepared_shards_equal_those_of_fetched_files_and_go_on_after_a_break(here, far, model_folder, tmp_path):
    def settings(name, **changes):
        data = SourceConfig(**{"kind": "parquet", "path": str(here), **changes})
        return PrepareConfig(
            data=data,
            text_tokenizer=str(model_folder),
            image_tokenizer=str(model_folder),
            num_sentinels=16,
            rows_per_shard=4,
            output=str(tmp_path / name),
        )

    def shards(name):
        return [shard_path(tmp_path / name, number) for number in range(4)]

    run(settings("fetched"))
    run(settings("streamed", stream=True))
    for fetched, streamed in zip(shards("fetched"), shards("streamed")):
        assert fetched.read_bytes() == streamed.read_bytes()

    remote = settings("remote", path=far, stream=True)
    FarAway.opens_left = {"/bucket/train-1.parquet": 1}  # its end can be read, and no more
    with pytest.raises(UnreachableError, match="the same command again: what is prepared is kept"):
        run(remote)
    assert [path.exists() for path in shards("remote")] == [True, False, False, False]
    first = shards("remote")[0].stat().st_mtime_ns
    FarAway.opens_left = {}
    folder = run(remote)
    assert shards("remote")[0].stat().st_mtime_ns == first
    tokenizer = DocumentTokenizer.load(folder)
    expected = tokenizer.tokenize(list(open_source(settings("fetched").data)))
    found = ShardedDocuments(folder)
    assert [found[index].segments for index in range(len(found))] == [each.segments for each in expected]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kind": "jsonl", "path": "x", "stream": True}, ConfigError, "stream reads parquet and hub, found kind=jsonl"),
        (
            {"kind": "hub", "path": "x", "stream": True, "where": {"a": ["b"]}},
            ConfigError,
            "where looks at all rows first, which stream is to spare",
        ),
        ({"kind": "parquet", "path": "nowhere", "stream": True}, DataError, "nowhere holds no Parquet files"),
        ({"kind": "parquet", "path": "faraway://bucket/none-*.parquet", "stream": True}, DataError, "has no rows"),
        ({"kind": "hub", "path": "./nowhere", "stream": True}, DataError, r"\./nowhere/train did not open"),
    ],
)
def test_wrong_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        open_source(SourceConfig(**settings))


def test_a_missing_column_a_split_and_another_format_are_named(here, tmp_path):
    with pytest.raises(DataError, match=r"train-0\.parquet has no column 'label'; choose among image, text, unused"):
        open_source(SourceConfig(kind="parquet", path=str(here), stream=True, text_columns=("label",)))
    with pytest.raises(DataError, match="rows/test has no such split; choose among train"):
        open_source(SourceConfig(kind="hub", path=str(here), split="test", stream=True))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"not stored as Parquet but as .*train\.jsonl; leave stream out"):
        open_source(SourceConfig(kind="hub", path=str(tmp_path / "lines"), stream=True))
