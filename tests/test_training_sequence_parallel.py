"""Processes that share rows train as one that has them whole; checkpoints do not care how many share."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from test_training_distributed import compare, document_of_step_two, launch, plain, train_plainly
from thread_group import in_parts
from tiny_run import VOCABULARY, losses, mark_as_retrieved, prepare, tiny_run

from cm3.config import dump_config
from cm3.data.shards import ShardedDocuments
from cm3.errors import ConfigError
from cm3.model.objective import ObjectiveConfig
from cm3.model.transformer import Transformer
from cm3.training.config import DataConfig
from cm3.training.loss import SUMS, LossModule, num_tokens, target_weight
from cm3.training.train import make_loader

MODEL = dataclasses.replace(
    tiny_run(Path("data"), Path("run")).model, num_heads=4, dropout=0.0, zero_init_outputs=False, init_std=0.1
)
CHAMELEON = dataclasses.replace(
    MODEL, norm="rmsnorm", activation="swiglu", position="rope", qk_norm=True, num_key_value_heads=2
)
ROWS = {"documents": CHAMELEON, "stream": MODEL}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("packing", "model_config"), ROWS.items())
def test_the_sums_and_gradients_of_all_parts_are_those_of_whole_rows(tmp_path, packing, model_config, size):
    model_config = dataclasses.replace(model_config, num_key_value_heads=4)
    data = DataConfig(train=str(prepare(tmp_path / "data")), sequence_length=32, packing=packing)
    config = tiny_run(tmp_path / "data", tmp_path, data=data, model=model_config, z_loss_weight=0.1)
    batch = next(iter(make_loader(config, ShardedDocuments(tmp_path / "data"), evaluation=False)))
    batch["weights_BT"] *= torch.rand(batch["weights_BT"].shape)
    models = [Transformer(model_config)]
    models += [copy.deepcopy(models[0]) for _ in range(size)]

    def part(group):
        module = LossModule(models[1 + group.index], VOCABULARY, config, group)
        share = target_weight(batch, group)
        loss, sums = module(batch["ids_BT"], batch["document_ids_BT"], batch["weights_BT"])
        (loss * share).backward()
        assert dict(zip(SUMS, sums.tolist()))["weight"] == pytest.approx(share, rel=1e-5)
        return torch.cat([sums, torch.tensor([loss.item() * share, share, num_tokens(batch, group)])])

    found = sum(in_parts(size, part))
    share = target_weight(batch)
    loss, sums = LossModule(models[0], VOCABULARY, config)(
        batch["ids_BT"], batch["document_ids_BT"], batch["weights_BT"]
    )
    (loss * share).backward()
    assert num_tokens(batch) == int((batch["document_ids_BT"] >= 0).sum()) > 0
    expected = torch.cat([sums, torch.tensor([loss.item() * share, share, num_tokens(batch)])])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in models[0].named_parameters():
        own = sum(each.get_parameter(name).grad for each in models[1:])
        torch.testing.assert_close(own, parameter.grad, rtol=1e-4, atol=1e-6 * share, msg=name)


VARIANTS = {
    "documents": {"model": CHAMELEON, "activation_checkpointing": True},
    "stream": {"model": MODEL, "zero_stage": 3, "micro_batch_rows": 2},
}


def shared(root, name, packing, **changes):
    """A run in which two processes share every row."""
    folder = str(root / "data")
    data = DataConfig(train=folder, validation=folder, sequence_length=32, packing=packing)
    settings = {"data": data, "sequence_parallel": 2} | changes
    return dataclasses.replace(plain(root / "data", root / name, model=MODEL), **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of two processes, all in one launch, by name."""
    root = tmp_path_factory.mktemp("shared")
    data = prepare(root / "data")
    bad_data = mark_as_retrieved(data, root / "bad data", document_of_step_two(data))
    bad = ObjectiveConfig(retrieved_loss_weight=math.inf)
    runs = {name: shared(root, name, name, **changes) for name, changes in VARIANTS.items()}
    runs["bf16"] = shared(root, "bf16", "documents", model=CHAMELEON, precision="bf16")
    runs["alone after documents"] = shared(
        root, "alone after documents", "documents", **VARIANTS["documents"] | {"sequence_parallel": 1}
    )
    runs["bad"] = plain(bad_data, root / "bad", objective=bad, sequence_parallel=2)
    paths = []
    for name, config in runs.items():
        paths.append(root / f"{name}.yaml")
        paths[-1].write_text(dump_config(config, stage="model"))
    launch([str(Path(__file__).with_name("parallel_runs.py")), *map(str, paths)], 2)
    return root


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_that_share_rows_train_as_plain_pytorch(trained, name):
    config = shared(trained, name, name, **VARIANTS[name] | {"sequence_parallel": 1, "micro_batch_rows": 4})
    values, weights = train_plainly(config, trained / "data")
    compare(trained / name, values, weights)
    if name == "documents":
        assert losses(trained / "bf16") == pytest.approx(values["loss"], rel=0.02)


def test_a_checkpoint_of_shared_rows_goes_on_without_sharing(trained):
    whole, resumed = trained / "documents", trained / "alone after documents"
    assert list(losses(resumed)) == [3, 4]
    for split, key in (("train", "loss"), ("train", "gradient_norm"), ("train", "tokens"), ("validation", "loss")):
        expected = losses(whole, split, key)
        found = losses(resumed, split, key)
        assert found and found == pytest.approx({step: expected[step] for step in found}, rel=2e-5)


def test_both_skip_what_is_bad_in_a_row_that_they_share(trained):
    lines = [json.loads(line) for line in (trained / "bad" / "skipped.jsonl").read_text().splitlines()]
    assert 2 in [line["step"] for line in lines] and len(lines) < 4
    bad = document_of_step_two(trained / "data")
    for line in lines:
        assert len(line["micro_batches"]) == 4
        hit = [bad in [document["number"] for document in each["documents"]] for each in line["micro_batches"]]
        assert sum(hit) == 1 and hit == [isinstance(each["loss"], str) for each in line["micro_batches"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_parallel": 0}, "sequence_parallel=0; choose 1 or more"),
        (
            {"sequence_parallel": 8},
            "sequence_parallel=8 does not divide model.num_heads=4; each process takes an equal",
        ),
        (
            {"sequence_parallel": 4, "model": CHAMELEON},
            "sequence_parallel=4 does not divide model.num_key_value_heads=2",
        ),
        (
            {"sequence_parallel": 4, "data": DataConfig(train="data", sequence_length=30)},
            "sequence_parallel=4 does not divide data.sequence_length=30",
        ),
    ],
)
def test_shares_that_are_not_even_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        tiny_run(Path("data"), Path("run"), **{"model": MODEL} | changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_processes_and_rows_must_split_into_groups():
    config = tiny_run(Path("data"), Path("run"), sequence_parallel=2)
    assert [config.accumulation_steps(count) for count in (2, 4)] == [2, 1]
    with pytest.raises(ConfigError, match="=2 does not divide the number of processes, 3; start a multiple of 2 with"):
        config.accumulation_steps(3)
    with pytest.raises(ConfigError, match="=2 times 3 groups of 2 processes; choose a multiple of 6"):
        config.accumulation_steps(6)
