"""From logits to one drawn id per row, each with its own settings and seed: guidance, reshaping, Gumbel-max.

Letters added: R rows of the forward pass (B rows that produce ids, then G guidance rows).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cm3.generation import logits as reshape
from cm3.generation.guidance import classifier_free
from cm3.generation.noise import TOKEN_NOISE, gumbel
from cm3.generation.settings import SamplingSettings
from cm3.tokenizers.vocabulary import Vocabulary


class Sampler:
    """The settings of a batch's rows as tensors, and the draw. A setting that no row uses costs nothing.

    Args:
        settings: of each row.
        seeds: of each row.
        guided: the rows that have a guidance row, in the order of these.
    """

    def __init__(
        self,
        settings: Sequence[SamplingSettings],
        seeds: Sequence[int],
        guided: Sequence[int],
        vocabulary: Vocabulary,
        device: torch.device,
    ) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        self.seed_B = torch.tensor(seeds, device=device)
        self.guided_G = torch.tensor(guided, dtype=torch.long, device=device)
        self.scale_G = column([settings[index].guidance_scale for index in guided])
        self.temperature_B = column([chosen.temperature for chosen in settings])
        self.top_k_B = torch.tensor([chosen.top_k for chosen in settings], device=device)
        self.top_p_B = column([chosen.top_p for chosen in settings])
        self.penalty_B = column([chosen.repetition_penalty for chosen in settings])
        self.uses_top_k = any(chosen.top_k > 0 for chosen in settings)
        self.uses_top_p = any(chosen.top_p < 1 for chosen in settings)
        self.uses_penalty = any(chosen.repetition_penalty != 1 for chosen in settings)
        seen_width = vocabulary.size if self.uses_penalty else 0
        self.seen_BV = torch.zeros(len(settings), seen_width, dtype=torch.bool, device=device)

    def draw(
        self,
        logits_RV: Float[Tensor, "R V"],
        step_1: Int[Tensor, " 1"],
        allowed_BV: Bool[Tensor, "B V"] | None,
        *,
        first_id: int,
    ) -> Int[Tensor, " B"]:
        """One id per row from logits over ids `first_id ..`; `allowed_BV` None: all of them, none is text."""
        num_rows, size = len(self.seed_B), logits_RV.shape[1]
        logits_BV, unconditional_GV = logits_RV[:num_rows], logits_RV[num_rows:]
        if len(self.guided_G):
            guided_GV = classifier_free(logits_BV[self.guided_G], unconditional_GV, self.scale_G)
            logits_BV = logits_BV.index_copy(0, self.guided_G, guided_GV)
        if allowed_BV is not None:
            if self.uses_penalty:
                logits_BV = reshape.repetition_penalty(logits_BV, self.seen_BV, self.penalty_B)
            logits_BV = logits_BV.masked_fill(~allowed_BV, reshape.EXCLUDED)
        logits_BV = reshape.temperature(logits_BV, self.temperature_B)
        if self.uses_top_k:
            logits_BV = reshape.top_k(logits_BV, self.top_k_B)
        if self.uses_top_p:
            logits_BV = reshape.top_p(logits_BV, self.top_p_B)
        noise_BV = gumbel(self.seed_B, step_1.expand(num_rows), TOKEN_NOISE, size, first_id)
        return (logits_BV + noise_BV).argmax(dim=1) + first_id

    def see(self, ids_B: Int[Tensor, " B"], is_text_B: Bool[Tensor, " B"]) -> None:
        """Remember text ids for the repetition penalty."""
        if self.uses_penalty:
            self.seen_BV.scatter_(1, ids_B[:, None], is_text_B[:, None])
