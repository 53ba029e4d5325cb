"""Two processes under torchrun train exactly as one does, and each holds half of the optimiser (ZeRO stage 1)."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from tiny_run import losses, prepare, tiny_run

from cm3.checkpoint import load_tensors
from cm3.config import dump_config

pytest.importorskip("deepspeed")


def train(config, folder, num_processes, name):
    """Run `cm3 train` in a child, under torchrun where there are several processes."""
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(config, stage="model"))
    launcher = []
    if num_processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", f"--master-port={port}"]
    command = [sys.executable, *launcher, "-m", "cm3", "train", str(path)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # two processes do not share one GPU
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
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
