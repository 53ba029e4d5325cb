"""Training of adapters: only they change, only they are saved, and the frozen model with them is what was evaluated."""

import dataclasses
import itertools
import shutil

import pytest
import torch
from process_group import process_group
from tiny_run import TOKENIZER_HASH, VOCABULARY, losses, prepare, tiny_run

from cm3.checkpoint import load_tensors, read_json
from cm3.config import load_config
from cm3.data.shards import ShardedDocuments
from cm3.errors import ConfigError, ModelFilesError
from cm3.model.lora import LoRAConfig, adapter_parameter_count, load_adapter, weights_hash
from cm3.model.pretrained import load_model
from cm3.training import train
from cm3.training.config import ModelRun
from cm3.training.loss import LossModule
from cm3.training.show import memory, show_model_run

pytest.importorskip("deepspeed")
pytest.importorskip("peft")

LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.1)
ALL = LoRAConfig(rank=2, train_embeddings=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with prepared data, a finished run, and one that trains adapters of its model."""
    root = tmp_path_factory.mktemp("lora")
    with process_group():
        train.run(tiny_run(prepare(root / "data"), root / "source", precision="fp32", steps=3))
        train.run(run_of(root, "tuned", steps=12))
        yield root


def run_of(root, name, **changes):
    """A run in fp32 that trains adapters of the model of the fixture's first one."""
    source = {"initialize_from": str(root / "source" / "model"), "lora": LORA}
    settings = {"precision": "fp32", "steps": 4, "checkpoint_interval": 2, "evaluation_interval": 2}
    return tiny_run(root / "data", root / name, **source | settings | changes)


def test_the_loss_falls_from_that_of_the_frozen_model(folder):
    evaluations = losses(folder / "tuned", "validation")
    assert evaluations[12] < evaluations[0] - 0.01
    transformer, _ = load_model(folder / "source" / "model", dtype=torch.float32)
    assert evaluations[0] == pytest.approx(validation_loss(folder, transformer), rel=1e-6)


def test_the_saved_adapter_gives_the_loss_of_the_run(folder):
    assert not (folder / "tuned" / "model").exists()
    transformer, config = load_model(folder / "source" / "model", dtype=torch.float32, tokenizer_hash=TOKENIZER_HASH)
    found = weights_hash(transformer)
    load_adapter(transformer, folder / "tuned" / "adapter")
    assert losses(folder / "tuned", "validation")[12] == pytest.approx(validation_loss(folder, transformer), rel=1e-5)
    assert read_json(folder / "tuned" / "adapter" / "base.json") == {
        "model": str(folder / "source" / "model"),
        "weights_hash": found,
        "tokenizer_hash": TOKENIZER_HASH,
    }
    saved = load_tensors(folder / "tuned" / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == adapter_parameter_count(config, LORA)


def validation_loss(folder, transformer):
    config = run_of(folder, "tuned")
    module = LossModule(transformer, VOCABULARY, config)
    loader = train.make_loader(config, ShardedDocuments(folder / "data"), evaluation=True)
    totals = torch.zeros(8, dtype=torch.float64)
    for batch in itertools.islice(loader, 2):  # 4 rows, 2 at a time
        with torch.no_grad():
            totals += module(batch["ids_BT"], batch["document_ids_BT"], batch["weights_BT"])[1]
    return float((totals[0] + totals[2]) / (totals[1] + totals[3]))


@pytest.mark.parametrize("changes", [{"zero_stage": 0}, {"precision": "bf16"}, {"zero_stage": 2}, {"zero_stage": 3}])
def test_frozen_weights_stay_as_they_are_to_the_bit(folder, monkeypatch, changes):
    from deepspeed.runtime.zero import GatheredParameters

    weights = {}

    def look(path, engine, *rest):
        for name, parameter in engine.module.named_parameters():
            with GatheredParameters(parameter):
                weights[name] = (parameter.requires_grad, parameter.detach().clone())

    monkeypatch.setattr(train, "export_adapter", look)
    run = "frozen " + " ".join(str(value) for value in changes.values())
    train.run(run_of(folder, run, lora=ALL, ema_decay=0.0, steps=3, evaluation_interval=0, **changes))
    base = load_tensors(folder / "source" / "model" / "model.safetensors")
    plain = {
        name.removeprefix("model.").replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, (trained, tensor) in weights.items()
        if not trained
    }
    assert plain.keys() == base.keys()
    assert all(torch.equal(plain[name], tensor.to(plain[name].dtype)) for name, tensor in base.items())
    trained = {name: tensor for name, (requires_grad, tensor) in weights.items() if requires_grad}
    embedding = trained["model.embedding.modules_to_save.default.weight"]
    assert not torch.equal(embedding, plain["embedding.weight"])
    assert all(tensor.abs().sum() > 0 for name, tensor in trained.items() if ".lora_B." in name)
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        saved = load_tensors(folder / run / f"checkpoints/step_00000003/{kind}.safetensors")
        assert saved.keys() == trained.keys()


def test_a_run_goes_on_exactly(folder):
    train.run(run_of(folder, "whole"))
    half = folder / "half" / "checkpoints"
    shutil.copytree(folder / "whole" / "checkpoints" / "step_00000002", half / "step_00000002")
    (half / "latest").write_text("step_00000002")
    train.run(run_of(folder, "half"))
    whole = load_tensors(folder / "whole" / "adapter" / "adapter_model.safetensors")
    ours = load_tensors(folder / "half" / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == ours.keys() and all(torch.equal(whole[name], tensor) for name, tensor in ours.items())
    assert read_json(half / "step_00000004" / "state.json")["base_hash"]


def test_checkpoints_of_other_weights_are_refused(folder):
    shutil.copytree(folder / "tuned", folder / "other")
    train.run(tiny_run(folder / "data", folder / "second", steps=1, seed=5))
    with pytest.raises(ModelFilesError, match=r"holds adapters of the weights \w{12}, this run trains adapters of"):
        train.run(run_of(folder, "other", initialize_from=str(folder / "second" / "model")))
    with pytest.raises(ModelFilesError, match=r"holds adapters of the weights \w{12}, this run trains whole weights"):
        train.run(run_of(folder, "other", lora=LoRAConfig()))
    with pytest.raises(ModelFilesError, match="is of another model: .* instead of"):
        train.run(run_of(folder, "other", lora=dataclasses.replace(LORA, rank=8)))


def test_it_is_recorded_and_shown(folder):
    config = run_of(folder, "tuned", steps=12)
    assert load_config(ModelRun, folder / "tuned" / "config.yaml") == config
    count = adapter_parameter_count(config.model, LORA)
    assert f"; {count:,} of adapters are trained\n" in show_model_run(config)
    assert f"and {count:,} of its adapters |" in (folder / "tuned" / "adapter" / "README.md").read_text()
    assert memory(config, 1).optimizer == 12 * count
    with pytest.raises(ConfigError, match="lora.rank=4 adapts a finished model; name it in initialize_from"):
        run_of(folder, "x", initialize_from=None)
