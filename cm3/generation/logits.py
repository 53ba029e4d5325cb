"""Reshaping a next-id distribution before one id is drawn. Pure functions; every row has its own settings.

Each function is the exact identity for a row whose setting is "off", whatever its neighbours ask for.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EXCLUDED = float("-inf")
"""Logit of an id that must not be drawn."""


def repetition_penalty(
    logits_BV: Float[Tensor, "B V"], seen_BV: Bool[Tensor, "B V"], penalty_B: Float[Tensor, " B"]
) -> Float[Tensor, "B V"]:
    """Make the ids marked in `seen_BV` less likely (Keskar et al. 2019, CTRL). 1 is off.

    Positive logits are divided by the penalty, negative ones multiplied. The caller marks only text ids.
    """
    penalty_B1 = penalty_B[:, None]
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV & (penalty_B1 != 1), penalised_BV, logits_BV)


def temperature(logits_BV: Float[Tensor, "B V"], temperature_B: Float[Tensor, " B"]) -> Float[Tensor, "B V"]:
    """Divide by the temperature; 0 keeps only the highest logit of the row (ties all stay). 1 is off."""
    temperature_B1 = temperature_B[:, None]
    greedy_BV = torch.where(logits_BV == logits_BV.amax(dim=1, keepdim=True), 0.0, EXCLUDED)
    return torch.where(temperature_B1 > 0, logits_BV / temperature_B1, greedy_BV)


def top_k(logits_BV: Float[Tensor, "B V"], k_B: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
    """Keep the k highest logits. 0 is off.

    Ids tied with the k-th all stay, so the result does not depend on the order of ids.
    """
    size = logits_BV.shape[1]
    last_B1 = torch.where(k_B > 0, k_B, size).clamp(max=size)[:, None] - 1
    threshold_B1 = logits_BV.sort(dim=1, descending=True).values.gather(1, last_B1)
    return logits_BV.masked_fill(logits_BV < threshold_B1, EXCLUDED)


def top_p(logits_BV: Float[Tensor, "B V"], p_B: Float[Tensor, " B"]) -> Float[Tensor, "B V"]:
    """Keep the fewest most likely ids whose probabilities reach p (Holtzman et al. 2020). 1 is off.

    The id that crosses p is in the set, so at least one id stays. Among equally likely ids at the edge the
    lower id goes in first: no id more than needed is kept.
    """
    sorted_BV, order_BV = logits_BV.sort(dim=1, descending=True, stable=True)
    reached_BV = sorted_BV.softmax(dim=1).cumsum(dim=1)
    before_BV = torch.cat([torch.zeros_like(reached_BV[:, :1]), reached_BV[:, :-1]], dim=1)
    outside_BV = (before_BV >= p_B[:, None]) & (p_B[:, None] < 1)
    return logits_BV.masked_fill(torch.zeros_like(outside_BV).scatter(1, order_BV, outside_BV), EXCLUDED)
