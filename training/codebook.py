"""Learning a codebook by moving averages (van den Oord et al. 2017, appendix A.1); revival of dead codes.

The codebook starts from k-means over real latents, and a code that was not used for a while is replaced by a
latent of the current batch, as in Jukebox (Dhariwal et al. 2020, section 3.1). Most latents of flat backgrounds are
all but equal, so that several codes end up side by side there, and rounding decides which of them a latent takes. Of
two codes that are too close the less used one is therefore moved elsewhere too.

B batch   P positions of a picture   N latents   Q codes   E code width   K codes that stay   M codes that move
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cm3.tokenizers.quantizer import CHUNK_ENTRIES, VectorQuantizer

CANDIDATES_PER_CODE = 4
"""Latents among which a new place for a code is looked for."""


@dataclass(frozen=True, kw_only=True)
class CodebookUsage:
    """How much of the codebook some pictures use."""

    used_codes: int
    """Codes chosen at least once."""
    perplexity: float
    """Exponential of the entropy of the choices: the effective number of codes."""

    @classmethod
    def of_counts(cls, counts_Q: Tensor) -> "CodebookUsage":
        """Usage from the number of times each code was chosen."""
        share_Q = counts_Q.double() / counts_Q.sum().clamp(min=1)
        entropy = -(share_Q * share_Q.clamp(min=1e-12).log()).sum()
        return cls(used_codes=int((counts_Q > 0).sum()), perplexity=float(entropy.exp()))


class CodebookLearner:
    """Moves a quantiser's codes to the mean of the latents that choose them, and keeps them apart.

    Args:
        quantizer: Its codebook is what is learned.
        decay: Of the moving averages.
        revive_after_steps: A code that was not used for so many updates is dead and moves to a latent; 0 is off.
        seed: Of all choices.
        min_code_distance: Least distance of two codes as a share of `spread`; 0 is off.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        decay: float,
        revive_after_steps: int,
        seed: int,
        min_code_distance: float = 0.0,
    ) -> None:
        self.quantizer = quantizer
        self.decay = decay
        self.revive_after_steps = revive_after_steps
        self.min_code_distance = min_code_distance
        codebook_QE = quantizer.codebook_QE
        num_codes, device = len(codebook_QE), codebook_QE.device
        self.generator = torch.Generator().manual_seed(seed)
        self.average_count_Q = torch.ones(num_codes, device=device)
        self.average_sum_QE = codebook_QE.clone()
        self.idle_steps_Q = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.interval_counts_Q = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.interval_revived = self.interval_separated = 0

    @property
    def spread(self) -> float:
        """Root mean square distance of the codes to their mean."""
        codebook_QE = self.quantizer.codebook_QE
        return float((codebook_QE - codebook_QE.mean(0)).square().sum(1).mean().sqrt())

    def _draw(self, latents_NE: Tensor, count: int) -> Tensor:
        """`count` random rows; without repeats if there are enough."""
        total = len(latents_NE)
        if count <= total:
            index = torch.randperm(total, generator=self.generator)[:count]
        else:
            index = torch.randint(total, (count,), generator=self.generator)
        return latents_NE[index.to(latents_NE.device)]

    @torch.no_grad()
    def initialize(self, latents_NE: Tensor, iterations: int = 10) -> None:
        """Set the codebook by k-means; empty clusters restart from random latents."""
        codebook_QE = self.quantizer.codebook_QE
        codebook_QE.copy_(self._draw(latents_NE, len(codebook_QE)))
        for _ in range(iterations):
            counts_Q, sums_QE = self._sums(latents_NE, self.quantizer.nearest(latents_NE))
            means_QE = self.quantizer.project(sums_QE / counts_Q.clamp(min=1)[:, None])
            empty_Q = counts_Q == 0
            means_QE[empty_Q] = self._draw(latents_NE, int(empty_Q.sum()))
            codebook_QE.copy_(means_QE)
        self.average_count_Q.fill_(1.0)
        self.average_sum_QE.copy_(codebook_QE)
        self.idle_steps_Q.zero_()

    @torch.no_grad()
    def update(self, latents_NE: Tensor, codes_BP: Tensor) -> None:
        """One step from the latents of a batch and the codes that they chose."""
        codes_N = codes_BP.flatten()
        counts_Q, sums_QE = self._sums(latents_NE, codes_N)
        self.average_count_Q.lerp_(counts_Q, 1 - self.decay)
        self.average_sum_QE.lerp_(sums_QE, 1 - self.decay)
        means_QE = self.average_sum_QE / self.average_count_Q.clamp(min=1e-6)[:, None]
        known_Q = self.average_count_Q > 1e-4
        codebook_QE = self.quantizer.codebook_QE
        codebook_QE[known_Q] = self.quantizer.project(means_QE[known_Q])
        self.interval_counts_Q += counts_Q.long()
        self.idle_steps_Q = torch.where(counts_Q > 0, 0, self.idle_steps_Q + 1)
        self._move_codes(latents_NE)

    def _move_codes(self, latents_NE: Tensor) -> None:
        """Move dead codes, and those too close to a more used one, to latents that are far enough from all others.

        Where there are too few such latents, a dead code stays where it is until there are, and a code that is too
        close to another is pushed away from it.
        """
        distance = self.min_code_distance * self.spread
        dead_Q = torch.zeros_like(self.idle_steps_Q, dtype=torch.bool)
        if self.revive_after_steps:
            dead_Q = self.idle_steps_Q >= self.revive_after_steps
        crowded_Q = self._crowded(distance)
        moving_M = torch.cat([(crowded_Q & ~dead_Q).nonzero()[:, 0], dead_Q.nonzero()[:, 0]])
        if not len(moving_M):
            return
        places_ME = self._places(latents_NE, len(moving_M), ~(dead_Q | crowded_Q), distance)
        placed_M, waiting_M = moving_M[: len(places_ME)], moving_M[len(places_ME) :]
        self._put(placed_M, places_ME, idle_steps=0)
        pushed_M = waiting_M[crowded_Q[waiting_M]]
        if len(pushed_M):
            beside_ME = self._beside(pushed_M, self.quantizer.codebook_QE[~crowded_Q], distance)
            self._put(pushed_M, beside_ME, idle_steps=self.revive_after_steps)  # goes on waiting, if nothing takes it
        self.interval_revived += int(dead_Q[placed_M].sum())
        self.interval_separated += int((~dead_Q[placed_M]).sum()) + len(pushed_M)

    def _crowded(self, distance: float) -> Tensor:
        """Which codes are too close to a more used one that stays."""
        crowded_Q = torch.zeros_like(self.idle_steps_Q, dtype=torch.bool)
        if distance:
            order_Q = self.average_count_Q.argsort(descending=True, stable=True)
            crowded_Q[order_Q] = too_close(self.quantizer.codebook_QE[order_Q], distance)
        return crowded_Q

    def _places(self, latents_NE: Tensor, count: int, stays_Q: Tensor, distance: float) -> Tensor:
        """Random latents, `count` of them; fewer where not so many are far from the codes that stay and each other."""
        if not distance:
            return self._draw(latents_NE, count)
        kept_KE = self.quantizer.codebook_QE[stays_Q]
        far_NE = latents_NE
        if len(kept_KE):
            parts = latents_NE.split(max(1, CHUNK_ENTRIES // len(kept_KE)))
            is_far_N = torch.cat([(_distances(part_NE, kept_KE) >= distance).all(1) for part_NE in parts])
            far_NE = latents_NE[is_far_N]
        candidates_NE = self._draw(far_NE, min(len(far_NE), CANDIDATES_PER_CODE * count))
        return candidates_NE[~too_close(candidates_NE, distance)][:count]

    def _beside(self, index_M: Tensor, kept_KE: Tensor, distance: float) -> Tensor:
        """Places for codes at twice the least distance from the nearest code that stays, on the side where they are."""
        codes_ME = self.quantizer.codebook_QE[index_M]
        parts = codes_ME.split(max(1, CHUNK_ENTRIES // len(kept_KE)))
        nearest_ME = kept_KE[torch.cat([_distances(part_ME, kept_KE).argmin(1) for part_ME in parts])]
        noise_ME = torch.randn(codes_ME.shape, generator=self.generator).to(codes_ME.device)
        direction_ME = F.normalize(codes_ME - nearest_ME + 0.1 * distance * noise_ME, dim=1)  # they may be equal
        return self.quantizer.project(nearest_ME + 2 * distance * direction_ME)

    def _put(self, index_M: Tensor, places_ME: Tensor, idle_steps: int) -> None:
        """Set codes and start their averages anew."""
        self.quantizer.codebook_QE[index_M] = places_ME
        self.average_sum_QE[index_M] = places_ME
        self.average_count_Q[index_M] = 1.0
        self.idle_steps_Q[index_M] = idle_steps

    def _sums(self, latents_NE: Tensor, codes_N: Tensor) -> tuple[Tensor, Tensor]:
        """Number and sum of the latents of each code."""
        num_codes = len(self.quantizer.codebook_QE)
        counts_Q = torch.bincount(codes_N, minlength=num_codes).to(latents_NE.dtype)
        sums_QE = torch.zeros_like(self.average_sum_QE).index_add_(0, codes_N, latents_NE)
        return counts_Q, sums_QE

    def report(self) -> dict[str, float]:
        """Usage, revivals and separations since the last report."""
        usage = CodebookUsage.of_counts(self.interval_counts_Q)
        moved = {"revived_codes": self.interval_revived, "separated_codes": self.interval_separated}
        self.interval_counts_Q.zero_()
        self.interval_revived = self.interval_separated = 0
        return {"used_codes": usage.used_codes, "perplexity": usage.perplexity, **moved}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the codebook itself, which belongs to the model."""
        return {
            "average_count": self.average_count_Q,
            "average_sum": self.average_sum_QE,
            "idle_steps": self.idle_steps_Q,
            "interval_counts": self.interval_counts_Q,
            "interval_revived": torch.tensor(self.interval_revived),
            "interval_separated": torch.tensor(self.interval_separated),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`."""
        self.average_count_Q.copy_(state["average_count"])
        self.average_sum_QE.copy_(state["average_sum"])
        self.idle_steps_Q.copy_(state["idle_steps"])
        self.interval_counts_Q.copy_(state["interval_counts"])
        self.interval_revived = int(state["interval_revived"])
        self.interval_separated = int(state.get("interval_separated", 0))  # early checkpoints have none
        self.generator.set_state(state["generator"])


def too_close(vectors_NE: Tensor, distance: float) -> Tensor:
    """Return which vectors are closer than `distance` to an earlier one that is not so itself."""
    parts = vectors_NE.split(max(1, CHUNK_ENTRIES // max(1, len(vectors_NE))))
    has_neighbor, start = [torch.zeros(0, dtype=torch.bool, device=vectors_NE.device)], 0
    for part_NE in parts:
        near_NN = _distances(part_NE, vectors_NE) < distance
        near_NN.diagonal(start).fill_(False)  # itself
        has_neighbor.append(near_NN.any(1))
        start += len(part_NE)
    index_M = torch.cat(has_neighbor).nonzero()[:, 0]
    some_ME = vectors_NE[index_M].cpu()
    found_M = torch.zeros(len(some_ME), dtype=torch.bool)
    for place, vector_E in enumerate(some_ME):
        if not found_M[place]:
            found_M[place + 1 :] |= (some_ME[place + 1 :] - vector_E).norm(dim=1) < distance
    result_N = torch.zeros(len(vectors_NE), dtype=torch.bool, device=vectors_NE.device)
    result_N[index_M] = found_M.to(result_N.device)
    return result_N


def _distances(first_NE: Tensor, second_KE: Tensor) -> Tensor:
    """Distance of each vector to each other one, from their common centre: products of large numbers cancel badly."""
    center_E = second_KE.mean(0)
    return torch.cdist(first_NE - center_E, second_KE - center_E)
