"""How ids are drawn: the sampling settings that a user chooses."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from cm3.errors import RequestError

SamplerName = Literal["top-p", "temperature", "cd-k", "mixed"]
_TYPES = {"sampler": str, "top_k": int, "contrast_k": int, "guidance_interval": tuple, "speculative_window": int}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Applied in the order guidance or contrast, repetition penalty, temperature, top-k, top-p; then one draw."""

    sampler: SamplerName = "top-p"
    """Which ids are drawn from. top-p: those that top_k and top_p leave. temperature: all of them. cd-k: those
    plausible to the model, by how much the prompt adds to their probability; takes the place of guidance, top_k
    and top_p, and costs twice as much as no guidance. mixed: samples of a prompt are drawn by top-p and cd-k in
    turn."""
    temperature: float = 1.0
    """Divides the logits: below 1 is safer, above 1 more varied; 0 always takes the likeliest id."""
    top_k: int = 0
    """Draw among the k likeliest ids only; 0 is off."""
    top_p: float = 1.0
    """Draw among the fewest likeliest ids whose probabilities reach p; 1 is off."""
    repetition_penalty: float = 1.0
    """More than 1 makes text ids that were already generated less likely; 1 is off. Images are exempt."""
    contrast_alpha: float = 0.5
    """cd-k: an id is plausible from this share of the probability of the contrast_k-th likeliest id on."""
    contrast_k: int = 1
    """cd-k: rank of the id that the others are compared with. CM3Leon found 1, the rule before it, too strict, and does
    not publish its own; a model that is often sure of the next code must have a small one (EXPERIMENTS.md)."""
    amateur_temperature: float = 1.0
    """cd-k: divides the logits without the prompt; above 1 the prompt's own probabilities count for more."""
    guidance_scale: float = 1.0
    """How far to overstate the effect of the prompt (classifier-free); 1 is off and costs half as much."""
    image_guidance_scale: float = 1.0
    """The same for a picture in the prompt, guidance_scale then being that of the text; 1 is off."""
    guidance_interval: Sequence[float] = (0.0, 1.0)
    """Guide or contrast only between these two shares of the new ids (of the budget, where their number is open).
    Outside nothing is computed for it, and ids are drawn by top-p, or temperature. (0, 1) is all of them."""
    speculative_window: int = 0
    """Draw up to so many ids of a picture in one forward pass, the later ones on guesses that are then checked: the
    same pictures in fewer, wider passes (see `cm3.generation.speculative`). 0 is off. The widest of a batch counts."""

    def __post_init__(self) -> None:
        if isinstance(self.guidance_interval, list):  # as JSON and YAML have it
            object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, _TYPES.get(field.name, int | float)) or isinstance(value, bool):
                raise RequestError(f"{field.name}={value!r} has a type that does not fit; give {field.type}")
        limits = {
            "sampler": (self.sampler in get_args(SamplerName), " or ".join(get_args(SamplerName))),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1 (off)"),
            "repetition_penalty": (self.repetition_penalty > 0, "more than 0 (1 is off)"),
            "contrast_alpha": (0 < self.contrast_alpha <= 1, "more than 0 and at most 1"),
            "contrast_k": (self.contrast_k >= 1, "1 or more"),
            "amateur_temperature": (self.amateur_temperature > 0, "more than 0"),
            "guidance_scale": (self.guidance_scale >= 0, "0 or more (1 is off)"),
            "image_guidance_scale": (self.image_guidance_scale >= 0, "0 or more (1 is off)"),
            "guidance_interval": (_is_interval(self.guidance_interval), "(start, stop) with 0 <= start < stop <= 1"),
            "speculative_window": (
                self.speculative_window == 0 or self.speculative_window >= 2,
                "0 (off), or 2 or more",
            ),
        }
        for field in fields(self):
            good, need = limits[field.name]
            value = getattr(self, field.name)
            if not good or value == float("inf"):
                raise RequestError(f"{field.name}={value} cannot be used; choose a value of {need}")

    def of_sample(self, index: int) -> "SamplingSettings":
        """The settings of the index-th sample of a prompt, whose sampler is no longer "mixed"."""
        if self.sampler != "mixed":
            return self
        return replace(self, sampler="cd-k" if index % 2 else "top-p")

    def compared_steps(self, num_new: int) -> range:
        """Those of `num_new` new ids that `guidance_interval` stands for."""
        start, stop = (round(share * num_new) for share in self.guidance_interval)
        return range(start, stop)


def check_negative(negative: str, settings: SamplingSettings) -> None:
    """Refuse a negative prompt that nothing would be compared with."""
    if negative.strip() and settings.guidance_scale == 1 and settings.sampler not in ("cd-k", "mixed"):
        raise RequestError(
            f"negative={negative!r} has no effect at guidance_scale=1; raise guidance_scale, or choose sampler='cd-k'"
        )


def _is_interval(shares: Sequence[Any]) -> bool:
    if len(shares) != 2 or not all(isinstance(share, int | float) for share in shares):
        return False
    return 0 <= shares[0] < shares[1] <= 1
