"""An imported Chameleon as a model: ids, answers and pictures against those of `transformers`."""

import re

import numpy as np
import pytest
import torch

from cm3.errors import ModelFilesError, RequestError
from cm3.generation.captions import QUESTION
from cm3.generation.grammar import Kind, id_kinds
from cm3.generation.settings import SamplingSettings
from cm3.generation.turns import make_prompts
from cm3.pipeline import CM3
from cm3.tokenizers.document import Document, Image, ImageCodes, Text, TextTokens, TokenizedDocument
from cm3.tokenizers.document_ids import document_to_ids

transformers = pytest.importorskip("transformers")

from chameleon_reference import (  # noqa: E402
    BREAK,
    CODES,
    EOSS,
    FIRST_CODE,
    FIRST_TEXT,
    NUM_CODES,
    PLACEHOLDER,
    SEPARATOR,
    VOCABULARY_SIZE,
    import_reading,
    picture,
    processor,
    reading_chameleon,
)
from tiny_chameleon import foreign_logits, image_name  # noqa: E402

from cm3.interop.chameleon_text import LAYOUT, chameleon_vocabulary  # noqa: E402

PROMPTS = {
    "text": "What do you see in this picture?",
    "image": "<image>What do you see?",
    "interleaved": "a red circle <image> left of\n<image><image> 365 green stars",
}
BUDGET = 20
GREEDY = SamplingSettings(temperature=0.0)


@pytest.fixture(scope="module")
def foreign():
    return reading_chameleon()


@pytest.fixture(scope="module")
def reader():
    return processor()


@pytest.fixture(scope="module")
def model(foreign, tmp_path_factory):
    return CM3.from_pretrained(import_reading(foreign, tmp_path_factory.mktemp("chameleon")))


def pictures(prompt):
    return [picture(number) for number in range(prompt.count("<image>"))]


def segments(model, prompt):
    """A prompt of theirs as segments of ours."""
    images = iter(pictures(prompt))
    parts = [part for part in re.split("(<image>)", prompt) if part]
    document = Document(tuple(Image(next(images)) if part == "<image>" else Text(part) for part in parts))
    return model.tokenizer.tokenize([document])[0].segments


def read(reader, prompts, **options):
    """Prompts as their processor gives them to their model."""
    images = [image for prompt in prompts for image in pictures(prompt)]
    return reader(images=images or None, text=prompts, return_tensors="pt", padding=True, **options)


def generated(foreign, inputs):
    """What their model writes, greedily, where only text may come: the new ids of each row up to `</s>`."""
    others = [id for id in range(FIRST_TEXT) if id != 2]
    ids = foreign.generate(**inputs, max_new_tokens=BUDGET, do_sample=False, suppress_tokens=others, eos_token_id=2)
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


def assert_same(ours, theirs):
    """Ours ends in `</s>` in its budget, which takes the place of the last of theirs."""
    assert len(ours) == len(theirs) and ours[-1] == 2
    assert ours[:-1].tolist() == theirs[:-1]


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_of_a_prompt_are_those_of_the_processor(foreign, reader, model, name):
    prompt = PROMPTS[name]
    inputs = read(reader, [prompt])
    expected = inputs["input_ids"][0].clone()
    if pictures(prompt):
        expected[expected == PLACEHOLDER] = foreign.get_image_tokens(inputs["pixel_values"]).flatten().long()
    request = model.prompts.words(segments(model, prompt), max_new_tokens=5)
    assert list(request.prompt_ids) == expected.tolist()
    assert request.prompt_ids[0] == 0 and request.prompt_ids[-1] == SEPARATOR
    assert request.prompt_ids.count(BREAK) == request.prompt_ids.count(EOSS) == prompt.count("<image>")

    open_ended = read(reader, [prompt], return_for_text_completion=True)["input_ids"][0]
    completion = model.prompts.complete(segments(model, prompt), max_new_tokens=5)
    assert list(completion.prompt_ids) == expected[:-1].tolist() and len(open_ended) == len(expected) - 1


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_text_is_that_of_the_library(foreign, reader, model, name):
    (theirs,) = generated(foreign, read(reader, [PROMPTS[name]]))
    request = model.prompts.words(segments(model, PROMPTS[name]), max_new_tokens=BUDGET)
    [[ours]] = model.engine.run([request], GREEDY)
    assert_same(ours, theirs)
    assert len(set(theirs)) > 3  # no stutter of one id, which anything would repeat


