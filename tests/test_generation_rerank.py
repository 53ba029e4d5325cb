"""Best of N: the model's own likelihood against its definition, and the choice by hand."""

import numpy as np
import pytest
import torch

from cm3.errors import RequestError
from cm3.generation.prompts import Prompts
from cm3.generation.rerank import caption_likelihood, choose, own_likelihood
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(12, 8, num_sentinels=2, multiple=8)
PROMPTS = Prompts(VOCABULARY, (2, 2))


def test_own_likelihood_is_the_mean_log_probability_of_the_new_ids():
    shape = {"width": 16, "num_layers": 1, "num_heads": 2, "max_positions": 16, "zero_init_outputs": False}
    model = Transformer(ModelConfig(vocabulary_size=VOCABULARY.size, init_std=0.4, **shape))
    requests = [PROMPTS.text_to_image([5, 6]), PROMPTS.infill_text([5], [], max_new_tokens=4)]
    pictures = [VOCABULARY.codes_to_ids(np.array(codes)) for codes in ([0, 1, 2, 3], [7, 7, 7, 7])]
    new_ids = [pictures, [np.array([9, 9, VOCABULARY.eoss_id])]]
    found = own_likelihood(model, VOCABULARY, requests, new_ids)
    assert [len(scores) for scores in found] == [2, 1]
    for request, samples, scores in zip(requests, new_ids, found):
        for ids, score in zip(samples, scores):
            row = torch.tensor([[*request.prompt_ids, *ids]])
            with torch.no_grad():
                log_p = model.logits(model(row))[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
            assert score == pytest.approx(log_p[-len(ids) :].mean().item(), abs=1e-5)


def test_caption_likelihood_is_that_of_the_masked_text_behind_its_image():
    torch.manual_seed(0)
    shape = {"width": 16, "num_layers": 1, "num_heads": 2, "max_positions": 16, "zero_init_outputs": False}
    model = Transformer(ModelConfig(vocabulary_size=VOCABULARY.size, init_std=0.4, **shape))
    images = [np.array([[0, 1], [2, 3]]), np.array([[7, 7], [7, 7]])]
    texts = [[5, 6, 7], [9]]
    found = caption_likelihood(model, PROMPTS, texts, images)
    eos, mask = VOCABULARY.eos_id, VOCABULARY.sentinel_id(0)
    for text, codes_HW, score in zip(texts, images, found):
        picture = VOCABULARY.codes_to_ids(codes_HW.ravel()).tolist()
        row = torch.tensor([[eos, mask, VOCABULARY.break_id, *picture, eos, mask, *text, VOCABULARY.eoss_id]])
        with torch.no_grad():
            log_p = model.logits(model(row))[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        assert score == pytest.approx(log_p[-len(text) - 1 :].mean().item(), abs=1e-5)


def test_the_best_by_one_ranker_is_its_highest_score():
    assert choose({"clip": [0.2, 0.31, 0.3]}) == 1
    assert choose({"clip": [0.2, 0.3, 0.3]}) == 1
    assert choose({"clip": [5.0]}) == 0


def test_rankers_are_pooled_on_equal_scales():
    """As they are, the second's scores decide alone (sample 0); with equal spreads, sample 1 is best."""
    scores = {"clip": [0.10, 0.30, 0.20], "likelihood": [-30.0, -40.0, -90.0]}
    assert np.argmax(np.sum(list(scores.values()), axis=0)) == 0
    assert choose(scores) == 1
    assert choose(scores, {"clip": 0.1, "likelihood": 1.0}) == 0
    assert choose(scores, {"clip": 1.0, "likelihood": -1.0}) == 2


def test_a_ranker_that_finds_all_samples_equal_has_no_say():
    assert choose({"clip": [0.1, 0.1, 0.1], "likelihood": [-3.0, -2.0, -1.0]}) == 2
    assert choose({"clip": [0.1, 0.1, 0.1]}) == 0


@pytest.mark.parametrize(
    ("scores", "weights", "message"),
    [
        ({}, None, "give equally many"),
        ({"clip": []}, None, "give equally many"),
        ({"clip": [1.0], "likelihood": [1.0, 2.0]}, None, r"'clip': 1, 'likelihood': 2.*give equally many"),
        ({"clip": [1.0]}, {"likelihood": 1.0}, r"weights for \['likelihood'\].*scores by \['clip'\]"),
        ({"clip": [1.0, float("nan")]}, None, "'clip' has the scores .*finite"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(scores, weights, message):
    with pytest.raises(RequestError, match=message):
        choose(scores, weights)
