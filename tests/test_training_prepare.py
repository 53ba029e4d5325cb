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
    assert report["rows"] == {"read": 10, "bad": 0, "bad_rows": []}
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


def test_wrong_settings_are_refused(tokenizers, tmp_path):
    with pytest.raises(ConfigError, match="rows_per_shard=0"):
        config(tokenizers, tmp_path, rows_per_shard=0)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/prepare_*.yaml")), ids=lambda path: path.parent.name)
def test_every_prepare_config_loads(path):
    loaded = load_config(PrepareConfig, path, ["--data.max_bad_fraction", "0.5"])
    assert loaded.data.split in path.stem
    assert loaded.output == f"runs/{path.parent.name}/{loaded.data.split}"
