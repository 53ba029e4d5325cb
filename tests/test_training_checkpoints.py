"""Checkpoints: damage of any kind is found, the one before is used, and a full disk costs nothing but the save."""

import json
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process_group import process_group
from torch import nn

from cm3.errors import ModelFilesError
from cm3.training.engine import STATE_KINDS, Engine, deepspeed_config
from cm3.training.state import (
    RunState,
    checkpoint_damage,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from cm3.training.sums import SUMS_FILE, find_damage, write_sums

pytest.importorskip("deepspeed")

FILES = [*(f"{kind}.safetensors" for kind in STATE_KINDS), "state.json", "config.yaml", SUMS_FILE]
HASH = "0123456789abcdef" * 4


class Square(nn.Module):
    """The smallest thing to train: 40,000 numbers that should be 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 40_000).reshape(200, 200))

    def forward(self, scale):
        return ((self.weight * scale).square().mean(),)


@pytest.fixture(scope="module")
def engine():
    """An engine after one update; the process group and its environment end with the module."""
    with process_group():
        torch.manual_seed(0)
        module = Square()
        config = deepspeed_config(
            micro_batch_rows=1,
            accumulation_steps=1,
            zero_stage=1,
            bf16=False,
            gradient_clip=1.0,
            offload_optimizer=False,
        )
        made = Engine(module, torch.optim.AdamW(module.parameters(), lr=0.1), config)
        made.backward(made(torch.ones(1))[0])
        yield made


def state(step, **changes):
    place = {"epoch": 0, "window": 0, "row": step}
    return RunState(step=step, tokens=10 * step, seconds=1.0, loader=place, tokenizer_hash=HASH, **changes)


def save(folder, engine, *steps, keep=2, keep_every_steps=0):
    for step in steps:
        save_checkpoint(folder, engine, state(step), None, "a: 1\n", keep=keep, keep_every_steps=keep_every_steps)


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, engine, 4, 8, 12, keep=3)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """Three good checkpoints to spoil."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_complete_and_good(folder):
    newest = newest_checkpoint(folder)
    assert newest == folder / "step_00000012" and names(newest) == sorted(FILES)
    assert checkpoint_damage(newest) == []
    assert names(folder) == ["latest", "step_00000004", "step_00000008", "step_00000012"]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_can_check_it(folder):
    done = subprocess.run(["sha256sum", "--check", SUMS_FILE], cwd=folder / "step_00000012", capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK") == len(FILES) - 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [flip, halve, Path.unlink], ids=["flipped bit", "half", "missing"])
@pytest.mark.parametrize("name", FILES[:-1])
def test_a_damaged_checkpoint_is_passed_over_and_the_fault_named(folder, capsys, name, spoil):
    spoil(folder / "step_00000012" / name)
    assert newest_checkpoint(folder) == folder / "step_00000008"
    fault = "is missing" if spoil is Path.unlink else "is not what was written (its checksum differs)"
    assert f"warning: step_00000012 cannot be used: {name} {fault}; using {folder / 'step_00000008'}" in (
        capsys.readouterr().out
    )


def test_two_damaged_ones_are_passed_over(folder, capsys):
    flip(folder / "step_00000012" / "weights.safetensors")
    shutil.rmtree(folder / "step_00000008")
    (folder / "step_00000008").mkdir()
    assert newest_checkpoint(folder) == folder / "step_00000004"
    out = capsys.readouterr().out
    assert (
        "step_00000012 cannot be used" in out and "step_00000008 cannot be used: weights.safetensors is missing" in out
    )


def test_the_checksums_themselves_may_be_damaged(folder):
    sums = folder / "step_00000012" / SUMS_FILE
    whole = sums.read_text()
    for text, fault in (
        ("", "does not list weights.safetensors"),
        (whole.split("\n", 2)[2], "does not list"),
        (whole[:-40], "config.yaml|weights|is damaged|is missing"),
        ("\x00" * 500, "is damaged"),
    ):
        sums.write_text(text)
        assert checkpoint_damage(sums.parent), fault
        assert newest_checkpoint(folder).name == "step_00000008"


@pytest.mark.parametrize("content", [None, "", "step_00000016", "../elsewhere", "\x00\xff"])
def test_without_a_name_to_go_by_the_newest_good_one_is_used(folder, capsys, content):
    marker = folder / "latest"
    marker.unlink() if content is None else marker.write_text(content, encoding="latin-1")
    flip(folder / "step_00000012" / "exp_avg.safetensors")
    assert newest_checkpoint(folder).name == "step_00000008"
    expected = "latest is missing" if content is None else "which is not there"
    assert expected in capsys.readouterr().out


def test_a_run_can_be_set_back(folder, capsys):
    (folder / "latest").write_text("step_00000008\n")
    assert newest_checkpoint(folder).name == "step_00000008"
    flip(folder / "step_00000008" / "exp_avg.safetensors")
    assert newest_checkpoint(folder).name == "step_00000004"  # never one that the run was set back from


def test_where_none_is_good_there_is_an_error(folder):
    for path in folder.glob("step_*"):
        halve(path / "state.json")
    with pytest.raises(ModelFilesError, match="no checkpoint in .* is good .*step_00000004 cannot be used: state.json"):
        newest_checkpoint(folder)
    for path in folder.glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(ModelFilesError, match="names 'step_00000012', which is not there"):
        newest_checkpoint(folder)


def test_a_new_run_has_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "nothing") is None


def test_an_early_checkpoint_without_checksums_is_checked_as_far_as_it_goes(folder):
    for path in folder.glob("step_*"):
        (path / SUMS_FILE).unlink()
    assert newest_checkpoint(folder).name == "step_00000012"
    halve(folder / "step_00000012" / "exp_avg.safetensors")
    assert newest_checkpoint(folder).name == "step_00000008"
    (folder / "step_00000008" / "state.json").unlink()
    assert newest_checkpoint(folder).name == "step_00000004"


def test_numbers_of_an_early_version_are_read_and_unknown_ones_refused(folder):
    path = folder / "step_00000012" / "state.json"
    values = json.loads(path.read_text())
    early = {name: values[name] for name in ("step", "tokens", "seconds", "loader", "tokenizer_hash")}
    path.write_text(json.dumps(early))
    assert read_state(path.parent) == state(12)
    path.write_text(json.dumps(early | {"colour": 1}))
    with pytest.raises(ModelFilesError, match="not of this version of open-cm3 .*colour"):
        read_state(path.parent)


def test_the_last_ones_and_every_nth_are_kept(engine, tmp_path):
    save(tmp_path, engine, *range(1, 11), keep=2, keep_every_steps=4)
    assert names(tmp_path) == ["latest"] + [f"step_{step:08d}" for step in (4, 8, 9, 10)]
    save(tmp_path, engine, 11, keep=1)
    assert names(tmp_path) == ["latest", "step_00000011"]


def test_what_was_saved_is_loaded(engine, folder):
    before = {kind: dict(engine.state(kind)) for kind in STATE_KINDS}
    assert all(tensor.abs().max() > 0 for tensors in before.values() for tensor in tensors.values())
    engine.backward(engine(torch.ones(1))[0])
    loaded = load_checkpoint(newest_checkpoint(folder), engine, None, HASH)
    assert loaded == state(12)
    for kind in STATE_KINDS:
        assert all(torch.equal(tensor, before[kind][name]) for name, tensor in engine.state(kind))


def fail_to_save(folder, engine, step):
    with pytest.raises(ModelFilesError) as caught:
        save(folder, engine, step)
    assert "\n" not in str(caught.value) and "give the same command to go on" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_full_disk_costs_only_the_save(engine, folder, limit):
    """A limit on the size of files stands in for the full disk: the system refuses the write in the same way."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        message = fail_to_save(folder, engine, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert f"cannot write the checkpoint {folder / 'step_00000016'} (File too large)" in message
    assert names(folder) == ["latest", "step_00000004", "step_00000008", "step_00000012"]
    assert newest_checkpoint(folder).name == "step_00000012" and not checkpoint_damage(folder / "step_00000012")
    save(folder, engine, 16)
    assert newest_checkpoint(folder).name == "step_00000016"


def test_a_folder_that_cannot_be_written_is_named(engine, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    assert "File exists" in fail_to_save(tmp_path / "checkpoints", engine, 4)
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "something").touch()
    assert "cannot write the checkpoint" in fail_to_save(tmp_path, engine, 4)


def test_what_a_killed_save_left_is_no_checkpoint(engine, folder):
    for name in (".0123abcd.tmp.step_00000016", ".0123abcd.old.step_00000012"):
        shutil.copytree(folder / "step_00000012", folder / name)
    (folder / ".0123abcd.tmp.latest").touch()
    assert newest_checkpoint(folder).name == "step_00000012"
    save(folder, engine, 16, keep=1)
    assert newest_checkpoint(folder).name == "step_00000016"


@settings(max_examples=100)
@given(
    contents=st.dictionaries(st.sampled_from(["a", "b", "c.json"]), st.binary(min_size=1), min_size=1),
    place=st.integers(0, 10**6),
    bits=st.integers(1, 255),
)
def test_any_changed_byte_is_found(contents, place, bits):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        write_sums(folder)
        assert find_damage(folder, list(contents)) == []
        files = sorted(contents)
        changed = folder / files[place % len(files)]
        content = bytearray(changed.read_bytes())
        content[place % len(content)] ^= bits
        changed.write_bytes(content)
        assert find_damage(folder) == [f"{changed.name} is not what was written (its checksum differs)"]
