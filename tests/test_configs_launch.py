"""Launching on several machines: the scripts of configs/launch say what they should, and "nodes" on loopback train."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from tiny_run import losses
from tiny_scenes import prepare_scenes, scenes_run

from cm3.checkpoint import load_tensors
from cm3.config import dump_config, load_config
from cm3.training.config import ModelRun

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))

# Stands for srun and scontrol: two tasks on this machine.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & tasks[task]=$!
done
wait "${tasks[0]}" && wait "${tasks[1]}"
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show && $2 == hostnames && $3 == 'local[1-2]' ]] && printf '127.0.0.1\\nlocalhost\\n'
"""
# Stands for the interpreter: tells what it was to do.
PYTHON = """#!/usr/bin/env bash
echo "${RANK:--} ${LOCAL_RANK:--} ${WORLD_SIZE:--} ${MASTER_ADDR:--} ${MASTER_PORT:--}: $*"
"""


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def environment(**values):
    """This one's, but for what a launcher would have set."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launched}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | values


def slurm_environment(folder, **values):
    """What a job on two machines would see; srun and scontrol are those above."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        write_script(folder / name, text)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "70007", "SLURM_JOB_NODELIST": "local[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    return environment(PATH=path, **job, **values)


def run(script, *words, env):
    return subprocess.run([FOLDER / script, *words], capture_output=True, text=True, timeout=3600, env=env)


def header(path):
    return [line for line in path.read_text().splitlines() if line.startswith("#")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_name_a_config_that_exists(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert os.access(path, os.X_OK) and "set -euo pipefail" in path.read_text().splitlines()
    (command,) = [line.partition("Command:")[2].split() for line in header(path) if "Command:" in line]
    assert f"configs/launch/{path.name}" in command
    assert (ROOT / command[-1]).is_file()


def slurm_settings():
    lines = (FOLDER / "slurm.sh").read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:]), "Slurm stops reading there"
    found = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line) for line in lines if line.startswith("#SBATCH")]
    return {match[1]: match[2] for match in found}


def test_the_job_has_a_task_for_every_gpu_and_time_to_save():
    settings = slurm_settings()
    assert {"job-name", "nodes", "time", "requeue", "output", "cpus-per-task"} <= settings.keys()
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]
    assert settings["dependency"] == "singleton" and settings["open-mode"] == "append"
    signal, _, seconds = settings["signal"].partition("@")
    assert signal == "TERM" and int(seconds) >= 300


def test_steps_split_evenly_among_the_processes():
    fetch_hostfile = pytest.importorskip("deepspeed.launcher.runner").fetch_hostfile
    machines = fetch_hostfile(str(FOLDER / "hostfile"))
    assert dict(machines) == {"node-0": 8, "node-1": 8}
    settings = slurm_settings()
    launches = {
        "node.sh": sum(machines.values()),
        "slurm.sh": int(settings["nodes"]) * int(settings["ntasks-per-node"]),
    }
    for script, processes in launches.items():
        config = next(line.split()[-1] for line in header(FOLDER / script) if "Command:" in line)
        assert load_config(ModelRun, ROOT / config).accumulation_steps(processes) >= 1


def test_each_node_starts_its_own_processes(tmp_path):
    (tmp_path / "hosts").write_text("# two\n\nfirst slots=8\nsecond   slots=4 # older\n")
    told = write_script(tmp_path / "python", PYTHON)
    for node, slots in ((0, 8), (1, 4)):
        env = environment(NODE=str(node), HOSTFILE=str(tmp_path / "hosts"), PYTHON=str(told), PORT="3000")
        done = run("node.sh", "a.yaml", "--steps", "3", env=env)
        assert done.stdout == (
            f"- - - - -: -m torch.distributed.run --nnodes 2 --node-rank {node} --nproc-per-node {slots} "
            "--master-addr first --master-port 3000 -m cm3 train a.yaml --steps 3\n"
        )


@pytest.mark.parametrize(
    ("values", "words", "message"),
    [
        ({"NODE": "2"}, ["a.yaml"], r"error: NODE=2, but .*hostfile has 2 machines; count from 0"),
        ({"NODE": "first"}, ["a.yaml"], "error: NODE=first, but"),
        ({}, ["a.yaml"], "set NODE to the place of this machine in .*hostfile: 0 is the first"),
        ({"NODE": "0"}, [], "error: which run"),
    ],
)
def test_a_node_that_cannot_start_says_why(values, words, message):
    done = run("node.sh", *words, env=environment(**values))
    assert done.returncode != 0 and re.search(message, done.stderr)


def test_every_task_of_a_job_knows_its_rank(tmp_path):
    told = write_script(tmp_path / "python", PYTHON)
    done = run(
        "slurm.sh", "a.yaml", "--sample_prompts", '["two words"]', env=slurm_environment(tmp_path, PYTHON=str(told))
    )
    meeting = f"2 127.0.0.1 {20000 + 70007 % 20000}"
    assert sorted(done.stdout.splitlines()) == [
        f'{rank} {rank} {meeting}: -m cm3 train a.yaml --sample_prompts ["two words"]' for rank in (0, 1)
    ]
    assert run("slurm.sh", env=slurm_environment(tmp_path)).returncode == 2
    failing = slurm_environment(tmp_path, PYTHON="false")
    assert run("slurm.sh", "a.yaml", env=failing).returncode != 0


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.slow
def test_two_nodes_on_loopback_train_as_two_processes_on_one_do(model_folder, tmp_path):
    """Three steps at ZeRO stage 3, with a sample sheet, by each launcher; all of it equal to the last bit."""
    pytest.importorskip("deepspeed")
    data = prepare_scenes(tmp_path / "data", model_folder)

    def write_config(name):
        changes = {"steps": 3, "zero_stage": 3, "ema_decay": 0.0, "sample_interval": 3, "sample_prompts": ("a star",)}
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(scenes_run(data, tmp_path / name, **changes), stage="model"))
        return path

    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    one = subprocess.run([*launcher, "-m", "cm3", "train", write_config("one node")], timeout=3600, env=environment())
    assert one.returncode == 0

    hosts, port = tmp_path / "hosts", free_port()
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    nodes = [
        subprocess.Popen(
            [FOLDER / "node.sh", write_config("two nodes")],
            env=environment(NODE=str(node), HOSTFILE=str(hosts), PORT=port),
        )
        for node in (0, 1)
    ]
    assert [node.wait(3600) for node in nodes] == [0, 0]

    job = run("slurm.sh", write_config("job"), env=slurm_environment(tmp_path))
    assert job.returncode == 0, job.stderr

    reference = tmp_path / "one node"
    assert list(losses(reference)) == [1, 2, 3]
    for other in (tmp_path / "two nodes", tmp_path / "job"):
        assert losses(other) == losses(reference)
        for path in ("checkpoints/step_00000003/weights.safetensors", "model/model.safetensors"):
            ours, whole = (load_tensors(folder / path) for folder in (other, reference))
            assert ours.keys() == whole.keys() and all((ours[name] == whole[name]).all() for name in whole)
        sheets = [np.asarray(PILImage.open(folder / "samples" / "step_00000003.png")) for folder in (other, reference)]
        assert np.array_equal(*sheets)
