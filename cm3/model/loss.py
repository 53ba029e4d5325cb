"""Next-token cross-entropy, chunked over tokens so that the logits of a batch never exist at once.

B batch   T tokens   D width   V joint vocabulary   C tokens of a chunk
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cm3.model.sequence_parallel import ALONE, SequenceGroup, SharedRows
from cm3.model.transformer import Transformer


@dataclass(frozen=True)
class LossOutput:
    """The loss to differentiate, and what to log: detached sums over targets of positive weight, in nats."""

    loss: Float[Tensor, ""]
    """Weighted mean of cross-entropy (plus z-loss) over the targets."""
    weight_sum: Float[Tensor, ""]
    """Sum of the targets' weights: what `loss` was divided by."""
    text_loss_sum: Float[Tensor, ""]
    text_count: Int[Tensor, ""]
    image_loss_sum: Float[Tensor, ""]
    image_count: Int[Tensor, ""]
    z_loss: Float[Tensor, ""]
    """Weighted mean of (log Z)^2, before its factor."""


def next_token_loss(
    model: Transformer,
    ids_BT: Int[Tensor, "B T"],
    document_ids_BT: Int[Tensor, "B T"] | None = None,
    *,
    image_range: tuple[int, int],
    weights_BT: Float[Tensor, "B T"] | None = None,
    z_loss_weight: float = 0.0,
    chunk_size: int = 2048,
    group: SequenceGroup = ALONE,
) -> LossOutput:
    """Run the model and score every token against the next one of its document.

    Processes that share rows are all given whole ones. Each gets mean and sums over its part, where the target of the
    last token is the first token of the next part.

    Args:
        document_ids_BT: see `Transformer.forward`; tokens of id -1 are neither read nor predicted.
        image_range: ids [start, stop) that count as image; all others count as text.
        weights_BT: weight of each token of `ids_BT` as a target, default 1; those of weight 0 are not logged.
        z_loss_weight: factor of (log Z)^2, Z the softmax's partition function (Chameleon section 2.3: 1e-5).
        chunk_size: tokens whose logits exist at once.
        group: processes that share the rows.
    """
    if group.size == 1:
        hidden_BTD = model(ids_BT, document_ids_BT=document_ids_BT)
    else:
        whole_BT = torch.zeros_like(ids_BT) if document_ids_BT is None else document_ids_BT
        hidden_BTD = model(group.part(ids_BT), rows=SharedRows(whole_BT, group))
    targets_BT, is_target_BT = shift_targets(ids_BT, document_ids_BT)
    weights = torch.ones_like(ids_BT, dtype=torch.float32) if weights_BT is None else weights_BT.float()
    weights_BT = weights.roll(-1, dims=1) * is_target_BT
    targets, weights = group.part(targets_BT).flatten(), group.part(weights_BT).flatten()
    counted = weights > 0  # logits of the others would come to nothing
    targets, weights = targets[counted], weights[counted]

    head_VD = model.head_weight_VD if torch.is_grad_enabled() else model.head_weight_VD.detach()
    total, losses, log_z = _ChunkedCrossEntropy.apply(
        hidden_BTD.flatten(0, 1)[counted], head_VD, targets, weights, z_loss_weight, chunk_size
    )
    weight_sum = weights.sum()
    divisor = weight_sum.clamp(min=torch.finfo(torch.float32).tiny)
    is_image = (targets >= image_range[0]) & (targets < image_range[1])
    is_text = ~is_image
    return LossOutput(
        loss=total / divisor,
        weight_sum=weight_sum,
        text_loss_sum=(losses * is_text).sum(),
        text_count=is_text.sum(),
        image_loss_sum=(losses * is_image).sum(),
        image_count=is_image.sum(),
        z_loss=(log_z.square() * weights).sum() / divisor,
    )


def shift_targets(
    ids_BT: Int[Tensor, "B T"], document_ids_BT: Int[Tensor, "B T"] | None
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """The id that follows each token, and whether it exists in the same document."""
    is_target_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    if document_ids_BT is not None:
        is_target_BT = (document_ids_BT == document_ids_BT.roll(-1, dims=1)) & (document_ids_BT >= 0)
    is_target_BT[:, -1] = False
    return ids_BT.roll(-1, dims=1), is_target_BT


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropy and z-loss; the gradients are made with the logits, chunk by chunk.

    One product with the head less than recomputing the logits in the backward pass (the idea of Liger Kernel,
    arXiv:2410.10989, section 3.2). The head's gradient is summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        weights_M: Tensor,
        z_loss_weight: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device_type = hidden_MD.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else hidden_MD.dtype
        head_VD = weight_VD.to(dtype)
        losses_M = torch.empty_like(weights_M)
        log_z_M = torch.empty_like(weights_M)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_MD = torch.empty_like(hidden_MD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None

        for start in range(0, len(targets_M), chunk_size):
            chunk = slice(start, start + chunk_size)
            hidden_CD = hidden_MD[chunk].to(dtype)
            targets_C1, weights_C = targets_M[chunk, None], weights_M[chunk]
            logits_CV = (hidden_CD @ head_VD.T).float()
            log_z_C = logits_CV.logsumexp(dim=-1)
            log_z_M[chunk] = log_z_C
            losses_M[chunk] = log_z_C - logits_CV.gather(1, targets_C1)[:, 0]
            if grad_hidden_MD is None and grad_weight_VD is None:
                continue
            # d/dlogits of w (log Z - logit_target + z (log Z)^2) = w ((1 + 2 z log Z) softmax - onehot)
            scale_C = weights_C * (1 + 2 * z_loss_weight * log_z_C)
            grad_CV = logits_CV.sub_(log_z_C[:, None]).exp_().mul_(scale_C[:, None])
            grad_CV = grad_CV.scatter_add_(1, targets_C1, -weights_C[:, None]).to(dtype)
            if grad_hidden_MD is not None:
                grad_hidden_MD[chunk] = (grad_CV @ head_VD).to(hidden_MD.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_CD

        ctx.save_for_backward(grad_hidden_MD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(losses_M, log_z_M)
        total = (weights_M * (losses_M + z_loss_weight * log_z_M.square())).sum()
        return total, losses_M, log_z_M

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_MD, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_MD is not None:
            grad_hidden_MD = (grad_hidden_MD * grad_total).to(grad_hidden_MD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_total).to(ctx.weight_dtype)
        return grad_hidden_MD, grad_weight_VD, None, None, None, None
