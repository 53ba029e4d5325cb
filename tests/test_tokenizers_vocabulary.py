"""The joint vocabulary: our layout, Chameleon's, conversions between ids, JSON and hash."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.errors import ConfigError, DataError, ModelFilesError
from cm3.pretrained import demo_folder
from cm3.tokenizers.layout import CM3_LAYOUT, Layout
from cm3.tokenizers.vocabulary import TEXT_SPECIALS, IdRange, Vocabulary


def chameleon_vocabulary() -> Vocabulary:
    """Chameleon's 65,536 ids: specials, image codes 4 to 8195, more specials, reserved ids, then the text."""
    special_ids = {name: id for id, name in enumerate(TEXT_SPECIALS)}
    special_ids |= {"<eoss>": 8196, "<break>": 8197}
    special_ids |= {f"<sentinel:{i}>": 8198 + i for i in range(512)}
    special_ids |= {f"<reserved:{id - 4}>": id for id in range(8710, 9216)}
    return Vocabulary(
        (
            IdRange("text_specials", "text", 0, 4),
            IdRange("image", "image", 4, 8192),
            IdRange("specials", "special", 8196, 9216 - 8196),
            IdRange("text", "text", 9216, 65536 - 9216),
        ),
        special_ids,
    )


def reversed_vocabulary() -> Vocabulary:
    """Text in two ranges, the later ids listed first."""
    special_ids = {"<eoss>": 10, "<break>": 11, "<sentinel:0>": 12, "<sentinel:1>": 13}
    special_ids |= {name: 30 + id for id, name in enumerate(TEXT_SPECIALS)}
    return Vocabulary(
        (
            IdRange("late text", "text", 30, 20),
            IdRange("early text", "text", 0, 10),
            IdRange("marks", "special", 10, 4),
            IdRange("image", "image", 14, 16),
        ),
        special_ids,
    )


VOCABULARIES = [Vocabulary.build(300, 64, num_sentinels=8), chameleon_vocabulary(), reversed_vocabulary()]
any_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=["ours", "chameleon", "reversed"])


def test_paper_layout() -> None:
    vocabulary = Vocabulary.build(56320, 8192)
    assert vocabulary.text_ranges == (IdRange("text", "text", 0, 56320),)
    assert vocabulary.image_range == IdRange("image", "image", 56320, 8192)
    assert (vocabulary.special_ids["<s>"], vocabulary.pad_id, vocabulary.eos_id) == (0, 1, 2)
    assert vocabulary.break_id == 64512
    assert vocabulary.eoss_id == 64513
    assert vocabulary.sentinel_id(0) == 64514
    assert vocabulary.num_sentinels == 512
    assert vocabulary.sentinel_id(511) + 1 == vocabulary.special_ids["<image_row_end>"]
    assert vocabulary.special_ids["<image_size:63>"] - vocabulary.special_ids["<image_size:0>"] == 63
    assert vocabulary.size % 64 == 0
    assert vocabulary.special_ids[f"<reserved:{vocabulary.size - 65091 - 1}>"] == vocabulary.size - 1


def test_no_reserved_ids_where_the_size_fits() -> None:
    filled = Vocabulary.build(300, 64, num_sentinels=8, multiple=1)
    assert "reserved" not in [part.name for part in filled.ranges]
    assert filled.size == 300 + 64 + 2 + 8 + 1 + 64


def test_chameleon_layout() -> None:
    vocabulary = chameleon_vocabulary()
    assert vocabulary.size == 65536
    assert vocabulary.text_size == 65536 - 8192 - 1020
    np.testing.assert_array_equal(vocabulary.codes_to_ids([0, 8191]), [4, 8195])
    np.testing.assert_array_equal(vocabulary.text_to_ids([3, 4, vocabulary.text_size - 1]), [3, 9216, 65535])
    assert vocabulary.sentinel_id(511) == 8709


