"""Documents: to ids and back without loss, errors that name the place, pictures through a real VQ-GAN."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from cm3.errors import DataError, ModelFilesError
from cm3.tokenizers.document import Document, DocumentTokenizer, Image, ImageCodes, Text, TextTokens, TokenizedDocument
from cm3.tokenizers.document_ids import document_from_ids, document_to_ids, segment_places
from cm3.tokenizers.image import ImageTokenizer
from cm3.tokenizers.layout import Layout
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3.tokenizers.vocabulary import TEXT_SPECIALS, IdRange, Vocabulary
from cm3.tokenizers.vqgan import VQGAN, VQGANConfig

GRID = (2, 3)
NUM_CODES = 16
TEXT_SIZE = 300
OURS = Vocabulary.build(TEXT_SIZE, NUM_CODES, num_sentinels=4)
IMAGES_FIRST = Vocabulary(
    (
        IdRange("text_specials", "text", 0, 4),
        IdRange("image", "image", 4, NUM_CODES),
        IdRange("marks", "special", 20, 3),
        IdRange("text", "text", 23, TEXT_SIZE - 4),
    ),
    {name: id for id, name in enumerate(TEXT_SPECIALS)} | {"<eoss>": 20, "<break>": 21, "<sentinel:0>": 22},
)
FRAMED = Vocabulary(
    IMAGES_FIRST.ranges,
    {name: id for id, name in enumerate(TEXT_SPECIALS)} | {"<end>": 20, "<begin>": 21},
    Layout(start="<s>", between=None, image_start="<begin>", image_end="<end>"),
)
"""Documents as Chameleon's: images are framed and nothing else parts the segments."""
CODES = list(range(4, 10))
any_vocabulary = pytest.mark.parametrize("vocabulary", [OURS, IMAGES_FIRST], ids=["ours", "images first"])


def tokens(*pieces: int) -> TextTokens:
    return TextTokens(np.array(pieces, dtype=np.int32))


def codes(*rows: Sequence[int]) -> ImageCodes:
    return ImageCodes(np.array(rows, dtype=np.uint16))


text_pieces = st.lists(st.integers(len(TEXT_SPECIALS), TEXT_SIZE - 1), max_size=8)
code_rows = st.tuples(*[st.tuples(*[st.integers(0, NUM_CODES - 1)] * GRID[1])] * GRID[0])
segment_values = st.lists(text_pieces | code_rows, min_size=1, max_size=6)


def document_of(values: list) -> TokenizedDocument:
    """A document of drawn values: lists are text, tuples of rows are images."""
    return TokenizedDocument(tuple(tokens(*v) if isinstance(v, list) else codes(*v) for v in values))


def image_codes(first: int = 0) -> ImageCodes:
    return ImageCodes(np.arange(first, first + 6).reshape(GRID))


@cache
def tokenizer() -> DocumentTokenizer:
    """A real tokenizer with an untrained, tiny VQ-GAN of 8x8 pixels and 2x2 codes."""
    torch.manual_seed(0)
    config = VQGANConfig(
        image_size=8,
        downsampling=4,
        base_channels=16,
        channel_multipliers=(1, 1),
        num_residual_blocks=1,
        num_codes=NUM_CODES,
        code_width=4,
    )
    text = TextTokenizer.train(["a red circle left of a blue square"] * 4, TextTokenizerConfig(vocabulary_size=300))
    return DocumentTokenizer(text, ImageTokenizer(VQGAN(config)), Vocabulary.build(text.size, NUM_CODES, 4))


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> PILImage.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(noise)


def test_layout_of_a_pair() -> None:
    """`</s> text <break> image </s>`, CM3Leon figures 8 and 9."""
    ids = document_to_ids(TokenizedDocument((tokens(7, 9), image_codes())), OURS)
    assert ids.dtype == np.int64
    assert ids.tolist() == [2, 7, 9, OURS.break_id, 300, 301, 302, 303, 304, 305, 2]


def test_layout_with_retrieved_pairs() -> None:
    """Four pairs have seven breaks and two `</s>` (CM3Leon figure 9)."""
    ids = document_to_ids(TokenizedDocument((tokens(7), image_codes()) * 4), OURS)
    assert (ids == OURS.break_id).sum() == 7
    assert (ids == OURS.eos_id).sum() == 2


def test_layout_of_framed_images() -> None:
    """`<s> text begin codes end text </s>`, as Chameleon has it."""
    document = TokenizedDocument((tokens(7, 9), image_codes(), tokens(8)))
    ids = document_to_ids(document, FRAMED)
    assert ids.tolist() == [0, 26, 28, 21, 4, 5, 6, 7, 8, 9, 20, 27, 2]
    assert document_from_ids(ids, FRAMED, GRID) == document
    assert document_from_ids([0, 2], FRAMED, GRID) == TokenizedDocument((tokens(),))


