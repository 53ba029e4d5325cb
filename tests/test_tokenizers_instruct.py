"""Instruction tasks: the paper's templates, and answers found again among the ids of any laid-out example."""

import re

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.errors import DataError
from cm3.model.objective import move_spans, unmask
from cm3.tokenizers.document import Document, DocumentTokenizer, Image, ImageCodes, Text, TextTokens, TokenizedDocument
from cm3.tokenizers.document_ids import document_to_ids
from cm3.tokenizers.instruct import (
    ANSWER_CHARACTERS,
    ANSWERS,
    answer_spans,
    check_fit,
    cut_at_answers,
    lay_out,
    tokenize_examples,
)
from cm3.tokenizers.instruct_tasks import TASKS, image_fields, is_image_field, located

BEFORE, AFTER = (Image(PIL.Image.new("RGB", (16, 16), color)) for color in ("red", "navy"))
QUESTION = ((BEFORE, Text("How many stars?")), (Text("two"),))


@pytest.fixture(scope="module")
def tokenizer(model_folder) -> DocumentTokenizer:
    return DocumentTokenizer.load(model_folder)


def shown(document: Document) -> list[str]:
    """The segments of a document as text; its answers in brackets."""
    shown = []
    for number, segment in enumerate(document.segments):
        text = segment.text if isinstance(segment, Text) else {id(BEFORE): "A", id(AFTER): "B"}[id(segment)]
        for where, first, stop in reversed(document.metadata[ANSWER_CHARACTERS]):
            if where == number:
                text = f"{text[:first]}[{text[first:stop]}]{text[stop:]}"
        shown.append(text)
    return shown


def conditioned(on):
    return [f"Make high quality image from {on}", "A", "one", "[B]"]


@pytest.mark.parametrize(
    ("task", "user", "assistant", "wordings"),
    [
        ("generate", ["one"], [AFTER], [["one", "[B]"]]),
        ("edit", [BEFORE, "one"], [AFTER], [["Edit first image following the instruction", "A", "one", "[B]"]]),
        ("edit", ["one", BEFORE], [AFTER], [["Edit first image following the instruction", "A", "one", "[B]"]]),
        ("text_in_image", ["STOP {x} [y]"], [AFTER], [['draw "STOP {x} [y]"', "[B]"]]),
        (
            "grounded",
            ["a street", "cat at (1, 2) -> (3, 4)", "dog at (5, 6) -> (7, 8)"],
            [AFTER],
            [
                [
                    "Generate high quality image of a street with segmentations cat at (1, 2) -> (3, 4), "
                    "dog at (5, 6) -> (7, 8)",
                    "[B]",
                ]
            ],
        ),
        ("edges", [BEFORE, "one"], [AFTER], [conditioned("canny edge features")]),
        ("segmentation", [BEFORE, "one"], [AFTER], [conditioned("a segmentation map")]),
        ("hed", [BEFORE, "one"], [AFTER], [conditioned("hed features")]),
        ("pose", [BEFORE, "one"], [AFTER], [conditioned("openpose features")]),
        ("depth", [BEFORE, "one"], [AFTER], [conditioned("depth features")]),
        ("normals", [BEFORE, "one"], [AFTER], [conditioned("3D norm features")]),
        ("scribble", [BEFORE, "one"], [AFTER], [conditioned("children's scribbles")]),
        ("segment", [BEFORE], [AFTER], [["Make a segmentation map from the image", "A", "[B]"]]),
        ("caption", [BEFORE], ["one"], [["[one]", "A"], ["Describe the given picture.[ one]", "A"]]),
        (
            "long_caption",
            [BEFORE],
            ["one"],
            [
                ["Describe the given picture in very detail.[ one]", "A"],
                ["Describe all the objects in the given image in very detail.[ one]", "A"],
                ["Generate a long caption for the given image.[ one]", "A"],
            ],
        ),
        (
            "narration",
            [BEFORE],
            ["one"],
            [
                ["Describe the given picture in very detail.[ one]", "A"],
                ["Generate a long narration of what is happening in the given image.[ one]", "A"],
                ["Generate a long caption for the given image.[ one]", "A"],
            ],
        ),
        (
            "vqa",
            [BEFORE, "q?"],
            ["a"],
            [
                ["Question: q? Answer:[ a].", "A"],
                ["Question: q?\n[a]", "A"],
                ["Question: q? The answer is[ a].", "A"],
            ],
        ),
        ("science", [BEFORE, "q?\nOptions: x"], ["a"], [["Question: q?\nOptions: x\nAnswer:[ a].", "A"]]),
        (
            "explanation",
            [BEFORE, "q?"],
            ["because.", "a"],
            [["Question: q?\nAnswer: Let's think step-by-step:[ because. So the answer is a].", "A"]],
        ),
    ],
)
def test_templates_are_those_of_the_paper(task, user, assistant, wordings):
    turns = [tuple(Text(part) if isinstance(part, str) else part for part in turn) for turn in (user, assistant)]
    assert len(TASKS[task].wordings) == len(wordings)
    for number, expected in enumerate(wordings):
        assert shown(lay_out(turns, task=task, wording=number)) == expected
    assert shown(lay_out(turns, task=task, wording=len(wordings))) == wordings[0]


