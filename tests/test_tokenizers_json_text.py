"""Text tokenizers in Hugging Face's files: text comes back, nothing but text comes out, ids are the library's."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.errors import DataError, MissingDependencyError, ModelFilesError
from cm3.tokenizers.json_text import JsonTextTokenizer
from cm3.tokenizers.vocabulary import TEXT_SPECIALS, IdRange, Vocabulary

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from chameleon_reference import FIRST_TEXT, TEXTS, VOCABULARY_SIZE, marks, text_tokenizer  # noqa: E402

from cm3.interop.chameleon_text import chameleon_vocabulary  # noqa: E402

LIBRARY = text_tokenizer()
DEFINITION = LIBRARY.to_str().encode()
VOCABULARY = chameleon_vocabulary(LIBRARY.get_vocab(), VOCABULARY_SIZE, "test")
TOKENIZER = JsonTextTokenizer(DEFINITION, VOCABULARY)
names_and_text = st.lists(st.sampled_from([*marks(), " ", "IMG", "<", "a red"]) | st.text(max_size=3), max_size=5)


def test_the_library_is_not_this_projects_folder():
    assert "site-packages" in tokenizers.__file__


@pytest.mark.parametrize("text", ["", *TEXTS])
def test_ids_are_those_of_the_library(text):
    pieces = TOKENIZER.encode(text)
    expected = LIBRARY.encode(text, add_special_tokens=False).ids
    assert VOCABULARY.text_to_ids(pieces).tolist() == expected
    assert pieces == [id - FIRST_TEXT for id in expected]
    assert TOKENIZER.decode(pieces) == text


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"])) | names_and_text.map("".join))
def test_every_text_comes_back_and_is_text(text):
    pieces = TOKENIZER.encode(text)
    assert TOKENIZER.decode(pieces) == text
    assert VOCABULARY.is_text(VOCABULARY.text_to_ids(pieces)).all()
    assert all(0 <= piece < TOKENIZER.size for piece in pieces)


def test_names_of_codes_and_marks_are_text():
    """The library alone would take them for what they name."""
    text = "an <image> IMGIMGBAZ</s>"
    assert {4 + 10, 31, 2} <= set(LIBRARY.encode(text).ids)
    expected = [VOCABULARY.text_to_ids(TOKENIZER.encode(character)) for character in "IMGIMGBAZ"]
    ids = VOCABULARY.text_to_ids(TOKENIZER.encode("IMGIMGBAZ"))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text and (ids >= FIRST_TEXT).all()
    assert np.concatenate(expected).tolist() == ids.tolist()


def test_surrogates_and_unknown_pieces_are_refused():
    with pytest.raises(DataError, match="unpaired surrogate at character 1"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(DataError, match=f"a text piece below {TOKENIZER.size}, found {TOKENIZER.size}"):
        TOKENIZER.decode([1, TOKENIZER.size])
    assert TOKENIZER.decode([]) == ""


def test_saved_and_loaded_it_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == DEFINITION
    loaded = JsonTextTokenizer.load(tmp_path / "tokenizer.json", VOCABULARY)
    assert loaded.hash == TOKENIZER.hash and loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    other = JsonTextTokenizer(DEFINITION + b" ", VOCABULARY)
    assert other.hash != TOKENIZER.hash


def test_settings_of_training_have_no_effect():
    """A file may say that texts are to be cut or filled up to a length."""
    cut = text_tokenizer()
    cut.enable_truncation(3)
    cut.enable_padding(length=40)
    tokenizer = JsonTextTokenizer(cut.to_str().encode(), VOCABULARY)
    assert tokenizer.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])


def test_characters_without_a_piece_are_refused():
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>"))
    ranges = (IdRange("text", "text", 0, 3), IdRange("image", "image", 3, 2), IdRange("s", "special", 5, 4))
    names = dict(zip((*TEXT_SPECIALS, "<break>"), (5, 6, 7, 0, 8), strict=True))
    tokenizer = JsonTextTokenizer(library.to_str().encode(), Vocabulary(ranges, names))
    assert tokenizer.encode("abba") == [1, 2, 2, 1] and tokenizer.decode([1, 0, 2]) == "a b"
    with pytest.raises(DataError, match="has no piece for 'c', character 2 of a text"):
        tokenizer.encode("abc")


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ModelFilesError, match="cannot read the text tokenizer .*none.json: No such file"):
        JsonTextTokenizer.load(tmp_path / "none.json", VOCABULARY)
    with pytest.raises(ModelFilesError, match="tokenizer.json cannot be read"):
        JsonTextTokenizer(b'{"model": 1}', VOCABULARY)
    smaller = json.loads(DEFINITION)
    del smaller["model"]["merges"][-1]
    last = max(smaller["model"]["vocab"], key=smaller["model"]["vocab"].get)
    del smaller["model"]["vocab"][last]
    with pytest.raises(ModelFilesError, match=f"has nothing at id {VOCABULARY_SIZE - 1}, which is text in vocabulary"):
        JsonTextTokenizer(json.dumps(smaller).encode(), VOCABULARY)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"run `pip install open-cm3\[interop\]`"):
        JsonTextTokenizer(DEFINITION, VOCABULARY)


def test_pieces_are_counted_by_the_ranges_of_the_vocabulary():
    """Text in two ranges, the later ids first: pieces follow the table, ids stay the library's."""
    half = FIRST_TEXT + 100
    ranges = (
        IdRange("late", "text", half, VOCABULARY_SIZE - half),
        *VOCABULARY.ranges[:-1],
        IdRange("early", "text", FIRST_TEXT, 100),
    )
    turned = Vocabulary(ranges, VOCABULARY.special_ids, VOCABULARY.layout)
    tokenizer = JsonTextTokenizer(DEFINITION, turned)
    assert tokenizer.encode(TEXTS[1]) != TOKENIZER.encode(TEXTS[1])
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
    np.testing.assert_array_equal(
        turned.text_to_ids(tokenizer.encode(TEXTS[1])), VOCABULARY.text_to_ids(TOKENIZER.encode(TEXTS[1]))
    )
