"""`cm3 prepare`: raw rows to a folder that trains, again without doing the work twice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

from cm3.config import load_config
from cm3.data.loader import PackedLoader
from cm3.data.shards import ShardedDocuments, shard_path
from cm3.data.sources import SourceConfig, open_source
from cm3.errors import ConfigError, DataError
from cm3.model.objective import ObjectiveConfig
from cm3.tokenizers.document import DocumentTokenizer
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3.tokenizers.vqgan import VQGAN, VQGANConfig
from cm3.training.prepare import PrepareConfig, run
from cm3.training.prepare_report import Progress

ROOT = Path(__file__).resolve().parent.parent
SCENES = SourceConfig(kind="scenes", limit=10)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> str:
    """A folder with an untrained image tokenizer and a text tokenizer of a few captions."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    vqgan = VQGANConfig(
        image_size=32,
        downsampling=8,
        base_channels=16,
        channel_multipliers=(1, 1),
        num_codes=16,
        code_width=4,
    )
    ImageTokenizer(VQGAN(vqgan)).save(folder)
    texts = open_source(SourceConfig(kind="scenes", limit=40, image_column=None)).texts()
    TextTokenizer.train(texts, TextTokenizerConfig(vocabulary_size=320)).save(folder / "tokenizer.model")
    return str(folder)


def config(tokenizers: str, output: Path, **settings) -> PrepareConfig:
    settings = {"data": SCENES, "num_sentinels": 8, "rows_per_shard": 4, "batch_size": 3, **settings}
    return PrepareConfig(text_tokenizer=tokenizers, image_tokenizer=tokenizers, output=str(output), **settings)


def test_prepared_documents_are_the_source_tokenised(tokenizers, tmp_path):
    folder = run(config(tokenizers, tmp_path / "out"))
    documents = ShardedDocuments(folder)
    tokenizer = DocumentTokenizer.load(folder)
    expected = tokenizer.tokenize(list(open_source(SCENES)))
    assert [documents[i].segments for i in range(len(documents))] == [each.segments for each in expected]
    assert documents.tokenizer_hash == tokenizer.hash
    assert documents.vocabulary == tokenizer.vocabulary
    assert documents[9].metadata["row"] == "scenes/train:9"
    assert sorted(path.name for path in (folder / "shards").iterdir()) == [
        *(f"{number:05d}.arrow" for number in range(3)),
        "index.json",
    ]
    report = json.loads((folder / "report.json").read_text())
    assert report["rows"] == {"read": 10, "bad": 0, "bad_rows": [], "reasons": {}, "examples": {}}
    assert (report["duplicates"], report["duplicate_rows"]) == (0, [])
    assert report["documents"] == 10
    assert report["image_tokens"] == 10 * 16
    assert report["text_tokens"] == sum(len(each.segments[0].tokens) for each in expected)
    assert report["longest_document"] == documents.lengths.max()
    assert load_config(PrepareConfig, folder / "config.yaml") == config(tokenizers, folder)


def test_a_prepared_folder_feeds_the_loader(tokenizers, tmp_path):
    documents = ShardedDocuments(run(config(tokenizers, tmp_path)))
    loader = PackedLoader(documents, documents.vocabulary, ObjectiveConfig(), sequence_length=256, rows=2)
    batch = next(iter(loader))
    assert batch["ids_BT"].max() < documents.vocabulary.size
    assert loader.num_too_long == 0


