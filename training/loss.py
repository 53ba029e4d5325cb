"""The transformer and its loss as one module, and the sums that a step reports."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cm3.model.loss import next_token_loss, shift_targets
from cm3.model.sequence_parallel import ALONE, SequenceGroup
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary
from cm3.training.config import ModelRun

SUMS = ("text_loss", "text_count", "image_loss", "image_count", "z_loss", "weight", "output_norm", "tokens")
"""What `LossModule` sums up over a micro batch, in nats where it is a loss.

The squared log partition function comes times the weight of its targets. The output norm is the L2 norm of a token's
hidden state before the final norm: together the early warning of a divergence (Chameleon, section 2.3).
"""


class LossModule(nn.Module):
    """The transformer and its loss in one forward, as the engine wants it.

    Of rows that the processes of a group share, each takes whole ids and computes the loss of its part.
    """

    def __init__(
        self, model: Transformer, vocabulary: Vocabulary, config: ModelRun, group: SequenceGroup = ALONE
    ) -> None:
        super().__init__()
        self.model = model
        self._group = group
        self._image_range = (vocabulary.image_range.start, vocabulary.image_range.stop)
        self._z_loss_weight = config.z_loss_weight
        self._norms_BT = torch.empty(0)
        model.final_norm.register_forward_pre_hook(self._keep_norms)

    def forward(self, ids_BT: Tensor, document_ids_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro batch, a mean over its targets, and its `SUMS`.

        A plain tuple: DeepSpeed hooks the tensors of tuples, lists and dictionaries only, and without its hooks bf16
        gradients of one micro batch leak into the next.
        """
        out = next_token_loss(
            self.model,
            ids_BT,
            document_ids_BT,
            image_range=self._image_range,
            weights_BT=weights_BT,
            z_loss_weight=self._z_loss_weight,
            group=self._group,
        )
        is_token_BT = self._group.part(document_ids_BT >= 0)
        sums = (
            out.text_loss_sum,
            out.text_count,
            out.image_loss_sum,
            out.image_count,
            out.z_loss * out.weight_sum,
            out.weight_sum,
            self._norms_BT[is_token_BT].sum(),
            is_token_BT.sum(),
        )
        return out.loss, torch.stack([value.detach().double() for value in sums])

    def _keep_norms(self, final_norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._norms_BT = torch.linalg.vector_norm(arguments[0].detach(), dim=-1, dtype=torch.float32)


def target_weight(batch: Mapping[str, Tensor], group: SequenceGroup = ALONE) -> float:
    """Return the sum of the weights of a micro batch's targets, of those in this process's part."""
    _, is_target_BT = shift_targets(batch["ids_BT"], batch["document_ids_BT"])
    return float(group.part(batch["weights_BT"].roll(-1, dims=1) * is_target_BT).sum())


def num_tokens(batch: Mapping[str, Tensor], group: SequenceGroup = ALONE) -> int:
    """Return the tokens of a micro batch that are no padding, those in this process's part."""
    return int(group.part(batch["document_ids_BT"] >= 0).sum())
