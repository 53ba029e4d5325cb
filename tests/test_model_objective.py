"""The CM3 objective: lossless, inside segments, and with the statistics of section 2.4 of the
specification."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.errors import ConfigError, DataError
from cm3.model.objective import Mask, ObjectiveConfig, draw_spans, mask_spans, move_spans, unmask
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(text_size=300, image_codes=256, num_sentinels=8)
EOS, BREAK, EOSS, S0 = VOCABULARY.eos_id, VOCABULARY.break_id, VOCABULARY.eoss_id, VOCABULARY.sentinel_id(0)
NO_ANSWERS = np.empty((0, 2), dtype=np.int64)
TEXT, IMAGE = 100, VOCABULARY.image_range.start + 5


def pairs(count: int, caption: int = 9, codes: int = 1024) -> np.ndarray:
    """The ids of a document of caption-image pairs."""
    ids: list[int] = []
    for _ in range(count):
        ids += [BREAK] * bool(ids) + [TEXT] * caption + [BREAK] + [IMAGE] * codes
    return np.array([EOS, *ids, EOS])


def is_boundary(ids_T: np.ndarray) -> np.ndarray:
    return ~(VOCABULARY.is_text(ids_T) | VOCABULARY.is_image(ids_T))


@st.composite
def documents(draw: st.DrawFn) -> np.ndarray:
    """Documents, or pieces of a stream of them: empty segments and cut ends included."""
    segment = st.lists(st.integers(4, 299), max_size=12) | st.lists(
        st.integers(VOCABULARY.image_range.start, VOCABULARY.image_range.stop - 1), max_size=12
    )
    ids: list[int] = draw(st.sampled_from([[], [EOS]]))
    for part in draw(st.lists(segment, max_size=6)):
        ids += [*part, draw(st.sampled_from([BREAK, EOS]))]
    return np.array(ids, dtype=np.int64)


configs = st.builds(
    ObjectiveConfig,
    span_count=st.sampled_from(["poisson", "fixed", "one"]),
    span_rate=st.floats(0, 6),
    min_spans=st.integers(0, 3),
    rotation_probability=st.sampled_from([0.0, 0.5, 1.0]),
    box_probability=st.sampled_from([0.0, 0.5]),
)


@given(documents(), configs, st.integers(0, 2**32))
def test_unmask_is_the_inverse_of_mask_for_any_document(ids_T, config, seed):
    masked = mask_spans(ids_T, VOCABULARY, config, np.random.default_rng(seed))
    np.testing.assert_array_equal(unmask(masked, VOCABULARY), ids_T)


@given(documents(), configs, st.integers(0, 2**32))
def test_spans_are_sorted_disjoint_not_empty_and_inside_one_segment(ids_T, config, seed):
    spans = draw_spans(ids_T, VOCABULARY, config, np.random.default_rng(seed))
    boundary = is_boundary(ids_T)
    for start, stop in spans:
        assert 0 <= start < stop <= len(ids_T)
        assert not boundary[start:stop].any()
    assert all(spans[1:, 0] >= spans[:-1, 1])
    assert len(spans) <= VOCABULARY.num_sentinels


@given(documents(), configs, st.integers(0, 2**32), st.integers(0, 12))
def test_no_target_is_cut_where_room_is_short(ids_T, config, seed, room):
    limit = len(ids_T) + room
    masked = mask_spans(ids_T, VOCABULARY, config, np.random.default_rng(seed), max_length=limit)
    assert len(masked) <= limit
    np.testing.assert_array_equal(unmask(masked, VOCABULARY), ids_T)


@given(documents(), configs, st.integers(0, 2**32))
def test_a_block_keeps_its_length_and_loses_only_its_end(ids_T, config, seed):
    weights_T = np.ones(len(ids_T))
    masked, _ = config.mask_block(ids_T, weights_T, VOCABULARY, np.random.default_rng(seed))
    restored = unmask(masked, VOCABULARY)
    num_spans = (masked == EOSS).sum()
    assert len(masked) == len(ids_T)
    assert len(restored) == len(ids_T) - 3 * num_spans
    np.testing.assert_array_equal(restored, ids_T[: len(restored)])


def test_rewriting_by_example():
    ids_T = np.array([EOS, 10, 11, 12, BREAK, IMAGE, IMAGE + 1, EOS])
    masked = move_spans(ids_T, np.array([[1, 3], [5, 7]]), VOCABULARY)
    expected = [EOS, S0, 12, BREAK, S0 + 1, EOS, S0, 10, 11, EOSS, S0 + 1, IMAGE, IMAGE + 1, EOSS]
    assert masked.tolist() == expected


def test_weights_move_with_their_tokens_and_sentinels_have_their_own():
    config = ObjectiveConfig(rotation_probability=1.0, sentinel_loss_weight=0.0)
    ids_T = np.array([EOS, 10, 11, EOS])
    weights_T = np.array([1.0, 0.25, 0.5, 1.0], dtype=np.float32)
    arguments = (ids_T, weights_T, VOCABULARY, np.random.default_rng(0))
    masked, weights = config.mask_document(*arguments, Mask("spans", 1), NO_ANSWERS)
    assert masked.tolist() == [EOS, S0, EOS, S0, 10, 11, EOSS]
    assert weights.tolist() == [1.0, 0.0, 1.0, 0.0, 0.25, 0.5, 1.0]
    assert weights.dtype == np.float32


@pytest.mark.parametrize(("num_pairs", "moved", "whole_image"), [(1, 0.25, 0.0), (3, 0.16, 0.15), (4, 0.14, 0.26)])
def test_statistics_of_the_first_table(num_pairs, moved, whole_image):
    """Section 2.4, first table; 2,000 documents: standard errors 0.011, 0.022, 0.005 and 0.010."""
    config = ObjectiveConfig(rotation_probability=0.0)
    rng, ids_T, rows = np.random.default_rng(0), pairs(num_pairs), 2000
    drawn = [draw_spans(ids_T, VOCABULARY, config, rng) for _ in range(rows)]
    sizes = [spans[:, 1] - spans[:, 0] for spans in drawn]
    assert np.mean([len(spans) == 0 for spans in drawn]) == pytest.approx(0.37, abs=0.03)
    assert np.mean([len(spans) for spans in drawn]) == pytest.approx(0.86, abs=0.06)
    assert np.mean([size.sum() / len(ids_T) for size in sizes]) == pytest.approx(moved, abs=0.015)
    assert np.mean([(size == 1024).any() for size in sizes]) == pytest.approx(whole_image, abs=0.03)
    whole_text = [((size == 9) & (ids_T[spans[:, 0]] == TEXT)).any() for size, spans in zip(sizes, drawn)]
    assert np.mean(whole_text) < 0.003  # without rotation a caption is as good as never masked


@pytest.mark.parametrize(("rotation", "first", "others"), [(0.5, 0.057, 0.054), (1.0, 0.116, 0.118)])
def test_statistics_of_whole_captions_in_a_stream(rotation, first, others):
    """Section 2.4, second table, `</s>` a boundary: how often a whole caption in a block is masked by itself.

    3 retrieved pairs and the query; 1,000 blocks of 4,097 ids cut anywhere: standard errors 0.01 and 0.005.
    """
    config = ObjectiveConfig(rotation_probability=rotation)
    rng, stream = np.random.default_rng(0), np.tile(pairs(4), 3)
    seen = {True: 0, False: 0}
    masked = {True: 0, False: 0}
    for begin in rng.integers(0, len(pairs(4)), 1000):
        block = stream[begin : begin + 4097]
        edges = np.flatnonzero(is_boundary(block))
        captions = edges[:-1][(np.diff(edges) == 10)] + 1
        starts = set(draw_spans(block, VOCABULARY, config, rng)[:, 0].tolist())
        for start in captions.tolist():
            is_first = bool(block[start - 1] == EOS)
            seen[is_first] += 1
            masked[is_first] += start in starts
    assert masked[True] / seen[True] == pytest.approx(first, abs=0.03)
    assert masked[False] / seen[False] == pytest.approx(others, abs=0.016)


def test_the_prefix_that_guidance_needs_occurs_at_the_expected_rate():
    """One pair, rotation 0.5: the caption is masked whole with P(one span) * 0.5 * 0.5 = 0.092."""
    config = ObjectiveConfig(rotation_probability=0.5)
    rng, ids_T = np.random.default_rng(0), pairs(1, codes=64)
    masked = [mask_spans(ids_T, VOCABULARY, config, rng) for _ in range(1500)]
    prefix = [ids[:3].tolist() == [EOS, S0, BREAK] for ids in masked]
    assert np.mean(prefix) == pytest.approx(np.exp(-1) / 4, abs=0.025)


def test_causal_leaves_documents_as_they_are():
    ids_T = pairs(1, codes=16)
    masked = mask_spans(ids_T, VOCABULARY, ObjectiveConfig(name="causal"), np.random.default_rng(0))
    np.testing.assert_array_equal(masked, ids_T)


def test_the_leading_eos_is_never_masked():
    config = ObjectiveConfig(span_count="fixed", span_rate=5.0)
    rng = np.random.default_rng(0)
    assert all(mask_spans(pairs(1, codes=4), VOCABULARY, config, rng)[0] == EOS for _ in range(50))


@pytest.mark.parametrize(
    ("fixed", "count"),
    [
        ({"span_count": "one"}, 1),
        ({"span_count": "fixed", "span_rate": 3.0}, 3),
        ({"min_spans": 2, "max_spans": 2}, 2),
    ],
)
def test_span_counts(fixed, count):
    masks = ObjectiveConfig(**fixed).draw_masks(VOCABULARY, np.random.default_rng(0), np.full(50, -1))
    assert set(masks) == {Mask("spans", count)}


def test_the_sentinels_of_the_vocabulary_limit_the_spans():
    config = ObjectiveConfig(span_count="fixed", span_rate=100.0)
    assert config.draw_masks(VOCABULARY, np.random.default_rng(0), np.array([-1])) == [Mask("spans", 8)]


@pytest.mark.parametrize("id", [S0, EOSS])
def test_a_masked_document_is_refused(id):
    with pytest.raises(DataError, match="holds sentinels"):
        mask_spans(np.array([EOS, 10, id, EOS]), VOCABULARY, ObjectiveConfig(), np.random.default_rng(0))


def test_a_document_longer_than_the_limit_is_refused():
    with pytest.raises(DataError, match="document of 15 ids was to be masked within 14"):
        mask_spans(pairs(1, codes=3), VOCABULARY, ObjectiveConfig(), np.random.default_rng(0), max_length=14)


@pytest.mark.parametrize(
    "ids",
    [
        [EOS, S0, EOS],  # the target is missing
        [EOS, S0, EOS, S0, 10],  # its end is missing
        [EOS, 10, EOS, S0, 10, EOSS],  # its place is missing
        [EOS, S0 + 1, EOS, S0 + 1, 10, EOSS],  # numbered wrongly
        [EOS, S0, EOS, S0, 10, EOSS, 11],  # something follows
        [EOS, EOSS],
    ],
)
def test_unmask_refuses_what_no_masking_makes(ids):
    with pytest.raises(DataError, match="do not form masked spans"):
        unmask(np.array(ids), VOCABULARY)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rotation_probability": 1.5}, "rotation_probability=1.5"),
        ({"min_spans": 3, "max_spans": 2}, "min_spans=3 and max_spans=2"),
        ({"span_rate": -1.0}, "span_rate=-1.0"),
        ({"retrieved_loss_weight": -0.1}, "retrieved_loss_weight=-0.1"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**wrong)


def square(side: int, caption: int = 3) -> np.ndarray:
    """The ids of a caption and an image whose codes are all different."""
    return np.array(
        [
            EOS,
            *[TEXT] * caption,
            BREAK,
            *range(VOCABULARY.image_range.start, VOCABULARY.image_range.start + side**2),
            EOS,
        ]
    )


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32))
def test_a_box_is_a_rectangle_of_codes(side, rows, seed):
    ids_T = square(side)
    spans = draw_spans(ids_T, VOCABULARY, ObjectiveConfig(), np.random.default_rng(seed), mask=Mask("box", rows))
    if rows > side:
        assert not len(spans)
        return
    top, left = np.divmod(spans[:, 0] - 5, side)
    bottom, last = np.divmod(spans[:, 1] - 1 - 5, side)
    np.testing.assert_array_equal(top, bottom)
    np.testing.assert_array_equal(top, top[0] + np.arange(rows))
    assert set(left) == {left[0]} and set(last) == {last[0]}


def test_boxes_of_every_place_and_size_occur_at_the_wanted_rate():
    config = ObjectiveConfig(box_probability=0.25, max_box_rows=3, span_count="one")
    masks = config.draw_masks(VOCABULARY, np.random.default_rng(0), np.full(20_000, -1))
    assert np.mean([mask.kind == "box" for mask in masks]) == pytest.approx(0.25, abs=0.01)
    assert set(masks) == {Mask("spans", 1), *(Mask("box", rows) for rows in (1, 2, 3))}
    rng = np.random.default_rng(1)
    boxes = {tuple(draw_spans(square(3), VOCABULARY, config, rng, mask=Mask("box", 2)).ravel()) for _ in range(500)}
    assert len(boxes) == 2 * (3 + 2 + 1)  # two tops; one, two or three columns wide


def test_without_an_image_there_is_no_box():
    ids_T = np.array([EOS, TEXT, TEXT, TEXT, TEXT, BREAK, TEXT, EOS])
    assert not len(draw_spans(ids_T, VOCABULARY, ObjectiveConfig(), np.random.default_rng(0), mask=Mask("box", 1)))


def test_a_box_that_does_not_fit_is_left_out_whole():
    ids_T = square(4)
    arguments = (ids_T, VOCABULARY, ObjectiveConfig(), np.random.default_rng(0))
    for room, added in ((9, 9), (8, 0)):
        masked = mask_spans(*arguments, mask=Mask("box", 3), max_length=len(ids_T) + room)
        assert len(masked) == len(ids_T) + added


@pytest.mark.parametrize(
    "settings, message", [({"box_probability": 1.5}, "box_probability=1.5"), ({"max_box_rows": 0}, "max_box_rows=0")]
)
def test_box_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**settings)


QUESTION = np.array([EOS, 10, 11, 12, BREAK, IMAGE, IMAGE, EOS])


def test_answers_are_masked_by_example():
    config = ObjectiveConfig(answer_probability=1.0, instruction_loss_weight=0.25)
    arguments = (QUESTION, np.ones(8), VOCABULARY, np.random.default_rng(0))
    masked, weights = config.mask_document(*arguments, Mask("answers", 1), np.array([[2, 3]]))
    assert masked.tolist() == [EOS, 10, S0, 12, BREAK, IMAGE, IMAGE, EOS, S0, 11, EOSS]
    assert weights.tolist() == [0.25] * 9 + [1, 1]  # the answer and its end count in full, the sentinels do not


def test_an_answer_at_the_end_stays_and_its_end_is_learnt_with_it():
    config = ObjectiveConfig(answer_probability=1.0, instruction_loss_weight=0.0)
    arguments = (QUESTION, np.ones(8), VOCABULARY, np.random.default_rng(0))
    masked, weights = config.mask_document(*arguments, Mask("answers", 0), np.array([[5, 7]]))
    assert masked.tolist() == QUESTION.tolist()
    assert weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_spans_at_random_weigh_instructions_too():
    config = ObjectiveConfig(rotation_probability=1.0, instruction_loss_weight=0.5)
    arguments = (QUESTION, np.ones(8), VOCABULARY, np.random.default_rng(1))
    masked, weights = config.mask_document(*arguments, Mask("spans", 1), np.array([[5, 7]]))
    np.testing.assert_array_equal(unmask(masked, VOCABULARY), QUESTION)
    assert weights[masked == IMAGE].tolist() == [1, 1] and set(weights[np.isin(masked, (10, 11, 12, S0))]) == {0.5}


def test_answers_are_drawn_for_instructions_alone_and_at_their_rate():
    config = ObjectiveConfig(answer_probability=0.25, span_count="one")
    numbers = np.tile([-1, 0, 2, 9], 5000)
    masks = config.draw_masks(VOCABULARY, np.random.default_rng(0), numbers)
    drawn = [{mask for mask, number in zip(masks, numbers, strict=True) if number == n} for n in (-1, 0, 2, 9)]
    ordinary = Mask("spans", 1)
    assert drawn == [{ordinary}, *({ordinary, Mask("answers", count)} for count in (0, 2, 0))]  # there are 8 sentinels
    assert np.mean([mask.kind == "answers" for mask in masks[1::4]]) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("mask", "room", "left"), [("spans", 2, 2), ("box", 2, 2), ("answers", 2, 0), ("answers", 3, 3), ("spans", 5, 3)]
)
def test_what_a_mask_leaves_where_room_is_short(mask, room, left):
    assert Mask(mask, 3).within(room) == Mask(mask, left)
