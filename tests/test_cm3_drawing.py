"""Drawing with all its parts: seeds of candidates, ranking, negative prompts, samplers, retrieved documents."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_retrieval import CAPTIONS, HashEncoder

from cm3.data.sources import SourceConfig, open_source
from cm3.drawing import Drawing, ranking_summary, retrieval_sheet
from cm3.errors import CM3Error, DataError, ModelFilesError, RequestError
from cm3.gallery import contact_sheet
from cm3.generation.context import ContextFinder
from cm3.generation.engine import Engine
from cm3.generation.prompts import Prompts
from cm3.generation.rerank import choose, own_likelihood
from cm3.generation.settings import SamplingSettings
from cm3.pipeline import CM3
from cm3.retrieval.encoder import open_encoder
from cm3.retrieval.memory import Memory
from cm3.retrieval.search import search
from cm3.tokenizers.document import Document, DocumentTokenizer, Text
from cm3.tokenizers.document import Image as ImageSegment
from cm3.tokenizers.vocabulary import Vocabulary

PROMPTS = ["a large red circle", "a green star"]


@pytest.fixture(scope="module")
def plain(model_folder):
    """A model without a memory."""
    return CM3.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def model(model_folder, retrieval_folder):
    model = CM3.from_pretrained(model_folder)
    model.use_memory(retrieval_folder / "memory")
    return model


@pytest.fixture(scope="module")
def memory(retrieval_folder):
    return Memory.open(retrieval_folder / "memory")


def pixels(image):
    return np.asarray(image).tolist()


def drawn(lists):
    return [[pixels(drawing.image) for drawing in drawings] for drawings in lists]


def by_hand(model, request, **settings):
    """What the engine makes of a request with the model's defaults."""
    settings = SamplingSettings(**model.settings(**settings))
    return Engine(model.transformer, model.tokenizer.vocabulary).run([request], settings)[0]


def prompts_of(model):
    return Prompts(model.tokenizer.vocabulary, model.tokenizer.image.grid)


def test_the_likeliest_candidate_is_kept_and_its_seed_draws_it_again(plain):
    lists = plain.draw(PROMPTS, num_images=2, seed=10, best_of=3, rank="likelihood")
    assert [[drawing.prompt for drawing in drawings] for drawings in lists] == [[prompt] * 2 for prompt in PROMPTS]
    candidates = drawn(plain.draw(PROMPTS, num_images=6, seed=10))
    for prompt, drawings, rivals in zip(PROMPTS, lists, candidates):
        request = prompts_of(plain).text_to_image(plain.tokenizer.text.encode(prompt), seeds=range(10, 16))
        outputs = by_hand(plain, request)
        expected = own_likelihood(plain.transformer, plain.tokenizer.vocabulary, [request], [outputs])[0]
        for place, drawing in enumerate(drawings):
            scores = drawing.scores["likelihood"]
            assert list(drawing.scores) == ["likelihood"]
            assert scores == pytest.approx(expected[3 * place : 3 * place + 3], abs=1e-4)
            assert drawing.chosen == int(np.argmax(scores))
            assert drawing.seed == 10 + 3 * place + drawing.chosen
            assert pixels(drawing.image) == rivals[3 * place + drawing.chosen]
    alone = plain.draw([PROMPTS[1]], seed=lists[1][1].seed)
    assert drawn(alone)[0][0] == pixels(lists[1][1].image)
    assert len({drawing.chosen for drawings in lists for drawing in drawings}) > 1


def test_an_encoder_ranks_alone_or_with_the_likelihood(plain, retrieval_folder):
    ranker = retrieval_folder / "encoder"
    encoder = open_encoder(ranker)
    candidates = plain.draw(PROMPTS, num_images=4, seed=1)
    fits = encoder.encode_texts(PROMPTS)[:, None] * np.stack(
        [encoder.encode_images([drawing.image for drawing in drawings]) for drawings in candidates]
    )
    for rank, names in (("clip", ["clip"]), ("both", ["likelihood", "clip"])):
        lists = plain.draw(PROMPTS, seed=1, best_of=4, rank=rank, ranker=ranker)
        for number, (drawing,) in enumerate(lists):
            assert list(drawing.scores) == names
            assert drawing.scores["clip"] == pytest.approx(fits[number].sum(axis=-1).tolist(), abs=1e-4)
            assert drawing.chosen == choose(drawing.scores)
            assert pixels(drawing.image) == pixels(candidates[number][drawing.chosen].image)