def test_answers_are_turns_where_the_layout_has_them() -> None:
    """`<s> text begin codes end <turn> text </s>`: an answer of whole segments, in words or a picture."""
    layout = Layout(start="<s>", between=None, image_start="<begin>", image_end="<end>", turn_end="<turn>")
    vocabulary = Vocabulary(FRAMED.ranges, {**FRAMED.special_ids, "<turn>": 22}, layout)
    segments = (tokens(7, 9), image_codes(), tokens(8, 5), image_codes())
    asked = [0, 26, 28, 21, *CODES, 20]
    for answers, expected in [
        ([[2, 0, 2]], [*asked, 22, 27, 24, 22, 21, *CODES, 20, 2]),
        ([[2, 0, 2], [3, 0, 6]], [*asked, 22, 27, 24, 21, *CODES, 20, 2]),
        ([[3, 0, 6]], [*asked, 27, 24, 22, 21, *CODES, 20, 2]),
        ([[1, 0, 6], [3, 0, 6]], [0, 26, 28, 22, *asked[3:], 22, 27, 24, 22, 21, *CODES, 20, 2]),
        ([[2, 0, 1]], [*asked, 27, 24, 21, *CODES, 20, 2]),  # a part of a text, as in the templates of tasks
        ([[0, 0, 2]], [0, 26, 28, 22, *asked[3:], 27, 24, 21, *CODES, 20, 2]),  # nothing before it was asked
    ]:
        document = TokenizedDocument(segments, {"answers": answers})
        assert document_to_ids(document, vocabulary).tolist() == expected
        *places, length = segment_places(document, layout)
        assert length == len(expected)
        assert [expected[place] for place in places] == [26, 4, 27, 4]
    later = TokenizedDocument(segments, {"answers": [[0, 0, 2]], "retrieved": 2})
    assert document_to_ids(later, vocabulary).tolist() == [*asked, 22, 27, 24, 22, 21, *CODES, 20, 2]
    ours = document_to_ids(TokenizedDocument(segments, {"answers": [[2, 0, 2]]}), OURS)
    assert ours.tolist() == document_to_ids(TokenizedDocument(segments), OURS).tolist()


@pytest.mark.parametrize("vocabulary", [OURS, FRAMED], ids=["ours", "framed"])
@given(values=segment_values)
def test_places_of_segments(values: list, vocabulary: Vocabulary) -> None:
    document = document_of(values)
    ids = document_to_ids(document, vocabulary)
    *places, length = segment_places(document, vocabulary.layout)
    assert length == len(ids)
    for place, part in zip(places, document.segments, strict=True):
        if isinstance(part, ImageCodes):
            np.testing.assert_array_equal(ids[place : place + 6], vocabulary.codes_to_ids(part.codes_HW.ravel()))
        else:
            np.testing.assert_array_equal(ids[place : place + len(part.tokens)], vocabulary.text_to_ids(part.tokens))


@given(values=segment_values)
def test_framed_documents_survive_but_for_the_bounds_of_texts(values: list) -> None:
    ids = document_to_ids(document_of(values), FRAMED)
    document = document_from_ids(ids, FRAMED, GRID)
    joined: list = []
    for value in values:
        if isinstance(value, list) and joined and isinstance(joined[-1], list):
            joined[-1] = joined[-1] + value
        elif value or len(values) == 1:
            joined.append(value)
    assert document == document_of(joined or [[]])
    np.testing.assert_array_equal(document_to_ids(document, FRAMED), ids)


@settings(max_examples=100)
@given(data=st.data())
def test_framed_ids_are_a_document_or_an_error(data: st.DataObject) -> None:
    likely = st.sampled_from([0, 2, 20, 20, 21, 21, 4, 5, 4, 5, 30, 31])
    frame = st.just([21, 4, 5, 20])
    parts = data.draw(st.lists(st.lists(likely, max_size=3) | frame, max_size=5))
    ids = [0, *(id for part in parts for id in part), 2]
    try:
        document = document_from_ids(ids, FRAMED, (1, 2))
    except DataError:
        return
    assert document_to_ids(document, FRAMED).tolist() == ids


@any_vocabulary
@given(values=segment_values)
def test_any_document_survives_ids(values: list, vocabulary: Vocabulary) -> None:
    document = document_of(values)
    ids = document_to_ids(document, vocabulary)
    assert document_from_ids(ids, vocabulary, GRID) == document
    assert document_from_ids(ids.tolist(), vocabulary, GRID) == document


