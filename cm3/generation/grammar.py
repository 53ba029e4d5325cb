"""What may come next: a finite-state machine over kinds of ids, run as tensors on the device.

A `Grammar` is a small program of states, built on the host by one of the functions below; every stream it
lets through parses as a document in the layout of the vocabulary (`cm3.tokenizers.layout`) or as the moved spans of one
(CM3, section 2). `GrammarTables` joins the programs of a batch into one transition table, so that rows in different
modalities share a step. Letters added: X states, Z kinds of ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cm3.tokenizers.layout import CM3_LAYOUT, Layout, Place
from cm3.tokenizers.vocabulary import Vocabulary


class Kind(IntEnum):
    """What an id is to the grammar; OTHER ids come only where a state names them."""

    TEXT = 0
    IMAGE = 1
    BREAK = 2
    EOS = 3
    EOSS = 4
    OTHER = 5
    IMAGE_START = 6
    IMAGE_END = 7


_KIND_OF_PLACE: dict[Place, Kind] = {
    "between": Kind.BREAK,
    "image_start": Kind.IMAGE_START,
    "image_end": Kind.IMAGE_END,
    "end": Kind.EOS,
}

END = 0
"""The state after the last id; a row that has ended stays there and takes `<pad>`."""

_UNREACHABLE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class State:
    """Where the next id is chosen."""

    moves: tuple[tuple[Kind, int], ...]
    """Each kind of id that may come, with the state that follows it."""
    count: int = 1
    """Number of ids taken in this state before it is left; more than 1 only where a single kind may come."""
    literal: int | None = None
    """The only id that may come, if there is only one; its kind is then that of the single move."""


@dataclass(frozen=True)
class Grammar:
    """The program of one row: states, of which number `END` is the end, and the one to start in."""

    states: tuple[State, ...]
    start: int

    def fewest_ids(self) -> list[int]:
        """For each state the fewest ids that lead from it to the end."""
        fewest = [0] + [_UNREACHABLE] * (len(self.states) - 1)
        while True:
            before = fewest.copy()
            for index, state in enumerate(self.states[1:], start=1):
                fewest[index] = state.count + min(fewest[following] for _, following in state.moves)
            if fewest == before:
                return fewest

    def image_runs(self) -> list[int]:
        """For each state how many ids surely follow that are image codes or named by the grammar.

        `_UNREACHABLE` or more where that holds up to the end.
        """
        runs = [_UNREACHABLE] + [0] * (len(self.states) - 1)
        while True:
            before = runs.copy()
            for index, state in enumerate(self.states[1:], start=1):
                kind, following = state.moves[0]
                if state.literal is not None or (kind == Kind.IMAGE and len(state.moves) == 1):
                    runs[index] = state.count + runs[following]
            if runs == before:
                return runs


class _Program:
    """Collects the states of a grammar, mostly last first, so that those a state leads to have numbers."""

    def __init__(self) -> None:
        self.states = [State(moves=((Kind.OTHER, END),))]

    def add(self, moves: Mapping[Kind, int], count: int = 1, literal: int | None = None) -> int:
        self.states.append(State(moves=tuple(moves.items()), count=count, literal=literal))
        return len(self.states) - 1

    def add_text(self, stop: Kind, following: int) -> int:
        """At least one text id, then the `stop` id."""
        more = len(self.states)
        self.add({Kind.TEXT: more, stop: following})
        return self.add({Kind.TEXT: more})

    def starting_at(self, start: int) -> Grammar:
        return Grammar(tuple(self.states), start)


def image(codes_per_image: int) -> Grammar:
    """Exactly one image, for a prompt that ends in `<break>`."""
    program = _Program()
    return program.starting_at(program.add({Kind.IMAGE: END}, count=codes_per_image))


@dataclass(frozen=True)
class Span:
    """A masked span that is to be generated."""

    sentinel_id: int
    """The sentinel that stands in its place."""
    num_codes: int | None
    """Number of image codes, or None for a span of text."""


def infill(spans: Sequence[Span], eoss_id: int) -> Grammar:
    """The moved spans of a masked document: `span <eoss>`, and before every one but the first its sentinel.

    For a prompt that ends in the first span's sentinel. Image spans have exactly their number of codes; a
    text span has at least one id, for training never moves an empty span.
    """
    program = _Program()
    following = END
    for index in reversed(range(len(spans))):
        span = spans[index]
        if span.num_codes is None:
            following = program.add_text(Kind.EOSS, following)
        else:
            following = program.add({Kind.EOSS: following}, literal=eoss_id)
            following = program.add({Kind.IMAGE: following}, count=span.num_codes)
        if index > 0:
            following = program.add({Kind.OTHER: following}, literal=span.sentinel_id)
    return program.starting_at(following)


class After(IntEnum):
    """What the prompt of an interleaved completion ends in."""

    BREAK = 0
    """`<break>`, or the id that opens the document: a segment must begin."""
    TEXT = 1
    """A text id: the text may go on."""
    IMAGE = 2
    """The last code of an image, with its frame where the layout has one."""


def interleaved(codes_per_image: int, after: After, layout: Layout = CM3_LAYOUT, *, images: bool = True) -> Grammar:
    """Text and images in any order, to the end of the document.

    With `<break>` between segments no segment is empty. Where nothing parts them, the document may end at once.

    Args:
        codes_per_image: Codes of an image.
        after: What the prompt ends in.
        layout: How documents are written.
        images: Whether images may come, too.
    """
    program = _Program()
    if layout.between is None:
        text, codes, closing = range(1, 4)
        begin_image = {Kind.IMAGE_START: codes} if images else {}
        program.add({Kind.TEXT: text, **begin_image, Kind.EOS: END})
        program.add({Kind.IMAGE: closing}, count=codes_per_image)
        program.add({Kind.IMAGE_END: text})
        return program.starting_at(text)
    segment, text, rest, closed = range(1, 5)
    image_state = closed if codes_per_image == 1 else rest
    program.add({Kind.TEXT: text, Kind.IMAGE: image_state} if images else {Kind.TEXT: text})
    program.add({Kind.TEXT: text, Kind.BREAK: segment, Kind.EOS: END})
    program.add({Kind.IMAGE: closed}, count=codes_per_image - 1)
    program.add({Kind.BREAK: segment, Kind.EOS: END})
    return program.starting_at({After.BREAK: segment, After.TEXT: text, After.IMAGE: closed}[after])


def id_kinds(vocabulary: Vocabulary) -> Int[Tensor, " V"]:
    """The kind of every id of the vocabulary."""
    ids_V = torch.arange(vocabulary.size)
    kind_V = torch.full_like(ids_V, Kind.OTHER)
    kind_V[vocabulary.is_text(ids_V)] = Kind.TEXT
    kind_V[vocabulary.is_image(ids_V)] = Kind.IMAGE
    if vocabulary.num_sentinels:
        kind_V[vocabulary.eoss_id] = Kind.EOSS
    for place, kind in _KIND_OF_PLACE.items():
        for id in vocabulary.mark(place):
            kind_V[id] = kind
    return kind_V


class GrammarTables:
    """The grammars of the rows of a batch as one set of tables, and the step from one state to the next.

    A row's place is (state, ids taken in that state, ids left in its budget). An id is allowed only if the
    budget then still suffices to reach the end, so that a row never stops inside a segment.
    """

    def __init__(self, grammars: Sequence[Grammar], vocabulary: Vocabulary, device: torch.device) -> None:
        states = [State(moves=((Kind.OTHER, END),), literal=vocabulary.pad_id)]
        fewest = [0]
        self._image_runs = [_UNREACHABLE]
        offsets: dict[Grammar, int] = {}
        for grammar in grammars:
            if grammar in offsets:
                continue
            offset = offsets[grammar] = len(states) - 1
            fewest += grammar.fewest_ids()[1:]
            self._image_runs += grammar.image_runs()[1:]
            for state in grammar.states[1:]:
                moves = tuple((kind, target and target + offset) for kind, target in state.moves)
                states.append(State(moves=moves, count=state.count, literal=state.literal))
        self.starts = [grammar.start and grammar.start + offsets[grammar] for grammar in grammars]

        shape = (len(states), len(Kind))
        next_XZ = torch.zeros(shape, dtype=torch.long)
        need_XZ = torch.full(shape, _UNREACHABLE)
        for index, state in enumerate(states):
            for kind, target in state.moves:
                next_XZ[index, kind] = target
                need_XZ[index, kind] = fewest[target] if state.count == 1 else 0
        self.next_XZ = next_XZ.to(device)
        self.need_XZ = need_XZ.to(device)
        self.count_X = torch.tensor([state.count for state in states], device=device)
        literals = [-1 if state.literal is None else state.literal for state in states]
        self.literal_X = torch.tensor(literals, device=device)
        self.kind_V = id_kinds(vocabulary).to(device)
        self.text_V = self.kind_V == int(Kind.TEXT)

    def allowed(self, state_B: Int[Tensor, " B"], left_B: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        """True for the ids that may come, as far as their kind and the budget go; see also `literal`."""
        allowed_BZ = self.need_XZ[state_B] < left_B[:, None]
        return allowed_BZ[:, self.kind_V]

    def literal(self, state_B: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The id that must come, or -1 where there is a choice."""
        return self.literal_X[state_B]

    def advance(
        self, state_B: Int[Tensor, " B"], taken_B: Int[Tensor, " B"], ids_B: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """State and ids taken in it after `ids_B`, which must be allowed."""
        taken_B = taken_B + 1
        stays_B = taken_B < self.count_X[state_B]
        state_B = torch.where(stays_B, state_B, self.next_XZ[state_B, self.kind_V[ids_B]])
        return state_B, torch.where(stays_B, taken_B, 0)

    def image_steps(self, states: Sequence[int], taken: Sequence[int]) -> int:
        """For how many steps no row can choose among anything but image ids; 0 if one can now."""
        return min(self._image_runs[state] - count for state, count in zip(states, taken, strict=True))
