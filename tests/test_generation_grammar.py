"""The grammar: whatever is drawn, every stream parses, in its budget, and rows do not touch each other."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.generation import grammar
from cm3.generation.grammar import END, After, GrammarTables, Kind, Span, id_kinds
from cm3.model.objective import unmask
from cm3.tokenizers.document import ImageCodes, TextTokens
from cm3.tokenizers.document_ids import document_from_ids
from cm3.tokenizers.layout import Layout
from cm3.tokenizers.vocabulary import IdRange, Vocabulary

VOCABULARY = Vocabulary.build(20, 8, num_sentinels=6, multiple=8)
GRID = (2, 3)
CODES = 6
EOS, BREAK, EOSS = VOCABULARY.eos_id, VOCABULARY.break_id, VOCABULARY.eoss_id
TEXT, IMAGE = 7, VOCABULARY.image_range.start
CPU = torch.device("cpu")
FRAMED = Vocabulary(
    (IdRange("s", "special", 0, 7), IdRange("i", "image", 7, 8), IdRange("t", "text", 15, 9)),
    {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<begin>": 4, "<end>": 5, "<turn>": 6},
    Layout(start="<s>", between=None, image_start="<begin>", image_end="<end>", turn_end="<turn>"),
)


def walk(grammars, budgets, rng, vocabulary=VOCABULARY):
    """New ids of rows that take any allowed id; kinds are equally likely, so that rare paths are taken."""
    tables = GrammarTables(grammars, vocabulary, CPU)
    state, left = torch.tensor(tables.starts), torch.tensor(budgets)
    taken = torch.zeros_like(state)
    streams = [[] for _ in grammars]
    while (state != END).any():
        allowed, literal = tables.allowed(state, left), tables.literal(state)
        only_images = tables.image_steps(state.tolist(), taken.tolist()) > 0
        ids = []
        for row, choices in enumerate(allowed):
            if literal[row] >= 0:
                ids.append(int(literal[row]))
                continue
            choices = choices.nonzero().flatten()
            kind = rng.choice(sorted(set(tables.kind_V[choices].tolist())))
            ids.append(int(rng.choice(choices[tables.kind_V[choices] == kind].numpy())))
            assert not only_images or kind == Kind.IMAGE
        for row, stream in enumerate(streams):
            if state[row] != END:
                stream.append(ids[row])
                left[row] -= 1
        state, taken = tables.advance(state, taken, torch.tensor(ids))
    assert (left >= 0).all()
    return streams


def sentinel(index):
    return VOCABULARY.sentinel_id(index)


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(2, 30))
def test_rows_of_every_kind_share_a_batch_and_parse(seed, budget):
    spans = [Span(sentinel(0), None), Span(sentinel(1), 2), Span(sentinel(2), None), Span(sentinel(3), 3)]
    rows = {
        "image": (grammar.image(CODES), CODES),
        "spans": (grammar.infill(spans, EOSS), 14 + budget),
        "caption": (grammar.infill(spans[:1], EOSS), budget),
        "document": (grammar.interleaved(CODES, After.BREAK), budget),
        "after text": (grammar.interleaved(CODES, After.TEXT), budget),
        "after image": (grammar.interleaved(CODES, After.IMAGE), budget),
    }
    programs, budgets = zip(*rows.values())
    streams = walk(programs, budgets, np.random.default_rng(seed))
    image, moved, caption, *documents = streams

    assert document_from_ids([EOS, TEXT, BREAK, *image, EOS], VOCABULARY, GRID)
    assert all(VOCABULARY.is_text(id) for id in caption[:-1]) and caption[-1] == EOSS and len(caption) >= 2
    source = [
        EOS,
        sentinel(0),
        BREAK,
        IMAGE,
        sentinel(1),
        EOS,
        sentinel(2),
        BREAK,
        sentinel(3),
        EOS,
        sentinel(0),
    ]
    whole = unmask(np.array(source + moved), VOCABULARY)
    assert VOCABULARY.is_image(whole).sum() == 1 + 2 + 3
    pixels = [IMAGE] * CODES
    for prompt, stream in zip(([EOS], [EOS, TEXT], [EOS, *pixels]), documents):
        document = document_from_ids(prompt + stream, VOCABULARY, GRID)
        sizes = [len(part.tokens) for part in document.segments if isinstance(part, TextTokens)]
        assert all(sizes)


def test_interleaved_documents_reach_both_kinds_of_segment():
    rows = [grammar.interleaved(CODES, After.BREAK)] * 20
    streams = walk(rows, [60] * 20, np.random.default_rng(0))
    kinds = {type(part) for ids in streams for part in document_from_ids([EOS, *ids], VOCABULARY, GRID).segments}
    assert kinds == {TextTokens, ImageCodes}
    assert all(len(ids) <= 60 for ids in streams)


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from(list(After)))
def test_documents_of_framed_images_parse(seed, budget, after):
    prompt = {After.BREAK: [0], After.TEXT: [0, 15], After.IMAGE: [0, 4, *[7] * CODES, 5]}[after]
    rows = [grammar.interleaved(CODES, after, FRAMED.layout, images=images) for images in (True, False)]
    streams = walk(rows, [budget] * 2, np.random.default_rng(seed), FRAMED)
    for stream in streams:
        assert stream[-1] == 2 and document_from_ids(prompt + stream, FRAMED, GRID)
    assert FRAMED.is_text(np.array(streams[1][:-1])).all()


def test_framed_images_come_where_they_fit():
    streams = walk(
        [grammar.interleaved(CODES, After.BREAK, FRAMED.layout)] * 20, [40] * 20, np.random.default_rng(0), FRAMED
    )
    documents = [document_from_ids([0, *ids], FRAMED, GRID) for ids in streams]
    assert max(sum(isinstance(part, ImageCodes) for part in document.segments) for document in documents) >= 2
    tables = GrammarTables([grammar.interleaved(CODES, After.BREAK, FRAMED.layout)], FRAMED, CPU)
    for left, fits in ((1 + CODES + 1 + 1, True), (1 + CODES + 1, False)):
        allowed = tables.allowed(torch.tensor(tables.starts), torch.tensor([left]))[0]
        assert allowed.nonzero().flatten().tolist() == [2, *([4] if fits else []), *range(15, 24)]


def test_without_images_only_text_comes():
    streams = walk([grammar.interleaved(CODES, After.BREAK, images=False)] * 5, [30] * 5, np.random.default_rng(0))
    parts = [part for ids in streams for part in document_from_ids([EOS, *ids], VOCABULARY, GRID).segments]
    assert len(parts) > 5 and {type(part) for part in parts} == {TextTokens}


def test_an_image_begins_only_if_all_of_it_fits():
    tables = GrammarTables([grammar.interleaved(CODES, After.BREAK)], VOCABULARY, CPU)
    state = torch.tensor(tables.starts)
    for left, image_fits in ((CODES + 1, True), (CODES, False)):
        assert tables.allowed(state, torch.tensor([left]))[0, IMAGE].item() is image_fits
    assert tables.allowed(state, torch.tensor([2]))[0, TEXT]


def test_one_code_images():
    streams = walk([grammar.image(1), grammar.interleaved(1, After.IMAGE)], [1, 9], np.random.default_rng(1))
    assert len(streams[0]) == 1
    assert document_from_ids([EOS, IMAGE, *streams[1]], VOCABULARY, (1, 1))


def test_image_steps_are_known_as_far_as_no_row_can_choose():
    spans = [Span(sentinel(0), 4), Span(sentinel(1), 2), Span(sentinel(2), None)]
    tables = GrammarTables(
        [grammar.infill(spans, EOSS), grammar.image(CODES), grammar.interleaved(CODES, After.TEXT)],
        VOCABULARY,
        CPU,
    )
    infill, image, text = tables.starts
    assert tables.image_steps([infill], [0]) == 4 + 2 + 2 + 2
    assert tables.image_steps([infill, image], [1, 5]) == 4 + 2 + 2 + 2 - 1
    assert tables.image_steps([infill, text], [0, 0]) == 0
    assert tables.image_steps([image, END], [0, 0]) > 1000


def test_fewest_ids():
    spans = [Span(sentinel(0), 3), Span(sentinel(1), None)]
    for program, fewest in [
        (grammar.image(CODES), CODES),
        (grammar.infill(spans, EOSS), 4 + 1 + 2),
        (grammar.interleaved(CODES, After.BREAK), 2),
        (grammar.interleaved(CODES, After.IMAGE), 1),
    ]:
        assert program.fewest_ids()[program.start] == fewest


def test_kinds_leave_out_special_ids_among_the_text_and_follow_any_table():
    kinds = id_kinds(VOCABULARY)
    assert [Kind(kind).name for kind in kinds[:5].tolist()] == ["OTHER", "OTHER", "EOS", "OTHER", "TEXT"]
    assert kinds[sentinel(0)] == Kind.OTHER
    ranges = (IdRange("a", "text", 0, 4), IdRange("i", "image", 4, 3), IdRange("b", "text", 7, 5))
    special = IdRange("s", "special", 12, 3)
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<break>": 12, "<eoss>": 13, "<sentinel:0>": 14}
    kinds = id_kinds(Vocabulary((*ranges, special), names))
    assert kinds.tolist() == [5, 5, 3, 5, 1, 1, 1, 0, 0, 0, 0, 0, 2, 4, 5]
    assert id_kinds(FRAMED).tolist() == [5, 5, 3, 5, 6, 7, 5, *[1] * 8, *[0] * 9]
