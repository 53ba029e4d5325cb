"""Written words: large, in the middle, in the colours asked for, and in disjoint splits."""

from itertools import combinations, product

import numpy as np
import pytest

from cm3.data.scene_letters import (
    GLYPHS,
    Writing,
    draw_writing,
    letter_corners,
    sample_writing,
    split_of_word,
    word_mask,
    writing_request,
)
from cm3.data.scene_world import BACKGROUNDS, COLORS
from cm3.errors import DataError


def test_letters_differ_in_several_cells():
    cells = {letter: np.array([list(row) for row in rows]) for letter, rows in GLYPHS.items()}
    assert all(rows.shape == (7, 5) for rows in cells.values())
    assert min((cells[a] != cells[b]).sum() for a, b in combinations(GLYPHS, 2)) >= 4


@pytest.mark.parametrize("word, width, height", [("X", 35, 49), ("NO", 55, 35), ("HAT", 51, 21)])
def test_words_are_large_and_in_the_middle(word, width, height):
    rows, columns = np.nonzero(word_mask(word))
    assert columns.max() - columns.min() + 1 == width and rows.max() - rows.min() + 1 == height
    assert abs(columns.min() - (63 - columns.max())) <= 1 and abs(rows.min() - (63 - rows.max())) <= 1
    left, top = letter_corners(len(word))[0]
    assert (columns.min(), rows.min()) == (left, top)


def test_a_word_by_hand():
    mask = word_mask("L")
    assert mask[7:56, 14:21].all() and mask[49:56, 14:49].all() and mask.sum() == 49 * 7 + 7 * 28
    pixels = np.asarray(draw_writing(Writing("L", "red", "navy")))
    assert (pixels[mask] == COLORS["red"]).all() and (pixels[~mask] == BACKGROUNDS["navy"]).all()


def test_splits_share_no_word():
    words = {
        split: {sample_writing(np.random.default_rng((1, i)), split).word for i in range(60)}
        for split in ("train", "validation", "test", "novel")
    }
    for split, found in words.items():
        assert len(found) > 20 and all(split_of_word(word) == split and 1 <= len(word) <= 3 for word in found)
    known = ["".join(letters) for n in (1, 2, 3) for letters in product(GLYPHS, repeat=n)]
    parts = [split_of_word(word) for word in known]
    assert 0.8 < parts.count("train") / len(known) < 0.9
    assert parts[: len(GLYPHS)] == ["train"] * len(GLYPHS)  # the single letters
    with pytest.raises(DataError, match="split 'dev' of the words does not exist; choose one of train"):
        sample_writing(np.random.default_rng(0), "dev")


def test_requests_state_word_colour_and_background():
    writing = Writing("CAT", "red", "white")
    requests = {writing_request(writing, np.random.default_rng(seed)) for seed in range(120)}
    assert len(requests) >= 6 and 'draw "CAT" in red on a white background' in requests
    assert all('"CAT"' in text and " in red" in text and " white" in text.lower() for text in requests)
