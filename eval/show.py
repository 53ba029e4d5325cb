"""`cm3 show` of an evaluation: its model, its tasks, and on how many examples each measures; nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from cm3.checkpoint import read_json
from cm3.config import to_dict
from cm3.data.instruct import InstructFile
from cm3.data.sources import SourceConfig, open_source
from cm3.eval.compositional import CATEGORIES
from cm3.eval.compositional_task import CompositionalGeneration, DpgPictures, GenEvalPictures
from cm3.eval.instruct_set import InstructionSet
from cm3.eval.instruct_task import SceneInstructions
from cm3.eval.run import EvalRun, tasks_of
from cm3.eval.scene_tasks import SceneSet
from cm3.eval.vqa_task import VisualQuestions
from cm3.model.config import ModelConfig, parameter_count
from cm3.pretrained import CONFIG_FILE, DEMO, resolve_model


def show_evaluation(config: EvalRun) -> str:
    """The report of an evaluation: its settings without the tasks that are left out, its model, its examples."""
    import yaml

    settings = {name: value for name, value in to_dict(config).items() if value is not None}
    lines = {"model": _model(config.model), "report": f"{config.output}/results.md", "tasks": ""}
    lines |= {f"  {name}": examples_of(task) or "" for name, task in tasks_of(config).items()}
    width = max(map(len, lines)) + 2
    listed = "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in lines.items())
    return f"{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}\n{listed}"


def examples_of(task: Any) -> str | None:
    """How many examples a task has, from whatever of its settings names them; None for a setting that names none."""
    match task:
        case SceneSet() | SceneInstructions():
            return f"{task.size} scenes of the split {task.split}"
        case CompositionalGeneration():
            return f"{task.prompts_per_category} prompts of each of {len(CATEGORIES)} categories"
        case SourceConfig():
            return _rows(task)
        case InstructionSet():
            return _number("rows", task.path, task.limit, lambda: len(InstructFile(task.path)))
        case VisualQuestions():
            return _number("questions", task.questions, task.limit)
        case GenEvalPictures() | DpgPictures():
            return f"{_number('prompts', task.prompts)}; pictures of each: {task.drawing.samples_per_prompt}"
    if not is_dataclass(task):
        return None
    return next(filter(None, (examples_of(getattr(task, field.name)) for field in fields(task))), None)


def _rows(source: SourceConfig) -> str:
    if source.kind == "scenes":
        return f"{source.limit or 'all'} scenes of the split {source.split}"
    if source.kind == "hub" and not Path(source.path).exists():  # nothing is fetched to be counted
        return f"{_asked(source.limit)} rows of {source.path} on the Hub, split {source.split}"
    return _number("rows", source.path, source.limit, lambda: len(open_source(source)))


def _number(what: str, path: str, limit: int | None = None, count: Callable[[], int] | None = None) -> str:
    """How many examples of a file or folder are used; they are counted where that is quick and they are there."""
    if not Path(path).exists():
        return f"{_asked(limit)} {what} of {path}, which is not here"
    if count is None:
        return f"{_asked(limit)} {what} of {path}"
    number = count()
    return f"{number if limit is None else min(limit, number)} {what} of {path}"


def _asked(limit: int | None) -> str:
    return "all" if limit is None else f"the first {limit}"


def _model(name: str) -> str:
    if name != DEMO and not Path(name).is_dir():
        return f"{name}, which is no folder here: to be trained, or on the Hub"
    values = read_json(resolve_model(name) / CONFIG_FILE)
    return f"{name}, {parameter_count(ModelConfig(**values['model'])):,} parameters"
