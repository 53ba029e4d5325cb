"""Several ids in one pass: which of them count by hand, the ids of plain decoding, and the distribution they have."""

import argparse
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from cm3.cli_options import add_sampling, sampling
from cm3.errors import RequestError
from cm3.generation import grammar, speculative
from cm3.generation.engine import Engine
from cm3.generation.grammar import END, GrammarTables, Span
from cm3.generation.prompts import Prompts
from cm3.generation.settings import SamplingSettings
from cm3.generation.speculative import DRAWN, course, num_kept
from cm3.model.cache import KeyValueCache
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer
from cm3.tokenizers.document import TextTokens
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(40, 24, num_sentinels=16, multiple=8)
IMAGE = VOCABULARY.image_range
GRID = (4, 4)
PROMPTS, SMALL_PROMPTS = Prompts(VOCABULARY, GRID), Prompts(VOCABULARY, (2, 3))
CODES = np.arange(16).reshape(GRID)
BOX = np.zeros(GRID, dtype=bool)
BOX[1:3, 1:3] = True

FEW_CODES = Vocabulary.build(16, 3, num_sentinels=4, multiple=8)
NUM_PLACES = 3
NUM_SAMPLES = 1000
SAMPLING_ERROR = 0.1
"""More than the total variation between a distribution over 27 pictures and `NUM_SAMPLES` samples of it: 0.06."""


def build_model(vocabulary=VOCABULARY, seed=1, **overrides):
    torch.manual_seed(seed)
    shape = {"width": 32, "num_layers": 2, "num_heads": 4, "max_positions": 96, "zero_init_outputs": False}
    spread = {"init_std": 0.35, "position_init_std": 0.3}
    return Transformer(ModelConfig(vocabulary_size=vocabulary.size, **(shape | spread | overrides))).eval()


@pytest.fixture(scope="module")
def engine():
    return Engine(build_model(), VOCABULARY)


def picture_requests():
    """Requests whose new ids are all codes or named: all kinds of guidance, of several lengths."""
    rough = SamplingSettings(temperature=1.4, top_k=9, repetition_penalty=1.8)
    return [
        (PROMPTS.text_to_image([5, 6, 7], seeds=(0, 7)), SamplingSettings(guidance_scale=3.0, top_p=0.9)),
        (SMALL_PROMPTS.text_to_image([9], seeds=(3,)), rough),
        (PROMPTS.infill_image(CODES, BOX, [8, 8], seeds=(4,)), SamplingSettings(guidance_scale=0.5)),
        (PROMPTS.text_to_image([7, 9], seeds=(1, 2)), SamplingSettings(sampler="mixed")),
        (PROMPTS.text_to_image([4], seeds=(6,)), SamplingSettings(guidance_scale=2.0, guidance_interval=(0.25, 0.75))),
        (PROMPTS.text_to_image(None, seeds=(2**40,)), SamplingSettings(temperature=0.0)),
    ]


def text_requests():
    return [
        (PROMPTS.infill_text([], [], CODES, max_new_tokens=25), SamplingSettings()),
        (PROMPTS.complete([TextTokens(np.array([5]))], max_new_tokens=30, seeds=(1, 2)), SamplingSettings()),
    ]


def run(engine, pairs, window=0):
    """The ids of all samples, with one window for all requests or one for each."""
    windows = [window] * len(pairs) if isinstance(window, int) else window
    chosen = [dataclasses.replace(pair[1], speculative_window=own) for pair, own in zip(pairs, windows, strict=True)]
    outputs = engine.run([request for request, _ in pairs], chosen)
    return [[ids.tolist() for ids in samples] for samples in outputs]


def passes(engine, pairs, window):
    """(rows, ids) of every forward pass, those of the prompts included."""
    shapes = []
    handle = engine.model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    run(engine, pairs, window)
    handle.remove()
    return shapes


def test_ids_count_up_to_the_first_that_follows_a_wrong_guess():
    fed = [[9, 1, 2, 3], [9, 1, 5, 3], [9, 7, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3]]
    drawn = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
    # all guesses right; the second wrong; the first wrong, though later ones agree; only two places left; none left
    found = num_kept(torch.tensor(fed), torch.tensor(drawn), torch.tensor([4, 4, 4, 2, 0]))
    assert found.tolist() == [4, 2, 1, 2, 0]


def test_a_window_of_one_place_has_no_guesses():
    assert num_kept(torch.tensor([[9], [9]]), torch.tensor([[1], [1]]), torch.tensor([1, 0])).tolist() == [1, 0]


