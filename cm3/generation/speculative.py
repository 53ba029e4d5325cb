"""Speculative Jacobi decoding: several ids of a picture in one forward pass, the same ids as one by one.

Noise is fixed for every place of a row (`cm3.generation.noise`), so that the id drawn there is a function of the ids
before it. One forward pass computes this function at all places of a window, whose later ids are guesses; drawn ids
count as long as all guesses before them were right. The first always does, so that no pass is in vain. The other
drawn ids are the next guesses, and a guess is more often right the more of what stands before it is (Jacobi's
iteration, arXiv:2002.09928). This is the speculative Jacobi decoding of arXiv:2410.01699 with a draft and its check
that share their noise. The paper draws the two apart and accepts a draft of q for p with probability min(1, p / q).
The distribution of the ids is the same; here each id is that of plain decoding besides, whatever the window and
whatever the rows beside it, up to the rounding of logits.

Letters added: R rows of the forward pass, M places of the window. T places of a run of ids that are drawn from image
codes alone or named by the grammar.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from cm3.generation.grammar import END, GrammarTables
from cm3.generation.sampler import Sampler
from cm3.model.cache import KeyValueCache
from cm3.model.transformer import Transformer

DRAWN = -1
"""Stands in a course where an id is drawn."""


def course(
    tables: GrammarTables, state_B: Int[Tensor, " B"], taken_B: Int[Tensor, " B"], num_steps: int, image_id: int
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"], Int[Tensor, " B"], Int[Tensor, " B"]]:
    """What the grammars do in steps where no row can choose among anything but image ids.

    Args:
        num_steps: at most `GrammarTables.image_steps`.
        image_id: any image id; which of them comes makes no difference.

    Returns:
        The id of every step that the grammar names, else `DRAWN`; the number of steps until each row ends; then the
        state of each row and the ids taken in it.
    """
    named = []
    num_new_B = torch.zeros_like(state_B)
    for _ in range(num_steps):
        named_B = tables.literal(state_B)
        named.append(named_B)
        num_new_B = num_new_B + (state_B != END)
        ids_B = torch.where(named_B >= 0, named_B, image_id)
        state_B, taken_B = tables.advance(state_B, taken_B, ids_B)
    return torch.stack(named, dim=1), num_new_B, state_B, taken_B


def num_kept(
    fed_BM: Int[Tensor, "B M"], drawn_BM: Int[Tensor, "B M"], num_new_B: Int[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """How many of the drawn ids are those of plain decoding: the first, and each that follows right guesses alone.

    Args:
        fed_BM: the last known id, then guesses of the ids after it.
        drawn_BM: what follows each of these if it and all before it are right.
        num_new_B: places of the window that the row still takes.
    """
    is_right_BM = fed_BM[:, 1:] == drawn_BM[:, :-1]
    return torch.minimum(is_right_BM.long().cumprod(dim=1).sum(dim=1) + 1, num_new_B)


def run_ahead(
    model: Transformer,
    cache: KeyValueCache,
    sampler: Sampler,
    last_B: Int[Tensor, " B"],
    owner_R: Int[Tensor, " R"],
    named_BT: Int[Tensor, "B T"],
    num_new_B: Int[Tensor, " B"],
    *,
    first_step: int,
    image_ids: tuple[int, int],
    window: int,
) -> Int[Tensor, "B T"]:
    """The ids of a run, and in the cache all of them but the last.

    Every row keeps its own number of ids of each pass; what the cache holds of wrong guesses is overwritten. The host
    waits for every pass to know whether there is another one.

    Args:
        last_B: the last id of each row, not yet in the cache.
        owner_R: the row whose ids each row of the forward pass is fed.
        named_BT: see `course`; with `num_new_B`.
        first_step: number of the run's first step.
        image_ids: first image id, and the one after the last.
        window: places of a pass; 1 is plain decoding.
    """
    num_steps = named_BT.shape[1]
    width = min(window, num_steps)
    sampler = sampler.widened(width)
    place_1M = torch.arange(width, device=last_B.device)[None]
    ids_BT = torch.cat([named_BT, named_BT[:, :1]], dim=1)  # the last place is spare, for what does not count
    done_B = torch.zeros_like(num_new_B)
    guessed_BM = named_BT[:, : width - 1]
    fed_BM = torch.cat([last_B[:, None], guessed_BM.where(guessed_BM != DRAWN, image_ids[0])], dim=1)
    owners, lengths, left = owner_R.tolist(), cache.lengths_B.tolist(), num_new_B.tolist()
    while any(left):
        new_B = (num_new_B - done_B).clamp(max=width)
        hidden_RMD = model(fed_BM[owner_R], cache=cache, num_new_B=new_B[owner_R])
        logits_RV = model.logits(hidden_RMD, image_ids).float().contiguous().flatten(0, 1)
        places_BM = done_B[:, None] + place_1M
        drawn = sampler.draw(logits_RV, (first_step + places_BM).flatten(), None, first_id=image_ids[0])
        drawn_BM = _with_named(drawn.view_as(places_BM), named_BT, places_BM)

        kept_B = num_kept(fed_BM, drawn_BM, new_B)
        counts_BM = place_1M < kept_B[:, None]
        ids_BT.scatter_(1, torch.where(counts_BM, places_BM, num_steps), drawn_BM)
        done_B = done_B + kept_B
        kept = kept_B.tolist()
        lengths = [length + kept[owner] for length, owner in zip(lengths, owners, strict=True)]
        left = [count - taken for count, taken in zip(left, kept, strict=True)]
        cache.truncate(lengths)

        # what was drawn behind the last id that counts is guessed next; behind the window its last id again
        source_BM = (kept_B[:, None] - 1 + place_1M).clamp(0, width - 1)
        fed_BM = drawn_BM.gather(1, source_BM)
        fed_BM = _with_named(fed_BM, named_BT, done_B[:, None] - 1 + place_1M)
    return ids_BT[:, :num_steps]


def _with_named(ids_BM: Int[Tensor, "B M"], named_BT: Int[Tensor, "B T"], places_BM: Int[Tensor, "B M"]) -> Tensor:
    """Ids with those that the grammar names in their places."""
    named_BM = named_BT.gather(1, places_BM.clamp(0, named_BT.shape[1] - 1))
    return torch.where(named_BM >= 0, named_BM, ids_BM)
