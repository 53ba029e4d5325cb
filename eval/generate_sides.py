"""The two sides of `cm3 bench generate`: what each holds in its process, and how one case is timed there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from cm3.eval.machine import peak_memory, reset_peak_memory, synchronize
from cm3.generation.engine import Engine
from cm3.generation.grammar import image
from cm3.generation.request import Request
from cm3.generation.settings import SamplingSettings
from cm3.interop.chameleon_generate import foreign_copy, foreign_generate
from cm3.model.config import ModelConfig
from cm3.model.quantized import quantize_blocks
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary

Side = Literal["ours", "transformers"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What both sides are asked for."""

    prompts: tuple[tuple[int, ...], ...]
    unconditional: tuple[int, ...]
    """The prompt that guidance starts from."""
    new_tokens: int
    """Of every prompt."""
    guidance_scale: float
    """1 is off."""
    precision: Literal["fp32", "bf16", "int8"]
    """int8: the blocks of ours have weights of 8 bits, all else is bf16."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One case, served once."""

    seconds: float
    """All new tokens of all prompts, prefill included."""
    first_seconds: float
    """The first token of all prompts, in a run that asks for no more."""
    peak_bytes: float
    """Most memory of the process (of tensors on a GPU); nan where the system does not say."""


_held: dict[str, Callable[[Case, str], None]] = {}
"""What serves cases in this process."""


def load_side(
    side: Side, config: ModelConfig, vocabulary: Vocabulary, precision: str, seed: int, compile: bool
) -> None:
    """Build the model of a side in this process; the weights are those that the seed gives ours."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    with device:
        model = Transformer(config).eval()
    if precision == "int8":
        quantize_blocks(model)
    model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    if side == "ours":
        engine = Engine(model, vocabulary, compile=compile)
        _held["serve"] = lambda case, setting: serve_ours(engine, case)
    else:
        foreign = foreign_copy(model).to(device)
        _held["serve"] = lambda case, setting: serve_foreign(foreign, case, setting)


def serve_ours(engine: Engine, case: Case) -> None:
    """Draw codes for every prompt."""
    engine.max_batch_rows = 2 * len(case.prompts)  # all of them in one pass, with guidance too
    requests = [
        Request(
            prompt_ids=prompt,
            grammar=image(case.new_tokens),
            max_new_tokens=case.new_tokens,
            unconditional_ids=case.unconditional,
            seeds=(case.seed + number,),
        )
        for number, prompt in enumerate(case.prompts)
    ]
    outputs = engine.run(requests, SamplingSettings(guidance_scale=case.guidance_scale))
    assert all(len(samples[0]) == case.new_tokens for samples in outputs)


def serve_foreign(model: Any, case: Case, setting: str) -> None:
    """Draw ids after every prompt."""
    foreign_generate(
        model,
        case.prompts,
        case.unconditional,
        new_tokens=case.new_tokens,
        guidance_scale=case.guidance_scale,
        setting=setting,
        seed=case.seed,
    )


def time_side(case: Case, setting: str) -> Timing:
    """Serve a case once, and once more for its first token alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reset_peak_memory(device)
    first_seconds = _seconds(replace(case, new_tokens=1), setting, device)
    seconds = _seconds(case, setting, device)
    return Timing(seconds=seconds, first_seconds=first_seconds, peak_bytes=peak_memory(device))


def _seconds(case: Case, setting: str, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    _held["serve"](case, setting)
    synchronize(device)
    return time.perf_counter() - start
