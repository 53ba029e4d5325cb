"""What an evaluation task is: a frozen config that measures a model and says under which protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Protocol

from cm3.eval.report import TaskResult
from cm3.pipeline import CM3


class Task(Protocol):
    """A frozen dataclass of settings with one method."""

    def run(self, model: CM3) -> TaskResult:
        """Measure `model`; deterministic for equal settings, weights and hardware."""
        ...


def fingerprint(items: Iterable[str]) -> str:
    """Sixteen hex digits that identify a list of prompts or references in a protocol record."""
    return hashlib.sha256(json.dumps(list(items), ensure_ascii=False).encode()).hexdigest()[:16]