@any_vocabulary
@settings(max_examples=100)
@given(data=st.data())
def test_ids_are_a_document_or_an_error(data: st.DataObject, vocabulary: Vocabulary) -> None:
    """Whatever is accepted is the one document with these ids."""
    text, image = vocabulary.text_to_ids([50, 51]).tolist(), vocabulary.codes_to_ids([0, 1]).tolist()
    likely = [2, vocabulary.break_id, *text, *image]
    id = st.sampled_from(likely) | st.integers(-1, vocabulary.size)
    ids = [2, *data.draw(st.lists(id, max_size=14)), 2]
    try:
        document = document_from_ids(ids, vocabulary, (1, 2))
    except DataError:
        return
    assert document_to_ids(document, vocabulary).tolist() == ids


BREAK = OURS.break_id
IMAGE = list(range(300, 306))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"ids of shape \(0,\)"),
        ([2], r"ids of shape \(1,\)"),
        ([[2, 2]], r"ids of shape \(1, 2\)"),
        ([7, 8, 2], r"ids\[0\]=7 is text; a document is </s>"),
        ([2, 7, 8], r"ids\[2\]=8 is text"),
        ([2, 7, 2, 8, 2], r"ids\[2\]=2 is </s>"),
        ([2, 7, 1, 2], r"ids\[2\]=1 is <pad>"),
        ([2, OURS.sentinel_id(1), BREAK, *IMAGE, 2], r"ids\[1\]=\d+ is <sentinel:1>"),
        ([2, 7, OURS.eoss_id, 2], r"ids\[2\]=\d+ is <eoss>"),
        ([2, 7, OURS.size, 2], r"ids\[2\]=\d+ is outside the vocabulary of"),
        ([2, 7, -1, 2], r"ids\[2\]=-1 is outside"),
        ([2, 7, *IMAGE, 2], r"ids\[2\]=300 is image code 0; the segment that begins at ids\[1\] mixes"),
        ([2, 7, BREAK, *IMAGE, 8, 2], r"ids\[9\]=8 is text; the segment that begins at ids\[3\] mixes"),
        ([2, 7, BREAK, *IMAGE[:5], 2], r"ids\[3:8\] are an image of 5 codes; one of 2x3 codes has 6"),
        ([2, *IMAGE, *IMAGE, 2], r"ids\[1:13\] are an image of 12 codes"),
    ],
)
def test_malformed_ids_are_refused_with_the_place(ids: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        document_from_ids(np.array(ids, dtype=np.int64), OURS, GRID)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0], r"a document is at least <s> </s>, found ids of shape \(1,\)"),
        ([2, 30, 2], r"ids\[0\]=2 is </s>; a document is <s>, text and images, each image in <begin> and <end>, </s>"),
        ([0, 30, 1, 2], r"ids\[2\]=1 is <pad>"),
        ([0, 30, *CODES, 2], r"ids\[2\]=4 is image code 0; images, and nothing else, stand in <begin> and <end>"),
        ([0, 21, *CODES, 2], r"ids\[7\]=9 is image code 5; the image that begins at ids\[1\] ends in <end>"),
        ([0, *CODES, 20, 2], r"ids\[1\]=4 is image code 0; images"),
        ([0, 20, 2], r"ids\[1\]=20 is <end>; images"),
        ([0, 21, 21, *CODES, 20, 2], r"ids\[1\]=21 is <begin>; the image that begins at ids\[1\] ends in <end>"),
        ([0, 21, 4, 30, 5, 20, 2], r"ids\[3\]=30 is text; images"),
        ([0, 21, 20, 2], r"ids\[2:2\] are an image of 0 codes; one of 2x3 codes has 6"),
        ([0, 21, *CODES, 4, 20, 2], r"ids\[2:9\] are an image of 7 codes"),
    ],
)
def test_malformed_framed_ids_are_refused_with_the_place(ids: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        document_from_ids(ids, FRAMED, GRID)


@pytest.mark.parametrize("special", range(4))
def test_special_text_tokens_are_refused(special: int) -> None:
    document = TokenizedDocument((tokens(), tokens(7, special)))
    with pytest.raises(DataError, match=f"token 1 of text segment 1 is {TEXT_SPECIALS[special]}, not text"):
        document_to_ids(document, OURS)


def test_segments_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="a text piece below 300, found 300"):
        document_to_ids(TokenizedDocument((tokens(300),)), OURS)
    with pytest.raises(DataError, match="an image code below 16, found 16"):
        document_to_ids(TokenizedDocument((image_codes(11),)), OURS)