@any_vocabulary
def test_every_id_has_one_kind(vocabulary: Vocabulary) -> None:
    ids = np.arange(vocabulary.size)
    special = np.isin(ids, list(vocabulary.special_ids.values()))
    kinds = vocabulary.is_text(ids).astype(int) + vocabulary.is_image(ids) + special
    assert (kinds == 1).all()


@any_vocabulary
def test_tests_of_kind_take_tensors(vocabulary: Vocabulary) -> None:
    ids = np.arange(vocabulary.size).reshape(2, -1)
    for test in (vocabulary.is_text, vocabulary.is_image):
        np.testing.assert_array_equal(test(torch.from_numpy(ids)).numpy(), test(ids))


@any_vocabulary
def test_conversions_are_inverse_and_complete(vocabulary: Vocabulary) -> None:
    pieces = np.arange(vocabulary.text_size, dtype=np.int32).reshape(-1, 2)
    text_ids = vocabulary.text_to_ids(pieces)
    np.testing.assert_array_equal(vocabulary.ids_to_text(text_ids), pieces)
    codes = np.arange(vocabulary.image_range.size, dtype=np.uint16)
    image_ids = vocabulary.codes_to_ids(codes)
    np.testing.assert_array_equal(vocabulary.ids_to_codes(image_ids), codes)
    assert vocabulary.is_image(image_ids).all()
    assert text_ids.dtype == image_ids.dtype == np.int64
    assert len(set(text_ids.ravel().tolist()) | set(image_ids.tolist())) == text_ids.size + image_ids.size


@any_vocabulary
def test_foreign_ids_are_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(DataError, match=f"below {vocabulary.text_size}, found {vocabulary.text_size}"):
        vocabulary.text_to_ids([5, vocabulary.text_size])
    with pytest.raises(DataError, match="found -1"):
        vocabulary.codes_to_ids([-1])
    with pytest.raises(DataError, match=f"found {vocabulary.break_id}"):
        vocabulary.ids_to_text([vocabulary.break_id])
    with pytest.raises(DataError, match=f"found {vocabulary.eos_id}"):
        vocabulary.ids_to_codes([vocabulary.image_range.start, vocabulary.eos_id])
    with pytest.raises(DataError, match=f"found {vocabulary.size}"):
        vocabulary.ids_to_text(np.array(vocabulary.size))


def test_sentinels_run_out_with_an_error() -> None:
    with pytest.raises(ConfigError, match="<sentinel:8> asked, the vocabulary has 8"):
        VOCABULARIES[0].sentinel_id(8)


def test_description_of_ids() -> None:
    vocabulary = VOCABULARIES[0]
    described = [vocabulary.describe(id) for id in (2, 5, 300, 363, vocabulary.break_id, vocabulary.size)]
    assert described == [
        "</s>",
        "text",
        "image code 0",
        "image code 63",
        "<break>",
        f"outside the vocabulary of {vocabulary.size}",
    ]


@any_vocabulary
def test_save_and_load(vocabulary: Vocabulary, tmp_path) -> None:
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == vocabulary
    assert loaded.hash == vocabulary.hash
    assert hash(loaded) == hash(vocabulary)


def test_a_layout_is_kept_and_ours_is_not_named(tmp_path) -> None:
    ours = reversed_vocabulary()
    assert "layout" not in ours.to_json()
    framed = replace(ours, layout=Layout(start="<s>", between=None, image_start="<break>", image_end="<eoss>"))
    framed.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == framed and loaded.layout.image_start == "<break>"
    assert framed != ours and framed.hash != ours.hash
    assert (framed.mark("start"), framed.mark("image_end"), framed.mark("between")) == ((30,), (10,), ())
    changed = {**framed.to_json(), "layout": {"image_begin": "<break>"}}
    with pytest.raises(ModelFilesError, match="not a valid vocabulary"):
        Vocabulary.from_json(changed)


