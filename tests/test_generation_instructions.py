"""Instruction tasks: every request is a training example up to its answer, and answers depend on nothing else."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from cm3.errors import CM3Error
from cm3.generation import grammar
from cm3.generation.instructions import picture_request, words_request
from cm3.generation.prompts import Prompts
from cm3.generation.request import Request
from cm3.generation.settings import SamplingSettings
from cm3.model.objective import move_spans
from cm3.pipeline import CM3
from cm3.tokenizers.document import Image, ImageCodes, Text, TextTokens, TokenizedDocument
from cm3.tokenizers.instruct import ANSWERS, answer_spans, lay_out, tokenize_examples
from cm3.tokenizers.instruct_tasks import TASKS, image_fields, is_image_field
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(30, 16, num_sentinels=6, multiple=8)
E, B, S, EOSS = VOCABULARY.eos_id, VOCABULARY.break_id, VOCABULARY.sentinel_id(0), VOCABULARY.eoss_id
CODES = np.arange(4).reshape(2, 2)
PICTURE = tuple(VOCABULARY.codes_to_ids(CODES.ravel()).tolist())
QUESTIONS = ["How many stars?", "Is there a circle?", "What is above the large red square?"]


def document(task, *segments, answers=()):
    parts = [ImageCodes(CODES) if segment is PICTURE else TextTokens(np.array(segment)) for segment in segments]
    return TokenizedDocument(tuple(parts), {"task": task, ANSWERS: list(answers)})


def noise(seed, size=(40, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


@pytest.fixture(scope="module")
def model(model_folder):
    return CM3.from_pretrained(model_folder)


@pytest.fixture
def asked(model, monkeypatch):
    """The requests of every run of the engine."""
    runs = []
    real = model.engine.run
    monkeypatch.setattr(model.engine, "run", lambda requests, chosen: runs.append(requests) or real(requests, chosen))
    return runs


def pixels(answers):
    return [np.asarray(answer).tolist() for answer in answers]


def test_the_words_of_an_answer_are_filled_in_behind_the_sentinel():
    """Question: (5 6) Answer: (7) <answer> . (8)"""
    request = words_request(
        document("vqa", [5, 6, 7, 8], PICTURE, answers=[[0, 3, 3]]), VOCABULARY, max_new_tokens=9, seed=4
    )
    assert request == Request(
        prompt_ids=(E, 5, 6, 7, S, 8, B, *PICTURE, E, S),
        grammar=grammar.infill([grammar.Span(S, None)], EOSS),
        max_new_tokens=9,
        seeds=(4,),
    )


@pytest.mark.parametrize(
    ("task", "segments", "prompt", "unconditional", "image_only"),
    [
        ("edit", ([5], PICTURE, [6, 7]), (E, 5, B, *PICTURE, B, 6, 7, B), (E, S, B), (E, 5, B, *PICTURE, B, S, B)),
        ("edges", ([5], PICTURE, [6]), (E, 5, B, *PICTURE, B, 6, B), (E, S, B), (E, 5, B, *PICTURE, B, S, B)),
        ("segment", ([5, 6], PICTURE), (E, 5, 6, B, *PICTURE, B), (E, 5, 6, B, S, B), None),
        ("grounded", ([5, 6],), (E, 5, 6, B), (E, S, B), None),
    ],
)
def test_a_picture_is_what_its_document_ends_with(task, segments, prompt, unconditional, image_only):
    assert picture_request(document(task, *segments), VOCABULARY, 4, seed=4) == Request(
        prompt_ids=prompt,
        unconditional_ids=unconditional,
        image_only_ids=image_only,
        grammar=grammar.image(4),
        max_new_tokens=4,
        seeds=(4,),
    )


@pytest.mark.parametrize("task", TASKS)
def test_requests_of_every_task_begin_its_training_rows(model, task):
    tokenizer, vocabulary = model.tokenizer, model.tokenizer.vocabulary
    user, answers = ([fill(name) for name in names] for names in (TASKS[task].user, TASKS[task].assistant))
    asked, whole = tokenize_examples(tokenizer, [lay_out(turns, task=task) for turns in ([user], [user, answers])])
    ids, spans = tokenizer.to_ids(whole), answer_spans(whole)
    if not image_fields(TASKS[task].assistant):
        request = words_request(asked, vocabulary, max_new_tokens=9, seed=0)
        row = move_spans(ids, spans, vocabulary).tolist()
        written = ids[spans[0, 0] : spans[0, 1]].tolist()
        assert row == [*request.prompt_ids, *written, vocabulary.eoss_id]
        assert model.text_of(np.array(written)).strip().endswith("one")
        return
    request = picture_request(asked, vocabulary, 16, seed=0)
    assert ids.tolist() == [*request.prompt_ids, *ids[slice(*spans[0])], vocabulary.eos_id]
    compared = request.image_only_ids or request.unconditional_ids
    rows = [move_spans(ids, span[None], vocabulary)[: len(compared)].tolist() for span in segments_of(whole)]
    assert list(compared) in rows  # one segment masked, what guidance compares with is a training row as well
    if request.image_only_ids:
        prompts = Prompts(vocabulary, tokenizer.image.grid)
        assert request.unconditional_ids == prompts.text_to_image(None).prompt_ids


def fill(name):
    return Image(noise(len(name))) if is_image_field(name) else Text("one")


def segments_of(document):
    """Start and stop of every segment among the ids of a document."""
    lengths = [part.codes_HW.size if isinstance(part, ImageCodes) else len(part.tokens) for part in document.segments]
    starts = np.cumsum([1, *(length + 1 for length in lengths)])[:-1]
    return np.stack([starts, starts + lengths], axis=1)


def test_questions_share_one_run_with_exactly_the_trained_layout(model, asked):
    photos = [noise(number) for number in range(2)]
    answers = model.answer(photos, QUESTIONS[:2], seed=3)
    assert len(answers) == 2 and all(isinstance(answer, str) and answer == answer.strip() for answer in answers)
    text, image, ids = model.tokenizer.text, model.tokenizer.image, model.tokenizer.vocabulary
    (requests,) = asked
    for request, photo, question in zip(requests, photos, QUESTIONS):
        codes = image.encode([photo])[0].astype(np.int64)
        expected = [ids.eos_id, *ids.text_to_ids(text.encode(f"Question: {question} Answer:")), ids.sentinel_id(0)]
        expected += [*ids.text_to_ids(text.encode(".")), ids.break_id, *ids.codes_to_ids(codes)]
        assert list(request.prompt_ids) == [*expected, ids.eos_id, ids.sentinel_id(0)]
        assert request.seeds == (3,)


@pytest.mark.parametrize(
    ("task", "texts", "sampling"),
    [
        ("vqa", QUESTIONS, {"max_new_tokens": 12}),
        ("vqa", QUESTIONS, {"max_new_tokens": 12, "temperature": 1.0}),
        ("edit", ["make it red", "move the small green star to the top", "add a circle"], {}),
        ("edit", ["make it red", "remove the star", "add a circle"], {"image_guidance_scale": 1.5}),
    ],
)
def test_a_row_depends_on_its_content_and_seed_only(model, task, texts, sampling):
    rows = [[noise(number), text] for number, text in enumerate(texts)]
    together = model.instruct(task, rows, seed=5, **sampling)
    alone = [model.instruct(task, [row], seed=5, **sampling)[0] for row in rows]
    swapped = model.instruct(task, [[*reversed(row)] for row in rows[::-1]], seed=5, **sampling)
    if task == "vqa":
        assert together == alone == swapped[::-1]
    else:
        assert pixels(together) == pixels(alone) == pixels(swapped[::-1])
        assert all(answer.size == (16, 16) for answer in together)


def test_seeds_draw_other_pictures_and_words_are_the_likeliest(model):
    row = [noise(0), "make it red"]
    first, again, other = (model.instruct("edit", [row], seed=seed) for seed in (1, 1, 2))
    assert pixels(first) == pixels(again) != pixels(other)
    question = [noise(0), QUESTIONS[0]]
    short = {"max_new_tokens": 12}
    likeliest = [model.instruct("vqa", [question], seed=seed, **short) for seed in (1, 2)]
    drawn = [model.instruct("vqa", [question], seed=seed, temperature=1.0, **short) for seed in (1, 2)]
    assert likeliest[0] == likeliest[1] and drawn[0] != drawn[1]
    assert model.instruct("vqa", [question], guidance_scale=3.0, **short) == likeliest[0]  # words are not guided


@pytest.mark.parametrize(
    ("sampling", "compared"),
    [
        ({"guidance_scale": 1.0}, {"unconditional_ids": None, "image_only_ids": None}),
        ({"guidance_scale": 4.0}, {"unconditional_ids": "image alone", "image_only_ids": None}),
        ({"guidance_scale": 4.0, "image_guidance_scale": 4.0}, {"image_only_ids": None}),
        ({"guidance_scale": 4.0, "image_guidance_scale": 1.5}, {}),
    ],
)
def test_an_edit_is_guided_by_its_instruction_and_its_picture(model, asked, sampling, compared):
    """Against the engine with the prompts that count, two at most but where both scales do."""
    found = model.edit(noise(0), "make it red", seed=2, **sampling)
    ((request,),) = asked
    prompts = {name: request.image_only_ids if value == "image alone" else value for name, value in compared.items()}
    scales = sampling if not compared else {"guidance_scale": sampling["guidance_scale"]}
    settings = SamplingSettings(**model.settings(**scales))
    by_hand = dataclasses.replace(request, **prompts)
    ((new_ids,),) = model.engine.run([by_hand], settings)
    codes_HW = model.prompts.image_codes(new_ids)
    assert pixels([found]) == pixels(model.tokenizer.image.decode(codes_HW.reshape(1, -1)))
    plain = model.edit(noise(0), "make it red", seed=2, guidance_scale=1.0)
    assert (pixels([found]) == pixels([plain])) == (sampling == {"guidance_scale": 1.0})


def test_answers_and_edits_are_those_tasks_for_one_or_several(model, tmp_path):
    noise(0).save(tmp_path / "photo.png")
    path = str(tmp_path / "photo.png")
    (expected,) = model.instruct("vqa", [[noise(0), QUESTIONS[0]]], max_new_tokens=8)
    assert model.answer(path, QUESTIONS[0], max_new_tokens=8) == expected
    assert model.answer([path], [QUESTIONS[0]], max_new_tokens=8) == [expected]
    assert model.instruct("vqa", [[Path(path), QUESTIONS[0]]], max_new_tokens=8) == [expected]
    edited = model.instruct("edit", [[noise(0), "make it red"]], seed=1)
    assert pixels([model.edit(path, "make it red", seed=1)]) == pixels(edited)
    assert pixels(model.edit([path], ["make it red"], seed=1)) == pixels(edited)
    assert model.instruct("edit", []) == model.answer([], []) == []


def test_an_answer_has_what_the_context_leaves(model, asked):
    (room,) = (128 - len(request.prompt_ids) for request in [asking(model, asked, "x")])
    longest = "x" * next(n for n in range(1, 200) if len(model.tokenizer.text.encode("Question: " + "x" * n)) >= 90)
    request = asking(model, asked, longest)
    assert request.max_new_tokens == 128 - len(request.prompt_ids) < room
    assert asking(model, asked, "x", max_new_tokens=7).max_new_tokens == 7


def asking(model, asked, question, **options):
    model.answer(noise(0), question, **options)
    return asked[-1][0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: m.instruct("translate", [["a"]]), "there is no task 'translate'; choose among generate, edit, "),
        (
            lambda m, p: m.instruct("edit", [[p, "make it red"], ["make it red"]]),
            "row 1: task 'edit' takes a picture (image) and a text (instruction) from the user, found 1 text(s) and 0",
        ),
        (lambda m, p: m.instruct("vqa", [[p, p, "why?"]]), "found 1 text(s) and 2 picture(s)"),
        (lambda m, p: m.instruct("vqa", [p]), "row 0 is Image, not a list; give a list of rows"),
        (lambda m, p: m.instruct("generate", ["a red star"]), "row 0 is str, not a list; give a list of rows"),
        (lambda m, p: m.instruct("vqa", [[p, "why?"]], topp=0.5), "'topp' is unknown"),
        (lambda m, p: m.instruct("vqa", [[p, "why?"]], max_new_tokens=1), "allows 1 new ids"),
        (lambda m, p: m.instruct("segment", [[p]], image_guidance_scale=2.0), "no prompt with a picture alone"),
        (lambda m, p: m.answer(p, " \n"), "the question of row 0 is empty; say what is asked for"),
        (lambda m, p: m.answer([p, p], ["why?", ""]), "the question of row 1 is empty"),
        (lambda m, p: m.answer([p, p], "why?"), "there are 2 picture(s) and 1 question(s); give one for each picture"),
        (lambda m, p: m.answer("nowhere.png", "why?"), "nowhere.png"),
        (lambda m, p: m.answer(p, "why? " * 100), "the model has 128 positions"),
        (lambda m, p: m.edit(p, ""), "the instruction of row 0 is empty"),
        (lambda m, p: m.edit(p, "make it red " * 100), "the model has 128 positions"),
        (lambda m, p: m.edit(p, ["a", "b"]), "1 picture(s) and 2 instruction(s)"),
    ],
)
def test_refusals_say_in_one_line_what_was_found(model, call, message):
    with pytest.raises(CM3Error, match=re.escape(message)) as raised:
        call(model, noise(0))
    assert "\n" not in str(raised.value)
