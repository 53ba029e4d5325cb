"""The text tokenizer: exact round trips of every Unicode string, training, files, and the training stage."""

import pickle

import pytest
import sentencepiece
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from cm3.config import load_config
from cm3.data.sources import SourceConfig
from cm3.errors import ConfigError, DataError, ModelFilesError
from cm3.tokenizers.text import TextTokenizer, TextTokenizerConfig
from cm3.tokenizers.vocabulary import TEXT_SPECIALS

COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
TEXTS = [
    f"a {size} {color} {shape}  left of a <break> {other}\n\tstar \u2581 caf\u00e9 \u4e00"
    for size in ("small", "large")
    for color in COLORS
    for shape in SHAPES
    for other in COLORS
]
CONFIG = TextTokenizerConfig(vocabulary_size=400)
TOKENIZER = TextTokenizer.train(TEXTS, CONFIG)

AWKWARD = [
    "",
    " ",
    "   ",
    "\n\n",
    " a  b ",
    "\0",
    "a\0\0b",
    "\t\r\n\x0b\x0c\x1b\x7f\x85\xa0\u2028\u2029\u3000",
    "\u2581",
    "\u2581\u2581 \u2581a\u2581",
    "a\u2581b c",
    "\u2585",
    "\ufeff\ufffd\ufffe\uffff\U0010ffff",
    "\ue000\uf8ff",
    "e\u0301 \u00e9 \ufb01 \u2460 \uff21",
    "<s></s><pad><unk>",
    " <break> <eoss> <sentinel:0> ",
    "<0x41><0xE2>\u2581<0x96>",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
mixed_text = st.lists(st.sampled_from([*AWKWARD, "red", " red", "circle"]) | unicode_text).map("".join)


def assert_round_trip(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(TEXT_SPECIALS) <= id < tokenizer.size for id in ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_round_trip(text: str) -> None:
    assert_round_trip(TOKENIZER, text)


@settings(max_examples=100)
@given(mixed_text)
@example(" ".join(TEXTS))
def test_every_unicode_string_round_trips(text: str) -> None:
    assert_round_trip(TOKENIZER, text)


@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(st.lists(mixed_text.filter(lambda text: text.strip("\0\t\n\r\u2581\u2585 ")), min_size=1, max_size=5))
def test_round_trip_does_not_depend_on_the_training_texts(texts: list[str]) -> None:
    tokenizer = TextTokenizer.train(texts, TextTokenizerConfig(vocabulary_size=2000))
    for text in [*texts, *AWKWARD]:
        assert_round_trip(tokenizer, text)


def test_unpaired_surrogates_are_refused() -> None:
    with pytest.raises(DataError, match="unpaired surrogate at character 2"):
        TOKENIZER.encode("ab\ud800c")


@given(st.lists(st.integers(0, TOKENIZER.size - 1)))
def test_any_ids_decode(ids: list[int]) -> None:
    TOKENIZER.decode(ids).encode()


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    first, *_ = TOKENIZER.encode("\U0001f600")
    assert TOKENIZER.decode([*TOKENIZER.encode("a"), first, *TOKENIZER.encode("b")]) == "a\ufffdb"


def test_specials_decode_to_nothing() -> None:
    assert TOKENIZER.decode([2, *TOKENIZER.encode("red"), 0, 1, 3, 2]) == "red"


@pytest.mark.parametrize("id", [-1, TOKENIZER.size])
def test_foreign_ids_are_refused(id: int) -> None:
    with pytest.raises(DataError, match=f"text piece {id} is not below {TOKENIZER.size}"):
        TOKENIZER.decode([5, id])


def test_training_learns_words() -> None:
    assert len(TOKENIZER.encode("a large red circle")) <= 5
    assert 300 < TOKENIZER.size <= 400


def test_training_is_deterministic() -> None:
    again = TextTokenizer.train(iter(TEXTS), CONFIG)
    assert again.hash == TOKENIZER.hash
    assert TextTokenizer.train(TEXTS[:50], CONFIG).hash != TOKENIZER.hash


def test_texts_with_reserved_characters_are_learnt_from() -> None:
    tokenizer = TextTokenizer.train(["\twonderful\0words\u2585and\u2581more"] * 10, CONFIG)
    assert len(tokenizer.encode("wonderful")) == 1


def test_small_vocabulary_holds_what_there_is() -> None:
    tokenizer = TextTokenizer.train(["ab"], TextTokenizerConfig(vocabulary_size=5000))
    assert tokenizer.size < 300
    assert_round_trip(tokenizer, "abba \u4e00")


@pytest.mark.parametrize("texts", [[], ["", "\n", "\u2581\0"]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text to train"):
        TextTokenizer.train(texts, CONFIG)


def test_errors_of_the_texts_come_through() -> None:
    def texts():
        yield "a red circle"
        raise DataError("row 1 is broken")

    with pytest.raises(DataError, match="row 1 is broken"):
        TextTokenizer.train(texts(), CONFIG)


def test_too_many_characters_is_an_error() -> None:
    with pytest.raises(ConfigError, match="vocabulary_size=400"):
        TextTokenizer.train(["".join(map(chr, range(0x4E00, 0x5000)))], CONFIG)


@pytest.mark.parametrize(
    "field",
    [
        {"vocabulary_size": 260},
        {"character_coverage": 0.0},
        {"character_coverage": 1.5},
        {"max_piece_length": 0},
    ],
)
def test_impossible_settings_are_refused(field: dict) -> None:
    (name,) = field
    with pytest.raises(ConfigError, match=name):
        TextTokenizerConfig(**field)


def test_save_and_load(tmp_path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.model")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.model")
    assert loaded.hash == TOKENIZER.hash
    assert loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_pickling() -> None:
    assert pickle.loads(pickle.dumps(TOKENIZER)).encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])


def test_foreign_models_are_refused(tmp_path) -> None:
    with pytest.raises(ModelFilesError, match="cannot read"):
        TextTokenizer.load(tmp_path / "none.model")
    for content in (b"not a model", b""):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(ModelFilesError, match="not a SentencePiece model"):
            TextTokenizer.load(tmp_path / "broken.model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "starts with"),
        ({"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}, "changes text"),
        ({"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "byte_fallback": True}, "changes text"),
    ],
)
def test_models_that_change_text_are_refused(tmp_path, options: dict, message: str) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "foreign"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    with pytest.raises(ModelFilesError, match=message):
        TextTokenizer.load(tmp_path / "foreign.model")


def test_stage_trains_from_scenes(tmp_path) -> None:
    from cm3.training.text_tokenizer import TextTokenizerRun, run

    overrides = ["--data.limit", "100", "--output", str(tmp_path / "run")]
    config = load_config(TextTokenizerRun, "configs/demo/text_tokenizer.yaml", overrides)
    path = run(config)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["config.yaml", "tokenizer.model"]
    assert load_config(TextTokenizerRun, path.parent / "config.yaml") == config
    tokenizer = TextTokenizer.load(path)
    assert tokenizer.size <= 512
    assert_round_trip(tokenizer, "a large red circle left of a small blue square")
    assert TextTokenizer.load(run(config)).hash == tokenizer.hash


def test_stage_learns_from_all_of_several_sources(tmp_path) -> None:
    from cm3.training.text_tokenizer import TextTokenizerRun, run

    sources = {}
    for name, word in (("data", "kangaroo"), ("more", "wallaby")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{word}"}}\n' * 50)
        sources[name] = SourceConfig(kind="jsonl", path=str(tmp_path / f"{name}.jsonl"), image_column=None)
    pieces = TextTokenizerConfig(vocabulary_size=300)
    config = TextTokenizerRun(
        data=sources["data"], more_data={"more": sources["more"]}, tokenizer=pieces, output=str(tmp_path)
    )
    tokenizer = TextTokenizer.load(run(config))
    assert [len(tokenizer.encode(word)) for word in ("kangaroo", "wallaby")] == [1, 1]
    assert load_config(TextTokenizerRun, tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", ["all", "demo", "emoji", "nlvr_box"])
def test_configs_load(name: str) -> None:
    from cm3.training.text_tokenizer import TextTokenizerRun

    config = load_config(TextTokenizerRun, f"configs/{name}/text_tokenizer.yaml")
    assert config.output == f"runs/{name}/text_tokenizer"