def test_image_first_moves_the_pictures_that_are_given_and_nothing_else():
    assert shown(lay_out(QUESTION, task="vqa", layout="image_first")) == [
        "A",
        "Question: How many stars? Answer:[ two].",
    ]
    edit = lay_out(((BEFORE, Text("add")), (AFTER,)), task="edit", layout="image_first")
    assert shown(edit) == ["A", "Edit first image following the instruction", "add", "[B]"]
    drawn = ((Text("a star"),), (AFTER,))
    assert shown(lay_out(drawn, task="generate", layout="image_first")) == ["a star", "[B]"]


@pytest.mark.parametrize("name", TASKS)
def test_every_wording_uses_every_field_once_and_asks_for_the_whole_answer(name):
    task = TASKS[name]
    user, assistant = ([field.rstrip("*") for field in fields] for fields in (task.user, task.assistant))
    for wording in task.wordings:
        assert sorted(re.findall(r"\{(\w+)\}", " ".join(wording))) == sorted([*user, *assistant])
        marked = re.findall(r"\{(\w+)\}", " ".join(re.findall(r"\[(.*?)\]", " ".join(wording))))
        assert marked == [field for field in assistant if not is_image_field(field)]
        for field in (*image_fields(user), *image_fields(assistant)):
            assert f"{{{field}}}" in wording
        answers = [place for place, part in enumerate(wording) if part[1:-1] in image_fields(assistant)]
        assert answers in ([], [len(wording) - 1])  # a prompt ends where the picture begins


def test_ids_and_masking_of_an_answer_inside_a_text(tokenizer):
    """`E Question: q Answer: S0 . B image E S0 a eoss` (CM3Leon, table 5)."""
    (document,) = tokenize_examples(tokenizer, [lay_out(QUESTION, task="vqa")])
    vocabulary, encode = tokenizer.vocabulary, tokenizer.text.encode
    before, answer, after = (
        vocabulary.text_to_ids(encode(text)).tolist() for text in ("Question: How many stars? Answer:", " two", ".")
    )
    image = vocabulary.codes_to_ids(tokenizer.image.encode([BEFORE.pixels])[0]).tolist()
    eos, gap, sentinel, eoss = vocabulary.eos_id, vocabulary.break_id, vocabulary.sentinel_id(0), vocabulary.eoss_id
    ids = tokenizer.to_ids(document)
    assert ids.tolist() == [eos, *before, *answer, *after, gap, *image, eos]
    spans = answer_spans(document)
    assert spans.tolist() == [[1 + len(before), 1 + len(before) + len(answer)]]
    masked = move_spans(ids, spans, vocabulary)
    assert masked.tolist() == [eos, *before, sentinel, *after, gap, *image, eos, sentinel, *answer, eoss]
    np.testing.assert_array_equal(unmask(masked, vocabulary), ids)