def test_ragged_batches_are_the_padded_ones_of_the_library(foreign, reader, model):
    prompts = list(PROMPTS.values())
    inputs = read(reader, prompts)
    lengths = inputs["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) == 3 and (inputs["input_ids"][0, :2] == 1).all()  # padded on the left
    requests = [model.prompts.words(segments(model, prompt), max_new_tokens=BUDGET) for prompt in prompts]
    ours = model.engine.run(requests, GREEDY)
    for (row,), theirs in zip(ours, generated(foreign, inputs), strict=True):
        assert_same(row, theirs)

    reader.tokenizer.padding_side = "right"
    try:
        right = read(reader, prompts)
    finally:
        reader.tokenizer.padding_side = "left"
    with torch.no_grad():
        logits = foreign(**right).logits
    for row, length, (new_ids,) in zip(logits, lengths, ours, strict=True):
        allowed = row[length - 1].clone()
        allowed[[id for id in range(FIRST_TEXT) if id != 2]] = -torch.inf
        assert allowed.argmax() == new_ids[0]


def test_captions_and_answers_are_what_the_library_writes(foreign, reader, model, monkeypatch):
    monkeypatch.setattr("cm3.generation.captions.MAX_CAPTION_TOKENS", BUDGET)
    prompt = f"<image>{QUESTION}"
    (theirs,) = generated(foreign, read(reader, [prompt]))
    expected = reader.tokenizer.decode(theirs[:-1])
    options = {"repetition_penalty": 1.0}
    assert model.answer(picture(0), QUESTION, max_new_tokens=BUDGET, **options) == expected.strip()
    captions = model.caption([picture(0), picture(1)], **options)
    assert captions[0] == expected and captions[1] != expected


def three_streams(foreign, prompt, image_only, scales, count):
    """The likeliest codes under guidance of their own logits: nothing, the pictures, all."""
    image_scale, text_scale = scales
    made = []
    for _ in range(count):
        nothing, image, whole = (
            foreign_logits(foreign, torch.tensor([[*ids, *made]]))[0, -1, FIRST_CODE : FIRST_CODE + NUM_CODES]
            for ids in ([0, BREAK], image_only, prompt)
        )
        made.append(
            FIRST_CODE + int((nothing + image_scale * (image - nothing) + text_scale * (whole - image)).argmax())
        )
    return made


def test_pictures_are_drawn_with_three_streams_and_have_all_codes(foreign, model):
    settings = SamplingSettings(temperature=0.0, guidance_scale=3.0, image_guidance_scale=1.2)
    parts = segments(model, "<image>make the star red")
    edit = model.prompts.picture(parts)
    drawing = model.prompts.text_to_image(model.tokenizer.text.encode("a red star"))
    framed = [BREAK, *(FIRST_CODE + parts[0].codes_HW.ravel().astype(int)).tolist(), EOSS]
    assert edit.prompt_ids[:-2][-len(parts[1].tokens) :] == tuple(FIRST_TEXT + parts[1].tokens)
    assert edit.prompt_ids[-2:] == (SEPARATOR, BREAK) and edit.image_only_ids == (0, *framed, BREAK)
    assert drawing.unconditional_ids == drawing.image_only_ids == edit.unconditional_ids == (0, BREAK)
    for request, ([new_ids],) in zip((edit, drawing), zip(model.engine.run([edit, drawing], settings))):
        assert len(new_ids) == CODES and model.tokenizer.vocabulary.is_image(new_ids).all()
        expected = three_streams(foreign, request.prompt_ids, request.image_only_ids, (1.2, 3.0), 12)
        assert new_ids[:12].tolist() == expected
    plain = model.engine.run([edit], GREEDY)[0][0]
    assert plain.tolist() != model.engine.run([edit], settings)[0][0].tolist()


def test_requests_of_the_model(model):
    together, (alone,) = (
        model.generate(["a red star", "a blue circle"], seed=3),
        model.generate("a blue circle", seed=3),
    )
    np.testing.assert_array_equal(np.asarray(together[1][0]), np.asarray(alone))
    assert np.asarray(together[0][0]).tolist() != np.asarray(alone).tolist()
    assert model.edit(picture(0), "make it red").size == picture(0).size
    negative = model.prompts.text_to_image([5], negative=[6])
    assert negative.unconditional_ids == negative.image_only_ids == (0, FIRST_TEXT + 6, SEPARATOR, BREAK)
    whole = model.complete(Document((Text("a red"), Image(picture(0)))), max_new_tokens=30, seed=1)
    assert whole.segments[0] == Text("a red") and isinstance(whole.segments[1], Image)


def test_settings_of_sampling_are_chameleons(model):
    expected = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2}
    assert model.defaults == SamplingSettings(**expected, guidance_scale=3.0, image_guidance_scale=1.2)


