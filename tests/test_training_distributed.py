"""Two processes under torchrun train exactly as plain PyTorch does, at every ZeRO stage, and agree on what to skip."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import TOKENIZER_HASH, VOCABULARY, losses, mark_as_retrieved, prepare, tiny_run

from cm3.checkpoint import load_tensors
from cm3.config import dump_config
from cm3.data.shards import ShardedDocuments
from cm3.model.lora import LoRAConfig
from cm3.model.objective import ObjectiveConfig
from cm3.training.initial import make_transformer
from cm3.training.loss import LossModule, target_weight
from cm3.training.optimizer import learning_rate_at, make_optimizer
from cm3.training.train import make_loader

pytest.importorskip("deepspeed")

VARIANTS = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"stage {stage}, offloaded": {"zero_stage": stage, "offload_optimizer": True} for stage in (1, 3)},
    "checkpointing": {"activation_checkpointing": True},
}
RESUMED = {"3 after stage 1": 3, "0 after stage 3": 0}


def train(config, folder, num_processes, name):
    """Run `cm3 train` in a child, under torchrun where there are several processes."""
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(config, stage="model"))
    launch(["-m", "cm3", "train", str(path)], num_processes)


def launch(words, num_processes):
    """Run Python in a child, under torchrun where there are several processes."""
    launcher = []
    if num_processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", f"--master-port={port}"]
    command = [sys.executable, *launcher, *words]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # two processes do not share one GPU
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_process_goes_on_where_two_were_and_finds_the_same(tmp_path):
    data = prepare(tmp_path / "data")
    model = dataclasses.replace(tiny_run(data, tmp_path).model, dropout=0.0)
    plain = {"model": model, "precision": "fp32", "steps": 4, "checkpoint_interval": 2}
    two, one = tmp_path / "two", tmp_path / "one"
    train(tiny_run(data, two, **plain), tmp_path, 2, "two")
    shutil.copytree(two / "checkpoints" / "step_00000002", one / "checkpoints" / "step_00000002")
    (one / "checkpoints" / "latest").write_text("step_00000002")
    train(tiny_run(data, one, micro_batch_rows=4, **plain), tmp_path, 1, "one")

    for split, key in (("train", "loss"), ("train", "gradient_norm"), ("train", "tokens"), ("validation", "loss")):
        by_two, by_one = (losses(folder, split, key) for folder in (two, one))
        assert by_one == pytest.approx({step: by_two[step] for step in by_one}, rel=1e-4)
    assert list(losses(one)) == [3, 4]
    for kind in ("weights", "exp_avg"):
        path = f"checkpoints/step_00000004/{kind}.safetensors"
        by_two, by_one = (load_tensors(folder / path) for folder in (two, one))
        assert all(torch.allclose(by_two[name], by_one[name], rtol=1e-3, atol=1e-6) for name in by_one)


def plain(data, output, **changes):
    """A run in fp32 whose losses do not depend on the number of processes."""
    model = dataclasses.replace(tiny_run(data, output).model, dropout=0.0)
    settings = {"model": model, "precision": "fp32", "ema_decay": 0.0, "steps": 4, "evaluation_interval": 0}
    return tiny_run(data, output, **settings | {"micro_batch_rows": 1, "checkpoint_interval": 2} | changes)


def adapted(root, name, **changes):
    """A run that trains adapters, the embeddings among them, of the model of the run `stage 1`."""
    lora = LoRAConfig(rank=4, train_embeddings=True)
    return plain(root / "data", root / name, initialize_from=str(root / "stage 1" / "model"), lora=lora, **changes)


def document_of_step_two(data):
    """The first document of the second step of such a run."""
    loader = make_loader(plain(data, data, micro_batch_rows=4), ShardedDocuments(data), evaluation=False)
    for _ in itertools.islice(loader, 2):
        documents = loader.batch_documents
    return documents[0][0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The runs of `parallel_runs.py` on two processes, all in one launch, by name."""
    root = tmp_path_factory.mktemp("parallel")
    data = prepare(root / "data")
    bad_data = mark_as_retrieved(data, root / "bad data", document_of_step_two(data))
    bad = ObjectiveConfig(retrieved_loss_weight=math.inf)
    runs = {name: plain(data, root / name, **changes) for name, changes in VARIANTS.items()}
    if importlib.util.find_spec("peft"):
        runs |= {f"lora {stage}": adapted(root, f"lora {stage}", zero_stage=stage) for stage in (1, 2, 3)}
    runs |= {name: plain(data, root / name, zero_stage=stage) for name, stage in RESUMED.items()}
    runs |= {
        f"bad {stage}": plain(bad_data, root / f"bad {stage}", objective=bad, zero_stage=stage) for stage in (0, 3)
    }
    paths = []
    for name, config in runs.items():
        paths.append(root / f"{name}.yaml")
        paths[-1].write_text(dump_config(config, stage="model"))
    launch([str(Path(__file__).with_name("parallel_runs.py")), *map(str, paths)], 2)
    return root


