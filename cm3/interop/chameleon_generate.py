"""`generate` of `transformers` for a Chameleon, in each of the settings that may be its fastest: to compare with.

B batch   T tokens   V joint vocabulary
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cm3.interop.chameleon import foreign_chameleon
from cm3.interop.chameleon_layout import chameleon_layout, split_parts
from cm3.model.transformer import Transformer

_STATIC, _DYNAMIC = "static cache", "dynamic cache"
_COMPILED = ", compiled"
_TWO_PASSES, _PAIRED = ", two passes", ", paired rows"
_PAD_ID = 0


def generate_settings(is_guided: bool, compile: bool) -> list[str]:
    """Names of the settings of `foreign_generate`.

    The cache grows or has its final size from the start. Guidance is their own, which goes through the model twice for
    each id, or ours by hand: both prompts are rows of one pass. Compiled is the forward pass of the static cache.
    """
    caches = [_DYNAMIC, _STATIC, *([_STATIC + _COMPILED] if compile else [])]
    return [cache + how for cache in caches for how in ((_TWO_PASSES, _PAIRED) if is_guided else ("",))]


def foreign_copy(model: Transformer) -> Any:
    """Their model with the weights of one of ours, in the same number format.

    Raises:
        ConfigError: The model is no Chameleon.
        MissingDependencyError: `transformers` is not installed.
    """
    foreign = foreign_chameleon(model.config).eval()
    layout = chameleon_layout(model.config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors |= split_parts(tensor, layout[name])
    foreign.load_state_dict(tensors)
    for parameter in foreign.parameters():  # not `module.to`, which would round its rotary table
        parameter.data = parameter.data.to(model.embedding.weight.dtype)
    return foreign


@torch.inference_mode()
def foreign_generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    *,
    new_tokens: int,
    guidance_scale: float,
    setting: str,
    seed: int,
) -> Tensor:
    """Draw ids after each prompt, at temperature 1 and from the whole vocabulary.

    Args:
        model: Of `foreign_copy`.
        prompts: Of any lengths; the rows are padded on the left, as `generate` wants them.
        unconditional: The prompt that guidance starts from, for all rows.
        new_tokens: Exactly as many; nothing ends a row.
        guidance_scale: 1 is off.
        setting: Of `generate_settings`.
        seed: Of torch's generator.

    Returns:
        New ids, one row a prompt.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    is_guided, is_paired = guidance_scale != 1, _PAIRED in setting
    torch.manual_seed(seed)
    device = model.lm_head.weight.device
    rows = [*prompts, *([unconditional] * len(prompts) if is_paired else [])]
    ids_BT, mask_BT = _left_padded(rows, device)
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        **({"do_sample": False} if is_paired else {"do_sample": True, "top_k": 0}),
        use_cache=True,
        cache_implementation="static" if _STATIC in setting else None,
        disable_compile=_COMPILED not in setting,
        pad_token_id=_PAD_ID,
    )
    if _COMPILED in setting:
        config.compile_config = _compile_config()
    more: dict[str, Any] = {}
    if is_paired:
        more["logits_processor"] = LogitsProcessorList([_PairedDraw(guidance_scale)])
    elif is_guided:
        config.guidance_scale = guidance_scale
        negative_BT, negative_mask_BT = _left_padded([unconditional] * len(prompts), device)
        more |= {"negative_prompt_ids": negative_BT, "negative_prompt_attention_mask": negative_mask_BT}
    model.generation_config = GenerationConfig()  # theirs names an id that ends a row
    out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config, **more)
    new_BT: Tensor = out_BT[: len(prompts), ids_BT.shape[1] :]
    assert new_BT.shape == (len(prompts), new_tokens), f"{new_BT.shape[1]} of {new_tokens} ids were made"
    return new_BT


class _PairedDraw:
    """Guidance between the first half of the rows and the second, and one draw for both rows of a pair."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        conditional_BV, unconditional_BV = scores.chunk(2)
        guided_BV = unconditional_BV + self.scale * (conditional_BV - unconditional_BV)
        drawn_B1 = torch.multinomial(guided_BV.softmax(dim=-1), num_samples=1)
        # what is not drawn is excluded, so that their greedy choice takes it for both
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn_B1.repeat(2, 1), 0.0)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids, and 1 where they are real."""
    longest = max(map(len, rows))
    ids = [[_PAD_ID] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _compile_config() -> Any:
    from transformers import CompileConfig

    config: Any = CompileConfig(mode="default", dynamic=False)
    config._compile_all_devices = True  # it compiles on accelerators alone otherwise
    return config
