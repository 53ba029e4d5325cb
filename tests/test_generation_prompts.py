"""Prompts: every one, with what its grammar lets through, is a row as the training objective makes it."""

import numpy as np
import pytest

from cm3.errors import RequestError
from cm3.generation.grammar import Span, infill
from cm3.generation.prompts import Prompts
from cm3.model.objective import move_spans
from cm3.tokenizers.document import ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.document_ids import document_to_ids
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(30, 16, num_sentinels=6, multiple=8)
GRID = (3, 4)
PROMPTS = Prompts(VOCABULARY, GRID)
CAPTION = [5, 6, 7, 8]
CODES = np.arange(12).reshape(GRID)
IDS = document_to_ids(
    TokenizedDocument((TextTokens(np.array(CAPTION)), ImageCodes(CODES.astype(np.uint16)))), VOCABULARY
)
FIRST_CODE = 2 + len(CAPTION)
BOX = np.zeros(GRID, dtype=bool)
BOX[1:3, 1:3] = True


def training_row(*spans):
    return move_spans(IDS, np.array(spans, dtype=np.int64).reshape(-1, 2), VOCABULARY).tolist()


def starts(row, prompt):
    return row[: len(prompt)] == list(prompt)


def test_text_to_image_prompts_begin_training_rows():
    request = PROMPTS.text_to_image(CAPTION, seeds=(3, 4))
    assert starts(training_row(), request.prompt_ids) and len(request.prompt_ids) == FIRST_CODE
    assert starts(training_row((1, 5)), request.unconditional_ids) and len(request.unconditional_ids) == 3
    assert request.max_new_tokens == 12 and request.seeds == (3, 4)
    assert PROMPTS.text_to_image(None).prompt_ids == request.unconditional_ids


def test_retrieved_documents_come_first_as_in_training():
    """`E T1 B I1 B T2 B I2 B text B`: the beginning of one document made of all their segments."""
    texts = [TextTokens(np.array(tokens)) for tokens in ([9, 8], [7], CAPTION)]
    images = [ImageCodes((CODES + shift).astype(np.uint16)) for shift in (1, 2, 0)]
    segments = [segment for pair in zip(texts, images) for segment in pair]
    row = document_to_ids(TokenizedDocument(tuple(segments)), VOCABULARY).tolist()
    context = [TokenizedDocument(tuple(segments[:2])), TokenizedDocument(tuple(segments[2:4]))]

    request = PROMPTS.text_to_image(CAPTION, context=context)
    assert request.prompt_ids == tuple(row[:-13])
    docs = request.prompt_ids[1 : -len(CAPTION) - 1]
    eos, masked, end = VOCABULARY.eos_id, VOCABULARY.sentinel_id(0), VOCABULARY.break_id
    assert request.unconditional_ids == (eos, *docs, masked, end)
    dropped = PROMPTS.text_to_image(CAPTION, context=context, unconditional_context="drop")
    assert dropped.prompt_ids == request.prompt_ids and dropped.unconditional_ids == (eos, masked, end)
    assert PROMPTS.text_to_image(None, context=context).prompt_ids == request.unconditional_ids

    first, stop = 1 + len(docs), 1 + len(docs) + len(CAPTION)
    moved = move_spans(np.array(row), np.array([[first + 1, stop]]), VOCABULARY).tolist()
    captioned = PROMPTS.infill_text(CAPTION[:1], [], CODES, context=context, max_new_tokens=9)
    assert starts(moved, captioned.prompt_ids) and moved[len(captioned.prompt_ids) :][:3] == CAPTION[1:]


def test_a_negative_prompt_takes_the_place_of_the_masked_caption():
    eos, end = VOCABULARY.eos_id, VOCABULARY.break_id
    request = PROMPTS.text_to_image(CAPTION, negative=[9])
    assert request.unconditional_ids == (eos, 9, end)
    assert request.prompt_ids == PROMPTS.text_to_image(CAPTION).prompt_ids
    document = TokenizedDocument((TextTokens(np.array([7])),))
    assert PROMPTS.text_to_image(CAPTION, negative=[9], context=[document]).unconditional_ids == (eos, 7, end, 9, end)
    filled = PROMPTS.infill_image(CODES, BOX, CAPTION, negative=[9])
    assert filled.unconditional_ids == (eos, 9, *filled.prompt_ids[1 + len(CAPTION) :])


