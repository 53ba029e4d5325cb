"""`cm3 prepare`: raw rows to a folder that trains, again without doing the work twice."""

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image as PILImage

from cm3.cli import main
from cm3.config import load_config
from cm3.data.loader import PackedLoader
from cm3.data.shard_sums import look_at_shard
from cm3.data.shards import ShardedDocuments, shard_path
from cm3.data.sources import SourceConfig, open_source
from cm3.errors import ConfigError, DataError
from cm3.model.objective import ObjectiveConfig
from cm3.tokenizers.document import DocumentTokenizer
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3.tokenizers.vqgan import VQGAN, VQGANConfig
from cm3.training.prepare import PrepareConfig, Preparer, run
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


@pytest.fixture(scope="module")
def finished(tokenizers, tmp_path_factory) -> Path:
    """A finished folder, to be copied."""
    return run(config(tokenizers, tmp_path_factory.mktemp("finished")))


@pytest.fixture
def out(finished, tmp_path) -> Path:
    """A finished folder."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


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


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What a folder holds: the bytes and the time of change of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_finished_folder_is_said_to_be_finished_and_left_alone(tokenizers, out, capsys):
    before = contents(out)
    run(config(tokenizers, out, batch_size=5))
    assert contents(out) == before
    printed = capsys.readouterr().out
    assert "10 rows read, 10 kept, 0 skipped" in printed
    assert printed.endswith(f"{out} was finished before: nothing was left to do\n")


def test_a_shard_with_a_changed_byte_is_made_anew_alone(out, finished):
    path = shard_path(out, 1)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    cure = f"cm3 prepare {out}/config.yaml --output {out}"
    with pytest.raises(DataError, match=rf"00001\.arrow has the checksum .*{cure}"):
        ShardedDocuments(out, check=True)
    assert main(cure.split()[1:]) == 0
    assert len(ShardedDocuments(out, check=True)) == 10
    before, after = contents(finished), contents(out)
    names = {name for name in before if name != "config.yaml"}  # it names the output
    assert {name: after[name][0] for name in names} == {name: before[name][0] for name in names}
    shards = [f"shards/{number:05d}.arrow" for number in range(3)]
    assert [before[name] == after[name] for name in shards] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"data": replace(SCENES, limit=5)}, "data.limit: 10 there, 5 now"),
        ({"data": replace(SCENES, seed=1)}, "data.seed: 0 there, 1 now"),
        ({"data": replace(SCENES, limit=20, seed=1)}, "data.limit: 10 there, 20 now; data.seed: 0 there, 1 now"),
        (
            {"data": SourceConfig(kind="scene_tasks", limit=10, tasks={"vqa": 1.0})},
            'data.kind: "scenes" there, "scene_tasks" now; data.tasks.vqa: null there, 1.0 now',
        ),
        ({"num_sentinels": 4}, "num_sentinels: 8 there, 4 now; other tokenizers"),
        ({"rows_per_shard": 5, "num_processes": 2}, "rows_per_shard: 4 there, 5 now"),
    ],
)
def test_other_settings_are_refused_and_named(tokenizers, out, capsys, changes, difference):
    for is_finished in (True, False):
        if not is_finished:
            (out / "shards" / "index.json").unlink()
            shard_path(out, 1).unlink()
        before = contents(out)
        with pytest.raises(ConfigError) as caught:
            run(config(tokenizers, out, **changes))
        assert str(caught.value) == (
            f"{out} holds shards that were prepared with other settings ({difference}); choose another output, or "
            f"delete {out} to prepare it anew"
        )
        assert contents(out) == before and capsys.readouterr().out == ""


def test_other_tokenizers_and_raw_rows_under_the_same_names_are_refused(tokenizers, tmp_path):
    mine, raw = tmp_path / "tokenizers", tmp_path / "raw"
    shutil.copytree(tokenizers, mine)
    raw.mkdir()
    PILImage.new("RGB", (32, 32)).save(raw / "0.png")
    (raw / "0.txt").write_text("black")
    settings = config(str(mine), tmp_path / "out", data=SourceConfig(kind="folder", path=str(raw)))
    run(settings)
    (raw / "0.txt").write_text("white and black")
    with pytest.raises(ConfigError, match=r"prepared with other settings \(other raw files\); choose another output"):
        run(settings)
    (raw / "0.txt").write_text("black")
    texts = [f"another text {number}" for number in range(300)]
    TextTokenizer.train(texts, TextTokenizerConfig(vocabulary_size=300)).save(mine / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"\(other tokenizers; other raw files\)"):  # their time of change is another
        run(settings)
    as_before(shard_path(tmp_path / "out", 0))
    with pytest.raises(ConfigError, match=r"\(other raw rows, tokenizers or memory, or another version of open-cm3\)"):
        run(settings)


def test_a_larger_limit_goes_on_and_keeps_whole_shards(tokenizers, out, tmp_path, capsys):
    before, larger = contents(out), {"data": replace(SCENES, limit=14)}
    run(config(tokenizers, out, **larger))
    assert f"going on with what {out} holds (data.limit: 10 there, 14 now)" in capsys.readouterr().out.splitlines()
    after, fresh = contents(out), contents(run(config(tokenizers, tmp_path / "fresh", **larger)))
    shards = [f"shards/{number:05d}.arrow" for number in range(3)]
    assert [after[name] == before[name] for name in shards] == [True, True, False]
    names = {name for name in fresh if name != "config.yaml"}  # it names the output
    assert {name: after[name][0] for name in names} == {name: fresh[name][0] for name in names}
    assert after.keys() == fresh.keys()
    assert load_config(PrepareConfig, out / "config.yaml") == config(tokenizers, out, **larger)


def as_before(path: Path) -> None:
    """Make a shard what it was before there were checksums."""
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"inputs"}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema.with_metadata(metadata)) as writer:
        writer.write_table(table)
    assert look_at_shard(path).num_bytes == 0


def test_shards_of_before_there_were_checksums_are_kept(tokenizers, out):
    for number in range(2):
        as_before(shard_path(out, number))
    (out / "shards" / "index.json").unlink()
    shard_path(out, 2).unlink()
    before = contents(out)
    run(config(tokenizers, out))
    after = contents(out)
    assert all(after[name] == before[name] for name in ("shards/00000.arrow", "shards/00001.arrow"))
    assert look_at_shard(shard_path(out, 2)).num_bytes > 0
    assert len(ShardedDocuments(out, check=True)) == 10


@pytest.mark.parametrize("damage", [b"not JSON", b"{}", b"[1]"])
def test_a_damaged_index_is_written_anew(tokenizers, out, finished, damage):
    index = Path("shards", "index.json")
    (out / index).write_bytes(damage)
    run(config(tokenizers, out))
    assert (out / index).read_bytes() == (finished / index).read_bytes()


def test_what_a_killed_run_left_half_written_is_cleared_away(tokenizers, out):
    shard_path(out, 2).unlink()
    left = out / "shards" / ".0123abcd.tmp.00002.arrow"
    left.write_bytes(b"half")
    run(config(tokenizers, out))
    assert not left.exists() and len(ShardedDocuments(out, check=True)) == 10


def test_a_folder_that_cannot_be_written_is_said_before_the_settings(tokenizers, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    output = tmp_path / "file" / "out"
    with pytest.raises(DataError) as caught:
        run(config(tokenizers, output))
    assert capsys.readouterr().out == "" and str(caught.value) == (
        f"cannot write the prepared folder {output} (Not a directory); make room or mend the folder, and give the same "
        "command to go on: shards that are whole are kept"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limits")
def test_a_full_disk_costs_only_the_shard_that_was_being_written(tokenizers, out):
    """A limit on the size of files stands in for the full disk: the system refuses the write in the same way."""
    for name in ("00001.arrow", "00002.arrow", "index.json"):
        (out / "shards" / name).unlink()
    before, preparer = contents(out), Preparer(config(tokenizers, out))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        for write in (lambda: preparer.make(1), lambda: preparer.make(0), lambda: run(preparer.config)):
            with pytest.raises(DataError, match=rf"cannot write the prepared folder {out} \(File too large\); make"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert contents(out) == before
    assert len(ShardedDocuments(run(preparer.config), check=True)) == 10


def test_a_shard_that_was_cut_off_is_made_anew(tokenizers, out):
    whole = {path: path.read_bytes() for path in (shard_path(out, 0), shard_path(out, 1))}
    damaged = shard_path(out, 1)
    for size in (len(whole[damaged]) * 3 // 4, 0):
        damaged.write_bytes(whole[damaged][:size])
        run(config(tokenizers, out))
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