def test_a_picture_as_the_answer_is_its_codes(tokenizer):
    (document,) = tokenize_examples(tokenizer, [lay_out(((BEFORE, Text("add")), (AFTER,)), task="edit")])
    ids = tokenizer.to_ids(document)
    assert document.metadata[ANSWERS] == [[3, 0, 16]]
    [[start, stop]] = answer_spans(document)
    assert stop == len(ids) - 1 and ids[start - 1] == tokenizer.vocabulary.break_id
    expected = tokenizer.image.encode([AFTER.pixels])[0]
    np.testing.assert_array_equal(tokenizer.vocabulary.ids_to_codes(ids[start:stop]), expected)


def test_a_conversation_is_laid_out_as_it_is_and_answers_are_whole_segments():
    turns = ((Text("look"), BEFORE), (Text("I see"), AFTER), (Text("and?"),), (Text("no"),))
    for layout in ("text_first", "image_first"):
        document = lay_out(turns, layout=layout)
        assert document.segments == tuple(part for turn in turns for part in turn)
        assert document.metadata[ANSWER_CHARACTERS] == [[2, 0, 5], [3, 0, 1], [5, 0, 2]]


def test_a_prompt_has_a_hole_or_ends_before_the_answer(tokenizer):
    asked = lay_out(QUESTION[:1], task="vqa")
    assert shown(asked) == ["Question: How many stars? Answer:[].", "A"]
    assert shown(lay_out(((BEFORE,),), task="caption")) == ["[]", "A"]
    assert shown(lay_out(((BEFORE, Text("add")),), task="edit"))[-1] == "add"
    assert shown(lay_out(QUESTION[:1])) == ["A", "How many stars?"]
    prompt, whole = tokenize_examples(tokenizer, [asked, lay_out(QUESTION, task="vqa")])
    [[start, stop]], [[first, last]] = answer_spans(prompt), answer_spans(whole)
    assert start == stop == first
    ids = tokenizer.to_ids(whole)
    np.testing.assert_array_equal(tokenizer.to_ids(prompt), np.delete(ids, slice(first, last)))


def test_places_count_from_the_first_segment_that_is_not_retrieved(tokenizer):
    (document,) = tokenize_examples(tokenizer, [lay_out(QUESTION, task="vqa")])
    context = (TextTokens(np.array([5, 6])), ImageCodes(np.zeros((4, 4), np.uint16)))
    longer = TokenizedDocument((*context, *document.segments), {**document.metadata, "retrieved": 2})
    np.testing.assert_array_equal(answer_spans(longer), answer_spans(document) + 2 + 1 + 16 + 1)


def test_documents_without_answers_are_tokenized_as_ever(tokenizer):
    documents = [Document((Text("a large red circle"), BEFORE, Text("")), {"row": "x:1"}), Document((Text(""),))]
    assert tokenize_examples(tokenizer, documents) == tokenizer.tokenize(documents)
    assert answer_spans(tokenizer.tokenize(documents)[0]).shape == (0, 2)
    assert cut_at_answers(documents[0]).segments == documents[0].segments
    assert tokenize_examples(tokenizer, []) == []


texts = st.text(min_size=1, max_size=12).map(Text)
images = st.sampled_from([BEFORE, AFTER])


@st.composite
def examples(draw):
    """Turns that fit a task, or a conversation, and how to lay them out."""
    name = draw(st.sampled_from([None, *TASKS]))
    layout = draw(st.sampled_from(["text_first", "image_first"]))
    if name is None:
        turns = draw(st.lists(st.lists(texts | images, min_size=1, max_size=3), min_size=2, max_size=5))
    else:
        sides = (TASKS[name].user, TASKS[name].assistant)
        turns = [[draw(images if is_image_field(field) else texts) for field in fields] for fields in sides]
    return turns, {"task": name, "layout": layout, "wording": draw(st.integers(0, 2))}


