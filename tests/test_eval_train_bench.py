"""`cm3 bench train`, `loader` and `loss` at the smallest size: what runs, what is measured, what is printed."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cm3 import cli_bench
from cm3.cli import main
from cm3.config import read_yaml
from cm3.data.shards import ShardedDocuments
from cm3.errors import ConfigError
from cm3.eval import loader_bench, loss_bench, train_bench
from cm3.eval.bench_shapes import SIZES, shape, write_documents
from cm3.eval.loader_bench import LoaderBench
from cm3.eval.loss_bench import LossBench
from cm3.eval.machine import MatrixPeak
from cm3.eval.train_bench import MasterAdamW, TrainBench, TrainCost, measure_model, table, tokens_and_context
from cm3.interop.chameleon import as_chameleon, foreign_chameleon, foreign_loss, has_transformers
from cm3.model.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
BENCH = TrainBench(rows=1, sequence_length=128, steps=1, precision="fp32")
SMALL = ModelConfig(vocabulary_size=50, width=32, num_layers=2, num_heads=4, num_key_value_heads=2, max_positions=16)
needs_transformers = pytest.mark.skipif(not has_transformers(), reason="transformers is not installed")


@pytest.mark.parametrize(
    ("size", "config"),
    [("demo", "demo/model"), *((size, f"pretrain/cm3leon_{size}") for size in ("350m", "760m", "7b"))],
)
def test_the_sizes_are_those_of_the_configs(size, config):
    values, found = read_yaml(ROOT / f"configs/{config}.yaml"), shape(size)
    assert found.model == ModelConfig(**values["model"])
    assert found.sequence_length == values["data"]["sequence_length"]
    assert found.packing == values["data"].get("packing", "documents")
    assert found.vocabulary.size == found.model.vocabulary_size
    assert cli_bench._SIZES == SIZES


def test_random_documents_are_a_prepared_folder(tmp_path):
    documents = write_documents(tmp_path, shape("demo"), seed=0)
    assert isinstance(documents, ShardedDocuments) and len(documents) == shape("demo").documents
    assert (documents.lengths.min(), documents.lengths.max()) == (64 + 3 + 1, 64 + 3 + 28)
    assert documents.ids(0).max() < shape("demo").vocabulary.size
    assert [part.tokens.tolist() for part in documents[0].segments[:1]] != [
        part.tokens.tolist() for part in documents[1].segments[:1]
    ]


@pytest.mark.parametrize("name", ["ours", "ours-chameleon", pytest.param("transformers", marks=needs_transformers)])
def test_each_model_is_measured(name):
    cost = measure_model(BENCH, name)
    assert cost.model == name
    assert sum(cost.shares.values()) == pytest.approx(1) and min(cost.shares.values()) > 0
    assert set(cost.shares) == {"data", "forward", "backward", "optimizer"}
    assert 0 < cost.tokens_per_second * cost.step_seconds <= 128
    assert 0 < cost.utilisation < 1.05
    assert cost.loss == pytest.approx(math.log(1728), abs=0.6)


@needs_transformers
def test_the_foreign_model_has_the_sizes_of_ours_and_the_plain_loss():
    config = as_chameleon(SMALL)
    assert (config.norm, config.activation, config.position) == ("rmsnorm", "swiglu", "rope")
    model = foreign_chameleon(config)
    ours = train_bench.Transformer(config)
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, ours)]
    norms = config.num_layers * config.head_width * (2 * (4 + 2) - 4)  # theirs has a gain and bias for every head
    assert counts[0] - counts[1] == norms
    ids_BT = torch.randint(50, (2, 12))
    real_BT = torch.arange(12) < torch.tensor([[12], [7]])
    logits_BTV = model.lm_head(model.model(input_ids=ids_BT)[0])
    expected = F.cross_entropy(logits_BTV[:, :-1][real_BT[:, 1:]], ids_BT[:, 1:][real_BT[:, 1:]])
    torch.testing.assert_close(foreign_loss(model, ids_BT, real_BT), expected)


@needs_transformers
def test_a_model_that_is_no_chameleon_is_refused():
    with pytest.raises(ConfigError, match="Chameleon wants model.norm=rmsnorm, model.activation=swiglu"):
        foreign_chameleon(SMALL)


def test_compiling_reaches_the_blocks_of_both(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((type(self).__name__, options)))
    train_bench.compile_blocks(train_bench.Transformer(SMALL))
    assert compiled == [("Block", {"dynamic": False})] * 2
    if has_transformers():
        train_bench.compile_blocks(foreign_chameleon(as_chameleon(SMALL)))
        assert compiled[2:] == [("ChameleonDecoderLayer", {"dynamic": False})] * 2


def test_master_weights_in_float32_are_plain_adamw():
    ours, plain = nn.Linear(6, 5), nn.Linear(6, 5)
    plain.load_state_dict(ours.state_dict())
    low = nn.Linear(6, 5).to(torch.bfloat16)
    low.load_state_dict(ours.state_dict())
    optimizer = MasterAdamW(ours)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.1)
    low_optimizer = MasterAdamW(low)
    for _ in range(50):
        x = torch.randn(3, 6)
        for module in (ours, plain, low):
            (3 * module(x.to(module.weight.dtype)).float().square().sum()).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
        optimizer.step()
        low_optimizer.step()
        assert ours.weight.grad is None
    torch.testing.assert_close(ours.weight, plain.weight)
    torch.testing.assert_close(low.weight.float(), plain.weight, rtol=0.02, atol=2e-3)  # 50 updates of 1e-4 arrive
    assert low.weight.dtype == torch.bfloat16


def test_tokens_and_context_by_hand():
    document_ids_BT = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    tokens, context = tokens_and_context(document_ids_BT)
    assert tokens == 11
    assert context == pytest.approx((1 + 2 + 3 + 1 + 2 + sum(range(1, 7))) / 11)


def test_the_peak_is_the_best_of_all_products():
    peak = MatrixPeak(torch.device("cpu"), torch.float32)
    peak.measure(1)
    first = peak.flops_per_second
    assert first > 1e6
    peak.measure(1)
    assert peak.flops_per_second >= first


COST = TrainCost(
    model="ours",
    parameters=2_500_000,
    step_seconds=0.5,
    tokens_per_second=8000.0,
    peak_flops=4e11,
    utilisation=0.25,
    peak_bytes=1.5e9,
    shares={"data": 0.01, "forward": 0.39, "backward": 0.5, "optimizer": 0.1},
    loss=7.4,
)


def test_the_table_and_the_ratio():
    costs = [COST, replace(COST, model="transformers", tokens_per_second=5000.0)]
    lines = list(table(TrainBench(models=("ours", "transformers")), costs))
    assert lines[0].startswith("demo: 8 rows of 512, bf16, 20 steps, seed 0; CPU, ")
    assert lines[4] == "| ours | 2.5 M | 500.0 | 8000 | 0.400 | 25.0 | 1.500 | 1.0 | 39.0 | 50.0 | 10.0 |"
    assert [line.count("|") for line in lines[2:6]] == [12] * 4
    assert lines[-1] == "ours: 1.60 times the tokens/s of transformers"


def test_without_transformers_ours_is_measured_alone(monkeypatch):
    monkeypatch.setattr(train_bench, "has_transformers", lambda: False)
    config = TrainBench(models=("transformers",))
    assert list(train_bench.measure(config)) == []
    assert list(table(config, []))[-1].startswith("transformers is not installed: nothing to compare with")


def test_the_train_command_prints_a_table(capsys):
    options = ["--rows", "1", "--sequence-length", "128", "--steps", "1", "--models", "ours"]
    assert main(["bench", "train", *options]) == 0
    *_, row, empty = capsys.readouterr().out.splitlines()
    assert row.startswith("| ours | ") and row.count("|") == 12 and empty == ""
    parameters, gigabytes = (float(row.split("|")[column].split()[0]) for column in (2, 7))
    # copies in float32 and two moments, beside weights and gradients; only Linux counts them
    assert math.isnan(gigabytes) or gigabytes * 1e9 > 12 * parameters * 1e6


def test_the_loader_is_measured_beside_training(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(loader_bench, "measure_training", lambda bench: iter([COST]))
    assert main(["bench", "loader", "--batches", "5"]) == 0
    alone, training, ratio = capsys.readouterr().out.splitlines()
    assert alone.startswith("loader alone: ") and "random documents of demo, 5 batches" in alone
    assert training == "training step of demo: 8000 tokens/s"
    speed = float(alone.split()[2])
    assert float(ratio.split()[3]) == pytest.approx(speed / 8000, abs=0.06)

    write_documents(tmp_path, shape("demo"), seed=1)
    cost = loader_bench.measure(LoaderBench(data=str(tmp_path), batches=5, rows=4, sequence_length=1024))
    assert cost.positions == 5 * 4 * 1024
    assert 0 <= cost.padding < 0.03
    assert main(["bench", "loader", "--data", str(tmp_path), "--batches", "1", "--steps", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_chunked_loss_takes_less_memory_than_the_logits(capsys):
    config = LossBench(tokens=2048, vocabulary=16_384, width=64, chunks=(256,), precision="fp32")
    costs = list(loss_bench.measure(config))
    assert [cost.name for cost in costs] == ["plain", "chunks of 256"]
    assert costs[0].loss == pytest.approx(costs[1].loss, rel=1e-5)
    logits_bytes = 2048 * 16_384 * 4
    if not math.isnan(costs[0].peak_bytes):  # only Linux counts it
        assert costs[0].peak_bytes > 2 * logits_bytes
        assert costs[1].peak_bytes < costs[0].peak_bytes / 2  # what libraries load on first use is in both
    lines = list(loss_bench.table(config, costs))
    assert lines[0].startswith("2048 tokens, 16384 ids, width 64, fp32, seed 0; ")
    assert lines[-1].startswith("| chunks of 256 | ") and len(lines) == 6


def test_impossible_settings_are_refused(capsys):
    with pytest.raises(ConfigError, match="size '13b' is unknown; choose one of demo, 350m, 760m, 7b"):
        TrainBench(size="13b")
    with pytest.raises(ConfigError, match="steps=0; choose 1 or more"):
        TrainBench(steps=0)
    with pytest.raises(ConfigError, match="batches=0; choose 1 or more"):
        LoaderBench(batches=0)
    assert main(["bench", "loss", "--width", "100"]) == 2
    assert capsys.readouterr().err == (
        "error: --width 100, --chunks 2048 512; choose a multiple of 64, and chunks of 1 or more\n"
    )