def test_retrieved_pictures_of_another_grid_are_refused():
    document = TokenizedDocument((ImageCodes(CODES.T.astype(np.uint16)),))
    with pytest.raises(RequestError, match="an image has 4x3 codes, this model's images have 3x4"):
        PROMPTS.text_to_image(CAPTION, context=[document])


def test_caption_and_text_infill_prompts_begin_training_rows():
    for start, stop in [(1, 5), (1, 3), (2, 4), (4, 5)]:
        before, after = CAPTION[: start - 1], CAPTION[stop - 1 :]
        request = PROMPTS.infill_text(before, after, CODES, max_new_tokens=9)
        row = training_row((start, stop))
        assert starts(row, request.prompt_ids)
        assert row[len(request.prompt_ids) :] == [*CAPTION[start - 1 : stop - 1], VOCABULARY.eoss_id]
    eos, sentinel = VOCABULARY.eos_id, VOCABULARY.sentinel_id(0)
    assert PROMPTS.infill_text([5], [6], max_new_tokens=9).prompt_ids == (eos, 5, sentinel, 6, eos, sentinel)


def test_region_prompts_begin_training_rows_with_one_span_for_each_row_of_a_box():
    request = PROMPTS.infill_image(CODES, BOX, CAPTION)
    runs = [(5, 7), (9, 11)]
    row = training_row(*[(FIRST_CODE + start, FIRST_CODE + stop) for start, stop in runs])
    assert starts(row, request.prompt_ids)
    target = row[len(request.prompt_ids) :]
    assert len(target) == request.max_new_tokens
    moved = [Span(VOCABULARY.sentinel_id(i), stop - start) for i, (start, stop) in enumerate(runs)]
    assert request.grammar == infill(moved, VOCABULARY.eoss_id)
    assert np.array_equal(PROMPTS.filled(CODES, BOX, np.array(target)), CODES)
    other = np.where(VOCABULARY.is_image(np.array(target)), VOCABULARY.codes_to_ids(15), target)
    changed = PROMPTS.filled(CODES, BOX, other)
    assert (changed[BOX] == 15).all() and (changed[~BOX] == CODES[~BOX]).all()


def test_the_guidance_row_of_a_region_masks_the_caption_under_another_sentinel():
    request = PROMPTS.infill_image(CODES, BOX, CAPTION)
    shared = request.prompt_ids[1 + len(CAPTION) :]
    assert request.unconditional_ids == (VOCABULARY.eos_id, VOCABULARY.sentinel_id(2), *shared)
    assert PROMPTS.infill_image(CODES, BOX, None).prompt_ids == request.unconditional_ids


def test_whole_rows_of_a_box_are_one_run():
    mask = np.zeros(GRID, dtype=bool)
    mask[:2] = True
    request = PROMPTS.infill_image(CODES, mask, CAPTION)
    assert request.max_new_tokens == 8 + 1
    assert request.grammar == infill([Span(VOCABULARY.sentinel_id(0), 8)], VOCABULARY.eoss_id)


def test_completion_prompts_are_open_documents():
    segments = [TextTokens(np.array([5])), ImageCodes(CODES.astype(np.uint16)), TextTokens(np.array([6, 7]))]
    for count in range(1, 4):
        request = PROMPTS.complete(segments[:count], max_new_tokens=20)
        document = TokenizedDocument(tuple(segments[:count]))
        assert list(request.prompt_ids) == document_to_ids(document, VOCABULARY)[:-1].tolist()
    assert PROMPTS.complete([], max_new_tokens=20).prompt_ids == (VOCABULARY.eos_id,)


def test_reading_results():
    assert np.array_equal(PROMPTS.image_codes(VOCABULARY.codes_to_ids(CODES.ravel())), CODES)
    assert PROMPTS.text_tokens(np.array([9, 8, VOCABULARY.eoss_id])) == [9, 8]


def test_unusable_masks_and_images_are_refused():
    with pytest.raises(RequestError, match="mask at least one"):
        PROMPTS.infill_image(CODES, np.zeros(GRID, dtype=bool), CAPTION)
    stripes = np.indices(GRID)[1] % 2 == 0
    with pytest.raises(RequestError, match="6 sentinels; choose a simpler mask"):
        PROMPTS.infill_image(CODES, stripes, CAPTION)
    with pytest.raises(RequestError, match="an image has 4x3 codes, this model's images have 3x4"):
        PROMPTS.infill_text([], [], CODES.T, max_new_tokens=4)
