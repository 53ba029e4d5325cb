"""Guidance and contrast: combining the logits of two or three prompts for one row (CM3Leon section 3.1).

Pure functions of fp32 logits; every row has its own scales.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cm3.generation.logits import EXCLUDED

LEAST_LOG_PROBABILITY = -1e4
"""Stands for the logarithm of the amateur's probability 0, so that no score is infinite."""


def classifier_free(
    conditional_BV: Float[Tensor, "B V"], unconditional_BV: Float[Tensor, "B V"], scale_B: Float[Tensor, " B"]
) -> Float[Tensor, "B V"]:
    """Classifier-free guidance `l_u + a (l_c - l_u)` (CM3Leon eq. 1-2), before temperature and top-p.

    A scale of 1 gives exactly the conditional logits, 0 the unconditional ones, more overstates the prompt.
    """
    scale_B1 = scale_B[:, None]
    guided_BV = unconditional_BV + scale_B1 * (conditional_BV - unconditional_BV)
    return torch.where(scale_B1 == 1, conditional_BV, guided_BV)


def image_text(
    none_BV: Float[Tensor, "B V"],
    image_BV: Float[Tensor, "B V"],
    full_BV: Float[Tensor, "B V"],
    image_scale_B: Float[Tensor, " B"],
    text_scale_B: Float[Tensor, " B"],
) -> Float[Tensor, "B V"]:
    """Guidance by an image and a text `l_0 + s_I (l_I - l_0) + s_T (l_IT - l_I)` (InstructPix2Pix eq. 3).

    With both scales at 1 these are exactly the logits of the full prompt. An image scale of 1 is
    classifier-free guidance against the image alone, equal scales are guidance against nothing at all.

    Args:
        none_BV: of the prompt without image and text.
        image_BV: of the prompt with the image alone.
        full_BV: of the prompt with both.
    """
    image_scale_B1, text_scale_B1 = image_scale_B[:, None], text_scale_B[:, None]
    guided_BV = none_BV + image_scale_B1 * (image_BV - none_BV) + text_scale_B1 * (full_BV - image_BV)
    return torch.where((image_scale_B1 == 1) & (text_scale_B1 == 1), full_BV, guided_BV)


def contrastive(
    expert_BV: Float[Tensor, "B V"],
    amateur_BV: Float[Tensor, "B V"],
    alpha_B: Float[Tensor, " B"],
    k_B: Int[Tensor, " B"],
    amateur_temperature_B: Float[Tensor, " B"],
) -> Float[Tensor, "B V"]:
    """CD-K, contrastive decoding (CM3Leon eq. 3-6): scores to be drawn from as if they were logits.

    `log p_E - log p_A` for the plausible ids, those at least alpha times as likely to the expert as its k-th
    likeliest id; all others are excluded. k = 1 is the rule of Li et al. (2022); k = 1 with alpha = 1 leaves
    the expert's likeliest id alone. Ids tied with the threshold all stay. Both distributions are over the ids
    that the expert does not exclude; where these are fewer than k, the least likely of them counts as the k-th.

    Args:
        expert_BV: logits with the prompt, those of excluded ids -inf.
        amateur_BV: logits without the prompt.
        amateur_temperature_B: divides the amateur's logits, more than 0.
    """
    excluded_BV = expert_BV == EXCLUDED
    num_ids_B = (~excluded_BV).sum(dim=1)
    last_B1 = (torch.minimum(k_B, num_ids_B) - 1).clamp(min=0)[:, None]
    kth_B1 = expert_BV.sort(dim=1, descending=True).values.gather(1, last_B1)
    plausible_BV = ~excluded_BV & (expert_BV >= kth_B1 + alpha_B.log()[:, None])
    amateur_BV = (amateur_BV / amateur_temperature_B[:, None]).masked_fill(excluded_BV, EXCLUDED)
    log_amateur_BV = amateur_BV.log_softmax(dim=1).clamp(min=LEAST_LOG_PROBABILITY)
    score_BV = expert_BV.log_softmax(dim=1) - log_amateur_BV
    return torch.where(plausible_BV, score_BV, EXCLUDED)
