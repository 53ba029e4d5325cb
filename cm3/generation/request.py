"""What the engine is asked for, and the check that it can be served."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

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
    """The prompt of the guidance row; None where guidance cannot be used."""
    forced_ids: tuple[int, ...] = ()
    """For each new position the id that must stand there, -1 where the model chooses. The rest is free."""
    seeds: tuple[int, ...] = (0,)
    """One sample per seed: the same seed gives the same noise, whatever else is in the batch."""


def check_request(
    index: int, request: Request, settings: SamplingSettings, max_positions: int, kind_V: Int[Tensor, " V"]
) -> None:
    """Refuse what cannot be served, before anything is computed.

    Args:
        index: the request's number, for the message.
        max_positions: context of the model.
        kind_V: kind of every id, see `id_kinds`.

    Raises:
        RequestError: the request does not fit the context or its own budget, or guidance lacks a prompt.
    """
    prompts = [request.prompt_ids]
    if settings.guidance_scale != 1:
        if request.unconditional_ids is None:
            raise RequestError(
                f"request {index} asks for guidance_scale={settings.guidance_scale}, but has no "
                "unconditional prompt to compare with; set guidance_scale=1"
            )
        prompts.append(request.unconditional_ids)
    if not all(prompts) or not request.seeds:
        raise RequestError(f"request {index} has an empty prompt or no seeds; give at least one of each")
    if any(not 0 <= seed < 1 << 63 for seed in request.seeds):
        raise RequestError(f"request {index} has the seeds {request.seeds}; choose 0 to 2**63 - 1")
    longest = max(len(prompt) for prompt in prompts)
    if longest + request.max_new_tokens > max_positions:
        raise RequestError(
            f"request {index} has {longest} prompt ids and asks for {request.max_new_tokens} new ones, "
            f"together {longest + request.max_new_tokens}; the model has {max_positions} positions: shorten "
            "the prompt or ask for fewer new ids"
        )
    fewest = request.grammar.fewest_ids()[request.grammar.start]
    if request.max_new_tokens < fewest:
        raise RequestError(
            f"request {index} allows {request.max_new_tokens} new ids, but what it asks for takes at least "
            f"{fewest}; raise max_new_tokens"
        )
    request.grammar.check_forced(request.forced_ids, request.max_new_tokens, kind_V)
