"""The instruction tasks of the procedural scenes as an evaluation: exact verdicts by task and kind, and baselines."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from cm3.config import check_seed
from cm3.data.scene_tasks import DEFAULT_MIX, InstructionExample, SceneTasks
from cm3.data.scene_world import SIDE
from cm3.errors import ConfigError
from cm3.eval.instruct_requests import COPIED, ask, check_tasks, task_settings
from cm3.eval.protocol import BOOTSTRAP, NORMAL, WILSON, protocol
from cm3.eval.question_guesses import PRIOR
from cm3.eval.report import Estimate, TaskResult
from cm3.eval.scene_instruct import grade, instruction_metrics, question_prior
from cm3.eval.task import fingerprint
from cm3.pipeline import CM3


@dataclass(frozen=True, kw_only=True)
class SceneInstructions:
    """Edits, questions, boxes, maps, letters and long captions of held-out scenes, graded by the oracle.

    Beside the figures of edits stand those of a copy of the picture given, and beside those of questions the share
    that a guess from the question alone gets right.
    """

    split: str = "test"
    """`validation` and `test` share no scene with training."""
    size: int = 400
    """Number of examples, of all tasks together."""
    seed: int = 0
    """Seed of the examples, and of the sampling."""
    mix: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    """Tasks of `cm3.data.scene_tasks` with their weights, in any unit; all but infill."""
    sampling: dict[str, dict[str, float]] = field(default_factory=dict)
    """By template, such as edit: {guidance_scale: 3, image_guidance_scale: 1.5}: settings in the place of the model's
    own. `writing` has the template `generate`. Without settings, answers in text take the likeliest tokens."""
    max_new_tokens: int | None = None
    """Longest answer in text; null is what the model allows."""
    batch_size: int = 32
    """Examples of a task at a time; the answers do not depend on it."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        examples = list(SceneTasks(self.split, self.size, self.seed, self.mix))
        if any(example.box is not None for example in examples):
            raise ConfigError(
                "the mix has a task that asks for a box of a picture, infill, which is no instruction by a template; "
                "leave it out, and measure it by scene_infilling"
            )
        tasks = [example.task for example in examples]
        check_tasks(tasks, self.sampling)
        settings = task_settings(model, tasks, self.sampling)  # first, so that a wrong one costs nothing
        if model.image_size != SIDE:
            raise ConfigError(
                f"scenes are graded at {SIDE}x{SIDE} pixels, this model draws {model.image_size}x{model.image_size}; "
                "leave scene_instructions out, or choose a model of that size"
            )
        answers = ask(
            model,
            tasks,
            [(*example.texts, *example.images) for example in examples],
            sampling=self.sampling,
            seed=self.seed,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        verdicts = [grade(example, answer) for example, answer in zip(examples, answers, strict=True)]
        own = instruction_metrics(examples, verdicts)
        baselines = _baselines(examples)
        metrics: dict[str, Estimate] = {}
        for name, value in own.items():
            metrics |= {name: value, **baselines.get(name, {})}
        record = protocol(
            model,
            (" | ".join((example.task, *example.texts)) for example in examples),
            references={
                "source": "cm3.data.scene_tasks",
                "split": self.split,
                "seed": self.seed,
                "size": self.size,
                "mix": self.mix,
                "answers": fingerprint(_answers(examples)),
            },
            preprocessing="64x64 as drawn",
            sampling=settings,
            retrieve=0,
            seed=self.seed,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={
                "grader": "cm3.eval.scene_instruct; pictures are read by the oracle, answers compared as normalized()",
                COPIED: "the picture given, graded as if it were the answer",
                PRIOR: "the most frequent answer to the same question, else to its kind, in the other half of them",
            },
            interval=f"shares of examples: {WILSON}; shares of objects and letters: {BOOTSTRAP}; levels: {NORMAL}",
            details={"max_new_tokens": self.max_new_tokens},
        )
        return TaskResult("scene instructions", metrics, record, time.monotonic() - start)


def _baselines(examples: list[InstructionExample]) -> dict[str, dict[str, Estimate]]:
    """For a figure the baselines that stand beside it, under their names."""
    found: dict[str, dict[str, Estimate]] = {}
    edits = [example for example in examples if example.task == "edit"]
    copies = instruction_metrics(edits, [grade(example, example.images[0]) for example in edits])
    for name, value in copies.items():
        found[name] = {f"{name}, {COPIED}": value}
    for kind, value in question_prior(examples).items():
        name = "vqa: exact" if kind == "all" else f"vqa {kind}: exact"
        found[name] = {f"{name}, {PRIOR}": value}
    return found


def _answers(examples: Iterable[InstructionExample]) -> list[str]:
    """The right answers in words, or as scenes."""
    return [example.answer if isinstance(example.answer, str) else repr(example.truth) for example in examples]
