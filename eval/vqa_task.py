"""Visual questions in the files of VQAv2, OK-VQA and VizWiz: VQA accuracy, or a file of answers for their servers."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cm3.checkpoint import write_json
from cm3.config import check_seed
from cm3.errors import ConfigError, DataError
from cm3.eval.document_tasks import ALL, square_of
from cm3.eval.instruct_requests import ask, task_settings
from cm3.eval.protocol import NORMAL, protocol
from cm3.eval.question_guesses import PRIOR, guesses
from cm3.eval.report import Estimate, TaskResult, mean
from cm3.eval.task import fingerprint
from cm3.eval.vqa_metrics import normalize_answer, vqa_accuracy
from cm3.pipeline import CM3
from cm3.tokenizers.image import load_image

_TASK = "vqa"


@dataclass(frozen=True)
class Question:
    """One question of a data set."""

    key: dict[str, Any]
    """What the server knows it by: {"question_id": 1} or {"image": "VizWiz_test_00000000.jpg"}."""
    text: str
    image: Path
    answers: tuple[str, ...] = ()
    """What people answered; empty where it is kept secret."""
    kind: str = ""
    """Type of its answer, such as yes/no; empty where it is not told."""


@dataclass(frozen=True, kw_only=True)
class VisualQuestions:
    """Answer the questions of VQAv2, OK-VQA or VizWiz, and score the answers as the official code does."""

    questions: str
    """File of the questions; of VizWiz the one file, which holds the answers too."""
    annotations: str | None = None
    """VQAv2, OK-VQA: file of people's answers; null where they are kept secret, as those of test-dev."""
    images: str
    """Folder of the pictures."""
    image_name: str | None = None
    """VQAv2, OK-VQA: file of a picture, such as COCO_val2014_{image_id:012d}.jpg; null goes by the file's
    `data_subtype`. The pictures of test-dev2015 are called test2015."""
    answers_file: str | None = None
    """Where the answers go as the servers take them; null writes none."""
    limit: int | None = None
    """Use the first questions only; null is all."""
    sampling: dict[str, float] = field(default_factory=dict)
    """Settings in the place of the likeliest tokens, such as temperature: 0.5."""
    max_new_tokens: int = 10
    """Longest answer in tokens."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 32
    """Questions at a time; the answers do not depend on it."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; choose 1 or more")
        check_seed(self.seed)

    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        questions = read_questions(self.questions, self.annotations, self.images, self.image_name)[: self.limit]
        scored = all(question.answers for question in questions)
        if not scored and self.answers_file is None:
            raise ConfigError(
                f"{self.questions} comes without people's answers, so nothing would be scored; give annotations, or "
                "answers_file to send the answers to the server of the data set"
            )
        sampling = {_TASK: self.sampling}
        settings = task_settings(model, [_TASK], sampling)[_TASK]  # first, so that a wrong one costs nothing
        given: list[str] = []
        for first in range(0, len(questions), self.batch_size):  # pictures are opened batch by batch
            batch = questions[first : first + self.batch_size]
            contents = [(question.text, load_image(question.image)) for question in batch]
            answers = ask(
                model,
                [_TASK] * len(batch),
                contents,
                sampling=sampling,
                seed=self.seed,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
            )
            given += [str(answer).strip() for answer in answers]
        if self.answers_file is not None:
            write_json(
                Path(self.answers_file),
                [{**question.key, "answer": answer} for question, answer in zip(questions, given, strict=True)],
            )
        seconds = time.monotonic() - start
        metrics = {"seconds a question": mean([seconds / len(questions)])}
        if scored:
            metrics = _accuracies(questions, given)
        record = protocol(
            model,
            (question.text for question in questions),
            references={
                "questions": self.questions,
                "annotations": self.annotations,
                "answers": fingerprint("\n".join(question.answers) for question in questions),
                "number": len(questions),
            },
            preprocessing=square_of(model),
            sampling=settings,
            retrieve=0,
            seed=self.seed,
            samples_per_prompt=1,
            re_ranking="none",
            metrics={
                "VQA accuracy": "official: each person left out in turn, min(matches / 3, 1), normalised where people "
                "disagree",
                PRIOR: "the most frequent answer to the same question, else to its type, in the other half of them",
            },
            interval=NORMAL.replace("pictures", "questions"),
            details={"max_new_tokens": self.max_new_tokens, "answers file": self.answers_file},
        )
        return TaskResult("visual questions", metrics, record, time.monotonic() - start)


def read_questions(
    questions: str | Path, annotations: str | Path | None, images: str | Path, image_name: str | None = None
) -> list[Question]:
    """The questions of a data set in its own files.

    Raises:
        DataError: a file cannot be read or has another layout, or a question lacks its annotation.
        ConfigError: nothing tells the names of the pictures.
    """
    value = _read_json(questions)
    try:
        if isinstance(value, list):
            found = [_vizwiz(each, Path(images)) for each in value]
        else:
            found = _vqa(value, annotations, Path(images), image_name)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{questions} is not laid out as VQAv2, OK-VQA or VizWiz ({type(error).__name__}: {error}); give the "
            "file as it was downloaded"
        ) from error
    if not found:
        raise DataError(f"{questions} holds no questions; check the file")
    return found


def _vqa(value: Any, annotations: str | Path | None, images: Path, image_name: str | None) -> list[Question]:
    subtype = value.get("data_subtype")
    if image_name is None and not subtype:
        raise ConfigError(
            "the file of questions has no data_subtype that tells the names of pictures; set image_name, such as "
            "COCO_val2014_{image_id:012d}.jpg"
        )
    name = image_name or f"COCO_{subtype}_{{image_id:012d}}.jpg"
    answered = {}
    if annotations is not None:
        answered = {each["question_id"]: each for each in _read_json(annotations)["annotations"]}
    found = []
    for each in value["questions"]:
        id = each["question_id"]
        if annotations is not None and id not in answered:
            raise DataError(f"question_id {id} has no annotation in {annotations}; give the files of one split")
        told = answered.get(id, {"answers": []})
        answers = tuple(person["answer"] for person in told["answers"])
        image = images / name.format(image_id=each["image_id"])
        found.append(Question({"question_id": id}, each["question"], image, answers, told.get("answer_type", "")))
    return found


def _vizwiz(each: Any, images: Path) -> Question:
    answers = tuple(person["answer"] for person in each.get("answers", ()))
    name = each["image"]
    return Question({"image": name}, each["question"], images / name, answers, each.get("answer_type", ""))


def _accuracies(questions: Sequence[Question], given: Sequence[str]) -> dict[str, Estimate]:
    known = [(each.kind, normalize_answer(each.text), _majority(each.answers)) for each in questions]
    guessed = guesses(known)
    own, prior = (
        [vqa_accuracy(answer, each.answers) for answer, each in zip(answers, questions, strict=True)]
        for answers in (given, guessed)
    )
    members: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        members[ALL].append(number)
        if question.kind:
            members[f"answer_type={question.kind}"].append(number)
    metrics: dict[str, Estimate] = {}
    for group, numbers in sorted(members.items()):
        metrics[f"VQA accuracy, {group}"] = mean([own[i] for i in numbers])
        metrics[f"VQA accuracy {PRIOR}, {group}"] = mean([prior[i] for i in numbers])
    return metrics


def _majority(answers: Sequence[str]) -> str:
    """The answer that most people gave, the first of those equally frequent."""
    return max(answers, key=answers.count)


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); give the file as it was downloaded") from error
