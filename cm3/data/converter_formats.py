"""The foreign formats that `cm3 convert` reads: LLaVA, COCO captions, VQAv2, ControlNet folders, tables in Parquet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cm3.data.conditions import CONDITIONS
from cm3.data.converters import (
    ConversionReport,
    Converter,
    ConvertOptions,
    ImageStore,
    Value,
    joined_rows,
    needed_fields,
    task_fields,
    task_row,
    write_rows,
)
from cm3.data.instruct_rows import ROLES, ImageFile, InstructRow
from cm3.data.readers import Table
from cm3.errors import ConfigError, DataError
from cm3.tokenizers.document import Text
from cm3.tokenizers.instruct_tasks import TASKS, is_image_field

_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_LLAVA_MARK = "<image>"
_INSTRUCTPIX2PIX_COLUMNS = {"image": "original_image", "instruction": "edit_prompt"}


def convert(format: str, input: str | Path, out: str | Path, options: ConvertOptions) -> ConversionReport:
    """Convert a data set to `instruct.jsonl` and its pictures.

    Args:
        format: A key of `FORMATS`.
        input: File or folder of the data set.
        out: Folder to write, made where it does not exist.
        options: What the format does not say by itself.

    Raises:
        DataError: the input cannot be read, or no row of it could be converted.
        ConfigError: an option is missing or does not fit.
    """
    path, out = Path(input), Path(out)
    folder = Path(options.images) if options.images else path if path.is_dir() else path.parent
    converter = FORMATS[format](path, ImageStore(out, folder, options.copy), options)
    return write_rows(converter, out, options.limit)


class Llava:
    """`[{"id", "image", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...]}, ...]`.

    `image` may be missing, a path or a list of paths; a picture that no `<image>` names comes first.
    """

    def __init__(self, path: Path, store: ImageStore, options: ConvertOptions) -> None:
        self._rows, self._store, self._task = _read_rows(path), store, options.task
        if self._task is not None:
            task_fields(self._task)

    def raw_rows(self) -> Iterator[tuple[str, Any]]:
        for number, raw in enumerate(self._rows):
            yield f"row {number}", raw

    def convert(self, name: str, raw: Any) -> list[InstructRow]:
        given = _get(raw, "image", (str, list)) if isinstance(raw, dict) and raw.get("image") else []
        paths = [given] if isinstance(given, str) else given
        if not all(isinstance(path, str) for path in paths):
            raise DataError("'image' must be a path or a list of paths")
        messages = _get(raw, "conversations", (list,))
        values = [_get(message, "value", (str,)) for message in messages]
        for number, message in enumerate(messages):
            role = _LLAVA_ROLES.get(_get(message, "from", (str,)))
            if role != ROLES[number % 2]:
                raise DataError(
                    f"conversations[{number}] is from {message['from']!r}, must be the {ROLES[number % 2]}'s; only "
                    "human and gpt in alternation can be converted"
                )
        marks = sum(value.count(_LLAVA_MARK) for value in values)
        if marks == 0 and values:
            values[0] = _LLAVA_MARK * len(paths) + values[0]
        elif marks != len(paths):
            raise DataError(f"{marks} {_LLAVA_MARK} marks for {len(paths)} pictures")
        pictures = iter([self._store.file(path) for path in paths])
        turns = []
        for value in values:
            first, *others = value.split(_LLAVA_MARK)
            turn: list[Text | ImageFile] = [Text(first.strip())]
            for text in others:
                turn += [next(pictures), Text(text.strip())]
            turns.append(tuple(part for part in turn if part != Text("")))
        id = raw.get("id")
        return [InstructRow(turns=tuple(turns), task=self._task, id=None if id is None else str(id))]


class CocoCaptions:
    """`{"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}`; a row for each caption."""

    def __init__(self, path: Path, store: ImageStore, options: ConvertOptions) -> None:
        value = _read_json(path)
        self._annotations, self._store = _get(value, "annotations", (list,)), store
        images = _get(value, "images", (list,))
        self._files = {_get(image, "id", (int, str)): _get(image, "file_name", (str,)) for image in images}
        self._task = options.task or "caption"
        needed_fields(self._task, ("image", "caption"), "coco")

    def raw_rows(self) -> Iterator[tuple[str, Any]]:
        for number, raw in enumerate(self._annotations):
            yield f"annotations[{number}]", raw

    def convert(self, name: str, raw: Any) -> list[InstructRow]:
        image_id = _get(raw, "image_id", (int, str))
        if image_id not in self._files:
            raise DataError(f"image_id {image_id} is not among the images")
        values: dict[str, Value] = {
            "image": self._store.file(self._files[image_id]),
            "caption": Text(_get(raw, "caption", (str,)).strip()),
        }
        return [task_row(self._task, values, str(raw.get("id", name)))]


class Vqa:
    """Questions and annotations of VQAv2 or OK-VQA, joined by `question_id`; the answer is the most frequent one."""

    def __init__(self, path: Path, store: ImageStore, options: ConvertOptions) -> None:
        if options.annotations is None:
            raise ConfigError("vqav2 has its answers in a second file; name it with --annotations")
        value = _read_json(path)
        self._questions, self._store = _get(value, "questions", (list,)), store
        annotations = _get(_read_json(Path(options.annotations)), "annotations", (list,))
        self._answers = {_get(each, "question_id", (int, str)): each for each in annotations}
        subtype = value.get("data_subtype")
        if options.image_name is None and not isinstance(subtype, str):
            raise ConfigError(
                f"{path} has no 'data_subtype' that tells the names of pictures; give them with --image-name, such as "
                "COCO_val2014_{image_id:012d}.jpg"
            )
        self._image_name = options.image_name or f"COCO_{subtype}_{{image_id:012d}}.jpg"
        self._task = options.task or "vqa"
        needed_fields(self._task, ("image", "question", "answer"), "vqav2")

    def raw_rows(self) -> Iterator[tuple[str, Any]]:
        for number, raw in enumerate(self._questions):
            yield f"questions[{number}]", raw

    def convert(self, name: str, raw: Any) -> list[InstructRow]:
        question_id, image_id = _get(raw, "question_id", (int, str)), _get(raw, "image_id", (int, str))
        if question_id not in self._answers:
            raise DataError(f"question_id {question_id} has no annotation")
        try:
            file_name = self._image_name.format(image_id=image_id)
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataError(
                f"--image-name {self._image_name!r} does not fit image_id {image_id!r} ({error}); write {{image_id}} "
                "where it stands"
            ) from error
        values: dict[str, Value] = {
            "image": self._store.file(file_name),
            "question": Text(_get(raw, "question", (str,)).strip()),
            "answer": Text(_most_frequent_answer(self._answers[question_id])),
        }
        return [task_row(self._task, values, str(question_id))]


class ControlNet:
    """A folder with `prompt.json`, an object `{"source", "target", "prompt"}` a line, and the pictures it names."""

    def __init__(self, path: Path, store: ImageStore, options: ConvertOptions) -> None:
        if not path.is_dir():
            raise DataError(f"{path} is not a folder; give the one that holds prompt.json")
        self._rows, self._store = _read_rows(path / "prompt.json"), store
        self._task = options.task or "edges"
        self._fields = needed_fields(self._task, ("condition_image", "caption", "image"), "controlnet")

    def raw_rows(self) -> Iterator[tuple[str, Any]]:
        for number, raw in enumerate(self._rows):
            yield f"row {number} of prompt.json", raw

    def convert(self, name: str, raw: Any) -> list[InstructRow]:
        values: dict[str, Value] = {"caption": Text(_get(raw, "prompt", (str,)).strip())}
        for key, field in (("source", "condition_image"), ("target", "image")):
            if field in self._fields:
                values[field] = self._store.file(_get(raw, key, (str,)))
        return [task_row(self._task, values, None)]


class ParquetTable:
    """Parquet as `datasets` writes it: a column for each field of a task. Lists of texts make a row of each element, or
    an exchange of one row."""

    def __init__(self, path: Path, store: ImageStore, options: ConvertOptions) -> None:
        if options.task is None:
            raise ConfigError(f"parquet does not say what its rows are; name a task: --task {'|'.join(TASKS)}")
        self._task, self._store, self._together = options.task, store, options.together
        fields = task_fields(self._task)
        if unknown := [name for name in options.columns if name not in fields]:
            raise ConfigError(f"task {self._task!r} has no field {unknown[0]!r}; choose among {', '.join(fields)}")
        if self._task in CONDITIONS and "condition_image" not in options.columns:
            fields = tuple(name for name in fields if name != "condition_image")
        self._columns = {name: options.columns.get(name, name) for name in fields}
        self._table = Table.from_parquet(str(path), options.split, list(self._columns.values()))

    def raw_rows(self) -> Iterator[tuple[str, Any]]:
        for index in range(len(self._table)):
            yield f"row {index}", (index, self._table.row(index))

    def convert(self, name: str, raw: Any) -> list[InstructRow]:
        index, row = raw
        values = {field: self._value(field, row[column], column) for field, column in self._columns.items()}
        lists = {field: value for field, value in values.items() if isinstance(value, list) and field != "objects"}
        lengths = {len(value) for value in lists.values()}
        if not lists:
            return [task_row(self._task, values, str(index))]
        if len(lengths) > 1:
            described = ", ".join(f"{self._columns[field]} {len(value)}" for field, value in lists.items())
            raise DataError(f"lists of one row have different lengths ({described})")
        rows = [values | {field: value[place] for field, value in lists.items()} for place in range(lengths.pop())]
        converted = [task_row(self._task, each, f"{index}.{place}") for place, each in enumerate(rows)]
        return [joined_rows(converted, str(index))] if self._together and converted else converted

    def _value(self, field: str, value: Any, column: str) -> Value:
        if is_image_field(field):
            data = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
            if isinstance(data, bytes):
                return self._store.data(data)
            if isinstance(data, str):
                return self._store.file(data)
            raise DataError(f"column {column!r} holds {type(data).__name__}, not a picture or its path")
        if isinstance(value, str):
            return Text(value.strip())
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return [Text(each.strip()) for each in value]
        raise DataError(f"column {column!r} holds {type(value).__name__}, not a text or a list of them")


def _instructpix2pix(path: Path, store: ImageStore, options: ConvertOptions) -> ParquetTable:
    columns = {**_INSTRUCTPIX2PIX_COLUMNS, **options.columns}
    return ParquetTable(path, store, replace(options, task=options.task or "edit", columns=columns))


FORMATS: dict[str, Callable[[Path, ImageStore, ConvertOptions], Converter]] = {
    "llava": Llava,
    "instructpix2pix": _instructpix2pix,
    "coco": CocoCaptions,
    "vqav2": Vqa,
    "controlnet": ControlNet,
    "parquet": ParquetTable,
}


def _most_frequent_answer(annotation: Any) -> str:
    if "multiple_choice_answer" in annotation:
        return str(_get(annotation, "multiple_choice_answer", (str,))).strip()
    answers = [_get(each, "answer", (str,)) for each in _get(annotation, "answers", (list,))]
    if not answers:
        raise DataError("the annotation has no answers")
    return Counter(answers).most_common(1)[0][0].strip()  # the first of those that are equally frequent


def _get(value: Any, key: str, kinds: tuple[type, ...]) -> Any:
    """The value of a key of a JSON object, of one of some types."""
    if not isinstance(value, dict):
        raise DataError(f"an object with {key!r} was expected, found {type(value).__name__}")
    if key not in value:
        raise DataError(f"no key {key!r}; the object has {', '.join(map(repr, value)) or 'none'}")
    if not isinstance(value[key], kinds):
        raise DataError(
            f"{key!r} is {type(value[key]).__name__}, must be {' or '.join(kind.__name__ for kind in kinds)}"
        )
    return value[key]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error


def _read_rows(path: Path) -> list[Any]:
    """A JSON list, or one JSON object a line."""
    try:
        text = path.read_text("utf-8-sig").strip()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error})") from error
    try:
        value = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is neither a JSON list nor one JSON object a line ({error})") from error
    rows: list[Any] = value
    return rows
