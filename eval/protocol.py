"""The protocol record: everything that a figure depends on, beside the figure (a number without it is not comparable).

Each task fills in one `Protocol`. Null means that a part does not apply to it, never that it was forgotten.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import PIL
import torch

from cm3.drawing import RANKERS
from cm3.eval.task import fingerprint
from cm3.pipeline import CM3

WILSON = "95%, Wilson score"
NORMAL = "95%, normal, over pictures"
BOOTSTRAP = "95%, percentile bootstrap over pictures, 2,000 draws"
JACKKNIFE = "95%, jackknife over groups of pictures; does not cover the bias of small samples"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the figures of one task came about."""

    prompts: str | None = None
    """Fingerprint of the list of prompts, in their order."""
    num_prompts: int | None = None
    """How many they are."""
    references: Mapping[str, Any] | None = None
    """The reference set: where it lies, fingerprint, number."""
    preprocessing: str | None = None
    """What happened to reference pictures before they were compared or encoded."""
    sampling: Mapping[str, Any] | None = None
    """All sampling settings, those included that the model's files give: sampler, temperature, guidance, ..."""
    guidance_scales: tuple[float, ...] | None = None
    """Scales that the task goes through, in the place of the one in `sampling`; 1 is off."""
    retrieve: int | None = None
    """Documents retrieved for each request."""
    memory: str | None = None
    """Folder of the memory they come from."""
    seed: int | None = None
    """Sample i of a prompt is drawn with seed + i."""
    samples_per_prompt: int | None = None
    """Pictures for each prompt that are scored."""
    re_ranking: str | None = None
    """How candidates were chosen among; "none" is one candidate for each sample."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """For each kind of figure the definition, convention or mode it follows, with the library it agrees with."""
    interval: str = ""
    """What the intervals are."""
    model_hash: str = ""
    """SHA-256 of the model's weights."""
    precision: str = ""
    """Number format of its weights, see `TrainedModel.precision`."""
    tokenizer_hash: str = ""
    """SHA-256 of its tokenizers."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the libraries that computed the figures."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else the task's figures depend on."""

    def record(self) -> dict[str, Any]:
        """For `TaskResult.protocol`."""
        return asdict(self)


def protocol(model: CM3, prompts: Iterable[str] | None = None, **parts: Any) -> dict[str, Any]:
    """The record of a task, with what the model and this installation say about themselves filled in.

    Args:
        model: What was measured.
        prompts: The prompts, or the captions asked about.
        parts: Fields of `Protocol`.
    """
    if prompts is not None:
        prompts = list(prompts)
        parts |= {"prompts": fingerprint(prompts), "num_prompts": len(prompts)}
    return Protocol(
        model_hash=model.hash,
        precision=model.precision,
        tokenizer_hash=model.tokenizer.hash,
        versions=versions(),
        **parts,
    ).record()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that every figure goes through."""
    from cm3 import __version__

    return {
        "open-cm3": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
        "pillow": PIL.__version__,
    }


def ranking(best_of: int, rank: str | None, ranker: str = "") -> str:
    """The entry `re_ranking` of generated pictures."""
    if best_of == 1:
        return "none"
    return f"best of {best_of} by {rank}" + (f" ({ranker})" if rank is not None and "clip" in RANKERS[rank] else "")
