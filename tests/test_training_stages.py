"""`cm3 train` and `cm3 prepare` look for what they need before they print the settings of a run."""

from pathlib import Path

import pytest

from cm3.cli import main

ROOT = Path(__file__).parents[1]
NOWHERE = ["--data.kind", "folder", "--data.path", "nowhere"]


@pytest.mark.parametrize(
    ("verb", "config", "overrides", "missing"),
    [
        ("train", "demo/model.yaml", [], "runs/demo/train holds no complete shards"),
        ("train", "tutorial/tune.yaml", [], "runs/tutorial/data holds no complete shards"),
        ("train", "demo/text_tokenizer.yaml", NOWHERE, "nowhere"),
        ("train", "demo/image_tokenizer.yaml", NOWHERE, "nowhere"),
        ("train", "demo/image_tokenizer.yaml", ["--perceptual_weights", "lpips.pth"], "lpips.pth"),
        ("train", "demo/retriever.yaml", ["--text_tokenizer", "nowhere"], "nowhere/tokenizer.model"),
        ("prepare", "demo/prepare_train.yaml", ["--image_tokenizer", "nowhere"], "nowhere/image_tokenizer"),
        ("prepare", "tutorial/prepare.yaml", [], "my-data/rows.jsonl is not a file"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_printed(
    verb, config, overrides, missing, tmp_path, monkeypatch, capsys
):
    for name in ("configs", "cm3"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert main([verb, f"configs/{config}", *overrides]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("error: ") and missing in error and error.count("\n") == 1
    assert not Path("runs").exists(), "nothing is written either"
