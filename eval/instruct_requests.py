"""Instruction requests put to a model in batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image as PILImage

from cm3.errors import ConfigError
from cm3.generation.trained import UNGUIDED
from cm3.pipeline import CM3
from cm3.tokenizers.instruct_tasks import TASKS, is_image_field

Part = str | PILImage.Image
Sampling = Mapping[str, Mapping[str, float]]
"""Sampling settings of a task in the place of the model's own."""

COPIED = "copying the picture"
"""What figures are called where the picture given is taken for the answer."""


def answers_in_text(task: str) -> bool:
    """Whether the answer to a task is text, and no picture."""
    return not any(is_image_field(name) for name in TASKS[task].assistant)


def check_tasks(tasks: Iterable[str], sampling: Sampling) -> None:
    """Check that a model can be asked these tasks by their templates, and that sampling settings are for them.

    Raises:
        ConfigError: a task without a template, or settings of a task that is not asked.
    """
    asked = list(dict.fromkeys(tasks))
    if unknown := [task for task in asked if task not in TASKS]:
        raise ConfigError(
            f"task {unknown[0]!r} has no template, so a model cannot be asked it here; leave it out and keep "
            f"{', '.join(task for task in asked if task in TASKS) or 'other tasks'}"
        )
    if idle := [task for task in sampling if task not in asked]:
        raise ConfigError(
            f"sampling has settings of task {idle[0]!r}, which is not asked; choose among {', '.join(asked)}"
        )


def task_settings(model: CM3, tasks: Iterable[str], sampling: Sampling) -> dict[str, dict[str, Any]]:
    """All sampling settings of each task, those included that the model's files give; for protocol records.

    Raises:
        RequestError: a setting is unknown or out of its range.
    """
    return {task: model.settings(**_overrides(task, sampling)) for task in dict.fromkeys(tasks)}


def ask(
    model: CM3,
    tasks: Sequence[str],
    contents: Sequence[Sequence[Part]],
    *,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> list[Part]:
    """The answers to requests of several tasks, in their order.

    Args:
        model: Who is asked.
        tasks: For each request its template.
        contents: For each request what the user gives: texts and pictures.
        sampling: Settings by task. Where there are none the model's own hold for pictures, and answers in text take
            the likeliest tokens; those are never guided.
        seed: Of every request.
        batch_size: Requests of one task at a time; the answers do not depend on it.
        max_new_tokens: Longest answer in text; None is what the model allows.

    Raises:
        ConfigError: batches of less than one request.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; choose 1 or more")
    answers: dict[int, Part] = {}
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    for task in dict.fromkeys(tasks):
        numbers = [number for number, name in enumerate(tasks) if name == task]
        options = {**(limit if answers_in_text(task) else {}), **_overrides(task, sampling)}
        for first in range(0, len(numbers), batch_size):
            batch = numbers[first : first + batch_size]
            found = model.instruct(task, [list(contents[number]) for number in batch], seed=seed, **options)
            answers |= zip(batch, found, strict=True)
    return [answers[number] for number in range(len(tasks))]


def _overrides(task: str, sampling: Sampling) -> dict[str, Any]:
    chosen = dict(sampling.get(task, {}))
    return {"temperature": 0.0, **chosen, **UNGUIDED} if answers_in_text(task) else chosen
