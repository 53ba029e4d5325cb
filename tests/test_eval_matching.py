"""Which original a drawn picture is nearest to, and the captions that are rivals of another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cm3.errors import ConfigError
from cm3.eval.matching import OwnRank, chance_of_recall, draw_rivals, nearer_than_others, own_ranks, recall, thumbnail


def gray(level, size=8):
    return Image.new("RGB", (size, size), (level, level, level))


def test_a_thumbnail_is_the_mean_of_its_boxes():
    picture = Image.new("RGB", (4, 4), (0, 0, 0))
    picture.paste((200, 100, 40), (2, 0, 4, 2))
    expected = np.zeros((2, 2, 3))
    expected[0, 1] = (200, 100, 40)
    assert np.array_equal(thumbnail(picture, 2), expected.ravel())


def test_ranks_by_hand():
    originals = [gray(level) for level in (0, 100, 200, 240)]
    drawn = {0: gray(10), 1: gray(180), 3: gray(220)}
    ranks = own_ranks(drawn, originals, ["all"] * 4, 2)
    assert ranks[0] == OwnRank(0, 3)  # 10 is nearest to 0
    assert ranks[1] == OwnRank(2, 3)  # 180: 200 and 240 are nearer than 100
    assert ranks[3] == OwnRank(0.5, 3)  # 220 lies between 200 and 240
    figures = list(ranks.values())
    assert nearer_than_others(figures).value == pytest.approx((1 + 1 / 3 + 2.5 / 3) / 3)
    assert recall(figures, 1).value == pytest.approx(2 / 3)
    assert recall(figures, 3).value == 1
    assert chance_of_recall(figures, 1) == 0.25 and chance_of_recall(figures, 10) == 1


def test_rivals_are_of_the_same_group():
    originals = [gray(level) for level in (0, 100, 200, 240)]
    assert own_ranks({1: gray(180)}, originals, "abab", 2)[1] == OwnRank(1, 1)
    assert own_ranks({1: gray(180)}, originals, "aabb", 2)[1] == OwnRank(0, 1)
    with pytest.raises(ConfigError, match="group 'b' has one picture"):
        own_ranks({1: gray(180)}, originals, "abaa", 2)


def test_one_picture_for_all_captions_is_at_chance():
    rng = np.random.default_rng(0)
    originals = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(12)]
    ranks = list(own_ranks(dict.fromkeys(range(12), originals[3]), originals, ["all"] * 12, 4).values())
    assert nearer_than_others(ranks).value == pytest.approx(0.5)
    assert recall(ranks, 3).value == pytest.approx(chance_of_recall(ranks, 3)) == 0.25


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12), st.integers(0, 9))
def test_rivals_have_other_captions_and_the_same_group(pairs, seed):
    captions, groups = [str(text) for text, _ in pairs], [group for _, group in pairs]
    enough = all(
        sum(group == other and text != word for word, other in zip(captions, groups)) >= 2
        for text, group in zip(captions, groups)
    )
    if not enough:
        with pytest.raises(ConfigError, match="2 rivals are asked for; take larger groups or fewer rivals"):
            draw_rivals(captions, groups, 2, seed)
        return
    rivals_NR = draw_rivals(captions, groups, 2, seed)
    assert rivals_NR.shape == (len(pairs), 2) and np.array_equal(rivals_NR, draw_rivals(captions, groups, 2, seed))
    for number, (first, second) in enumerate(rivals_NR.tolist()):
        assert first != second
        for rival in (first, second):
            assert captions[rival] != captions[number] and groups[rival] == groups[number]