def test_several_processes_write_the_same_folder(tokenizers, tmp_path):
    one = run(config(tokenizers, tmp_path / "one"))
    two = run(config(tokenizers, tmp_path / "two", num_processes=2))
    for name in ("shards/00000.arrow", "shards/00002.arrow", "shards/index.json", "report.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_second_run_keeps_what_is_whole_and_fits(tokenizers, tmp_path):
    first = config(tokenizers, tmp_path)
    run(first)
    report = (tmp_path / "report.json").read_bytes()
    shard_path(tmp_path, 1).write_bytes(b"damaged")
    before = {number: shard_path(tmp_path, number).stat().st_mtime_ns for number in range(3)}
    run(first)
    after = {number: shard_path(tmp_path, number).stat().st_mtime_ns for number in range(3)}
    assert [before[number] == after[number] for number in range(3)] == [True, False, True]
    assert (tmp_path / "report.json").read_bytes() == report

    run(replace(first, data=replace(SCENES, limit=5, seed=1)))
    documents = ShardedDocuments(tmp_path)
    assert len(documents) == 5
    assert not shard_path(tmp_path, 2).exists()
    expected = DocumentTokenizer.load(tmp_path).tokenize(list(open_source(replace(SCENES, limit=5, seed=1))))
    assert documents[0].segments == expected[0].segments


def test_a_shard_that_was_cut_off_is_made_anew(tokenizers, tmp_path):
    run(config(tokenizers, tmp_path))
    whole = {path: path.read_bytes() for path in (shard_path(tmp_path, 0), shard_path(tmp_path, 1))}
    damaged = shard_path(tmp_path, 1)
    for size in (len(whole[damaged]) * 3 // 4, 100, 0):
        damaged.write_bytes(whole[damaged][:size])
        run(config(tokenizers, tmp_path))
        assert {path: path.read_bytes() for path in whole} == whole


def test_bad_rows_are_reported_and_too_many_stop_the_run(tokenizers, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(6):
        PILImage.new("RGB", (40, 32), (number, 0, 0)).save(raw / f"{number}.png")
        (raw / f"{number}.txt").write_text(f"picture {number}")
    (raw / "4.png").write_bytes(b"broken")
    source = SourceConfig(kind="folder", path=str(raw), max_bad_fraction=0.2)
    folder = run(config(tokenizers, tmp_path / "out", data=source))
    report = json.loads((folder / "report.json").read_text())
    assert (report["rows"]["read"], report["rows"]["bad"], report["documents"]) == (6, 1, 5)
    assert str(raw / "4.png") in report["rows"]["bad_rows"][0]

    (raw / "0.txt").unlink()
    (raw / "1.txt").unlink()
    with pytest.raises(DataError, match="of 6 rows are bad"):
        run(config(tokenizers, tmp_path / "stopped", data=source))
    with pytest.raises(DataError, match="no complete shards"):
        ShardedDocuments(tmp_path / "stopped")


def test_skipped_rows_are_counted_by_reason_and_duplicates_are_found(tokenizers, tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(9):
        PILImage.new("RGB", (40, 32), (20 * number, 0, 0)).save(raw / f"{number}.png")
        (raw / f"{number}.txt").write_text(f"picture {number}")
    for number in (2, 3, 6):
        (raw / f"{number}.png").write_bytes(b"broken")
    (raw / "4.txt").write_text(" ")
    for suffix in ("png", "txt"):
        (raw / f"8.{suffix}").write_bytes((raw / f"1.{suffix}").read_bytes())
    source = SourceConfig(kind="folder", path=str(raw), max_bad_fraction=0.5)
    folder = run(config(tokenizers, tmp_path / "out", data=source))
    report = json.loads((folder / "report.json").read_text())
    broken, empty = "... is in no picture format that Pillow knows", "no text in text"
    assert report["rows"]["reasons"] == {broken: 3, empty: 1}
    assert [example.split(":")[0] for example in report["rows"]["examples"][empty]] == [str(raw / "4.png")]
    assert len(report["rows"]["examples"][broken]) == 3
    assert (report["rows"]["read"], report["documents"], report["rows"]["bad"]) == (9, 5, 4)
    assert report["duplicates"] == 1
    assert report["duplicate_rows"] == [f"{raw / '8.png'} is {raw / '1.png'}"]
    printed = capsys.readouterr()
    for line in ("9 rows read, 5 kept, 4 skipped", f"  skipped 3: {broken}", "1 documents repeat an earlier one"):
        assert line in printed.out.splitlines()
    assert "9 of 9 rows (100%)" in printed.err and "eta 0 s" in printed.err


def test_progress_shows_rate_and_time_left_of_what_is_made_now(capsys):
    progress = Progress(1000)
    progress.update(500, made=False)
    assert progress.line(10.0) == "500 of 1000 rows (50%)"
    progress.update(100, made=True)
    assert progress.line(10.0) == "600 of 1000 rows (60%) | 10 rows/s | eta 40 s"
    assert capsys.readouterr().err == ""  # no terminal, and half a minute has not passed
    progress.update(400, made=True)
    assert "1000 of 1000 rows (100%)" in capsys.readouterr().err


def as_rank(monkeypatch, number: int, world_size: int = 2) -> None:
    """What a launcher's environment would say; another test may have made a process group, which would win."""
    for name, value in (("rank", number), ("world_size", world_size), ("is_main", number == 0)):
        monkeypatch.setattr(f"cm3.training.prepare.{name}", lambda value=value: value)


def test_ranks_share_the_shards_and_write_the_folder_of_one(tokenizers, tmp_path, monkeypatch, capsys):
    one = run(config(tokenizers, tmp_path / "one"))
    shared = config(tokenizers, tmp_path / "two")
    order = []

    def the_other_rank_runs_meanwhile(seconds: float) -> None:
        order.append(sorted(path.name for path in (tmp_path / "two" / "shards").iterdir()))
        as_rank(monkeypatch, 1)
        run(shared)
        as_rank(monkeypatch, 0)

    monkeypatch.setattr("cm3.training.prepare.time.sleep", the_other_rank_runs_meanwhile)
    as_rank(monkeypatch, 0)
    two = run(shared)
    assert order == [["00000.arrow", "00002.arrow"]]
    for name in ("shards/00000.arrow", "shards/00001.arrow", "shards/index.json", "report.json", "vocabulary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert "rank 1 of 2: its 1 shards are written" in capsys.readouterr().out


def test_a_rank_that_never_delivers_is_reported_and_the_next_run_goes_on(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr("cm3.training.prepare.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("cm3.training.prepare.time.sleep", lambda seconds: None)
    as_rank(monkeypatch, 0)
    with pytest.raises(DataError, match="of the shards of other ranks 1 are missing, the first is number 1, and for 0"):
        run(config(tokenizers, tmp_path))
    with pytest.raises(DataError, match="no complete shards"):
        ShardedDocuments(tmp_path)
    written = shard_path(tmp_path, 0).stat().st_mtime_ns
    as_rank(monkeypatch, 0, world_size=1)
    assert len(ShardedDocuments(run(config(tokenizers, tmp_path)))) == 10
    assert shard_path(tmp_path, 0).stat().st_mtime_ns == written


def test_wrong_settings_are_refused(tokenizers, tmp_path):
    with pytest.raises(ConfigError, match="rows_per_shard=0"):
        config(tokenizers, tmp_path, rows_per_shard=0)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/prepare_*.yaml")), ids=lambda path: path.parent.name)
def test_every_prepare_config_loads(path):
    loaded = load_config(PrepareConfig, path, ["--data.max_bad_fraction", "0.5"])
    assert loaded.output.startswith(f"runs/{path.parent.name}/")
    if loaded.data.kind != "instruct":  # a file of rows has no split
        assert loaded.output.endswith(f"/{loaded.data.split}")
