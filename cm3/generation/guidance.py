"""Guidance: combining the logits of several prompts for one row (CM3Leon paper eq. 1-2)."""

import torch
from jaxtyping import Float
from torch import Tensor


def classifier_free(
    conditional_BV: Float[Tensor, "B V"], unconditional_BV: Float[Tensor, "B V"], scale_B: Float[Tensor, " B"]
) -> Float[Tensor, "B V"]:
    """Classifier-free guidance `l_u + a (l_c - l_u)`, before temperature and top-p.

    A scale of 1 gives exactly the conditional logits, 0 the unconditional ones, more overstates the prompt.
    """
    scale_B1 = scale_B[:, None]
    guided_BV = unconditional_BV + scale_B1 * (conditional_BV - unconditional_BV)
    return torch.where(scale_B1 == 1, conditional_BV, guided_BV)
