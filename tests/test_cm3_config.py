"""Configs from YAML and the command line: precedence, strictness, and messages that help."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from cm3.config import config_parser, dump_config, load_config, read_yaml
from cm3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 0.5
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates."""

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ConfigError(f"learning_rate={self.learning_rate}; choose 0 or more")


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    """What is done; there is no default."""
    inner: Inner | None = None
    """Settings of a third optimiser."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    """Number of updates."""
    inner: Inner = field(default_factory=Inner)
    """Settings of the optimiser."""
    other: Inner | None = None
    """A second optimiser; null is none."""
    mode: Literal["fast", "slow"] = "fast"
    """Speed."""
    names: tuple[str, ...] = ()
    """Any number of names."""
    limit: int | None = None
    """Updates at most; null is all."""
    task: Task | None = None
    """What else to do; null is nothing."""
    rounding: Literal["int8"] | None = None
    """How values are rounded; null keeps them."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}; choose 1 or more")


@pytest.fixture
def path(tmp_path):
    def write(text):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return file

    return write


def test_precedence_is_default_then_yaml_then_command_line(path):
    file = path("stage: something\nsteps: 3\ninner:\n  learning_rate: 1e-3\nnames: [a, b]\n")
    config = load_config(Outer, file)
    assert config == Outer(steps=3, inner=Inner(learning_rate=1e-3), names=("a", "b"))
    words = ["--steps=4", "--inner.learning_rate", "2e-3", "--inner.betas", "[0.8, 0.9]", "--mode", "slow"]
    inner = Inner(learning_rate=2e-3, betas=(0.8, 0.9))
    assert load_config(Outer, file, words) == Outer(steps=4, inner=inner, names=("a", "b"), mode="slow")
    assert load_config(Outer, None, ["--steps", "1"]) == Outer(steps=1)


def test_optional_parts(path):
    assert load_config(Outer, path("steps: 1\nother: {learning_rate: 2}\n")).other == Inner(learning_rate=2.0)
    assert load_config(Outer, path("steps: 1\nother: null\n")).other is None


def test_round_trip(path):
    config = Outer(steps=2, other=Inner(), names=("ä",), mode="slow")
    text = dump_config(config, stage="any")
    assert text.startswith("stage: any\nsteps: 2\n")
    assert load_config(Outer, path(text)) == config


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("step: 1", [], "unknown key 'step'; did you mean 'steps'"),
        (
            "steps: 1\ninner: {learning_rat: 1}",
            [],
            "unknown key 'inner.learning_rat'; did you mean 'inner.learning_rate'",
        ),
        (
            "steps: 1\nzzz: 1",
            [],
            "unknown key 'zzz'; the keys are steps, inner, other, mode, names, limit, task, rounding",
        ),
        (
            "steps: 1",
            ["--learning_rat", "1"],
            "unknown option --learning_rat; did you mean --(inner|other|task.inner).learning_rate",
        ),
        ("steps: many", [], "steps.*many"),
        ("steps: 1\nmode: medium", [], "mode.*medium"),
        ("steps: 1\ninner: 3", [], "inner is a group of settings, found 3"),
        ("steps: 0", [], "^steps=0; choose 1 or more$"),
        ("steps: 1\nother: {learning_rate: -1}", [], r"^other: learning_rate=-1\.0; choose 0 or more$"),
        ("steps: 1", ["--other.learning_rate", "-1"], r"^other: learning_rate=-1\.0; choose 0 or more$"),
        ("steps: 1\nother: {learning_rate: 2}", ["--other.learning_rate=-3"], r"^other: learning_rate=-3\.0; "),
        ("steps: 1\ntask: {name: a, inner: {learning_rate: -1}}", [], r"^task\.inner: learning_rate=-1\.0; choose"),
        ("steps: 1\ntask: {name: a}", ["--task.inner.learning_rate", "-1"], r"^task\.inner: learning_rate=-1\.0; "),
        ("steps: 1\ninner: {learning_rate: -1}", [], r"^learning_rate=-1\.0; choose 0 or more$"),
        ("steps: 1\ntask: {inner: {}}", [], r"config\.yaml: task: .*required.*name"),
        ("steps: 1\ntask: {}", [], r"config\.yaml: task: .*required.*name"),
        ("steps: 1\nother: {learning_rate: many}", [], r"config\.yaml: other\.learning_rate: .*float.*many"),
        ("steps: 1\nlimit: x", [], r"config\.yaml: limit: expected one of int, null; found x$"),
        ("steps: 1", ["--limit", "x"], r"limit: expected one of int, null; found x$"),
        ("steps: 1\nrounding: int4", [], r"config\.yaml: rounding: expected one of 'int8', null; found int4$"),
        ("steps: x\nother: {learning_rate: -1}", ["--other", "null"], r"config\.yaml: steps: .*int.*x"),
        ("steps: 1", ["stray"], "stray"),
        ("mode: fast", [], "steps"),
        ("steps: [", [], "is not valid YAML"),
        ("- 1", [], "must hold `key: value` lines, found list"),
    ],
)
def test_mistakes_are_named(path, text, words, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(Outer, path(text), words)
    assert "\n" not in str(error.value)
    assert not any(word in str(error.value) for word in ("Union", "<class", "Namespace", "Traceback"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*none\.yaml"):
        read_yaml(tmp_path / "none.yaml")


def test_the_docstrings_of_the_fields_are_the_help():
    text = config_parser(Outer).format_help()
    assert "Number of updates." in text and "Step size." in text