def test_the_course_of_a_run_names_what_the_grammar_does():
    first, second = VOCABULARY.sentinel_id(0), VOCABULARY.sentinel_id(1)
    spans = grammar.infill([Span(first, 2), Span(second, 1)], VOCABULARY.eoss_id)
    tables = GrammarTables([spans, grammar.image(3), grammar.image(9)], VOCABULARY, torch.device("cpu"))
    states = torch.tensor(tables.starts)
    named, num_new, state, taken = course(tables, states, torch.zeros(3, dtype=torch.long), 7, IMAGE.start)
    eoss, pad = VOCABULARY.eoss_id, VOCABULARY.pad_id
    assert named.tolist() == [
        [DRAWN, DRAWN, eoss, second, DRAWN, eoss, pad],
        [DRAWN, DRAWN, DRAWN, pad, pad, pad, pad],
        [DRAWN] * 7,
    ]
    assert num_new.tolist() == [6, 3, 7]
    assert state.tolist() == [END, END, tables.starts[2]] and taken.tolist() == [0, 0, 7]


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been():
    model = build_model()
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    cache = KeyValueCache.create(model.config, 2, 12).bounded([0, 0])
    with torch.no_grad():
        model(ids, cache=cache)
        cache.truncate([2, 4])
        assert cache.lengths_B.tolist() == [2, 4] and max(run.longest for run in cache.runs) == 4
        found = model(torch.tensor([[11, 12], [13, 14]]), cache=cache)
        expected = [model(torch.tensor([row]))[0, -2:] for row in ([5, 6, 11, 12], [9, 8, 7, 6, 13, 14])]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"position": "rope", "num_key_value_heads": 2, "norm": "rmsnorm"}])
def test_ids_are_those_of_plain_decoding(overrides):
    engine = Engine(build_model(**overrides), VOCABULARY)
    plain = run(engine, picture_requests())
    for window in (2, 5, 40):
        assert run(engine, picture_requests(), window) == plain


def test_a_row_does_not_depend_on_its_neighbours(engine):
    """Rows that write text are decoded plainly, and while they are so is everything beside them."""
    pairs = picture_requests()[:4] + text_requests()
    plain = run(engine, pairs)
    assert run(engine, pairs, 5) == plain
    assert [run(engine, [pair], 5)[0] for pair in pairs] == plain
    assert run(Engine(engine.model, VOCABULARY, max_batch_rows=4), pairs[::-1], 5) == plain[::-1]


def chain_engine(following):
    """A model that draws, from the codes, the one that follows the last id alone."""
    known = (VOCABULARY.break_id, *map(VOCABULARY.sentinel_id, range(2)), *range(IMAGE.start, IMAGE.stop))
    size = VOCABULARY.size
    model = build_model(width=size, tie_embeddings=False, zero_init_outputs=True, position="rope", max_positions=32)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(size))
        model.head.weight.zero_()
        for id in known:
            model.head.weight[following(id), id] = 1
    return Engine(model, VOCABULARY)


GREEDY_PICTURE = [(PROMPTS.text_to_image([5, 6]), SamplingSettings(temperature=0.0))]


@pytest.mark.parametrize(("window", "expected"), [(5, [(1, 5)] * 4), (16, [(1, 16)]), (99, [(1, 16)])])
def test_right_guesses_fill_the_window(window, expected):
    engine = chain_engine(lambda id: IMAGE.start)  # the first guess, and the last code again: always right
    assert passes(engine, GREEDY_PICTURE, window)[1:] == expected
    assert run(engine, GREEDY_PICTURE, window) == [[[IMAGE.start] * 16]]


def test_what_the_grammar_names_is_guessed_from_the_first_pass_on():
    """Two spans of two codes, each with its end, and the sentinel between them."""
    infill = [(PROMPTS.infill_image(CODES, BOX, [8]), SamplingSettings(temperature=0.0))]
    engine = chain_engine(lambda id: IMAGE.start)
    plain = run(engine, infill)
    assert len(plain[0][0]) == 7
    assert passes(engine, infill, 16)[1:] == [(1, 7)]
    assert run(engine, infill, 16) == plain


def test_the_widest_window_of_a_batch_counts():
    engine = chain_engine(lambda id: IMAGE.start)
    assert passes(engine, GREEDY_PICTURE * 3, (0, 16, 5))[1:] == [(3, 16)]


