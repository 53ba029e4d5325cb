"""Rows that several processes share, a part each, after DeepSpeed Ulysses (arXiv:2309.14509, section 3.1).

All but attention works on each token alone, so a process computes it for its part of the tokens. For attention an
all-to-all gives every process all tokens of its share of the heads, and a second one gives back all heads of its part.
Two exchanges a layer, of a volume that falls with the number of processes; activations fall with it too.

Written on torch.distributed rather than with DeepSpeed's `DistributedAttention`: the model knows nothing of DeepSpeed,
and queries, keys and values go in one exchange here and in three there.

B batch   T tokens of a row   L tokens of a part   P parts   N query heads   G key/value heads   K head width
n, g, h   one process's share of the query heads, of the key/value heads, and of all of them together
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cm3.distributed import rank, world_size
from cm3.model.masks import PackedMask, document_positions


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share rows; by default one that has its rows for itself."""

    size: int = 1
    """P, its processes, as many as parts."""
    index: int = 0
    """Which part this process has."""
    all_to_all: Callable[[Tensor], Tensor] = lambda x: x
    """Gives block p of the first dimension to process p and returns the blocks got, in the order of the processes."""

    def part(self, x_BT: Shaped[Tensor, "B T"]) -> Shaped[Tensor, "B L"]:
        """The columns of this process; their number must be a multiple of the processes."""
        return x_BT.unflatten(1, (self.size, -1))[:, self.index]


ALONE = SequenceGroup()


def join_sequence_group(size: int) -> SequenceGroup:
    """The group of this process: consecutive ones, which launchers put on one machine. A collective of all processes.

    Args:
        size: processes of each group; divides their number.
    """
    if size == 1:
        return ALONE
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size(), size)]
    return SequenceGroup(size, rank() % size, partial(_all_to_all, group=groups[rank() // size]))


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


class SharedRows(PackedMask):
    """The mask of whole packed rows, for tokens of which this process has only a part.

    Args:
        document_ids_BT: of the whole rows, the same in all processes of the group.
        group: who shares them.

    Attributes:
        positions_BL: position of every token of this part inside its document, which may begin in another part.
    """

    def __init__(self, document_ids_BT: Int[Tensor, "B T"], group: SequenceGroup) -> None:
        super().__init__(document_ids_BT)
        self.positions_BL = group.part(document_positions(document_ids_BT))
        self._group = group

    def gather_tokens(
        self, q_BLNK: Float[Tensor, "B L N K"], k_BLGK: Float[Tensor, "B L G K"], v_BLGK: Float[Tensor, "B L G K"]
    ) -> tuple[Float[Tensor, "B T n K"], Float[Tensor, "B T g K"], Float[Tensor, "B T g K"]]:
        """Queries, keys and values of all tokens, for this process's heads. A collective of the group.

        Share p of the queries looks at share p of the keys and values, as both are cut evenly.
        """
        shares = [x.unflatten(2, (self._group.size, -1)) for x in (q_BLNK, k_BLGK, v_BLGK)]
        sent_PBLhK = torch.cat(shares, dim=3).movedim(2, 0)
        got_PBLhK = _Exchange.apply(sent_PBLhK, self._group.all_to_all)
        q_BTnK, k_BTgK, v_BTgK = got_PBLhK.movedim(0, 1).flatten(1, 2).split([x.shape[3] for x in shares], dim=2)
        return q_BTnK, k_BTgK, v_BTgK

    def gather_heads(self, out_BTnK: Float[Tensor, "B T n K"]) -> Float[Tensor, "B L N K"]:
        """Attention of all heads, for the tokens of this part. A collective of the group."""
        sent_PBLnK = out_BTnK.unflatten(1, (self._group.size, -1)).movedim(1, 0)
        got_PBLnK = _Exchange.apply(sent_PBLnK, self._group.all_to_all)
        return got_PBLnK.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """An all-to-all. What came from process p is due to what it sent, so the gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, all_to_all: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.all_to_all = all_to_all
        return all_to_all(x.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.all_to_all(grad.contiguous()), None
