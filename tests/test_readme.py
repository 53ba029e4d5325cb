"""What the README tells people to type is accepted as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from cm3.cli import VERBS, build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == ""
    for line in block.splitlines()
    if line.startswith("cm3 ")
]


def test_every_verb_is_shown():
    assert {command.split()[1] for command in COMMANDS} >= set(VERBS) - {"show"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse_and_name_files_that_exist(command):
    arguments = build_parser().parse_args(shlex.split(command)[1:])
    if hasattr(arguments, "config"):
        assert (ROOT / arguments.config).is_file()


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"^make ([a-z]+)", README, flags=re.MULTILINE)) <= set(targets)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [block for language, block in BLOCKS if language == "python"]
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["images"]) == 4 and names["filled"].size == names["images"][0].size
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
