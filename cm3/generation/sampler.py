"""From logits to one drawn id per row, each with its own settings and seed: guidance, reshaping, Gumbel-max.

Letters added: R rows of the forward pass (B rows that produce ids, then those of the prompts they are compared
with), G rows that are guided or contrasted in one way.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cm3.generation import logits as reshape
from cm3.generation.guidance import classifier_free, contrastive, image_text
from cm3.generation.noise import TOKEN_NOISE, gumbel
from cm3.generation.settings import SamplingSettings
from cm3.tokenizers.vocabulary import Vocabulary


class Sampler:
    """The settings of a batch's rows as tensors, and the draw. A setting that no row uses costs nothing.

    Args:
        settings: of each row; no sampler is "mixed".
        seeds: of each row.
        compared: for each row the rows of the forward pass with the prompts it is compared with, see
            `compared_prompts`. Rows without are neither guided nor contrasted now, whatever their settings.
        seen_BV: what an earlier sampler of the same rows has seen.
    """

    def __init__(
        self,
        settings: Sequence[SamplingSettings],
        seeds: Sequence[int],
        compared: Sequence[Sequence[int]],
        vocabulary: Vocabulary,
        device: torch.device,
        seen_BV: Bool[Tensor, "B V"] | None = None,
    ) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def rows(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        contrasted = [row for row, others in enumerate(compared) if others and settings[row].sampler == "cd-k"]
        guided = [row for row, others in enumerate(compared) if len(others) == 1 and row not in contrasted]
        guided_apart = [row for row, others in enumerate(compared) if len(others) == 2]
        self._rows = (settings, seeds, compared, vocabulary)
        self.contrasted_G, self.amateur_G = rows(contrasted), rows([compared[row][0] for row in contrasted])
        self.guided_G, self.unconditional_G = rows(guided), rows([compared[row][0] for row in guided])
        self.guided_apart_G = rows(guided_apart)
        self.none_G, self.image_G = (rows([compared[row][stream] for row in guided_apart]) for stream in (0, 1))
        self.scale_B = column([chosen.guidance_scale for chosen in settings])
        self.image_scale_B = column([chosen.image_guidance_scale for chosen in settings])
        self.alpha_B = column([chosen.contrast_alpha for chosen in settings])
        self.k_B = rows([chosen.contrast_k for chosen in settings])
        self.amateur_temperature_B = column([chosen.amateur_temperature for chosen in settings])

        cut = [row not in contrasted and chosen.sampler != "temperature" for row, chosen in enumerate(settings)]
        top_k = [chosen.top_k if is_cut else 0 for chosen, is_cut in zip(settings, cut, strict=True)]
        top_p = [chosen.top_p if is_cut else 1.0 for chosen, is_cut in zip(settings, cut, strict=True)]
        self.seed_B = rows(seeds)
        self.temperature_B = column([chosen.temperature for chosen in settings])
        self.uses_temperature = any(chosen.temperature != 1 for chosen in settings)
        self.top_k_B, self.uses_top_k = rows(top_k), any(k > 0 for k in top_k)
        self.top_p_B, self.uses_top_p = column(top_p), any(p < 1 for p in top_p)
        self.penalty_B = column([chosen.repetition_penalty for chosen in settings])
        self.uses_penalty = any(chosen.repetition_penalty != 1 for chosen in settings)
        if seen_BV is None:
            seen_width = vocabulary.size if self.uses_penalty else 0
            seen_BV = torch.zeros(len(settings), seen_width, dtype=torch.bool, device=device)
        self.seen_BV = seen_BV

    def draw(
        self,
        logits_RV: Float[Tensor, "R V"],
        step_B: Int[Tensor, " #B"],
        allowed_BV: Bool[Tensor, "B V"] | None,
        *,
        first_id: int,
    ) -> Int[Tensor, " B"]:
        """One id per row from logits over ids `first_id ..`.

        Args:
            step_B: number of the id among the row's new ones, which its noise depends on; one for all rows, or each.
            allowed_BV: ids that may come; None: all of them, none is text.
        """
        num_rows, size = len(self.seed_B), logits_RV.shape[1]
        logits_BV = self._combined(logits_RV, allowed_BV)
        if allowed_BV is not None:
            if self.uses_penalty:
                logits_BV = reshape.repetition_penalty(logits_BV, self.seen_BV, self.penalty_B)
            logits_BV = logits_BV.masked_fill(~allowed_BV, reshape.EXCLUDED)
        if self.uses_temperature:
            logits_BV = reshape.temperature(logits_BV, self.temperature_B)
        if self.uses_top_k:
            logits_BV = reshape.top_k(logits_BV, self.top_k_B)
        if self.uses_top_p:
            logits_BV = reshape.top_p(logits_BV, self.top_p_B)
        noise_BV = gumbel(self.seed_B, step_B.expand(num_rows), TOKEN_NOISE, size, first_id)
        return (logits_BV + noise_BV).argmax(dim=1) + first_id

    def widened(self, columns: int) -> "Sampler":
        """One that draws several ids per row: column c of row r, of logits as of ids, is its row `r * columns + c`."""
        settings, seeds, compared, vocabulary = self._rows
        cells = [(row, column) for row in range(len(settings)) for column in range(columns)]
        return Sampler(
            [settings[row] for row, _ in cells],
            [seeds[row] for row, _ in cells],
            [[other * columns + column for other in compared[row]] for row, column in cells],
            vocabulary,
            self.seed_B.device,
            self.seen_BV.repeat_interleave(columns, dim=0),
        )

    def _combined(
        self, logits_RV: Float[Tensor, "R V"], allowed_BV: Bool[Tensor, "B V"] | None
    ) -> Float[Tensor, "B V"]:
        """The logits that each row draws from: its own, or its own combined with those it is compared with."""
        logits_BV = logits_RV[: len(self.seed_B)]
        if len(self.guided_G):
            rows_G = self.guided_G
            guided_GV = classifier_free(logits_RV[rows_G], logits_RV[self.unconditional_G], self.scale_B[rows_G])
            logits_BV = logits_BV.index_copy(0, rows_G, guided_GV)
        if len(self.guided_apart_G):
            rows_G = self.guided_apart_G
            streams = (logits_RV[self.none_G], logits_RV[self.image_G], logits_RV[rows_G])
            guided_GV = image_text(*streams, self.image_scale_B[rows_G], self.scale_B[rows_G])
            logits_BV = logits_BV.index_copy(0, rows_G, guided_GV)
        if len(self.contrasted_G):
            rows_G = self.contrasted_G
            expert_GV = logits_RV[rows_G]
            if allowed_BV is not None:  # the k likeliest are those of the ids that may come
                expert_GV = expert_GV.masked_fill(~allowed_BV[rows_G], reshape.EXCLUDED)
            rule = (self.alpha_B[rows_G], self.k_B[rows_G], self.amateur_temperature_B[rows_G])
            score_GV = contrastive(expert_GV, logits_RV[self.amateur_G], *rule)
            logits_BV = logits_BV.index_copy(0, rows_G, score_GV)
        return logits_BV

    def see(self, ids_B: Int[Tensor, " B"], is_text_B: Bool[Tensor, " B"]) -> None:
        """Remember text ids for the repetition penalty."""
        if self.uses_penalty:
            self.seen_BV.scatter_(1, ids_B[:, None], is_text_B[:, None])
