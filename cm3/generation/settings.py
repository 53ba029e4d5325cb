"""How ids are drawn: the sampling settings that a user chooses."""

from dataclasses import dataclass, fields

from cm3.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Applied in the order guidance, repetition penalty, temperature, top-k, top-p; then one draw per id."""

    temperature: float = 1.0
    """Divides the logits: below 1 is safer, above 1 more varied; 0 always takes the likeliest id."""
    top_k: int = 0
    """Draw among the k likeliest ids only; 0 is off."""
    top_p: float = 1.0
    """Draw among the fewest likeliest ids whose probabilities reach p; 1 is off."""
    repetition_penalty: float = 1.0
    """More than 1 makes text ids that were already generated less likely; 1 is off. Images are exempt."""
    guidance_scale: float = 1.0
    """How far to overstate the effect of the prompt (classifier-free); 1 is off and costs half as much."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int if field.name == "top_k" else int | float) or isinstance(value, bool):
                raise RequestError(f"{field.name}={value!r} is no number that fits; give {field.type}")
        limits = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1 (off)"),
            "repetition_penalty": (self.repetition_penalty > 0, "more than 0 (1 is off)"),
            "guidance_scale": (self.guidance_scale >= 0, "0 or more (1 is off)"),
        }
        for field in fields(self):
            good, need = limits[field.name]
            value = getattr(self, field.name)
            if not good or value == float("inf"):
                raise RequestError(f"{field.name}={value} cannot be used; choose a value of {need}")
