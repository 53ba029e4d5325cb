"""Two processes under torchrun train exactly as one does, and each holds half of the optimiser (ZeRO stage 1)."""

import os
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_processes_equal_one_and_resume_as_one(tmp_path):
    data = prepare(tmp_path / "data")
    model = tiny_run(data, tmp_path).model
    plain = {"model": type(model)(**{**vars(model), "dropout": 0.0}), "precision": "fp32", "checkpoint_interval": 2}
    train(tiny_run(data, tmp_path / "two", steps=4, **plain), tmp_path, 2, "two")
    train(tiny_run(data, tmp_path / "one", steps=4, micro_batch_rows=4, **plain), tmp_path, 1, "one")
    for key in ("loss", "gradient_norm", "tokens"):
        assert losses(tmp_path / "two", key=key) == pytest.approx(losses(tmp_path / "one", key=key), rel=1e-4)
    assert losses(tmp_path / "two", "validation") == pytest.approx(losses(tmp_path / "one", "validation"), rel=1e-4)
    for kind in ("weights", "exp_avg"):
        two, one = (load_tensors(tmp_path / run / f"checkpoints/step_00000004/{kind}.safetensors") for run in ("two", "one"))
        assert all(torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-6) for name in one)
