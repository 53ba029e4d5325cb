"""Who may attend to whom: causal rows, rows packed with documents, and rows that extend a cache.

A mask is built once per forward pass and shared by all layers.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MAX_GROUP_RATIO = 1.5
"""Documents share one padded batch while the longest is at most this much longer than the shortest."""
_LENGTH_MULTIPLE = 32
"""Padded lengths are multiples of this: a tile of the matrix units; shorter documents share a batch."""


@dataclass(frozen=True)
class CausalMask:
    """Every token sees itself and all before it in its row."""

    def visible(self, num_tokens: int, device: torch.device) -> Bool[Tensor, "1 T S"]:
        """True where query T may look at key S."""
        return torch.ones(1, num_tokens, num_tokens, dtype=torch.bool, device=device).tril()


@dataclass(frozen=True)
class CacheMask:
    """New tokens against a static cache of S slots per row; made by `KeyValueCache.plan_step`."""

    positions_BT: Int[Tensor, "B T"]
    """Position of each new token in its row; 0 at padding."""
    slots_BT: Int[Tensor, "B T"]
    """Cache slot each new token is written to; padding goes to the spare last slot."""
    visible_BTS: Bool[Tensor, "B T S"]
    """True where query T may look at slot S; padding looks at slot 0, which is always finite."""
    real_BT: Bool[Tensor, "B T"] | None
    """False at padding columns; None where there are none."""
    parts: tuple[tuple[slice, "CacheMask"], ...] = ()
    """Where attention reads no further than rows are filled: rows that are served together, and their mask, whose S
    is that of their first slots. Empty: all rows together."""

    def part(self, rows: slice, num_slots: int) -> "CacheMask":
        """The mask of some rows and their first slots."""
        real_BT = None if self.real_BT is None else self.real_BT[rows]
        visible_BTS = self.visible_BTS[rows, :, :num_slots]
        return CacheMask(self.positions_BT[rows], self.slots_BT[rows], visible_BTS, real_BT)


def document_starts(document_ids_BT: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True at the first token of every run of equal ids (a document, or a stretch of -1 padding)."""
    first_B1 = torch.ones_like(document_ids_BT[:, :1], dtype=torch.bool)
    return torch.cat([first_B1, document_ids_BT[:, 1:] != document_ids_BT[:, :-1]], dim=1)


def document_positions(document_ids_BT: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position of every token inside its document, from 0; 0 at padding."""
    column_1T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)[None]
    start_BT = torch.where(document_starts(document_ids_BT), column_1T, 0).cummax(dim=1).values
    return torch.where(document_ids_BT >= 0, column_1T - start_BT, 0)


class PackedMask:
    """Rows packed with several documents: every token sees itself and what precedes it in its document.

    A document is a run of equal ids; -1 is padding, which sees nothing and whose attention output is zero.
    Beside the boolean mask of the reference this holds what fast kernels want, each computed once on demand:
    `groups`, documents of similar length as right-padded batches for causal SDPA (padding is bounded,
    however unequal the documents), and `cumulative_lengths` for variable-length kernels.
    """

    def __init__(self, document_ids_BT: Int[Tensor, "B T"]) -> None:
        self.document_ids_BT = document_ids_BT
        self.device = document_ids_BT.device
        starts = torch.nonzero(document_starts(document_ids_BT).flatten()).flatten()
        total = torch.full((1,), document_ids_BT.numel(), device=self.device)
        lengths = torch.diff(torch.cat([starts, total]))
        is_document = document_ids_BT.flatten()[starts] >= 0
        if not is_document.any():  # one empty document keeps all gradients connected
            starts, lengths, is_document = starts[:1], lengths[:1] * 0, ~is_document[:1]
        self._starts = starts[is_document]
        self._lengths = lengths[is_document]

    def visible(self) -> Bool[Tensor, "B T S"]:
        """True where query T may look at key S."""
        run_BT = document_starts(self.document_ids_BT).cumsum(dim=1)
        same_BTS = run_BT[:, :, None] == run_BT[:, None, :]
        return (same_BTS & (self.document_ids_BT >= 0)[:, :, None]).tril()

    @cached_property
    def token_indices(self) -> Int[Tensor, " tokens"]:
        """Places of all real tokens in the flattened batch, document after document."""
        return torch.nonzero(self.document_ids_BT.flatten() >= 0).flatten()

    @cached_property
    def cumulative_lengths(self) -> Int[Tensor, " documents_plus_one"]:
        """Offsets of the documents in `token_indices`, int32, as variable-length kernels want them."""
        zero = self._lengths.new_zeros(1)
        return torch.cat([zero, self._lengths.cumsum(0)]).to(torch.int32)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document (0 if there is none)."""
        return int(self._lengths.max())

    @cached_property
    def groups(self) -> "DocumentGroups":
        """The documents, longest first, in batches of similar length."""
        lengths, order = self._lengths.sort(descending=True, stable=True)
        shapes: list[tuple[int, int]] = []
        for length in lengths.tolist():
            if not shapes or shapes[-1][1] > max(length * _MAX_GROUP_RATIO, _LENGTH_MULTIPLE):
                shapes.append((0, _round_up(length)))
            shapes[-1] = (shapes[-1][0] + 1, shapes[-1][1])
        padded_lengths = [length for count, length in shapes for _ in range(count)]
        padded = torch.tensor(padded_lengths, device=self.device)
        document_of_slot = torch.repeat_interleave(torch.arange(len(lengths), device=self.device), padded)
        offset = torch.arange(len(document_of_slot), device=self.device)
        offset -= (padded.cumsum(0) - padded)[document_of_slot]
        is_real = offset < lengths[document_of_slot]
        token_of_slot = (self._starts[order][document_of_slot] + offset).where(is_real, 0)
        slots = torch.nonzero(is_real).flatten()
        slot_of_token = torch.zeros(self.document_ids_BT.numel(), dtype=torch.int64, device=self.device)
        slot_of_token[token_of_slot[slots]] = slots
        empty_slots = torch.nonzero(~is_real).flatten()
        empty_tokens = torch.nonzero(self.document_ids_BT.flatten() < 0).flatten()
        return DocumentGroups(shapes, token_of_slot, empty_slots, slot_of_token, empty_tokens)


def _round_up(length: int) -> int:
    return max(1, -(-length // _LENGTH_MULTIPLE)) * _LENGTH_MULTIPLE


@dataclass(frozen=True)
class DocumentGroups:
    """A one-to-one map between the tokens of packed rows and the slots of right-padded batches."""

    shapes: list[tuple[int, int]]
    """(documents, padded length) of each batch; their products sum to the number of slots."""
    token_of_slot: Int[Tensor, " slots"]
    empty_slots: Int[Tensor, " padding_slots"]
    slot_of_token: Int[Tensor, " tokens"]
    empty_tokens: Int[Tensor, " padding_tokens"]

    def to_slots(self, x: Float[Tensor, "tokens N K"]) -> Float[Tensor, "slots N K"]:
        """Rows moved to their slots; zeros in empty slots."""
        return x.index_select(0, self.token_of_slot).index_fill_(0, self.empty_slots, 0.0)

    def to_tokens(self, x: Float[Tensor, "slots N K"]) -> Float[Tensor, "tokens N K"]:
        """Rows moved back; zeros for the padding of packed rows."""
        return x.index_select(0, self.slot_of_token).index_fill_(0, self.empty_tokens, 0.0)


AttentionMask = CausalMask | PackedMask | CacheMask
