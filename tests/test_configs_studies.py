"""The commands of the retrieval studies, in the Makefile and in headers of configs: they parse, and fit together."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cm3.cli import build_parser
from cm3.config import load_config
from cm3.eval.run import EvalRun
from cm3.training.stages import config_class_of

ROOT = Path(__file__).parent.parent
HEADERS = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*/*.yaml"))}
WHOLE_COMMANDS = [
    (path, re.sub(r"\\\n#", "", command))
    for path, text in HEADERS.items()
    for command in re.findall(r"^#   (cm3 index (?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
]


def ids(value):
    return f"{value.parent.name}/{value.stem}" if isinstance(value, Path) else ""


@pytest.mark.parametrize(("path", "command"), WHOLE_COMMANDS, ids=ids)
def test_a_memory_in_a_header_is_made_by_a_command_that_parses(path, command):
    arguments = build_parser().parse_args(shlex.split(command)[1:])
    memory = arguments.out if arguments.action == "build" else arguments.memory
    assert f"memory: {memory}\n" in HEADERS[path]


def recorded(target, tmp_path, *variables):
    """What a target of the Makefile would have `cm3` do, in the order of its commands."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    program = tmp_path / "bin" / "cm3"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done >> "$LOG"; echo >> "$LOG"\n')
    program.chmod(0o755)
    for name in ("python", "installed"):
        (program.parent / name).touch()
    environment = {**os.environ, "LOG": str(tmp_path / "log")}
    names = [f"BIN={program.parent}", f"RUN={program.parent / 'installed'}", *variables]
    subprocess.run(["make", target, *names], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)
    return [entry.splitlines() for entry in (tmp_path / "log").read_text().split("\n\n") if entry]


@pytest.mark.parametrize("target", ["retrieval-study", "emoji-retrieval-study"])
def test_the_study_trains_three_seeds_each_way_and_compares_them(target, tmp_path):
    runs = tmp_path / "runs"
    (runs / "memory").mkdir(parents=True)  # copied for the concepts
    name = "STUDY" if target == "retrieval-study" else "EMOJI"
    commands = recorded(target, tmp_path, f"{name}={runs}", "DATA=some/rows")
    parsed = [build_parser().parse_args(words) for words in commands]
    trained, evaluated = [], []
    for words, arguments in zip(commands, parsed, strict=True):
        if words[0] not in ("train", "prepare", "eval"):
            continue
        kind = EvalRun if words[0] == "eval" else config_class_of(str(ROOT / arguments.config))
        config = load_config(kind, ROOT / arguments.config, words[2:])
        if words[0] == "train":
            trained.append((config.output, config.seed, config.data.train))
        elif words[0] == "eval":
            evaluated.append(config.output)
            assert config.model == f"{Path(config.output).parent}/model"
    assert {Path(output).name: seed for output, seed, _ in trained} == {
        f"{kind}_{seed}": seed for kind in ("plain", "retrieved") for seed in range(3)
    }
    assert len({data for output, _, data in trained if "plain" in Path(output).name}) == 1
    assert {data for output, _, data in trained if "plain" not in Path(output).name} == {f"{runs}/retrieved/train"}
    assert sorted(evaluated) == sorted(f"{output}/eval" for output, _, _ in trained)
    assert commands[-1][0] == "compare"


def test_the_emoji_study_searches_with_the_encoder_of_emoji_and_reads_one_folder_of_rows(tmp_path):
    runs = tmp_path / "runs"
    (runs / "memory").mkdir(parents=True)
    commands = recorded("emoji-retrieval-study", tmp_path, f"EMOJI={runs}", "DATA=some/rows")
    (build,) = [words for words in commands if words[:2] == ["index", "build"]]
    arguments = build_parser().parse_args(build)
    encoder = load_config(
        config_class_of(str(ROOT / "configs/emoji/retriever.yaml")), ROOT / "configs/emoji/retriever.yaml"
    )
    assert arguments.encoder == f"{encoder.output}/encoder"
    assert arguments.data == "some/rows"
    (append,) = [build_parser().parse_args(words) for words in commands if words[:2] == ["index", "append"]]
    held_out = load_config(EvalRun, ROOT / "configs/emoji_retrieval/eval.yaml")
    for task in (held_out.retrieved_likelihood, held_out.retrieved_picture_matching):
        where = task.pairs.source.where
        assert where["split_kind"] == dict(append.where)["split_kind"]
        assert not set(where["style"]) & set(dict(append.where)["style"])  # what is asked about is not in the memory
    for words in commands:
        if words[0] in ("prepare", "eval"):
            assert "some/rows" in words and not any("data/emoji" in word for word in words)
    assert (runs / "concept_memory").is_dir() and not (runs / "unfinished").exists()
