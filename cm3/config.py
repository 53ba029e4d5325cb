"""Configs: frozen dataclasses to and from YAML, with dotted command line overrides (jsonargparse)."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cm3.errors import ConfigError

STAGE_KEY = "stage"
"""Key of a run's YAML file that names the config class; it is no field of that class."""

Config = TypeVar("Config")


def config_parser(config_class: type) -> Any:
    """Return the jsonargparse parser of a config class; its help is made of the docstrings of the fields."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, fail_untyped=True)
    return parser


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; numbers such as `1e-3` are numbers.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds no mapping.
    """
    from jsonargparse import get_loader

    try:
        values = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}; check the path") from None
    except Exception as error:  # the loader's own exceptions differ between versions of PyYAML
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, found {type(values).__name__}")
    return values


def load_config(config_class: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Build a config; the precedence is default < YAML < overrides.

    Args:
        config_class: Dataclass to build, nested dataclasses included.
        path: YAML file, or None for the defaults. Its `stage` key is ignored.
        overrides: Command line words with dotted names, such as `["--optimizer.learning_rate", "1e-3"]`;
            `--help` prints every setting and leaves.

    Raises:
        ConfigError: An unknown key (the nearest one is named), a wrong type (with the value), or values that
            the config class itself refuses.
    """
    values = {} if path is None else read_yaml(path)
    values.pop(STAGE_KEY, None)
    where = "the defaults" if path is None else str(path)
    for name in _unknown_keys(config_class, values):
        raise ConfigError(f"{where}: unknown key {name!r}{_nearest(name, config_class)}")
    if "--help" in overrides or "-h" in overrides:
        config_parser(config_class).print_help()
        raise SystemExit(0)
    for word in overrides:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name not in set(_names(config_class)):
            raise ConfigError(f"unknown option --{name}{_nearest(name, config_class, '--')}")
    return _build(config_class, values, overrides, where)


def _build(
    config_class: type[Config], values: dict[str, Any], words: Sequence[str], where: str, group: str = ""
) -> Config:
    """Build the config, or one group of its settings from the part of the values and words that belongs to it."""
    merging, checking = config_parser(config_class), config_parser(config_class)
    merging.set_defaults(values)  # the values of defaults are taken on trust, hence the second parser
    try:
        checked = checking.parse_object(merging.parse_args(list(words)).as_dict())
        return config_class(**checking.instantiate(checked).as_dict())
    except ConfigError as error:
        raise ConfigError(f"{group}: {error}" if group else str(error)) from None
    except Exception as error:  # jsonargparse raises ArgumentError, TypeError or ValueError by cause
        # of `X | None` it says that the value fits neither, around what X said; X by itself says it plainly
        for name, nested in _groups(config_class):
            part, its_words = values.get(name), _words_of(name, words)
            is_replaced = any(word.partition("=")[0] == f"--{name}" for word in words)  # by null
            if (part is not None or its_words) and not is_replaced:
                _build(nested, part or {}, its_words, where, f"{group}.{name}" if group else name)
        raise ConfigError(f"{where}: {_plain_words(error, group)}") from None


def _groups(config_class: type) -> Iterator[tuple[str, type]]:
    """Yield the fields that are groups of settings, and the class of each."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if nested := _nested_class(hints[field.name]):
            yield field.name, nested


def _words_of(group: str, words: Sequence[str]) -> list[str]:
    """Return the words that set something in a group, without its name."""
    prefix, mine, belongs = f"--{group}.", [], False
    for word in words:
        if word.startswith("--"):
            belongs = word.startswith(prefix)
        if belongs:
            mine.append(f"--{word.removeprefix(prefix)}" if word.startswith("--") else word)
    return mine


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed of a run that random generators do not take, or not with a step number beside it."""
    if not 0 <= seed < 1 << 31:
        raise ConfigError(f"seed={seed}; choose 0 to 2147483647")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain dictionaries and lists, ready for YAML or JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def dump_config(config: Any, stage: str | None = None) -> str:
    """Return the YAML of a config, every field included; `load_config` reads it back."""
    import yaml

    values = to_dict(config) if stage is None else {STAGE_KEY: stage, **to_dict(config)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _nested_class(annotation: Any) -> type | None:
    """Return the dataclass of an annotation such as `X` or `X | None`."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Yield every dotted field name of a config class."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        yield prefix + field.name
        if nested := _nested_class(hints[field.name]):
            yield from _names(nested, f"{prefix}{field.name}.")


def _unknown_keys(config_class: type, values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that are no fields.

    Raises:
        ConfigError: a group of settings has a plain value.
    """
    hints = typing.get_type_hints(config_class)
    known = {field.name for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}"
        elif nested := _nested_class(hints[key]):
            if isinstance(value, dict):
                yield from _unknown_keys(nested, value, f"{prefix}{key}.")
            elif value is not None or nested is hints[key]:
                raise ConfigError(f"{prefix}{key} is a group of settings, found {value!r}; write its keys below it")


def _nearest(name: str, config_class: type, prefix: str = "") -> str:
    """Return `; did you mean ...?` with the dotted field name nearest to a wrong one, written with the prefix."""
    names = list(_names(config_class))
    last_parts = [candidate.rpartition(".")[2] for candidate in names]
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    close = difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1, cutoff=0.6)
    if match or close:
        nearest = (match or [names[last_parts.index(close[0])]])[0]
        return f"; did you mean {prefix + nearest if prefix else repr(nearest)}?"
    return f"; the keys are {', '.join(prefix + candidate for candidate in names if '.' not in candidate)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _plain_words(error: Exception, group: str) -> str:
    """Return what jsonargparse says of a group of settings in fewer words, with the whole name of the setting."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", _one_line(error)).replace("NoneType", "null")
    text = re.sub(r"typing\.Literal\[([^]]*)\]", r"\1", text)
    text = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)",
        r"expected one of \1; found \2",
        text,
    )
    named = re.sub(r'^Parser key "([^"]*)": ', lambda found: f"{group}.{found[1]}: ".removeprefix("."), text)
    return named if named != text or not group else f"{group}: {text}"
