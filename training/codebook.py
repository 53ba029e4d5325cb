"""Learning a codebook by moving averages (van den Oord et al. 2017, appendix A.1); revival of dead codes.

The codebook starts from k-means over real latents, and a code that was not used for a while is replaced by a
latent of the current batch, as in Jukebox (Dhariwal et al. 2020, section 3.1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cm3.tokenizers.quantizer import VectorQuantizer


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
    """Moves a quantiser's codes to the mean of the latents that choose them."""

    def __init__(self, quantizer: VectorQuantizer, decay: float, revive_after_steps: int, seed: int) -> None:
        self.quantizer = quantizer
        self.decay = decay
        self.revive_after_steps = revive_after_steps
        codebook_QE = quantizer.codebook_QE
        num_codes, device = len(codebook_QE), codebook_QE.device
        self.generator = torch.Generator().manual_seed(seed)
        self.average_count_Q = torch.ones(num_codes, device=device)
        self.average_sum_QE = codebook_QE.clone()
        self.idle_steps_Q = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.interval_counts_Q = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.interval_revived = 0

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
        if self.revive_after_steps:
            self._revive(latents_NE)

    def _revive(self, latents_NE: Tensor) -> None:
        dead_Q = self.idle_steps_Q >= self.revive_after_steps
        count = int(dead_Q.sum())
        if not count:
            return
        latents = self._draw(latents_NE, count)
        self.quantizer.codebook_QE[dead_Q] = latents
        self.average_sum_QE[dead_Q] = latents
        self.average_count_Q[dead_Q] = 1.0
        self.idle_steps_Q[dead_Q] = 0
        self.interval_revived += count

    def _sums(self, latents_NE: Tensor, codes_N: Tensor) -> tuple[Tensor, Tensor]:
        """Number and sum of the latents of each code."""
        num_codes = len(self.quantizer.codebook_QE)
        counts_Q = torch.bincount(codes_N, minlength=num_codes).to(latents_NE.dtype)
        sums_QE = torch.zeros_like(self.average_sum_QE).index_add_(0, codes_N, latents_NE)
        return counts_Q, sums_QE

    def report(self) -> dict[str, float]:
        """Usage and revivals since the last report."""
        usage = CodebookUsage.of_counts(self.interval_counts_Q)
        revived = self.interval_revived
        self.interval_counts_Q.zero_()
        self.interval_revived = 0
        return {"used_codes": usage.used_codes, "perplexity": usage.perplexity, "revived_codes": revived}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the codebook itself, which belongs to the model."""
        return {
            "average_count": self.average_count_Q,
            "average_sum": self.average_sum_QE,
            "idle_steps": self.idle_steps_Q,
            "interval_counts": self.interval_counts_Q,
            "interval_revived": torch.tensor(self.interval_revived),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`."""
        self.average_count_Q.copy_(state["average_count"])
        self.average_sum_QE.copy_(state["average_sum"])
        self.idle_steps_Q.copy_(state["idle_steps"])
        self.interval_counts_Q.copy_(state["interval_counts"])
        self.interval_revived = int(state["interval_revived"])
        self.generator.set_state(state["generator"])
