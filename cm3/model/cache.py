"""A static key-value cache: fixed shapes, one write index per row, no synchronisation in the decoding step.

L layers   B rows   S slots (capacity + 1)   T new tokens   G key/value heads   K head width
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cm3.errors import RequestError
from cm3.model.config import ModelConfig
from cm3.model.masks import CacheMask


@dataclass
class LayerCache:
    """One layer's keys and values (views of the whole cache)."""

    keys_BSGK: Float[Tensor, "B S G K"]
    values_BSGK: Float[Tensor, "B S G K"]

    def write(
        self, k_BTGK: Float[Tensor, "B T G K"], v_BTGK: Float[Tensor, "B T G K"], slots_BT: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B S G K"], Float[Tensor, "B S G K"]]:
        """Put new keys and values into their slots, in place, and return all of them."""
        row_B1 = torch.arange(slots_BT.shape[0], device=slots_BT.device)[:, None]
        self.keys_BSGK[row_B1, slots_BT] = k_BTGK.to(self.keys_BSGK.dtype)
        self.values_BSGK[row_B1, slots_BT] = v_BTGK.to(self.values_BSGK.dtype)
        return self.keys_BSGK, self.values_BSGK


RUN_COST = 64
"""What one more run of rows costs, in slots that are read for nothing: a forward pass over few tokens, or a call of the
attention kernel, takes about as long as that many slots of one row (measured on a CPU)."""


@dataclass(frozen=True)
class Run:
    """Neighbouring rows that are served together, as long as the longest of them."""

    start: int
    stop: int
    longest: int
    """Most tokens that a row of them holds, as far as the host knows."""

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.start, self.stop)


def similar_runs(lengths: Sequence[int]) -> tuple[Run, ...]:
    """Rows in runs of similar length: as few slots as possible, each run counted as `RUN_COST` more."""
    costs: list[float] = [0]
    starts = []
    for stop in range(1, len(lengths) + 1):
        cost, start, longest = float("inf"), stop, 0
        for first in range(stop - 1, -1, -1):
            longest = max(longest, lengths[first])
            if costs[first] + RUN_COST + (stop - first) * longest < cost:
                cost, start = costs[first] + RUN_COST + (stop - first) * longest, first
        costs.append(cost)
        starts.append(start)
    runs: list[Run] = []
    stop = len(lengths)
    while stop:
        start = starts[stop - 1]
        runs.insert(0, Run(start, stop, max(lengths[start:stop])))
        stop = start
    return tuple(runs)


