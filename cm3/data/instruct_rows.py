"""Rows of instruction data: a line of JSONL to turns of texts and pictures, and everything that can be wrong with it.

The format is described in `cm3.data.instruct`. Pictures are checked by their names only.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from cm3.data.conditions import CONDITIONS
from cm3.errors import DataError
from cm3.tokenizers.document import Text
from cm3.tokenizers.instruct import check_fit
from cm3.tokenizers.instruct_tasks import TASKS, image_fields

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class ImageFile:
    """A picture by its path, relative to the file of rows, with `/` between folders."""

    path: str


@dataclass(frozen=True, kw_only=True)
class InstructRow:
    """One line: what the user says, what the assistant answers, and so on."""

    turns: tuple[tuple[Text | ImageFile, ...], ...]
    task: str | None = None
    id: str | None = None

    def to_json(self) -> str:
        """The line, without its end."""
        turns = [
            {"role": ROLES[number % 2], "content": [_segment_to_json(part) for part in turn]}
            for number, turn in enumerate(self.turns)
        ]
        named = {key: value for key, value in (("id", self.id), ("task", self.task)) if value is not None}
        return json.dumps({**named, "turns": turns}, ensure_ascii=False)


class RowError(DataError):
    """Everything that is wrong with one row; `faults` has it one by one."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)


def parse_row(line: bytes) -> InstructRow:
    """Read a line.

    Raises:
        RowError: it is no row; with all that is wrong.
    """
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise RowError([f"not valid JSON ({error}); write one object a line, in UTF-8"]) from error
    faults: list[str] = []
    row = _row(value, faults)
    if not faults and row.task is not None:
        placeholder = (ImageFile(""),) if lacks_condition(row.task, row.turns) else ()
        try:
            check_fit(row.task, ((*placeholder, *row.turns[0]), *row.turns[1:]))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise RowError(faults)
    return row


def path_fault(path: str) -> str | None:
    """What is wrong with the path of a picture by its name alone; None where nothing is."""
    if not path or "\0" in path:
        return "is empty or holds a null character; give a path relative to this file"
    if "://" in path or path.startswith("data:"):
        return "is an address; download the picture and give its path relative to this file"
    if path.startswith(("/", "~")) or PureWindowsPath(path).drive:
        return "is absolute; move or link the picture into this file's folder and give a relative path"
    if "\\" in path:
        return "has a backslash; write / between folders"
    if ".." in PurePosixPath(path).parts:
        return "leaves this file's folder by `..`; move or link the picture into it"
    return None


def _row(value: Any, faults: list[str]) -> InstructRow:
    if not isinstance(value, dict):
        faults.append(f"a line must hold a JSON object with the key 'turns', found {_kind(value)}")
        return InstructRow(turns=())
    _check_keys(value, ("id", "task", "turns"), "", faults)
    id, task, turns = value.get("id"), value.get("task"), value.get("turns")
    if "id" in value and (not isinstance(id, str) or not id):
        faults.append(f"id is {_kind(id)}; give a text that is not empty, or leave it out")
    if "task" in value and (not isinstance(task, str) or task not in TASKS):
        hint = _hint(str(task), tuple(TASKS))
        faults.append(f"task is {json.dumps(task)[:60]}; {hint}, or leave it out for a conversation")
    if not isinstance(turns, list) or not turns:
        found = _kind(turns) if "turns" in value else "no such key"
        faults.append(f"turns must be a list of objects with 'role' and 'content', found {found}")
        return InstructRow(turns=())
    parsed = tuple(_turn(turn, number, faults) for number, turn in enumerate(turns))
    if len(turns) % 2:
        faults.append("the turns end with the user's; add the assistant's answer, which is what is learnt")
    return InstructRow(turns=parsed, task=task, id=id)


def _turn(value: Any, number: int, faults: list[str]) -> tuple[Text | ImageFile, ...]:
    where = f"turns[{number}]"
    if not isinstance(value, dict):
        faults.append(f"{where} must be an object with 'role' and 'content', found {_kind(value)}")
        return ()
    _check_keys(value, ("role", "content"), where, faults)
    role, content, expected = value.get("role"), value.get("content"), ROLES[number % 2]
    if role != expected:
        faults.append(
            f"{where}.role is {json.dumps(role)[:60]}, must be {expected!r}; turns are the user's and the assistant's "
            "in alternation, the user's first"
        )
    if not isinstance(content, list) or not content:
        example = '[{"text": "..."}, {"image": "..."}]'
        faults.append(
            f"{where}.content must be a list with a segment or more, such as {example}, found {_kind(content)}"
        )
        return ()
    parts = [_segment(part, f"{where}.content[{place}]", faults) for place, part in enumerate(content)]
    return tuple(part for part in parts if part is not None)


def _segment(value: Any, where: str, faults: list[str]) -> Text | ImageFile | None:
    if not isinstance(value, dict):
        faults.append(f'{where} must be {{"text": ...}} or {{"image": ...}}, found {_kind(value)}')
        return None
    _check_keys(value, ("text", "image"), where, faults)
    keys = [key for key in ("text", "image") if key in value]
    if len(keys) != 1:
        faults.append(f"{where} holds {' and '.join(keys) or 'neither text nor image'}; give one of text and image")
        return None
    content, where = value[keys[0]], f"{where}.{keys[0]}"
    if not isinstance(content, str):
        faults.append(f"{where} must be a string, found {_kind(content)}")
    elif not _is_unicode(content):
        faults.append(f"{where} holds half of a surrogate pair; write the character itself")
    elif keys == ["image"]:
        if fault := path_fault(content):
            faults.append(f"{where} {json.dumps(content)[:120]} {fault}")
        return ImageFile(content)
    elif not content.strip():
        faults.append(f"{where} is empty; fill it in or leave the segment out")
    else:
        return Text(content)
    return None


def lacks_condition(task: str, turns: Sequence[Sequence[Text | ImageFile]]) -> bool:
    """Whether the condition picture of a row is to be computed."""
    given = [sum(isinstance(part, ImageFile) for part in turn) for turn in turns]
    return task in CONDITIONS and given == [len(image_fields(TASKS[task].user)) - 1, 1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return value


def _check_keys(value: dict[str, Any], known: tuple[str, ...], where: str, faults: list[str]) -> None:
    for key in value:
        if key not in known:
            faults.append(f"{where + ': ' if where else ''}unknown key {key[:40]!r}; {_hint(key, known)}")


def _hint(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(known)}"


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (str, list)) and not value:
        return "an empty list" if isinstance(value, list) else "an empty string"
    kinds = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return kinds[type(value)]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _segment_to_json(part: Text | ImageFile) -> dict[str, str]:
    return {"text": part.text} if isinstance(part, Text) else {"image": part.path}