def test_what_needs_sentinels_or_a_context_is_refused(model):
    with pytest.raises(RequestError, match="this model has no sentinels .a Chameleon has none. and cannot fill in"):
        model.infill(picture(0), box=(0, 0, 4, 4))
    with pytest.raises(RequestError, match="no sentinels"):
        model.draw(["a star"], best_of=2, rank="caption")
    context = [TokenizedDocument((TextTokens(np.array([5])),))]
    with pytest.raises(RequestError, match="no place for retrieved documents; set retrieve=0"):
        model.prompts.text_to_image([5], context=context)
    with pytest.raises(RequestError, match="no place for retrieved documents"):
        model.prompts.words([ImageCodes(np.zeros((8, 8), int))], context=context, max_new_tokens=3)
    with pytest.raises(RequestError, match="the question of row 0 is empty"):
        model.answer(picture(0), " ")
    with pytest.raises(RequestError, match="task 'vqa' takes a picture"):
        model.instruct("vqa", [["only a text"]])


def test_without_a_decoder_it_writes_text(foreign, tmp_path):
    model = CM3.from_pretrained(import_reading(foreign, tmp_path, decoder=False))
    given = picture(0)
    beginning = Document((Text("a"), Image(given)))
    whole = model.complete(beginning, max_new_tokens=40, temperature=2.0, repetition_penalty=1.0)
    assert [type(part) for part in whole.segments] == [Text, Image, Text]
    assert whole.segments[1].pixels is given and len(whole.segments[2].text) > 5
    with pytest.raises(RequestError, match="has no decoder"):
        model.generate("a red star")


def public_names(**changes):
    """The ids of Chameleon (spec of its release), text made up."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197}
    names |= {image_name(code): 4 + code for code in range(8192)}
    names |= {f"<reserved{id - 4:05d}>": id for id in range(8198, 9216)}
    del names["<reserved08707>"]
    return names | {"<image>": 8711} | {f"piece{id}": id for id in range(9216, 65536)} | changes


def test_the_public_vocabulary():
    vocabulary = chameleon_vocabulary(public_names(), 65536, "test")
    assert vocabulary.size == 65536 and vocabulary.num_sentinels == 0 and vocabulary.layout == LAYOUT
    assert [part.kind for part in vocabulary.ranges] == ["special", "image", "special", "text"]
    assert vocabulary.text_to_ids([0, 65535 - 9216]).tolist() == [9216, 65535]
    document = TokenizedDocument((TextTokens(np.array([0, 3])), ImageCodes(np.array([[0, 8191]]))))
    assert document_to_ids(document, vocabulary).tolist() == [0, 9216, 9219, 8197, 4, 8195, 8196, 2]
    assert (vocabulary.mark("turn_end"), vocabulary.pad_id, vocabulary.special_ids["<image>"]) == ((8710,), 1, 8711)
    kinds = id_kinds(vocabulary)
    assert (kinds == Kind.TEXT).sum() == 65536 - 9216 and (kinds == Kind.IMAGE).sum() == 8192
    assert [int(kinds[id]) for id in (2, 8196, 8197, 8710)] == [Kind.EOS, Kind.IMAGE_END, Kind.IMAGE_START, Kind.OTHER]


def test_ids_are_found_by_name():
    names = {name: id for name, id in public_names().items() if id < 9300}
    moved = {name: (id + 100) % 9300 for name, id in names.items()}
    vocabulary = chameleon_vocabulary(moved, 9300, "test")
    assert vocabulary.codes_to_ids([0, 8191]).tolist() == [104, 8295]
    assert vocabulary.mark("start") == (100,) and vocabulary.mark("image_start") == (8297,)
    assert vocabulary.is_text(np.array([moved["piece9216"], moved["piece9299"]])).all()
    assert not vocabulary.is_text(np.array([moved[name] for name in ("<image>", "<reserved09000>", "</s>")])).any()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (public_names(IMGIMGCZ=7, IMGIMGDZ=6), "has image code 2 at id 7, 6 was expected; only vocabularies whose"),
        ({k: v for k, v in public_names().items() if k != "<reserved08706>"}, "has no <reserved08706>, so it is no"),
        ({k: v for k, v in public_names().items() if "IMG" not in k}, "names no image codes"),
        (public_names(word=65536), "names ids beyond the 65536 of the model: word"),
    ],
)
def test_other_vocabularies_are_refused(names, message):
    with pytest.raises(ModelFilesError, match=message):
        chameleon_vocabulary(names, 65536, "test")


def test_sizes_of_lumina_are_marks():
    vocabulary = chameleon_vocabulary(public_names(), 65536, "test", named_sizes=True)
    assert vocabulary.special_ids["<image_row_end>"] == 8803
    assert [vocabulary.special_ids[f"<image_size:{number}>"] for number in (1, 16, 64)] == [8805, 8820, 8868]
    with pytest.raises(ModelFilesError, match="names the size of every image .* cannot be written yet"):
        make_prompts(vocabulary, (32, 32))


def test_the_vocabulary_has_the_size_of_the_small_model(model):
    assert model.tokenizer.vocabulary.size == VOCABULARY_SIZE == model.transformer.config.vocabulary_size
    assert model.tokenizer.text.size == VOCABULARY_SIZE - FIRST_TEXT
