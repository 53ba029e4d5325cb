"""Atomic writes, JSON and strict safetensors."""

import errno
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from torch import nn

from cm3 import checkpoint
from cm3.checkpoint import (
    atomic_path,
    load_model_weights,
    load_strict,
    load_tensors,
    new_folder,
    read_json,
    remove_folder,
    remove_leftovers,
    save_model_weights,
    save_tensors,
    stored_tensors,
    stream_model_weights,
    tensor_shapes,
    write_json,
    write_text,
)
from cm3.errors import ModelFilesError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_and_keeps_its_suffix(tmp_path: Path):
    target = tmp_path / "new" / "picture.png"
    write_text(target, "old")
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".png" and temporary.parent == target.parent
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names_in(target.parent) == ["picture.png"]


def test_a_folder_is_replaced_whole(tmp_path: Path):
    target = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_path(target) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / content).write_text(content)
    assert names_in(target / "inner") == ["second"]
    assert names_in(tmp_path) == ["model"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that is to be replaced, with a file of its own and things that a user put there."""
    folder = tmp_path / "place" / "model"
    (folder / ".git" / "objects" / "empty").mkdir(parents=True)
    (folder / ".git" / "objects" / "a").write_text("history")
    (folder / ".git" / "objects" / "a").chmod(0o444)
    (folder / "notes").write_text("mine")
    (folder / "link").symlink_to("notes")
    (folder / "config.json").write_text("old")
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    return folder


def contents(folder: Path) -> dict[str, str | None]:
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in folder.rglob("*")}


def test_what_a_user_put_into_a_folder_is_carried_over(model: Path):
    before = contents(model)
    with new_folder(model, ("model-*.safetensors",)) as folder:
        assert names_in(folder) == [] and contents(model) == before
        (folder / "config.json").write_text("new")
    del before["model-00001-of-00002.safetensors"]
    assert contents(model) == before | {"config.json": "new"}
    assert (model / "link").is_symlink() and names_in(model.parent) == ["model"]


def test_things_of_users_are_copied_where_files_cannot_have_two_names(model: Path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    before = contents(model)
    monkeypatch.setattr(os, "link", refuse)
    with new_folder(model) as folder:
        (folder / "config.json").write_text("new")
    assert contents(model) == before | {"config.json": "new"}


def test_an_old_folder_comes_back_where_the_new_one_cannot_take_its_place(model: Path, monkeypatch):
    before, rename = contents(model), Path.rename

    def fail_with_the_new(path: Path, target: Path) -> Path:
        if ".tmp." in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path), None, str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_with_the_new)
    with pytest.raises(ModelFilesError, match="cannot write the folder .*model"), new_folder(model) as folder:
        (folder / "config.json").write_text("new")
    assert contents(model) == before and names_in(model.parent) == ["model"]


def test_an_old_folder_that_cannot_go_yet_is_no_failure(model: Path, monkeypatch):
    def busy(*args, **kwargs):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "rmdir", busy)  # as NFS does while a file in it is open
    with new_folder(model) as folder:
        (folder / "config.json").write_text("new")
    assert (model / "config.json").read_text() == "new" and len(names_in(model.parent)) == 2
    monkeypatch.undo()
    remove_leftovers(model.parent)
    assert names_in(model.parent) == ["model"]


def test_a_mount_point_is_refused_before_anything_is_written(model: Path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == model)
    before = contents(model.parent)
    with pytest.raises(ModelFilesError) as caught, new_folder(model):
        pytest.fail("the body of a folder that cannot be written ran")
    assert str(caught.value) == (
        f"{model} is a mount point, and a folder that is written whole cannot take its place; choose a folder inside "
        f"it, such as {model / 'new'}"
    )
    assert contents(model.parent) == before


def test_only_what_cannot_be_written_is_said_to_be(model: Path, tmp_path: Path):
    before = contents(model.parent)
    with pytest.raises(FileNotFoundError, match=r"lost\.json"), new_folder(model) as folder:
        shutil.copyfile(model.parent / "lost.json", folder / "a.json")
    with pytest.raises(ModelFilesError, match="cannot write the folder .*No such file"), new_folder(model) as folder:
        (folder / "nothing" / "a.json").write_text("new")
    (tmp_path / "source").write_bytes(bytes(100))
    with full_disk(), pytest.raises(ModelFilesError, match="cannot write the folder"), new_folder(model) as folder:
        shutil.copyfile(tmp_path / "source", folder / "a.json")
    assert contents(model.parent) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, kind: str):
    target = tmp_path / "target"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="disk full"), atomic_path(target) as temporary:
        if kind == "folder":
            temporary.mkdir()
            temporary = temporary / "part"
        temporary.write_text("half")
        raise RuntimeError("disk full")
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["target"]


def test_writing_nothing_is_a_fault_of_the_caller(tmp_path: Path):
    with pytest.raises(AssertionError, match="nothing was written"), atomic_path(tmp_path / "target"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_permissions_of_any_new_file(tmp_path: Path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "a.json", {})
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_json_round_trip_in_utf8(tmp_path: Path):
    value = {"caption": "ein grüner Stern ★", "sizes": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "grüner Stern ★" in (tmp_path / "a.json").read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"cannot read .*a\.json.*check the path"), (b"{", "is not JSON"), (b"\xff\xff", "is not JSON")],
)
def test_bad_json_names_the_file(tmp_path: Path, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ModelFilesError, match=message):
        read_json(tmp_path / "a.json")


def test_tensors_round_trip_with_dtypes_views_and_gradients(tmp_path: Path):
    tensors = {
        "transposed": torch.randn(3, 4).T,
        "half": torch.randn(5).bfloat16(),
        "ids": torch.arange(6),
        "parameter": nn.Parameter(torch.randn(2)),
        "scalar": torch.tensor(1.5),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"step": "3"})
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_tied_tensors_are_refused_and_nothing_is_left(tmp_path: Path):
    tied = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save_tensors(tmp_path / "a.safetensors", {"embedding": tied, "head": tied})
    assert names_in(tmp_path) == []


def test_missing_and_damaged_tensor_files(tmp_path: Path):
    with pytest.raises(ModelFilesError, match="no such file"):
        load_tensors(tmp_path / "a.safetensors")
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(100)})
    content = (tmp_path / "a.safetensors").read_bytes()
    for damaged in (content[:-40], b"", b"version https://git-lfs.github.com/spec/v1"):
        (tmp_path / "a.safetensors").write_bytes(damaged)
        with pytest.raises(ModelFilesError, match="is damaged"):
            load_tensors(tmp_path / "a.safetensors")


def test_strict_loading_copies_every_value():
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    load_strict(target, source.state_dict(), "here")
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)
    assert source.weight.data_ptr() != target.weight.data_ptr()


def test_strict_loading_lists_every_problem_and_changes_nothing():
    module = nn.Linear(2, 3)
    before = module.bias.clone()
    tensors = {"weight": torch.zeros(2, 3), "scale": torch.zeros(1)}
    with pytest.raises(ModelFilesError) as caught:
        load_strict(module, tensors, "old.safetensors")
    message = str(caught.value)
    for part in (
        "old.safetensors",
        "Linear",
        "missing: bias",
        "unexpected: scale",
        "wrongly shaped: weight (2, 3) instead of (3, 2)",
    ):
        assert part in message
    assert torch.equal(module.bias, before)


def test_a_long_list_of_problems_is_shortened():
    with pytest.raises(ModelFilesError, match=r"unexpected: extra0, .* and 12 more"):
        load_strict(nn.Identity(), {f"extra{i}": torch.zeros(1) for i in range(20)}, "here")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {f"layer{i}.weight": torch.randn(10, 10) for i in range(5)}


def assert_same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_weights_in_one_file_and_in_shards(tmp_path: Path, weights: dict[str, torch.Tensor]):
    save_model_weights(tmp_path, weights)
    assert names_in(tmp_path) == [checkpoint.WEIGHTS_FILE]
    assert_same(load_model_weights(tmp_path), weights)

    save_model_weights(tmp_path, weights, max_shard_size=900)  # bytes: two tensors of 400 fit
    assert names_in(tmp_path) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        checkpoint.INDEX_FILE,
    ]
    assert_same(load_model_weights(tmp_path), weights)
    index = json.loads((tmp_path / checkpoint.INDEX_FILE).read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == 2000

    save_model_weights(tmp_path, weights)
    assert names_in(tmp_path) == [checkpoint.WEIGHTS_FILE]


def test_streamed_weights_are_made_once_and_a_shard_at_a_time(tmp_path: Path, weights: dict[str, torch.Tensor]):
    asked, made = [], []

    def make(name: str) -> torch.Tensor:
        alive = [tensor for tensor in (reference() for reference in made) if tensor is not None]
        assert sum(tensor.nbytes for tensor in alive) < 900
        tensor = weights[name].clone()
        asked.append(name)
        made.append(weakref.ref(tensor))
        return tensor

    stream_model_weights(tmp_path / "streamed", {n: t.to("meta") for n, t in weights.items()}, make, max_shard_size=900)
    save_model_weights(tmp_path / "saved", weights, max_shard_size=900)
    assert sorted(asked) == sorted(weights)
    assert names_in(tmp_path / "streamed") == names_in(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "streamed" / path.name).read_bytes()


def test_stored_tensors_are_known_before_they_are_read(tmp_path: Path, weights: dict[str, torch.Tensor]):
    save_model_weights(tmp_path, {**weights, "half": torch.ones(3, dtype=torch.bfloat16)}, max_shard_size=900)
    stored = stored_tensors(tmp_path)
    assert stored.keys() == {*weights, "half"}
    assert (stored["layer0.weight"].shape, stored["layer0.weight"].dtype) == ((10, 10), "F32")
    assert (stored["half"].shape, stored["half"].dtype) == ((3,), "BF16")
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in weights.items())


def test_faults_of_a_weights_folder(tmp_path: Path, weights: dict[str, torch.Tensor]):
    with pytest.raises(ModelFilesError, match="holds no weights"):
        load_model_weights(tmp_path)
    save_model_weights(tmp_path, weights, max_shard_size=900)
    index_path = tmp_path / checkpoint.INDEX_FILE
    index = read_json(index_path)

    write_json(index_path, index | {"weight_map": index["weight_map"] | {"lost": "../outside.safetensors"}})
    with pytest.raises(ModelFilesError, match="no valid weight_map"):
        load_model_weights(tmp_path)

    first = index["weight_map"]["layer0.weight"]
    write_json(index_path, index | {"weight_map": index["weight_map"] | {"lost": first}})
    with pytest.raises(ModelFilesError, match="differ in lost"):
        load_model_weights(tmp_path)

    write_json(index_path, index)
    (tmp_path / first).unlink()
    with pytest.raises(ModelFilesError, match=f"{first}: no such file"):
        load_model_weights(tmp_path)


def test_leftovers_of_killed_writes_are_told_from_other_files(tmp_path: Path):
    kept = [".hidden", "model", ".0123abcd.tmp", ".0123abcg.tmp.model", "0123abcd.tmp.model"]
    for name in [*kept, ".0123abcd.tmp.model", ".0123abcd.old.latest", ".tmpuS432z"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").touch()
    (tmp_path / ".fedcba98.tmp.a.json").touch()
    with atomic_path(tmp_path / "new") as temporary:  # the names are those that are really used
        temporary.touch()
        assert temporary.name in names_in(tmp_path)
        remove_leftovers(tmp_path)
        assert names_in(tmp_path) == sorted(kept)
        temporary.touch()
    remove_leftovers(tmp_path / "nothing")


def test_a_folder_is_removed_whole(tmp_path: Path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").touch()
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path: None)  # as if killed there
    remove_folder(tmp_path / "model")
    assert not (tmp_path / "model").exists() and len(names_in(tmp_path)) == 1
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == []


def test_shapes_come_from_the_header_which_tells_a_cut_file(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.zeros(3, 4), "b": torch.zeros(())})
    assert tensor_shapes(path) == {"a": (3, 4), "b": ()}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFilesError, match="is damaged"):
        tensor_shapes(path)
    with pytest.raises(ModelFilesError, match="nothing.safetensors"):
        tensor_shapes(tmp_path / "nothing.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limits")
def test_a_full_disk_is_told_as_the_system_tells_it(tmp_path: Path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and names_in(tmp_path) == []