def test_the_summary_compares_the_first_candidates_with_the_chosen():
    image = Image.new("RGB", (2, 2))
    drawings = [
        Drawing(image, "a", 1, (), {"clip": (0.125, 0.5), "likelihood": (-2.0, -1.0)}, 1),
        Drawing(image, "b", 2, (), {"clip": (0.375, 0.25), "likelihood": (-3.0, -4.0)}, 0),
    ]
    assert ranking_summary(drawings) == {
        "clip": {"first": 0.25, "chosen": 0.4375},
        "likelihood": {"first": -2.5, "chosen": -2.0},
    }
    assert ranking_summary([]) == ranking_summary([Drawing(image, "a", 1)]) == {}
    assert drawings[0].record() == {
        "prompt": "a",
        "seed": 1,
        "scores": {"clip": [0.125, 0.5], "likelihood": [-2.0, -1.0]},
        "chosen": 1,
    }


def test_a_negative_prompt_changes_the_picture_and_a_blank_one_does_not(plain):
    without = drawn(plain.draw(PROMPTS, seed=3))
    assert drawn(plain.draw(PROMPTS, seed=3, negative=" \n")) == without
    guided = drawn(plain.draw(PROMPTS, seed=3, negative="a small blue square"))
    assert all(first != second for first, second in zip(guided, without))
    pieces = plain.tokenizer.text.encode
    request = prompts_of(plain).text_to_image(pieces(PROMPTS[1]), negative=pieces("a small blue square"), seeds=(3,))
    codes_HW = prompts_of(plain).image_codes(by_hand(plain, request)[0])
    assert guided[1][0] == pixels(plain.tokenizer.image.decode(codes_HW.reshape(1, -1))[0])

    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    boxed = {"box": (0, 0, 16, 12), "prompt": "a green star", "seed": 3}
    assert pixels(plain.infill(photo, **boxed, negative=" ")) == pixels(plain.infill(photo, **boxed))
    assert pixels(plain.infill(photo, **boxed, negative="a blue square")) != pixels(plain.infill(photo, **boxed))


def test_mixed_takes_the_samplers_in_turn(plain):
    (mixed,), (nucleus,), (contrast,) = (
        drawn(plain.draw(PROMPTS[:1], num_images=4, seed=2, sampler=name)) for name in ("mixed", "top-p", "cd-k")
    )
    assert mixed == [nucleus[0], contrast[1], nucleus[2], contrast[3]]
    assert nucleus != contrast


def test_retrieved_documents_stand_before_the_prompt(model, plain, memory):
    lists = model.draw(PROMPTS, num_images=2, seed=5, retrieve=2)
    for prompt, drawings in zip(PROMPTS, lists):
        documents = drawings[0].retrieved
        assert len(documents) == 2 and documents == drawings[1].retrieved
        assert documents[0].score >= documents[1].score
        assert all(item.document.segments == memory.document(item.row).segments for item in documents)
        request = prompts_of(model).text_to_image(
            model.tokenizer.text.encode(prompt), context=[item.document for item in documents], seeds=(5, 6)
        )
        codes_NP = np.stack([prompts_of(model).image_codes(ids).ravel() for ids in by_hand(model, request)])
        expected = model.tokenizer.image.decode(codes_NP)
        assert [pixels(drawing.image) for drawing in drawings] == [pixels(image) for image in expected]
    assert drawn(model.draw(PROMPTS, num_images=2, seed=5)) == drawn(plain.draw(PROMPTS, num_images=2, seed=5))
    assert drawn(lists) != drawn(plain.draw(PROMPTS, num_images=2, seed=5))
    assert pixels(model.generate(PROMPTS[0], seed=5, retrieve=2)[0]) == pixels(lists[0][0].image)


