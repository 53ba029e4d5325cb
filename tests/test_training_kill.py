"""A run that is killed with SIGKILL, at random moments and in the middle of saving, ends as if nothing had happened."""

import dataclasses
import json
import random
import re
import shutil

import pytest
import torch
from killed_run import finish, kill_after, kill_at, stop_after
from tiny_run import losses, prepare, tiny_run

from cm3.checkpoint import load_tensors
from cm3.training.state import checkpoint_damage, newest_checkpoint

pytest.importorskip("deepspeed")

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("killed") / "data")


def frequent(data, output, steps=STEPS, **changes):
    """A run that saves at every second step, with dropout and an average of the weights."""
    settings = {"steps": steps, "checkpoint_interval": 2, "evaluation_interval": 4}
    return tiny_run(data, output, **settings | changes)


def portable(data, output, steps=STEPS):
    """A run whose losses do not depend on the number of processes: in fp32, and without dropout.

    A large epsilon: without it the sign of a gradient of about 0 decides an update, and rounding decides that sign.
    """
    run = tiny_run(data, output)
    model = dataclasses.replace(run.model, dropout=0.0)
    optimizer = dataclasses.replace(run.optimizer, epsilon=1e-3)
    return frequent(data, output, steps, model=model, optimizer=optimizer, precision="fp32")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that was never interrupted."""
    output = tmp_path_factory.mktemp("killed") / "whole"
    finish(frequent(data, output))
    return output


def told(output):
    """What a run reports, but for times: every line of it, samples and losses."""
    timed = ("tokens_per_second", "mfu", "eta_seconds")
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def assert_the_same(killed, whole, steps=STEPS):
    """The same lines, documents, losses and weights to the bit, nothing lost, nothing left over."""
    assert told(killed) == told(whole)
    assert (
        list(losses(killed)) == list(range(1, steps + 1)) and len(set(losses(killed, key="samples").values())) == steps
    )
    for path in ("model/model.safetensors", f"checkpoints/step_{steps:08d}/exp_avg_sq.safetensors"):
        ours, theirs = load_tensors(killed / path), load_tensors(whole / path)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_tidy(killed)


def assert_tidy(killed):
    checkpoints = killed / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert len(names) == 3 and names[0] == "latest" and newest_checkpoint(checkpoints).name == names[2]
    assert not any(checkpoint_damage(checkpoints / name) for name in names[1:])


def test_killed_after_steps_and_while_saving(data, whole, tmp_path):
    rng, config = random.Random(0), frequent(data, tmp_path / "run")
    assert kill_after(config, rng.randrange(1, 5))
    assert kill_at(config, rng.randrange(10, 120))
    finish(config)
    assert_the_same(tmp_path / "run", whole)


def test_killed_at_any_point_of_a_save_there_is_a_good_checkpoint(data, tmp_path):
    """One save after the other is killed a few operations further on: every one leaves the checkpoint before."""
    config = frequent(data, tmp_path / "run", steps=4, evaluation_interval=0)
    checkpoints = tmp_path / "run" / "checkpoints"
    finish(dataclasses.replace(config, steps=2))
    before = newest_checkpoint(checkpoints)
    shutil.copytree(checkpoints, tmp_path / "spare")
    operation = 5
    while kill_at(config, operation):
        found = newest_checkpoint(checkpoints)
        assert found.name in (before.name, "step_00000004") and not checkpoint_damage(found)
        shutil.rmtree(checkpoints)
        shutil.copytree(tmp_path / "spare", checkpoints)
        operation += 17
    assert operation > 40 and newest_checkpoint(checkpoints).name == "step_00000004"


def test_killed_on_two_processes_and_resumed_on_one(data, tmp_path):
    whole, killed = (portable(data, tmp_path / name) for name in ("whole", "killed"))
    finish(whole)
    assert kill_after(dataclasses.replace(killed, micro_batch_rows=1), 5, num_processes=2)
    resumed = finish(killed)
    assert any("resumed from" in line for line in resumed)
    assert_close(tmp_path / "killed", tmp_path / "whole")


def stopped_at(told, output, steps=STEPS):
    """The step that the last line of a stopped run names, of which there is a checkpoint."""
    where = re.escape(str(output / "checkpoints"))
    line = f"stopped by SIGTERM after step (\\d+) of {steps}, saved in {where}; the same command goes on from there"
    found = re.fullmatch(line, told[-1])
    assert found, told[-1]
    assert newest_checkpoint(output / "checkpoints").name == f"step_{int(found[1]):08d}"
    return int(found[1])


def test_sigterm_saves_and_ends_well_and_the_same_command_goes_on(data, whole, tmp_path):
    config = frequent(data, tmp_path / "run")
    step = stopped_at(stop_after(config, 2), tmp_path / "run")
    assert 2 <= step < STEPS
    assert any(f"resumed from {tmp_path / 'run'}" in line for line in finish(config))
    assert_the_same(tmp_path / "run", whole)


def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(data, tmp_path):
    config = dataclasses.replace(portable(data, tmp_path / "run", steps=40), micro_batch_rows=1)
    assert 2 <= stopped_at(stop_after(config, 2, num_processes=2), tmp_path / "run", steps=40) < 40


def assert_close(killed, whole):
    """The same documents, and losses to within what the order of a sum in fp32 makes."""
    assert losses(killed, key="samples") == losses(whole, key="samples")
    for split, key in (("train", "loss"), ("train", "gradient_norm"), ("train", "output_norm"), ("validation", "loss")):
        assert losses(killed, split, key) == pytest.approx(losses(whole, split, key), rel=1e-3)
    assert_tidy(killed)


@pytest.mark.slow
def test_killed_twenty_times(data, tmp_path):
    """Between steps, within them, and while saving."""
    rng, steps = random.Random(20), 120
    runs = {name: frequent(data, tmp_path / name, steps) for name in ("whole", "killed")}
    finish(runs["whole"])
    for _ in range(20):
        if rng.random() < 0.5:
            assert kill_after(runs["killed"], rng.randrange(1, 6))
        else:
            assert kill_at(runs["killed"], rng.randrange(1, 250))
    finish(runs["killed"])
    assert_the_same(tmp_path / "killed", tmp_path / "whole", steps)


@pytest.mark.slow
def test_killed_twenty_times_on_one_and_two_processes_in_turn(data, tmp_path):
    rng, steps = random.Random(20), 120
    whole, killed = (portable(data, tmp_path / name, steps) for name in ("whole", "killed"))
    finish(whole)
    for turn in range(20):
        two = turn % 2 == 1
        config = dataclasses.replace(killed, micro_batch_rows=1) if two else killed
        assert kill_after(config, rng.randrange(1, 7), num_processes=1 + two)
    finish(killed)
    assert_close(tmp_path / "killed", tmp_path / "whole")