@pytest.fixture(scope="module")
def reference(trained):
    """Losses, gradient norms and final weights of plain PyTorch."""
    return train_plainly(plain(trained / "data", trained, micro_batch_rows=4), trained / "data")


def train_plainly(config, data):
    """Losses, gradient norms and final weights of AdamW in plain PyTorch, a whole batch in one forward pass."""
    torch.manual_seed(config.seed)
    module = LossModule(make_transformer(config, TOKENIZER_HASH)[0], VOCABULARY, config)
    optimizer = make_optimizer(module, config.optimizer)
    values = {"loss": {}, "gradient_norm": {}}
    batches = make_loader(config, ShardedDocuments(data), evaluation=False)
    for step, batch in zip(range(1, config.steps + 1), itertools.islice(batches, config.steps), strict=True):
        loss, _ = module(batch["ids_BT"], batch["document_ids_BT"], batch["weights_BT"])
        assert target_weight(batch) > 0
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config.steps, config.optimizer)
        optimizer.step()
        optimizer.zero_grad()
        values["loss"][step], values["gradient_norm"][step] = loss.item(), norm.item()
    return values, {name: weight.detach() for name, weight in module.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_as_plain_pytorch(trained, reference, name):
    compare(trained / name, *reference)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_train_adapters_as_plain_pytorch(trained, stage):
    pytest.importorskip("peft")
    config = adapted(trained, "plain", micro_batch_rows=4)
    values, weights = train_plainly(config, trained / "data")
    assert any(".lora_A." in name for name in weights) and "model.embedding.modules_to_save.default.weight" in weights
    compare(trained / f"lora {stage}", values, weights)
    first, last = values["loss"][1], values["loss"][4]
    assert last < first


def compare(folder, values, weights):
    """Check a run against losses, gradient norms and final weights."""
    for key, expected in values.items():
        assert losses(folder, key=key) == pytest.approx(expected, rel=2e-5)
    saved = load_tensors(folder / "checkpoints" / "step_00000004" / "weights.safetensors")
    assert saved.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(saved[key], weight, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_one_stage_is_resumed_at_another(trained, reference):
    for name in RESUMED:
        assert list(losses(trained / name)) == [3, 4]
        expected = {step: loss for step, loss in reference[0]["loss"].items() if step > 2}
        assert losses(trained / name) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_both_processes_skip_what_is_bad_in_one(trained, stage):
    lines = [json.loads(line) for line in (trained / f"bad {stage}" / "skipped.jsonl").read_text().splitlines()]
    assert 2 in [line["step"] for line in lines] and len(lines) < 4
    bad = document_of_step_two(trained / "data")
    for line in lines:
        assert len(line["micro_batches"]) == 4  # two of each process
        hit = [bad in [document["number"] for document in each["documents"]] for each in line["micro_batches"]]
        assert sum(hit) == 1 and hit == [isinstance(each["loss"], str) for each in line["micro_batches"]]
    by_stage = [losses(trained / f"bad {each}") for each in (stage, 0)]
    assert by_stage[0].keys() == by_stage[1].keys() == {1, 2, 3, 4}
    for step, loss in by_stage[0].items():
        assert (loss is None) == (step in [line["step"] for line in lines])
        assert loss is None or loss == pytest.approx(by_stage[1][step], rel=2e-5)


@pytest.mark.slow
def test_three_processes_share_what_does_not_divide_evenly(tmp_path):
    """32 gains of a norm are no multiple of 3; saved and loaded at stage 3 all the same."""
    data = prepare(tmp_path / "data")
    runs = {name: plain(data, tmp_path / name, batch_rows=6, zero_stage=3) for name in ("three", "one")}
    train(dataclasses.replace(runs["three"], steps=2), tmp_path, 3, "first half")
    train(runs["three"], tmp_path, 3, "second half")
    shutil.copytree(tmp_path / "three" / "checkpoints", tmp_path / "one" / "checkpoints")
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "step_00000004")
    (tmp_path / "one" / "checkpoints" / "latest").write_text("step_00000002")
    train(runs["one"], tmp_path, 1, "one")
    for key in ("loss", "gradient_norm"):
        by_three = losses(tmp_path / "three", key=key)
        assert losses(tmp_path / "one", key=key) == pytest.approx({step: by_three[step] for step in (3, 4)}, rel=1e-4)
