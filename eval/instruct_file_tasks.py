"""Instruction evaluation on one's own rows: answers in text by equality, edited pictures by their pixels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image as PILImage

from cm3.config import check_seed
from cm3.eval.document_tasks import square_of
from cm3.eval.image_metrics import psnr, ssim
from cm3.eval.instruct_requests import COPIED, Part, ask, check_tasks, task_settings
from cm3.eval.instruct_set import InstructionSet, Request
from cm3.eval.protocol import NORMAL, WILSON, protocol
from cm3.eval.question_guesses import PRIOR, guesses
from cm3.eval.report import Estimate, TaskResult, mean, share
from cm3.eval.vqa_metrics import normalize_answer
from cm3.pipeline import CM3
from cm3.tokenizers.image import to_square

ROUND_TRIP = "round trip of the answer"

_MEASURES = ("pixel distance (levels)", "PSNR (dB)", "SSIM")
_EQUAL_DB = 100.0


@dataclass(frozen=True, kw_only=True)
class InstructionAnswers:
    """Questions of instruction rows, answered and compared with their answers, beside what the questions give away."""

    rows: InstructionSet
    """The rows; those of tasks that are answered in text count."""
    prior: str | None = None
    """File of instruction data that the guess from the question alone learns from, such as the training rows. Null:
    each half of the rows learns from the other."""
    sampling: dict[str, dict[str, float]] = field(default_factory=dict)
    """By task, settings in the place of the likeliest tokens, such as vqa: {temperature: 0.5}."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; null is what the model allows."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 32
    """Rows of a task at a time; the answers do not depend on it."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        requests = self.rows.texts()
        settings = _checked(self, model, requests)
        known = None if self.prior is None else [_known(each) for each in InstructionSet(path=self.prior).texts()]
        guessed = guesses([_known(each) for each in requests], known)
        answered = _ask(self, model, requests)
        wanted = [_words(request.answer) for request in requests]
        right = [_words(answer) == words for answer, words in zip(answered, wanted, strict=True)]
        prior = [guess == words for guess, words in zip(guessed, wanted, strict=True)]
        metrics: dict[str, Estimate] = {}
        for group, members in self.rows.groups(requests):
            metrics[f"exact answer, {group}"] = share([right[i] for i in members])
            metrics[f"exact answer {PRIOR}, {group}"] = share([prior[i] for i in members])
            gain = [float(right[i]) - float(prior[i]) for i in members]
            metrics[f"gain over the question alone, {group}"] = mean(gain)
        record = protocol(
            model,
            (" | ".join((request.task, *request.texts)) for request in requests),
            references=self.rows.record(requests),
            preprocessing=square_of(model),
            sampling=settings,
            retrieve=0,
            seed=self.seed,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={
                "exact": "equal to the one answer of the row after the official VQA normalisation of both",
                PRIOR: "the most frequent answer to the same question, else to its task, in "
                + ("the other half of the rows" if self.prior is None else self.prior),
                "gain": "mean over rows of right (1 or 0) less that of the guess",
            },
            interval=f"shares: {WILSON}; gain: {NORMAL.replace('pictures', 'rows')}",
            details={"max_new_tokens": self.max_new_tokens},
        )
        return TaskResult("instruction answers", metrics, record, time.monotonic() - start)


@dataclass(frozen=True, kw_only=True)
class InstructionEdits:
    """Pictures made of pictures by instruction rows, compared with the true ones, beside a copy of the picture given.

    A copy keeps every pixel that an edit leaves alone, and no model that goes through an image tokenizer does. The
    round trip of the true picture through it is the best that any such model reaches.
    """

    rows: InstructionSet
    """The rows; those that give one picture and are answered by one count."""
    sampling: dict[str, dict[str, float]] = field(default_factory=dict)
    """By task, settings in the place of the model's, such as edit: {guidance_scale: 3, image_guidance_scale: 1.5}."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 32
    """Rows of a task at a time; the pictures do not depend on it."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        requests = self.rows.edits()
        settings = _checked(self, model, requests)
        drawn = [answer for answer in _ask(self, model, requests) if isinstance(answer, PILImage.Image)]
        before = [to_square(request.images[0], model.image_size) for request in requests]
        after = [to_square(_picture(request), model.image_size) for request in requests]
        decoded = model.reconstruct(after)
        measured = {
            name: [_measures(*pair) for pair in zip(pictures, after, strict=True)]
            for name, pictures in (("", drawn), (f" {COPIED}", before), (f" {ROUND_TRIP}", decoded))
        }
        blurred = [_distance(*pair) for pair in zip(model.reconstruct(before), after, strict=True)]
        distances = {name: [each["pixel distance (levels)"] for each in rows] for name, rows in measured.items()}
        closer = [own < other for own, other in zip(distances[""], distances[f" {COPIED}"], strict=True)]
        fairly = [own < other for own, other in zip(distances[""], blurred, strict=True)]
        metrics: dict[str, Estimate] = {}
        for group, members in self.rows.groups(requests):
            metrics[f"closer than the copy, {group}"] = share([closer[i] for i in members])
            metrics[f"closer than the round trip of the copy, {group}"] = share([fairly[i] for i in members])
            for measure in _MEASURES:
                for name, rows in measured.items():
                    metrics[f"{measure}{name}, {group}"] = mean([rows[i][measure] for i in members])
        record = protocol(
            model,
            (" | ".join((request.task, *request.texts)) for request in requests),
            references=self.rows.record(requests),
            preprocessing=square_of(model),
            sampling=settings,
            retrieve=0,
            seed=self.seed,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={
                "PSNR": f"RGB together, peak 255, at most {_EQUAL_DB:g}, mean over pictures",
                "SSIM": "Gaussian 11x11, sigma 1.5, mean over channels",
                "pixel distance": "mean absolute difference of RGB in levels of 255",
                "closer": "smaller pixel distance to the true picture; ties are lost",
                COPIED: "the picture given in the place of the model's",
                ROUND_TRIP: "the true picture through the image tokenizer, the best that can be reached",
            },
            interval=f"shares: {WILSON}; else {NORMAL}",
        )
        return TaskResult("instruction edits", metrics, record, time.monotonic() - start)


def _measures(picture: PILImage.Image, wanted: PILImage.Image) -> dict[str, float]:
    values = (_distance(picture, wanted), min(psnr(picture, wanted), _EQUAL_DB), ssim(picture, wanted))
    return dict(zip(_MEASURES, values, strict=True))


def _distance(picture: PILImage.Image, wanted: PILImage.Image) -> float:
    return float(np.abs(np.asarray(picture, dtype=float) - np.asarray(wanted, dtype=float)).mean())


def _checked(
    task: InstructionAnswers | InstructionEdits, model: CM3, requests: Sequence[Request]
) -> dict[str, dict[str, Any]]:
    """The sampling settings of each task; before the model is asked, so that a wrong one costs nothing."""
    tasks = [request.task for request in requests]
    check_tasks(tasks, task.sampling)
    return task_settings(model, tasks, task.sampling)


def _ask(task: InstructionAnswers | InstructionEdits, model: CM3, requests: Sequence[Request]) -> list[Part]:
    return ask(
        model,
        [request.task for request in requests],
        [request.contents for request in requests],
        sampling=task.sampling,
        seed=task.seed,
        batch_size=task.batch_size,
        max_new_tokens=task.max_new_tokens if isinstance(task, InstructionAnswers) else None,
    )


def _picture(request: Request) -> PILImage.Image:
    assert not isinstance(request.answer, str), request.name
    return request.answer


def _known(request: Request) -> tuple[str, str, str]:
    """Kind, question and answer, in words that are compared."""
    return request.task, " ".join(" ".join(request.texts).lower().split()), _words(request.answer)


def _words(answer: Part) -> str:
    """An answer as it is compared; one that the normalisation leaves nothing of, such as "a", as it is."""
    assert isinstance(answer, str)
    return normalize_answer(answer) or answer.strip().lower()