def test_wrong_guesses_cost_no_more_passes_than_plain_decoding():
    def following(id):
        return IMAGE.start + (5 if id == VOCABULARY.break_id else (id - IMAGE.start + 1) % IMAGE.size)

    engine = chain_engine(following)  # every id depends on the one before, and a guess is always one behind
    assert passes(engine, GREEDY_PICTURE, 4)[1:] == [(1, 4)] * 16
    assert run(engine, GREEDY_PICTURE, 4) == [[[IMAGE.start + code for code in range(5, 21)]]]


@pytest.fixture(scope="module")
def small_engine():
    """A model of three codes, whose pictures can be enumerated."""
    return Engine(build_model(FEW_CODES, seed=2), FEW_CODES)


SMALL_PICTURE = Prompts(FEW_CODES, (1, NUM_PLACES)).text_to_image([5, 6], seeds=range(NUM_SAMPLES))
PICTURES = list(itertools.product(range(3), repeat=NUM_PLACES))


def exact_probabilities(model, chosen):
    """Of every picture, from full forward passes over all of them."""
    logits = []
    for prompt in (SMALL_PICTURE.prompt_ids, SMALL_PICTURE.unconditional_ids):
        rows = torch.tensor([[*prompt, *(FEW_CODES.image_range.start + code for code in codes)] for codes in PICTURES])
        with torch.no_grad():
            scores = model.logits(model(rows))[:, len(prompt) - 1 : -1]
        logits.append(scores[..., FEW_CODES.image_range.start : FEW_CODES.image_range.stop].double().numpy())
    guided = (logits[1] + chosen.guidance_scale * (logits[0] - logits[1])) / chosen.temperature
    p = np.exp(guided) / np.exp(guided).sum(-1, keepdims=True)
    for row in p.reshape(-1, 3):  # the likeliest codes until they reach top_p
        likeliest = np.argsort(-row)
        needed = 1 + int((row[likeliest].cumsum() < chosen.top_p).sum())
        row[likeliest[needed:]] = 0
    p /= p.sum(-1, keepdims=True)
    places = np.arange(NUM_PLACES)
    return np.array([p[number, places, codes].prod() for number, codes in enumerate(PICTURES)])


def total_variation(engine, chosen):
    """Between the pictures that are drawn and the exact distribution."""
    counts = dict.fromkeys(PICTURES, 0)
    for ids in engine.run([SMALL_PICTURE], chosen)[0]:
        counts[tuple((ids - FEW_CODES.image_range.start).tolist())] += 1
    drawn = np.array(list(counts.values())) / NUM_SAMPLES
    return 0.5 * np.abs(drawn - exact_probabilities(engine.model, chosen)).sum()


AS_IT_IS = SamplingSettings(speculative_window=3)
GUIDED_NUCLEUS = SamplingSettings(speculative_window=2, guidance_scale=1.5, temperature=1.3, top_p=0.8)


@pytest.mark.parametrize("chosen", [AS_IT_IS, GUIDED_NUCLEUS])
def test_pictures_have_the_distribution_of_the_model(small_engine, chosen):
    assert total_variation(small_engine, chosen) < SAMPLING_ERROR


@pytest.mark.parametrize(
    "heuristic",
    [
        lambda fed, drawn, num_new: num_new,  # all ids count
        lambda fed, drawn, num_new: torch.minimum(num_kept(fed, drawn, num_new) + 1, num_new),  # one guess is forgiven
    ],
)
def test_a_heuristic_rule_would_be_found_out(small_engine, monkeypatch, heuristic):
    monkeypatch.setattr(speculative, "num_kept", heuristic)
    assert total_variation(small_engine, AS_IT_IS) > 2 * SAMPLING_ERROR


@pytest.mark.parametrize("window", [1, -1])
def test_windows_that_cannot_be_used_are_refused(window):
    with pytest.raises(RequestError, match=f"speculative_window={window} cannot be used; .* 0 .off., or 2 or more"):
        SamplingSettings(speculative_window=window)


def test_the_command_line_sets_the_window():
    parser = argparse.ArgumentParser()
    add_sampling(parser, guidance=True)
    assert sampling(parser.parse_args(["--speculative-window", "8"])) == {"speculative_window": 8}
    assert sampling(parser.parse_args([])) == {}


def test_a_compiled_engine_refuses_a_window(engine, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    compiled = Engine(engine.model, VOCABULARY, compile=True)
    with pytest.raises(RequestError, match="step is compiled, .* compile=False, or set speculative_window=0"):
        run(compiled, GREEDY_PICTURE, 4)
