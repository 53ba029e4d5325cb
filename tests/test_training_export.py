"""A checkpoint as a model folder: it loads, and its logits are those of the checkpoint."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch
from full_disk import FOUND, full_disk
from process_group import process_group
from tiny_run import tiny_run

from cm3.checkpoint import load_tensors, read_json
from cm3.cli import main
from cm3.config import load_config
from cm3.data.scenes import example
from cm3.data.shards import shard_path, write_index, write_shard
from cm3.errors import DataError, ModelFilesError, RequestError
from cm3.model.lora import LoRAConfig, load_adapter
from cm3.model.pretrained import TOKENIZER_FILES, load_model
from cm3.model.transformer import Transformer
from cm3.pipeline import CM3
from cm3.tokenizers.document import DocumentTokenizer, ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3.training import train
from cm3.training.config import DataConfig, ModelRun
from cm3.training.export import export_checkpoint
from cm3.training.sums import write_sums

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """A run of 4 steps on documents of a real tokenizer, saved at 2 and 4."""
    root = tmp_path_factory.mktemp("export")
    data = root / "data"
    rng = np.random.default_rng(0)
    documents = [
        TokenizedDocument(
            (
                TextTokens(rng.integers(4, 300, 5).astype(np.int32)),
                ImageCodes(rng.integers(0, 32, (4, 4)).astype(np.uint16)),
            ),
            {"row": str(number)},
        )
        for number in range(16)
    ]
    write_shard(shard_path(data, 0), documents, {})
    tokenizer = DocumentTokenizer.load(model_folder)
    write_index(data, 1, tokenizer.hash)
    for name in TOKENIZER_FILES:
        shutil.copyfile(model_folder / name, data / name)
    config = tiny_run(
        data, root / "run", steps=4, checkpoint_interval=2, evaluation_interval=0, export_precision="fp32"
    )
    model = dataclasses.replace(config.model, vocabulary_size=tokenizer.vocabulary.size, max_positions=64)
    settings = DataConfig(train=str(data), sequence_length=64)
    with process_group():
        train.run(dataclasses.replace(config, model=model, data=settings))
        yield root / "run"


def logits(tensors, config):
    model = Transformer(config).eval()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    return run_model(model)


@torch.no_grad()
def run_model(model):
    ids_BT = torch.arange(40).reshape(2, 20) * 7
    return model.logits(model(ids_BT))


@pytest.mark.parametrize("step", [2, 4])
def test_logits_are_those_of_the_average(run, tmp_path, step):
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    assert export_checkpoint(checkpoint, tmp_path / "model") == checkpoint
    model = CM3.from_pretrained(tmp_path / "model")
    expected = logits(load_tensors(checkpoint / "average.safetensors"), model.transformer.config)
    assert torch.equal(run_model(model.transformer), expected)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| Steps | {step} of 4 rows" in card and "not known: exported from a checkpoint" in card


def test_the_newest_of_a_run_is_what_the_run_itself_wrote(run, tmp_path):
    for source in (run, run / "checkpoints"):
        assert export_checkpoint(source, tmp_path / "model").name == "step_00000004"
        ours, theirs = (load_tensors(folder / "model.safetensors") for folder in (tmp_path / "model", run / "model"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_an_average_the_weights_are_taken(run, tmp_path):
    checkpoint = shutil.copytree(run / "checkpoints" / "step_00000004", tmp_path / "step_00000004")
    (checkpoint / "average.safetensors").unlink()
    write_sums(checkpoint)
    export_checkpoint(checkpoint, tmp_path / "model", tokenizers=run / "model")
    model = CM3.from_pretrained(tmp_path / "model")
    expected = logits(load_tensors(checkpoint / "weights.safetensors"), model.transformer.config)
    assert torch.equal(run_model(model.transformer), expected)


def test_adapters_are_merged_into_a_whole_model(run, tmp_path):
    pytest.importorskip("peft")
    config = load_config(ModelRun, run / "config.yaml")
    base = shutil.copytree(run / "model", tmp_path / "base")
    changes = {"initialize_from": str(base), "lora": LoRAConfig(rank=2), "output": str(tmp_path / "run")}
    train.run(dataclasses.replace(config, **changes, steps=2))
    export_checkpoint(tmp_path / "run", tmp_path / "merged")
    merged = CM3.from_pretrained(tmp_path / "merged").transformer
    adapted, _ = load_model(base)
    before = run_model(adapted)
    load_adapter(adapted, tmp_path / "run" / "adapter")
    torch.testing.assert_close(run_model(merged), run_model(adapted))
    assert not torch.allclose(run_model(merged), before, rtol=1e-3)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"--model {base} --adapter FOLDER" in card and "2,048 of its adapters" in card
    shutil.copyfile(run / "model" / "config.json", base / "config.json")
    shutil.copyfile(tmp_path / "merged" / "model.safetensors", base / "model.safetensors")
    with pytest.raises(ModelFilesError, match="the run adapted the weights .* restore that model"):
        export_checkpoint(tmp_path / "run", tmp_path / "again")


def test_what_cannot_be_exported_is_named(run, tmp_path):
    checkpoint = shutil.copytree(run / "checkpoints" / "step_00000004", tmp_path / "step_00000004")
    other = shutil.copytree(run / "model", tmp_path / "other")
    captions = [example(1, "train", index).caption for index in range(200)]
    TextTokenizer.train(captions, TextTokenizerConfig(vocabulary_size=320)).save(other / "tokenizer.model")
    with pytest.raises(ModelFilesError, match="was trained with the tokenizers .* name the folder that has the run's"):
        export_checkpoint(checkpoint, tmp_path / "model", tokenizers=other)
    with pytest.raises(ModelFilesError, match="is no checkpoint and no folder of a run"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "model")
    (checkpoint / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(ModelFilesError, match="cannot be used: weights.safetensors is not what was written"):
        export_checkpoint(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [0, 2_000, 20_000])
def test_a_full_disk_leaves_no_half_of_a_model(run, tmp_path, capsys, limit):
    export_checkpoint(run / "checkpoints" / "step_00000002", tmp_path / "old")
    before = contents(tmp_path)
    for name in ("new", "old"):
        with full_disk(limit):
            assert main(["export", str(run), "--out", str(tmp_path / name)]) == 2
        out, error = capsys.readouterr()
        assert f"cannot write the folder {tmp_path / name} ({FOUND}); make room or mend the place" in error
        assert out == "" and error.count("\n") == 1
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["old"]
    assert main(["export", str(run), "--out", str(tmp_path / "new")]) == 0
    assert contents(tmp_path / "new").keys() == contents(tmp_path / "old").keys()


def test_a_place_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ModelFilesError, match=r"cannot write the folder .*file/model \((Not a directory|File exists)\)"
    ):
        export_checkpoint(run, tmp_path / "file" / "model")


def test_an_earlier_export_of_the_run_is_replaced_whole(run, tmp_path):
    out = tmp_path / "model"
    out.mkdir()  # an empty folder is as good as none
    export_checkpoint(run / "checkpoints" / "step_00000002", out)
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of a larger model")
    (tmp_path / "link").symlink_to(out)
    export_checkpoint(run, tmp_path / "link")
    newest = export_checkpoint(run, tmp_path / "other") / "average.safetensors"
    assert contents(out) == contents(tmp_path / "other") and (tmp_path / "link").is_symlink()
    expected = logits(load_tensors(newest), CM3.from_pretrained(out).transformer.config)
    assert torch.equal(run_model(CM3.from_pretrained(out).transformer), expected)
    ours, theirs = (read_json(folder / "config.json") for folder in (out, run / "model"))
    assert ours == theirs, "what the run itself wrote is an export of it, too"


def test_a_finished_run_that_is_run_again_keeps_what_a_user_put_beside_its_model(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    (again / "model" / ".git").mkdir()
    (again / "model" / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (again / "model" / "notes.txt").write_text("mine")
    before = contents(again / "model")
    (again / "model" / "model-00001-of-00002.safetensors").write_bytes(b"of a larger model")
    (again / "model" / "model.safetensors").write_bytes(b"damaged")
    train.run(dataclasses.replace(load_config(ModelRun, run / "config.yaml"), output=str(again)))
    after = contents(again / "model")
    for folder in (before, after):  # these two name the run
        folder.pop("config.json")
        folder.pop("README.md")
    assert after == before


def test_a_model_folder_that_cannot_be_replaced_is_refused_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "run" / "model")
    config = dataclasses.replace(load_config(ModelRun, run / "config.yaml"), output=str(tmp_path / "run"))
    with pytest.raises(ModelFilesError, match=r"run/model is a mount point.* choose a folder inside it"):
        train.run(config)
    assert list(tmp_path.iterdir()) == []


def test_a_run_can_leave_out_the_comparison_with_checksums(run, tmp_path, capsys):
    config = load_config(ModelRun, run / "config.yaml")
    data = shutil.copytree(config.data.train, tmp_path / "data")
    content = bytearray(shard_path(data, 0).read_bytes())
    content[-2] ^= 1  # of the checksum
    shard_path(data, 0).write_bytes(content)
    settings = dataclasses.replace(config.data, train=str(data), validation=str(data))
    with pytest.raises(DataError, match="cannot be trained on"):
        train.open_data(dataclasses.replace(config, data=settings))
    settings = dataclasses.replace(settings, check_shards=False)
    opened = train.open_data(dataclasses.replace(config, data=settings))
    assert [len(documents) for documents in opened] == [16, 16] and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "notes.txt").write_text("mine"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("no JSON"),
        lambda folder: (folder / "config.json").write_text("[]"),
    ],
)
def test_a_folder_with_anything_else_is_left_alone(run, tmp_path, spoil):
    export_checkpoint(run, tmp_path / "model")
    spoil(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(RequestError) as caught:
        export_checkpoint(run, tmp_path / "model")
    assert str(caught.value) == (
        f"{tmp_path / 'model'} is not empty, and what it holds is not just an earlier export of {run}; choose a folder "
        "that does not exist yet"
    )
    assert contents(tmp_path) == before


def test_the_export_of_another_run_and_a_file_are_left_alone(run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints", tmp_path / "other" / "checkpoints")
    export_checkpoint(tmp_path / "other", tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name in ("model", "file"):
        assert main(["export", str(run), "--out", str(tmp_path / name)]) == 2
        assert f"{tmp_path / name} is not empty" in capsys.readouterr().err
    assert contents(tmp_path) == before
