"""A run that starts from the weights of a finished model: from exactly these, and from no model that does not fit."""

import dataclasses
import itertools
import shutil

import pytest
import torch
from process_group import process_group
from tiny_run import TOKENIZER_HASH, VOCABULARY, losses, prepare, tiny_run

from cm3.checkpoint import load_tensors, read_json, write_json
from cm3.config import load_config
from cm3.data.shards import ShardedDocuments
from cm3.errors import ConfigError, ModelFilesError
from cm3.model.pretrained import load_model
from cm3.training import train
from cm3.training.config import ModelRun
from cm3.training.loss import LossModule
from cm3.training.optimizer import OptimizerConfig
from cm3.training.show import show_model_run

pytest.importorskip("deepspeed")

STANDING_STILL = OptimizerConfig(learning_rate=1e-30, warmup_steps=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with prepared data, a finished run in fp32 and one that starts from its model."""
    root = tmp_path_factory.mktemp("initial")
    with process_group():
        train.run(tiny_run(prepare(root / "data"), root / "source", precision="fp32", export_precision="fp32"))
        train.run(run_of(root, "tuned"))
        yield root


def run_of(root, name, **changes):
    """A run without dropout that starts from the model of the fixture's first one."""
    model = dataclasses.replace(tiny_run(root, root).model, dropout=0.0)
    settings = {"initialize_from": str(root / "source" / "model"), "model": model, "precision": "fp32", "steps": 4}
    return tiny_run(root / "data", root / name, **settings | changes)


def test_the_first_evaluation_is_that_of_the_model(folder):
    evaluations = losses(folder / "tuned", "validation")
    assert evaluations.keys() == {0, 4}
    config = run_of(folder, "tuned")
    transformer, _ = load_model(folder / "source" / "model")
    module = LossModule(transformer, VOCABULARY, config)
    loss = count = 0.0
    for batch in itertools.islice(make_evaluation(folder, config), 2):  # 4 rows, 2 at a time
        with torch.no_grad():
            _, sums = module(batch["ids_BT"], batch["document_ids_BT"], batch["weights_BT"])
        loss, count = loss + float(sums[0] + sums[2]), count + float(sums[1] + sums[3])
    assert evaluations[0] == pytest.approx(loss / count, rel=1e-6)
    assert evaluations[0] == losses(folder / "source", "validation")[12] != evaluations[4]


def make_evaluation(folder, config):
    return train.make_loader(config, ShardedDocuments(folder / "data"), evaluation=True)


@pytest.mark.parametrize("changes", [{"zero_stage": 0, "precision": "fp32"}, {"zero_stage": 1}, {"zero_stage": 3}])
def test_masters_are_the_fp32_weights_of_the_file(folder, changes):
    name = f"still {changes['zero_stage']}"
    still = {"precision": "bf16", "ema_decay": 0.0, "steps": 1, "optimizer": STANDING_STILL, "evaluation_interval": 0}
    train.run(run_of(folder, name, **still | changes))
    masters = load_tensors(folder / name / "checkpoints" / "step_00000001" / "weights.safetensors")
    expected = load_tensors(folder / "source" / "model" / "model.safetensors")
    assert masters.keys() == {f"model.{each}" for each in expected}
    assert all(torch.equal(masters[f"model.{each}"], tensor) for each, tensor in expected.items())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in expected.values())
    assert losses(folder / name, "validation").keys() == {1}


def test_the_average_starts_from_the_file_and_the_optimiser_afresh(folder):
    train.run(run_of(folder, "averaged", steps=1, optimizer=STANDING_STILL))
    checkpoint = folder / "averaged" / "checkpoints" / "step_00000001"
    average = load_tensors(checkpoint / "average.safetensors")
    expected = load_tensors(folder / "source" / "model" / "model.safetensors")
    assert all(torch.equal(average[f"model.{each}"], tensor) for each, tensor in expected.items())
    one_step = load_tensors(checkpoint / "exp_avg_sq.safetensors")
    after_twelve = load_tensors(folder / "source" / "checkpoints" / "step_00000012" / "exp_avg_sq.safetensors")
    assert all(one_step[name].sum() < after_twelve[name].sum() for name in one_step)
    assert read_json(checkpoint / "state.json")["step"] == 1