def test_documents_that_do_not_fit_are_left_out_of_their_own_prompt_alone(model):
    prompts = ["a red star", "a large red circle left of a small blue square on navy " * 2]
    lists = model.draw(prompts, seed=5, retrieve=20)
    found = model.retrieved([Document((Text(prompt),)) for prompt in prompts], 20)
    counts = []
    for prompt, (drawing,), items in zip(prompts, lists, found):
        assert [item.row for item in (*drawing.retrieved, *drawing.left_out)] == [item.row for item in items]
        counts.append(len(drawing.retrieved))
        pieces = model.tokenizer.text.encode(prompt)
        contexts = [[item.document for item in items[: counts[-1] + more]] for more in (0, 1)]
        fits, exceeds = (prompts_of(model).text_to_image(pieces, context=context) for context in contexts)
        assert len(fits.prompt_ids) + 16 <= 128 < len(exceeds.prompt_ids) + 16  # codes of a picture, positions
        record = drawing.record()
        assert [entry["row"] for entry in record["left_out"]] == [item.row for item in items[counts[-1] :]]
    assert counts[0] > counts[1] > 0
    for prompt, pictures, count in zip(prompts, drawn(lists), counts):
        assert drawn(model.draw([prompt], seed=5, retrieve=count)) == [pictures]
    with pytest.raises(RequestError, match="128 positions: shorten the prompt"):
        model.draw(["a star " * 200], retrieve=2)


def test_captions_leave_documents_out_rather_than_words(model, retrieval_folder):
    picture = retrieval_folder / "0.png"
    (caption,) = model.describe([picture], retrieve=20)
    count = len(caption.retrieved)
    assert 0 < count < 20 == count + len(caption.left_out)
    assert model.describe([picture], retrieve=count)[0].text == caption.text == model.caption(picture, retrieve=20)
    codes_HW = model.encode([model.square(picture)])[0]
    contexts = [[item.document for item in (*caption.retrieved, *caption.left_out[:more])] for more in (0, 1)]
    lengths = [
        len(prompts_of(model).infill_text([], [], codes_HW, context=context, max_new_tokens=32).prompt_ids)
        for context in contexts
    ]
    assert lengths[0] + 32 <= 128 < lengths[1] + 32


def test_one_text_is_no_list_of_prompts(model):
    with pytest.raises(
        RequestError, match=r"prompts='a star' is one text, draw takes a list of them; write \['a star'"
    ):
        model.draw("a star")
    with pytest.raises(RequestError, match="a prompt is int, not a text"):
        model.generate(["a star", 3])
    with pytest.raises(RequestError, match="images is one str, describe takes a list"):
        model.describe("photo.png")


def test_guidance_compares_with_or_without_the_documents(model):
    settings = {"seed": 5, "retrieve": 2, "guidance_scale": 3.0}
    kept, dropped = (
        drawn(model.draw(PROMPTS[:1], unconditional_context=name, **settings)) for name in ("keep", "drop")
    )
    assert kept == drawn(model.draw(PROMPTS[:1], **settings)) != dropped
    settings["guidance_scale"] = 1.0  # nothing is compared
    assert drawn(model.draw(PROMPTS[:1], **settings)) == drawn(
        model.draw(PROMPTS[:1], unconditional_context="drop", **settings)
    )


def test_what_was_retrieved_is_on_record(model):
    ((drawing,),) = model.draw(PROMPTS[:1], retrieve=1)
    record = json.loads(json.dumps(drawing.record()))
    (document,) = record.pop("retrieved")
    assert record == {"prompt": PROMPTS[0], "seed": 0}
    assert document["text"] == CAPTIONS[document["row"]] == drawing.retrieved[0].text
    assert document["row"] == drawing.retrieved[0].row
    assert document["name"].endswith(f"rows.jsonl:{document['row'] + 1}")
    assert document["score"] == pytest.approx(drawing.retrieved[0].score, abs=1e-4)


def test_the_sheet_shows_what_was_retrieved_beside_what_was_drawn(model):
    ((drawing,),) = samples = model.draw(PROMPTS[:1], retrieve=1)
    (document,) = drawing.retrieved
    shown = model.tokenizer.detokenize(document.document)
    caption = f"{document.score:.3f} {shown.segments[0].text}"
    rows = [
        (f"retrieved for: {PROMPTS[0]}", [shown.segments[1].pixels], [caption]),
        (f"drawn: {PROMPTS[0]}", [drawing.image], []),
    ]
    assert pixels(retrieval_sheet(model, samples)) == pixels(contact_sheet(rows))
    plain_rows = [(f"drawn: {PROMPTS[0]}", [drawing.image], [])]
    assert pixels(retrieval_sheet(model, [[replace(drawing, retrieved=())]])) == pixels(contact_sheet(plain_rows))