def test_the_vocabulary_of_the_shipped_model_is_as_it_was() -> None:
    vocabulary = Vocabulary.load(demo_folder() / "vocabulary.json")
    assert vocabulary.layout == CM3_LAYOUT
    assert vocabulary.hash == "60f605698ee390abbeb3a61f0d58ce7e2b4d14dd4f7d24f683b50971e6e3694c"
    assert vocabulary.to_json() == json.loads((demo_folder() / "vocabulary.json").read_text())


def test_a_vocabulary_may_have_no_sentinels() -> None:
    names = {name: id for name, id in reversed_vocabulary().special_ids.items() if "sentinel" not in name}
    vocabulary = replace(reversed_vocabulary(), special_ids=names)
    assert vocabulary.num_sentinels == 0
    with pytest.raises(ConfigError, match="has no sentinels .* use objective.name=causal"):
        vocabulary.sentinel_id(0)


@pytest.mark.parametrize("places", [{}, {"image_start": "<a>"}, {"image_end": "<b>"}])
def test_a_layout_that_cannot_be_read_back_is_refused(places: dict) -> None:
    with pytest.raises(ConfigError, match="cannot be read back; name `between`, or both"):
        Layout(between=None, **places)


@settings(max_examples=10)
@given(st.integers(5, 400), st.integers(1, 400), st.integers(1, 40), st.integers(1, 64))
def test_built_vocabularies_are_valid_and_differ(text: int, codes: int, sentinels: int, multiple: int) -> None:
    vocabulary = Vocabulary.build(text, codes, sentinels, multiple)
    assert vocabulary.size % multiple == 0
    assert vocabulary == Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))
    assert vocabulary.hash != Vocabulary.build(text + 1, codes, sentinels, multiple).hash


def test_damaged_files_are_refused(tmp_path) -> None:
    value = VOCABULARIES[0].to_json()
    with pytest.raises(ModelFilesError, match="is stored with it"):
        Vocabulary.from_json({**value, "hash": "0"})
    renamed = {**value["special_ids"], "<image_row_end!>": value["special_ids"]["<image_row_end>"]}
    del renamed["<image_row_end>"]
    with pytest.raises(ModelFilesError, match="is stored with it"):
        Vocabulary.from_json({**value, "special_ids": renamed})
    for broken in ({}, {**value, "ranges": [{"name": "text"}]}, {**value, "ranges": value["ranges"][1:]}, []):
        with pytest.raises(ModelFilesError, match="not a valid vocabulary"):
            Vocabulary.from_json(broken)
    with pytest.raises(ModelFilesError, match="cannot read"):
        Vocabulary.load(tmp_path / "none.json")


def without(name: str) -> dict[str, int]:
    return {key: id for key, id in reversed_vocabulary().special_ids.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"special_ids": without("<break>")}, "no id is named <break>"),
        ({"special_ids": without("</s>")}, "no id is named </s>"),
        ({"special_ids": without("<eoss>")}, "no id is named <eoss>"),
        ({"layout": Layout(between="<turn>", turn_end="<turn>")}, "no id is named <turn>"),
        ({"special_ids": {**without(""), "<break>": 10}}, "share an id"),
        ({"special_ids": {**without(""), "<break>": 14}}, "<break>=14 is no text or special id"),
        ({"special_ids": {**without(""), "<break>": 50}}, "<break>=50 is no text or special id"),
        ({"special_ids": {**without(""), "<sentinel:1>": 9}}, "not consecutive"),
        ({"ranges": reversed_vocabulary().ranges[:3]}, "the next free id is 14"),
        ({"ranges": (*reversed_vocabulary().ranges, IdRange("more", "image", 50, 3))}, "one image range"),
        ({"ranges": (*reversed_vocabulary().ranges, IdRange("image", "special", 50, 3))}, "names repeat"),
        (
            {"ranges": (*reversed_vocabulary().ranges, IdRange("overlap", "special", 40, 20))},
            "next free id is 50",
        ),
    ],
)
def test_unusable_tables_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(reversed_vocabulary(), **change)


@pytest.mark.parametrize("sizes", [(3, 64, 8), (300, 0, 8), (300, 64, 0)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError):
        Vocabulary.build(*sizes)
