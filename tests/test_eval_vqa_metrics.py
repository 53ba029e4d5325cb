"""VQA accuracy against recorded outputs of the official code.

How the fixtures were made: `PythonEvaluationTools/vqaEvaluation/vqaEval.py` of github.com/GT-Vision-Lab/VQA (commit
a013f00) with its two print statements taken out, so that Python 3 runs it; `processPunctuation` and
`processDigitArticle` for the normal forms, `evaluate` for accuracies. On 20,000 random strings and 3,000 random
questions the two gave equal results.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.errors import DataError
from cm3.eval.vqa_metrics import normalize_answer, vqa_accuracy

OFFICIAL = {
    "A man.": "man",
    "two dogs": "2 dogs",
    "No.": "no",
    "it's a 1,000 dollar bill, ok": "it's 1000 dollar bill ok",
    "3.5": "3.5",
    "3. 5": "3 5",
    ".5": ".5",
    "yes/no": "yes no",
    "t-shirt": "t shirt",
    "left - right": "left right",
    "dont know": "don't know",
    "the  Cat": "cat",
    "none": "0",
    "ten": "10",
    "u.s.a.": "usa",
    "what?!": "what",
    "(red)": "red",
    "red, white": "red white",
    "red,white": "red white",
    "somebody'd": "somebodyd",
    "lets go": "lets go",
    "wouldntve": "wouldntve",
    "wouldnt've": "wouldn't've",
    "couldn'tve": "couldn't've",
    "a an the": "",
    "$5.00.": "$5.00",
    "50%": "50%",
    "Im": "im",
    "hello_world": "hello world",
    "a;b": "b",
    "." * 40: "." * 8,
    "Two\tmen\nhere": "2 men here",
    "10 : 30": "10 : 30",
    "e.g. this": "eg this",
    "'Yes'": "'yes'",
    '"quoted" word': "quoted word",
    "  spaced  ": "spaced",
}


@pytest.mark.parametrize("answer", OFFICIAL)
def test_normal_forms_are_the_official_ones(answer):
    assert normalize_answer(answer) == OFFICIAL[answer]


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_leaving_one_out_gives_less_than_a_third_for_each_match(matches, accuracy):
    assert vqa_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "humans", "accuracy"),
    [
        ("Yes", ["yes"] * 10, 0.0),  # unanimous answers are compared as they are
        ("yes.", ["yes"] * 10, 0.0),
        ("yes\n", ["yes"] * 10, 1.0),  # but for line ends
        ("Yes", ["yes"] * 9 + ["no"], 1.0),
        ("two", ["2"] * 2 + ["3"] * 8, 0.6),
        ("a dog", ["dog"] * 4 + ["cat"] * 6, 1.0),
        ("dog", ["The dog."] + ["cat"] * 9, 0.3),
    ],
)
def test_people_must_disagree_for_answers_to_be_normalised(answer, humans, accuracy):
    assert vqa_accuracy(answer, humans) == pytest.approx(accuracy)


@given(st.integers(0, 10), st.permutations(range(10)))
def test_the_order_of_people_does_not_matter(matches, order):
    humans = ["cat"] * matches + ["dog", "bird", "cow", "ant", "bee", "fly", "owl", "pig", "hen", "fox"][matches:]
    mixed = [humans[i] for i in order]
    assert vqa_accuracy("cat", mixed) == pytest.approx(vqa_accuracy("cat", humans))


def test_one_answer_is_no_agreement():
    with pytest.raises(DataError, match="there are 1; compare single answers for equality"):
        vqa_accuracy("yes", ["yes"])