def test_a_copy_of_the_request_is_searched_but_not_retrieved(model, memory, retrieval_folder, model_folder):
    row = CAPTIONS.index("a green star")
    found = search(memory, memory.open_encoder(), model.tokenizer, text="a green star", count=len(memory))
    assert row in [hit.row for hit in found] and len(found) == len(CAPTIONS)
    ((drawing,),) = model.draw(["a green star"], retrieve=3)
    assert row not in [item.row for item in drawing.retrieved]
    strict = CM3.from_pretrained(model_folder)
    strict.use_memory(retrieval_folder / "memory", max_similarity=-0.5)
    ((drawing,),) = strict.draw(["a green star"], retrieve=3)
    assert all(item.score <= -0.5 for item in drawing.retrieved)


def test_captions_take_documents_for_their_pictures(model, retrieval_folder):
    picture = Image.open(retrieval_folder / "7.png")
    captions = model.caption([picture, picture], retrieve=2)
    finder = ContextFinder(retrieval_folder / "memory", model.tokenizer, encoder=None, device="cpu", max_similarity=0.9)
    (found,) = finder.find([Document((ImageSegment(picture),))], 2)
    assert len(found) == 2 and 7 not in [item.row for item in found]  # that is the picture itself
    codes_HW = model.tokenizer.image.encode([picture]).reshape(model.tokenizer.image.grid)
    request = prompts_of(model).infill_text(
        [], [], codes_HW, context=[item.document for item in found], max_new_tokens=2
    )
    request = replace(request, max_new_tokens=128 - len(request.prompt_ids))  # all that the context leaves
    (new_ids,) = by_hand(model, request, temperature=0.0, guidance_scale=1.0)
    expected = model.tokenizer.text.decode(prompts_of(model).text_tokens(new_ids))
    assert captions == [expected] * 2 and expected != model.caption(picture)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best_of": 0}, "best_of=0"),
        ({"best_of": 2}, "best_of=2 needs a ranker.*likelihood, caption, clip, both"),
        ({"rank": "clip"}, "rank='clip' has one candidate"),
        ({"best_of": 2, "rank": "taste"}, "rank='taste' is unknown"),
        ({"best_of": 2, "rank": "clip", "ranker": "./nowhere"}, "encoder './nowhere' is no folder"),
        ({"retrieve": -1}, "retrieve=-1"),
        ({"unconditional_context": "none"}, "unconditional_context='none' is unknown; choose keep or drop"),
        ({"negative": "a star", "guidance_scale": 1.0}, "negative='a star' has no effect at guidance_scale=1"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval"),
    ],
)
def test_refusals_say_what_was_found(model, options, message):
    with pytest.raises(CM3Error, match=message) as raised:
        model.draw(PROMPTS, **options)
    assert "\n" not in str(raised.value)


def test_a_memory_must_be_there_and_fit(plain, model, retrieval_folder, tmp_path):
    for call in (plain.generate, plain.caption):
        with pytest.raises(RequestError, match="retrieve=1 needs a memory"):
            call(retrieval_folder / "0.png" if call == plain.caption else "a star", retrieve=1)
    with pytest.raises(ModelFilesError, match="holds no finished memory"):
        plain.use_memory(tmp_path)
    source = open_source(SourceConfig(kind="jsonl", path=str(retrieval_folder / "rows.jsonl"), limit=3))
    Memory.build(source, plain.tokenizer, HashEncoder(), tmp_path / "hash")
    with pytest.raises(ModelFilesError, match="was built with encoder 0123456789ab"):
        plain.use_memory(tmp_path / "hash", encoder=retrieval_folder / "encoder")
    vocabulary = Vocabulary.build(plain.tokenizer.text.size, 32, num_sentinels=8)
    other = DocumentTokenizer(plain.tokenizer.text, plain.tokenizer.image, vocabulary)
    with pytest.raises(DataError, match="build the memory with this model's tokenizers"):
        CM3(plain.transformer, other).use_memory(retrieval_folder / "memory")