@dataclass
class KeyValueCache:
    """Keys and values of every layer, and how many tokens each row holds.

    Rows are independent: each has its own length, which is also the position of its next token. The last
    slot is spare: padding is written there and nobody looks at it.
    """

    keys_LBSGK: Float[Tensor, "L B S G K"]
    values_LBSGK: Float[Tensor, "L B S G K"]
    lengths_B: Int[Tensor, " B"]
    runs: tuple[Run, ...] | None = None
    """See `bounded`; None: attention reads all slots of all rows, in the same shapes at every step."""
    cpu_step: Any = field(default=None, init=False, repr=False, compare=False)
    """What `cpu_step_model` made for steps on these very tensors; None: nothing fits."""
    cpu_step_model: Any = field(default=None, init=False, repr=False, compare=False)
    """The `Transformer` that fed this cache last."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the step, which knows where these very tensors lie, and its model."""
        return {**self.__dict__, "cpu_step": None, "cpu_step_model": None}

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KeyValueCache":
        """An empty cache for `batch` rows of up to `capacity` tokens.

        Raises:
            RequestError: if the model has fewer positions than `capacity`.
        """
        if not 1 <= capacity <= config.max_positions:
            raise RequestError(
                f"a cache of {capacity} tokens a row was asked for, but the model has "
                f"{config.max_positions} positions; shorten the prompt or ask for fewer new tokens"
            )
        shape = (config.num_layers, batch, capacity + 1, config.key_value_heads, config.head_width)
        return cls(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.keys_LBSGK.shape[2] - 1

    def layer(self, index: int) -> LayerCache:
        """The part of one layer, sharing memory."""
        return LayerCache(self.keys_LBSGK[index], self.values_LBSGK[index])

    def plan_step(self, num_columns: int, num_new_B: Int[Tensor, " B"] | None = None) -> CacheMask:
        """Positions, slots and mask for appending `num_columns` right-padded tokens to every row.

        Args:
            num_new_B: real tokens of each row (0 leaves a row untouched); None: all columns are real.

        Raises:
            RequestError: if the columns alone exceed the capacity. Lengths are not read back from the device:
                check them beforehand with `plan_capacity`.
        """
        if num_columns > self.capacity:
            raise RequestError(
                f"{num_columns} tokens do not fit a cache of {self.capacity}; create it with more capacity"
            )
        device = self.lengths_B.device
        column_1T = torch.arange(num_columns, device=device)[None]
        positions_BT = self.lengths_B[:, None] + column_1T
        real_BT = None
        slots_BT = positions_BT
        if num_new_B is not None:
            real_BT = column_1T < num_new_B[:, None]
            positions_BT = torch.where(real_BT, positions_BT, 0)
            slots_BT = torch.where(real_BT, positions_BT, self.capacity)
        runs = self._runs_after(num_columns)
        num_slots = self.capacity + 1 if runs is None else max(run.longest for run in runs)
        slot_S = torch.arange(num_slots, device=device)
        mask = CacheMask(positions_BT, slots_BT, slot_S <= positions_BT[..., None], real_BT)
        if runs is None:
            return mask
        return replace(mask, parts=tuple((run.rows, mask.part(run.rows, run.longest)) for run in runs))

    def advance(self, num_columns: int, num_new_B: Int[Tensor, " B"] | None = None) -> None:
        """Count the tokens just written, in place; arguments as for `plan_step`."""
        self.lengths_B += num_columns if num_new_B is None else num_new_B
        self.runs = self._runs_after(num_columns)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first tokens of every row, in place; those behind them are overwritten by the next ones.

        Args:
            lengths: tokens that are kept of each row; no more than it holds.
        """
        self.lengths_B.copy_(torch.tensor(lengths))
        if self.runs is not None:
            self.runs = tuple(replace(run, longest=max(lengths[run.rows])) for run in self.runs)

    def bounded(self, lengths: Sequence[int]) -> "KeyValueCache":
        """The same cache, sharing memory, that reads no more slots of a row than may be filled.

        The host counts along, one for every column, and never asks the device. Shapes then change at every step: not
        for a step that is compiled or captured.

        Args:
            lengths: Most tokens that each row holds now.
        """
        return replace(self, runs=similar_runs(lengths))

    def rows(self, rows: slice) -> "KeyValueCache":
        """Some neighbouring rows, sharing memory; without bounds."""
        return KeyValueCache(self.keys_LBSGK[:, rows], self.values_LBSGK[:, rows], self.lengths_B[rows])

    def _runs_after(self, num_columns: int) -> tuple[Run, ...] | None:
        """The runs once every row has as many tokens more; a row that is full has stopped."""
        if self.runs is None:
            return None
        return tuple(replace(run, longest=min(run.longest + num_columns, self.capacity)) for run in self.runs)

    def select(self, rows_B: Int[Tensor, " rows"]) -> "KeyValueCache":
        """A new cache with copies of the given rows, in any order and number: drop, share or pair rows."""
        return KeyValueCache(self.keys_LBSGK[:, rows_B], self.values_LBSGK[:, rows_B], self.lengths_B[rows_B])

    def expand(self, copies: int) -> "KeyValueCache":
        """A new cache with every row repeated: row i becomes rows i*copies to (i+1)*copies - 1."""
        rows = torch.arange(len(self.lengths_B), device=self.lengths_B.device)
        return self.select(rows.repeat_interleave(copies))


def plan_capacity(config: ModelConfig, prompt_lengths: Sequence[int], max_new_tokens: int) -> int:
    """Capacity that holds the longest prompt and its new tokens.

    Raises:
        RequestError: if the model's context is too short for it.
    """
    longest = max(prompt_lengths)
    if longest + max_new_tokens > config.max_positions:
        raise RequestError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones were asked for, but the model's "
            f"context is {config.max_positions} tokens; shorten the prompt or ask for fewer new tokens"
        )
    return longest + max_new_tokens
