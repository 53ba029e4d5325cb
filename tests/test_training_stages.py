"""`cm3 train` and `cm3 prepare` look for what they need before they print the settings of a run."""

import os
from pathlib import Path

import pytest
from full_disk import FOUND, full_disk

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


def refused(verb, config, output, capsys):
    """The one line of a run that finds before all else that it cannot write its output."""
    assert main([verb, str(ROOT / "configs" / config), "--output", str(output)]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.count("\n") == 1 and f"output={output} cannot be written to (" in error
    assert error.endswith("; choose another output, or make room or mend that place\n")
    return error


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        ("train", "demo/model.yaml"),
        ("train", "demo/text_tokenizer.yaml"),
        ("train", "demo/image_tokenizer.yaml"),
        ("train", "demo/retriever.yaml"),
        ("prepare", "demo/prepare_train.yaml"),
    ],
)
def test_an_output_that_cannot_be_written_is_said_before_anything_else(verb, config, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "(Not a directory)" in refused(verb, config, tmp_path / "file" / "run", capsys)
    with full_disk():
        assert f"({FOUND})" in refused(verb, config, tmp_path / "run" / "of mine", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not hold this user")
@pytest.mark.parametrize("name", ["", "run"])
def test_a_read_only_output_is_said_before_anything_else(name, tmp_path, capsys):
    tmp_path.chmod(0o555)
    try:
        assert "(Permission denied)" in refused("train", "demo/model.yaml", tmp_path / name, capsys)
    finally:
        tmp_path.chmod(0o755)
