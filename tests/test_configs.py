"""Every file in configs/ parses strictly, fits its class, and says how it is run and what comes of it."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from cm3.cli import build_parser
from cm3.config import STAGE_KEY, dump_config, load_config, read_yaml
from cm3.eval.run import EvalRun
from cm3.model.config import named_size, parameter_count
from cm3.model.transformer import Transformer
from cm3.training.config import ModelRun
from cm3.training.stages import config_class_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "configs").glob("*/*.yaml"))


def stage(path):
    """The stage of a run; evaluations have none."""
    return read_yaml(path).get(STAGE_KEY)


def load(path):
    return load_config(config_class_of(str(path)) if stage(path) else EvalRun, path)


def ids(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_config_parses_and_survives_a_round_trip(path, tmp_path):
    config = load(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config, stage=stage(path)))
    assert load_config(type(config), copy) == config


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_the_header_says_how_it_is_run(path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("Command:", "Hardware:", "Time:", "Expected:"):
        lines = [line.partition(word)[2].strip() for line in header if word in line]
        assert len(lines) == 1 and lines[0], f"{path} needs one header line `# {word} ...`"
    command = next(line for line in header if "Command:" in line)
    assert f"configs/{path.parent.name}/{path.name}" in command


@pytest.mark.parametrize("path", [path for path in FILES if stage(path) == "model"], ids=ids)
def test_the_model_builds_on_the_meta_device(path):
    config = load(path)
    with torch.device("meta"):
        model = Transformer(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config.model)
    for processes in (1, 2, 8):
        if config.batch_rows % (config.micro_batch_rows * processes) == 0:
            break
    else:
        pytest.fail(f"{path}: batch_rows fits no common number of processes")


@pytest.mark.parametrize("size", ["350m", "760m", "7b"])
def test_pretraining_has_the_published_sizes(size):
    config = load(ROOT / "configs" / "pretrain" / f"cm3leon_{size}.yaml")
    assert config.model == named_size(size, vocabulary_size=config.model.vocabulary_size)
    assert config.batch_rows * config.data.sequence_length == 2**23
    tokens = {"350m": 1.4e12, "760m": 1.9e12, "7b": 2.4e12}[size]
    assert config.steps * 2**23 == pytest.approx(tokens, rel=0.01)


def test_the_commands_of_the_readme_parse():
    commands = re.findall(r"^cm3 .+$", README, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        args = build_parser().parse_args(shlex.split(command, comments=True)[1:])
        assert not hasattr(args, "config") or (ROOT / args.config).is_file(), command


def test_the_launch_in_the_readme_splits_a_step_evenly():
    text = (ROOT / "configs/launch/README.md").read_text(encoding="utf-8")
    [(processes, path, overrides)] = re.findall(r"torchrun --nproc_per_node (\d+) -m cm3 train (\S+) ?([^`]*)`", text)
    assert load_config(ModelRun, ROOT / path, overrides.split()).accumulation_steps(int(processes)) == 1