def test_a_run_with_checkpoints_goes_on_from_them(folder, capsys):
    train.run(run_of(folder, "half", steps=2, evaluation_interval=2))
    shutil.copytree(folder / "half", folder / "resumed")
    train.run(run_of(folder, "resumed", evaluation_interval=2, initialize_from=str(folder / "gone")))
    out = capsys.readouterr().out
    assert "resumed from" in out and out.count("starting from the weights of") == 1
    kept = losses(folder / "resumed", "validation")
    assert list(kept) == [0, 2, 4] and kept[0] == losses(folder / "tuned", "validation")[0]


def test_a_model_that_is_missing_is_named_before_the_settings_are_printed(folder, capsys):
    with pytest.raises(ModelFilesError, match="gone"):
        train.run(run_of(folder, "never", initialize_from=str(folder / "gone")))
    assert capsys.readouterr().out == "" and not (folder / "never").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(folder):
    shutil.copytree(folder / "half", folder / "killed")
    shutil.rmtree(folder / "killed" / "checkpoints")
    train.run(run_of(folder, "killed", steps=2, evaluation_interval=2))
    for split in ("train", "validation"):
        assert losses(folder / "killed", split) == losses(folder / "half", split)
    lines = (folder / "killed" / "metrics.jsonl").read_text().splitlines()
    assert sum('"split": "validation"' in line for line in lines) == 2


def test_it_is_recorded_and_shown(folder):
    config = run_of(folder, "tuned")
    source = config.initialize_from
    assert load_config(ModelRun, folder / "tuned" / "config.yaml") == config
    assert f"| Started from | `{source}` |" in (folder / "tuned" / "model" / "README.md").read_text()
    assert "| Started from | random weights |" in (folder / "source" / "model" / "README.md").read_text()
    assert f"initialize_from: {source}\n" in show_model_run(config)
    assert f", starting from {source}\n" in show_model_run(config)
    assert ", starting from random ones\n" in show_model_run(dataclasses.replace(config, initialize_from=None))


def test_a_model_of_another_shape_is_refused_by_the_names_of_the_settings(folder):
    model = dataclasses.replace(
        run_of(folder, "x").model, num_layers=3, norm="rmsnorm", init_std=0.1, feed_forward_width=128
    )
    with pytest.raises(ConfigError) as caught:
        train.run(run_of(folder, "other shape", model=model))
    assert (
        "is another model than `model:`: num_layers is 2 there and 3 here, norm is 'layernorm' there and 'rmsnorm' "
        "here; write the values of that model under `model:`"
    ) in str(caught.value)


def test_a_model_of_other_tokenizers_is_refused(folder):
    other = shutil.copytree(folder / "source" / "model", folder / "other tokenizers")
    write_json(other / "config.json", read_json(other / "config.json") | {"tokenizer_hash": "f" * 64})
    with pytest.raises(
        ConfigError, match=f"tokenizers ffffffffffff, the data were prepared with {TOKENIZER_HASH[:12]}"
    ):
        train.run(run_of(folder, "refused", initialize_from=str(other)))


def test_a_model_that_is_not_there_or_damaged_is_named(folder):
    with pytest.raises(ModelFilesError, match="nowhere' is no folder here"):
        train.run(run_of(folder, "refused", initialize_from=str(folder / "nowhere")))
    with pytest.raises(ModelFilesError, match="has no config.json, so it is no model folder"):
        train.run(run_of(folder, "refused", initialize_from=str(folder / "source")))
    broken = shutil.copytree(folder / "source" / "model", folder / "broken")
    (broken / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelFilesError, match="model.safetensors is damaged"):
        train.run(run_of(folder, "refused", initialize_from=str(broken)))