def test_segments_check_and_keep_their_types() -> None:
    assert TextTokens(np.array([])).tokens.dtype == np.int32
    assert image_codes().codes_HW.dtype == np.uint16
    for segment, wrong in ((TextTokens, [[1]]), (TextTokens, [0.5]), (ImageCodes, [1, 2])):
        with pytest.raises(DataError, match="must be integers in"):
            segment(np.array(wrong))
    with pytest.raises(DataError, match=r"must lie in 0..65535, found 1..65536"):
        ImageCodes(np.array([[1, 65536]]))
    with pytest.raises(DataError, match="at least one code"):
        ImageCodes(np.zeros((0, 4), dtype=np.uint16))
    for empty in (Document, TokenizedDocument):
        with pytest.raises(DataError, match="at least one segment"):
            empty(())


def test_segments_compare_by_content() -> None:
    assert tokens(1, 2) == TextTokens(np.array([1, 2]))
    assert tokens(1, 2) != tokens(1, 3)
    assert image_codes() != image_codes(1)
    assert TokenizedDocument((tokens(),)) != TokenizedDocument((image_codes(),))


def test_tokenize_any_number_of_segments() -> None:
    documents = [
        Document((Text("a red circle"), Image(picture(0)), Text(""), Image(picture(1, (20, 12)))), {"id": "a"}),
        Document((Text(" \n</s> <break>"),)),
        Document((Image(picture(2)),)),
    ]
    tokenized = tokenizer().tokenize(documents)
    assert [type(part) for part in tokenized[0].segments] == [TextTokens, ImageCodes, TextTokens, ImageCodes]
    assert tokenized[0].metadata == {"id": "a"}
    alone = [tokenizer().tokenize([document])[0] for document in documents]
    assert alone == tokenized
    for document, tokens in zip(documents, tokenized, strict=True):
        assert tokenizer().from_ids(tokenizer().to_ids(tokens)).segments == tokens.segments
        restored = tokenizer().detokenize(tokens)
        assert restored.metadata == document.metadata
        for before, after in zip(document.segments, restored.segments, strict=True):
            assert before == after if isinstance(before, Text) else after.pixels.size == (8, 8)
    assert tokenizer().tokenize([]) == []


@settings(max_examples=15)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_any_text_survives_the_whole_way(texts: list[str]) -> None:
    document = Document(tuple(map(Text, texts)))
    ids = tokenizer().to_ids(tokenizer().tokenize([document])[0])
    assert tokenizer().detokenize(tokenizer().from_ids(ids)) == document


def test_codes_survive_and_decode_alike() -> None:
    document = TokenizedDocument((codes([0, 5], [15, 2]), tokens(), codes([1, 1], [1, 1])))
    assert tokenizer().from_ids(tokenizer().to_ids(document)) == document
    first, _, second = tokenizer().detokenize(document).segments
    (alone,) = tokenizer().detokenize(TokenizedDocument(document.segments[2:])).segments
    np.testing.assert_allclose(np.asarray(second.pixels, int), np.asarray(alone.pixels, int), atol=1)
    assert first != second


def test_images_of_another_grid_are_refused() -> None:
    with pytest.raises(DataError, match=r"segment 0 is an image of \(1, 4\) codes"):
        tokenizer().to_ids(TokenizedDocument((codes([0, 5, 15, 2]),)))


def test_save_and_load(tmp_path) -> None:
    tokenizer().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "image_tokenizer.json",
        "image_tokenizer.safetensors",
        "tokenizer.model",
        "vocabulary.json",
    ]
    loaded = DocumentTokenizer.load(tmp_path)
    assert loaded.hash == tokenizer().hash
    document = Document((Text("a blue square"), Image(picture(3))))
    assert loaded.tokenize([document]) == tokenizer().tokenize([document])


def test_hash_changes_with_each_part() -> None:
    whole = tokenizer()
    other_text = TextTokenizer.train(["other words"], TextTokenizerConfig(vocabulary_size=whole.text.size))
    sizes = (other_text.size, NUM_CODES)
    torch.manual_seed(1)
    variants = [
        DocumentTokenizer(other_text, whole.image, Vocabulary.build(*sizes, 4)),
        DocumentTokenizer(other_text, whole.image, Vocabulary.build(*sizes, 5)),
        DocumentTokenizer(other_text, ImageTokenizer(VQGAN(whole.image.config)), Vocabulary.build(*sizes, 4)),
    ]
    assert len({whole.hash, *(variant.hash for variant in variants)}) == 4


def test_files_of_different_models_are_refused(tmp_path) -> None:
    tokenizer().save(tmp_path)
    Vocabulary.build(tokenizer().text.size, NUM_CODES + 1).save(tmp_path / "vocabulary.json")
    with pytest.raises(ModelFilesError, match="16 image codes, the vocabulary .* and 17"):
        DocumentTokenizer.load(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(ModelFilesError, match="vocabulary.json"):
        DocumentTokenizer.load(tmp_path)
