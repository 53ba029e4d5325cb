"""What the `cm3` command says of words that it cannot use: one line, with the nearest name where one is close."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

SETTINGS = "--key"
"""What stands for the settings of a config in a usage."""
_KINDS = {"int": "a whole number", "float": "a number"}
_MOST_LISTED = 10
"""Choices that are listed; more of them are left to the help."""
_OPTION = re.compile(r"(--?[A-Za-z][\w-]*)(?:=.*)?", re.DOTALL)
"""What is meant as an option; `-5`, or a text that begins with a dash, is not."""
_BEFORE, _AFTER = r"(?<![^\s(])", r"(?=[.,;:)]*(?:\s|$))"
"""Around a word of a message that is no part of a longer one, such as a path."""
_REWORDED = (
    (r"argument (.+?): invalid (int|float) value: (.+)", lambda m: f"{m[1]} takes {_KINDS[m[2]]}, not {m[3]}"),
    (r"argument (.+?): invalid choice: (.+?) \(choose from (.+)\)", lambda m: _choice(m[1], m[2], m[3])),
    (r"argument (.+?): expected one argument", lambda m: f"{m[1]} needs a value"),
    (r"argument (.+?): expected at least one argument", lambda m: f"{m[1]} needs at least one value"),
    (r"argument (.+?): (.+)", lambda m: f"{m[1]}: {m[2]}"),
    (r"the following arguments are required: (.+)", lambda m: f"nothing was given for {m[1]}"),
)
"""Messages of argparse, which names neither the nearest choice nor what a type takes. One that is worded in another way
is printed as it is."""


class Parser(argparse.ArgumentParser):
    """A parser that prints one line where argparse prints the whole usage, and knows the nearest option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does, but that words nobody knows are refused here, where the verb is known."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with exit code 2."""
        message = " ".join(message.split())
        for pattern, reworded in _REWORDED:
            if match := re.fullmatch(pattern, message):
                message = reworded(match)
                break
        joint = " See" if message.endswith("?") else "; see"
        self.exit(2, f"{self.prog}: {message.rstrip('.')}{joint} {self.prog} --help\n")

    def _unknown(self, words: Sequence[str]) -> str:
        option = next((match[1] for word in words if (match := _OPTION.fullmatch(word))), None)
        if option is None:
            return f"unexpected {' '.join(map(shlex.quote, words))}; a text of several words goes in quotes"
        known = re.findall(r"(?<![\w-])--[a-z][\w-]*", self.format_usage())
        if SETTINGS in known:
            return f"there is no option {option} before the config; its settings come after it"
        near = difflib.get_close_matches(option, known, n=1)
        return f"there is no option {option}" + (f"; did you mean {near[0]}?" if near else "")


def add_sub_parser(parsers: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Add the parser of a verb, or of a part of one, to what `add_subparsers` returned.

    Args:
        parsers: Gets the new one.
        name: What is typed.
        summary: What it does.
        example: A whole command; it is printed on one line of a terminal of 80 columns.
    """
    return parsers.add_parser(
        name,
        help=summary,
        description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}.", 78),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def in_shell_words(message: str, arguments: Mapping[str, Any]) -> str:
    """A message that names arguments of Python, `num_images=0`, as the shell has them, `--num-images 0`.

    Args:
        message: One line.
        arguments: Those of the verb by their names, as argparse has them. Several numbers are typed as several words
            where the argument is a list, and with commas elsewhere.
    """
    known = sorted(arguments, key=len, reverse=True)
    if not known:
        return message
    value = r"\([^()]*\)|\[[^\[\]]*\]|'[^']*'|\"[^\"]*\"|[^\s,;:)/]+"
    message = re.sub(
        rf"{_BEFORE}({'|'.join(known)})=({value}){_AFTER}",
        lambda m: f"{_option(m[1])} {_shell_value(m[2], ' ' if isinstance(arguments[m[1]], list) else ',')}",
        message,
    )
    long = "|".join(name for name in known if "_" in name)  # a name of one word could be just that word
    return re.sub(rf"{_BEFORE}({long}){_AFTER}", lambda m: _option(m[1]), message) if long else message


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shell_value(text: str, separator: str) -> str:
    """What one types for a value that Python prints as `text`; `separator` stands between several."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    if isinstance(value, str):
        return shlex.quote(value)
    return separator.join(shlex.quote(str(item)) for item in value) if isinstance(value, list | tuple) else text


def _choice(name: str, given: str, choices: str) -> str:
    known = [choice.strip().strip("'") for choice in choices.split(",")]
    near = difflib.get_close_matches(given.strip("'"), known, n=1)
    if near:
        return f"{name} cannot be {given}; did you mean {near[0]}?"
    return f"{name} cannot be {given}" + (f"; choose one of {', '.join(known)}" if len(known) <= _MOST_LISTED else "")
