"""What the engine is asked for, and the check that it can be served."""

from dataclasses import dataclass, replace

from cm3.errors import RequestError
from cm3.generation.grammar import Grammar
from cm3.generation.settings import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and what to make of it."""

    prompt_ids: tuple[int, ...]
    """Ids of the joint vocabulary that the row starts from."""
    grammar: Grammar
    """What the new ids must look like."""
    max_new_tokens: int
    """Budget of new ids; the grammar reaches its end within it."""
    unconditional_ids: tuple[int, ...] | None = None
    """The prompt to guide away from: without the text, or with a negative one; also that of CD-K's amateur.
    None where neither can be used."""
    image_only_ids: tuple[int, ...] | None = None
    """Where the prompt has a picture and a text that are guided apart, the prompt with the picture alone."""
    seeds: tuple[int, ...] = (0,)
    """One sample per seed: the same seed gives the same noise, whatever else is in the batch."""

    def fitted(self, max_positions: int) -> "Request":
        """With no more new ids than the context leaves it; two where it leaves fewer, too many, which is refused."""
        room = max(2, max_positions - len(self.prompt_ids))
        return replace(self, max_new_tokens=min(self.max_new_tokens, room))


@dataclass(frozen=True)
class Row:
    """One sample of one request."""

    request: Request
    settings: SamplingSettings
    """Of this sample, see `SamplingSettings.of_sample`."""
    seed: int

    @property
    def compared(self) -> tuple[tuple[int, ...], ...]:
        """The prompts it is ever compared with, see `compared_prompts`."""
        return compared_prompts(self.request, self.settings) if self._compared_steps else ()

    def compared_at(self, step: int) -> tuple[tuple[int, ...], ...]:
        """The prompts it is compared with in a step."""
        return self.compared if step in self._compared_steps else ()

    @property
    def changes(self) -> set[int]:
        """Steps from which on it is compared with other prompts than before. After its last step it need not be."""
        if not self.compared:
            return set()
        return {self._compared_steps.start, self._compared_steps.stop} - {self.request.max_new_tokens}

    @property
    def _compared_steps(self) -> range:
        return self.settings.compared_steps(self.request.max_new_tokens)


def compared_prompts(request: Request, settings: SamplingSettings) -> tuple[tuple[int, ...], ...]:
    """The prompts whose logits a sample needs beside its own; one that the request lacks is empty.

    None without guidance, one for classifier-free guidance and CD-K, two (nothing, picture alone) for guidance by
    picture and text. Of these two only one has a weight where the picture's scale is 1 or that of the text.

    Args:
        settings: of the sample, see `SamplingSettings.of_sample`.
    """
    text_scale, image_scale = settings.guidance_scale, settings.image_guidance_scale
    nothing, image_only = request.unconditional_ids or (), request.image_only_ids or ()
    if settings.sampler == "cd-k":
        return (nothing,)
    if text_scale == image_scale == 1:
        return ()
    if request.image_only_ids is None or image_scale == text_scale:
        return (nothing,)
    return (image_only,) if image_scale == 1 else (nothing, image_only)


def check_request(index: int, request: Request, settings: SamplingSettings, max_positions: int) -> None:
    """Refuse what cannot be served, before anything is computed.

    Args:
        index: the request's number, for the message.
        max_positions: context of the model.

    Raises:
        RequestError: the request does not fit the context or its own budget, or guidance or contrast lacks a prompt.
    """
    prompts = [request.prompt_ids]
    for chosen in dict.fromkeys(settings.of_sample(number) for number in range(len(request.seeds))):
        is_contrast = chosen.sampler == "cd-k"
        if not is_contrast and chosen.image_guidance_scale != 1 and request.image_only_ids is None:
            raise RequestError(
                f"request {index} asks for image_guidance_scale={chosen.image_guidance_scale}, but has no prompt "
                "with a picture alone; set image_guidance_scale=1"
            )
        compared = compared_prompts(request, chosen)
        if not all(compared):
            scales = f"guidance_scale={chosen.guidance_scale}, image_guidance_scale={chosen.image_guidance_scale}"
            asked = f"sampler={settings.sampler!r}" if is_contrast else scales
            instead = "choose sampler='top-p'" if is_contrast else "set guidance_scale=1 and image_guidance_scale=1"
            raise RequestError(
                f"request {index} asks for {asked}, but has no unconditional prompt to compare with; {instead}"
            )
        prompts += compared
    if not all(prompts) or not request.seeds:
        raise RequestError(f"request {index} has an empty prompt or no seeds; give at least one of each")
    if any(not 0 <= seed < 1 << 63 for seed in request.seeds):
        raise RequestError(f"request {index} has the seeds {request.seeds}; choose 0 to 2**63 - 1")
    longest = max(len(prompt) for prompt in prompts)
    if longest + request.max_new_tokens > max_positions:
        raise RequestError(
            f"request {index} has {longest} prompt ids and asks for {request.max_new_tokens} new ones, "
            f"together {longest + request.max_new_tokens}; the model has {max_positions} positions: shorten "
            "the prompt, retrieve fewer documents or ask for fewer new ids"
        )
    fewest = request.grammar.fewest_ids()[request.grammar.start]
    if request.max_new_tokens < fewest:
        raise RequestError(
            f"request {index} allows {request.max_new_tokens} new ids, but what it asks for takes at least "
            f"{fewest}; raise max_new_tokens"
        )