@settings(max_examples=60)
@given(example=examples())
def test_answers_come_back_from_the_ids(tokenizer, example):
    turns, how = example
    document = lay_out(turns, **how)
    (tokens,) = tokenize_examples(tokenizer, [document])
    ids, spans = tokenizer.to_ids(tokens), answer_spans(tokens)
    vocabulary = tokenizer.vocabulary
    assert tokenizer.from_ids(ids).segments == tokens.segments  # nothing is lost
    decoded = tokenizer.detokenize(tokens).segments
    assert [part.text for part in decoded if isinstance(part, Text)] == [
        part.text for part in document.segments if isinstance(part, Text)
    ]
    assert np.all(spans[:, 0] < spans[:, 1]) and np.all(spans[1:, 0] >= spans[:-1, 1])
    said = []
    for (start, stop), (segment, first, last) in zip(spans, document.metadata[ANSWER_CHARACTERS], strict=True):
        part = document.segments[segment]
        if isinstance(part, Text):
            text = tokenizer.text.decode(vocabulary.ids_to_text(ids[start:stop]).tolist())
            assert text == part.text[first:last]
            said.append(text)
        else:
            assert vocabulary.is_image(ids[start:stop]).all() and stop - start == 16
    wanted = [part.text for number, turn in enumerate(turns) if number % 2 for part in turn if isinstance(part, Text)]
    joined = "".join(said)
    assert all(text in joined for text in wanted)


@pytest.mark.parametrize(
    ("task", "turns", "message"),
    [
        ("vqq", QUESTION, "there is no task 'vqq'; choose among generate, edit,"),
        ("caption", ((BEFORE,), (Text("a"),)) * 2, "task 'caption' is one question and its answer, found 4 turns"),
        ("edit", ((BEFORE, Text("x")), (AFTER,)) * 2, "one question and its answer, found 4 turns; leave the task out"),
        ("vqa", QUESTION * 2, r"takes a text \(question\) from the user, found 1 text\(s\) and 1 picture\(s\)"),
        (
            "vqa",
            ((BEFORE, AFTER), QUESTION[1]),
            r"takes a picture \(image\) and a text \(question\) from the user, found 0 text\(s\) and 2 picture\(s\)",
        ),
        ("edit", ((BEFORE, Text("x")), (Text("y"),)), r"a picture \(edited_image\) from the assistant, found 1 text"),
        ("grounded", ((Text("x"),), (AFTER,)), r"a text \(caption\) and texts \(objects\*\) from the user, found 1"),
    ],
)
def test_turns_that_do_not_fit_are_refused(task, turns, message):
    with pytest.raises(DataError, match=message):
        check_fit(task, turns)
    with pytest.raises(DataError, match=message):
        lay_out(turns, task=task)


def test_further_questions_stand_below_the_first(tokenizer):
    turns = (*QUESTION, (Text("Red?"),), (Text("no"),))
    document = lay_out(turns, task="vqa")
    assert shown(document) == [f"{shown(lay_out(QUESTION, task='vqa'))[0]}\nQuestion: Red? Answer:[ no].", "A"]
    (whole,) = tokenize_examples(tokenizer, [document])
    ids = document_to_ids(whole, tokenizer.vocabulary)
    answers = [ids[start:stop].tolist() for start, stop in answer_spans(whole)]
    (alone,) = tokenize_examples(tokenizer, [lay_out((QUESTION[0], turns[3]), task="vqa")])
    ((start, stop),) = answer_spans(alone)
    assert len(answers) == 2 and answers[1] == document_to_ids(alone, tokenizer.vocabulary)[start:stop].tolist()
    assert shown(lay_out(turns[:3], task="vqa"))[0].endswith("Question: Red? Answer:[].")


def test_places_of_objects_are_those_of_the_square_that_is_seen():
    assert located("bottle", (199, 130, 204, 150), (256, 256)) == "bottle at (199, 130) -> (204, 150)"
    assert located("cat", (100, 0, 250, 50), (300, 100)) == "cat at (0, 0) -> (255, 128)"
    with pytest.raises(DataError, match="no part in the middle square of a picture of 300x100"):
        located("cat", (0, 0, 90, 50), (300, 100))
