"""The engine on a tiny random model: cached equals uncached, batched equals alone, and what requests ask."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.errors import RequestError
from cm3.generation import engine as engine_module
from cm3.generation.engine import Engine
from cm3.generation.prompts import Prompts
from cm3.generation.settings import SamplingSettings
from cm3.model.config import ModelConfig
from cm3.model.objective import unmask
from cm3.model.transformer import Transformer
from cm3.tokenizers.document import ImageCodes, TextTokens
from cm3.tokenizers.document_ids import document_from_ids
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(40, 24, num_sentinels=16, multiple=8)
GRID = (4, 4)
PROMPTS = Prompts(VOCABULARY, GRID)
CODES = np.arange(16).reshape(GRID)
BOX = np.zeros(GRID, dtype=bool)
BOX[1:3, 1:3] = True
GREEDY = SamplingSettings(temperature=0.0)
FREE = SamplingSettings()
GUIDED = SamplingSettings(guidance_scale=3.0, top_p=0.9)


def build_model(**overrides):
    torch.manual_seed(1)
    shape = {"width": 32, "num_layers": 2, "num_heads": 4, "max_positions": 96, "zero_init_outputs": False}
    spread = {"init_std": 0.35, "position_init_std": 0.3}
    return Transformer(ModelConfig(vocabulary_size=VOCABULARY.size, **(shape | spread | overrides)))


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, VOCABULARY)


def mixed_requests():
    """Seven requests of every kind, with prompts of many lengths, and their settings."""
    rough = SamplingSettings(temperature=1.4, top_k=9, repetition_penalty=1.8)
    return [
        (PROMPTS.text_to_image([5, 6, 7], seeds=(0, 7)), GUIDED),
        (PROMPTS.infill_text([], [], CODES, max_new_tokens=25), FREE),
        (PROMPTS.text_to_image([9], seeds=(3,)), rough),
        (PROMPTS.infill_image(CODES, BOX, [8, 8], seeds=(4,)), SamplingSettings(guidance_scale=0.5)),
        (PROMPTS.complete([TextTokens(np.array([5, 9]))], max_new_tokens=50, seeds=(1, 2)), rough),
        (PROMPTS.infill_image(CODES, BOX, [8, 9, 10], seeds=(5,)), GUIDED),
        (PROMPTS.text_to_image(None, seeds=(2**40,)), GREEDY),
    ]


def as_lists(outputs):
    return [[ids.tolist() for ids in samples] for samples in outputs]


def run(engine, pairs):
    return as_lists(engine.run([request for request, _ in pairs], [chosen for _, chosen in pairs]))


def uncached_greedy(model, request, scale):
    """The likeliest image ids, with a full forward pass of both prompts for every id."""
    image = VOCABULARY.image_range
    new = []
    for _ in range(request.max_new_tokens):
        conditional, unconditional = (
            model.logits(model(torch.tensor([[*prompt, *new]]))[0, -1])[image.start : image.stop]
            for prompt in (request.prompt_ids, request.unconditional_ids)
        )
        new.append(int((unconditional + scale * (conditional - unconditional)).argmax()) + image.start)
    return new


@pytest.mark.parametrize("overrides", [{}, {"position": "rope", "num_key_value_heads": 2, "norm": "rmsnorm"}])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cached_decoding_equals_the_full_forward(overrides, scale):
    model = build_model(**overrides)
    request = PROMPTS.text_to_image([5, 6, 7, 8])
    with torch.no_grad():
        expected = uncached_greedy(model, request, scale)
    chosen = SamplingSettings(temperature=0.0, guidance_scale=scale)
    assert run(Engine(model, VOCABULARY), [(request, chosen)]) == [[expected]]


def test_a_row_does_not_depend_on_its_neighbours(engine):
    pairs = mixed_requests()
    together = run(engine, pairs)
    order = np.random.default_rng(0).permutation(len(pairs))
    assert run(engine, [pairs[i] for i in order]) == [together[i] for i in order]
    for pair, samples in zip(pairs, together):
        request, chosen = pair
        alone = [dataclasses.replace(request, seeds=(seed,)) for seed in request.seeds]
        assert [run(engine, [(one, chosen)])[0][0] for one in alone] == samples


@pytest.mark.parametrize("max_batch_rows", [2, 5])
def test_split_batches_give_the_same(model, engine, max_batch_rows):
    pairs = mixed_requests()[:4]
    widths = []
    small = Engine(model, VOCABULARY, max_batch_rows=max_batch_rows)
    handle = model.register_forward_pre_hook(lambda _, inputs: widths.append(len(inputs[0])))
    found = run(small, pairs)
    handle.remove()
    assert found == run(engine, pairs)
    assert max(widths) <= max_batch_rows


def test_samples_share_one_prefill_and_differ(model, engine):
    shapes = []
    request = PROMPTS.text_to_image([5, 6, 7], seeds=tuple(range(5)))
    handle = model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    (samples,) = run(engine, [(request, GUIDED)])
    handle.remove()
    assert shapes == [(2, 4)] + [(10, 1)] * 16
    assert len({tuple(ids) for ids in samples}) == 5


def test_guidance_of_one_equals_conditional_and_ignores_the_other_prompt(engine):
    request = PROMPTS.text_to_image([5, 6], seeds=(8,))
    other = dataclasses.replace(request, unconditional_ids=None)
    chosen = SamplingSettings(guidance_scale=1.0)
    assert run(engine, [(request, chosen)]) == run(engine, [(other, chosen)])
    assert run(engine, [(request, chosen)]) != run(engine, [(request, GUIDED)])


def test_guidance_between_equal_prompts_changes_nothing(engine):
    request = PROMPTS.text_to_image(None, seeds=(8,))
    guided = SamplingSettings(guidance_scale=5.0)
    assert run(engine, [(request, guided)]) == run(engine, [(request, FREE)])


def test_only_image_rows_use_the_image_part_of_the_head(model, engine, monkeypatch):
    heads = []
    real = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden, part: heads.append(part) or real(hidden, part))
    image = (VOCABULARY.image_range.start, VOCABULARY.image_range.stop)
    run(engine, mixed_requests()[:1] + mixed_requests()[3:4])
    assert heads == [image] * 16
    heads.clear()
    caption, picture = mixed_requests()[1], mixed_requests()[0]
    length = len(run(engine, [caption])[0][0])
    heads.clear()
    run(engine, [caption, picture])
    in_text = -(-length // engine_module.CHECK_INTERVAL) * engine_module.CHECK_INTERVAL
    assert heads == [None] * min(in_text, 25) + [image] * max(16 - in_text, 0)


@settings(max_examples=5)
@given(st.integers(0, 2**62), st.floats(0.5, 3.0))
def test_every_stream_parses(engine, seed, temperature):
    chosen = SamplingSettings(temperature=temperature)
    document = [TextTokens(np.array([5])), ImageCodes(CODES.astype(np.uint16))]
    requests = [
        PROMPTS.complete([], max_new_tokens=2 + seed % 60, seeds=(seed, seed + 1)),
        PROMPTS.complete(document, max_new_tokens=1 + seed % 50, seeds=(seed,)),
        PROMPTS.text_to_image([5, 6], seeds=(seed,)),
        PROMPTS.infill_text([7], [8], CODES, max_new_tokens=2 + seed % 20, seeds=(seed,)),
        PROMPTS.infill_image(CODES, BOX, [5], seeds=(seed,)),
    ]
    outputs = engine.run(requests, chosen)
    for index, (request, samples) in enumerate(zip(requests, outputs)):
        for new_ids in samples:
            assert len(new_ids) <= request.max_new_tokens
            ids = np.array([*request.prompt_ids, *new_ids])
            if index == 2:
                ids = np.append(ids, VOCABULARY.eos_id)
            assert document_from_ids(unmask(ids, VOCABULARY), VOCABULARY, GRID)
    assert len(PROMPTS.text_tokens(outputs[3][0])) == len(outputs[3][0]) - 1


@pytest.mark.parametrize("text", [[5, 6], None])
def test_region_infill_leaves_the_outside_unchanged(engine, text):
    request = PROMPTS.infill_image(CODES, BOX, text)
    (new_ids,) = engine.run([request], GUIDED)[0]
    assert len(new_ids) == request.max_new_tokens
    filled = PROMPTS.filled(CODES, BOX, new_ids)
    assert np.array_equal(filled[~BOX], CODES[~BOX])
    assert not np.array_equal(filled[BOX], CODES[BOX])


def test_repetition_penalty_counts_generated_text_only(engine):
    request = PROMPTS.infill_text([], [], CODES, max_new_tokens=30)
    (plain,) = run(engine, [(request, GREEDY)])[0]
    (varied,) = run(engine, [(request, SamplingSettings(temperature=0.0, repetition_penalty=50.0))])[0]
    assert len(set(varied)) / len(varied) > len(set(plain)) / len(plain)
    image = PROMPTS.text_to_image([5])
    penalised = SamplingSettings(temperature=0.0, repetition_penalty=50.0)
    assert run(engine, [(image, penalised), (request, penalised)])[0] == run(engine, [(image, GREEDY)])[0]


def test_score_is_the_log_probability_of_each_continuation(model, engine):
    pairs = [((2, 5, 6), (7, 8)), ((2,), (9, 10, 11)), ((2, 5), (6,))]
    found = Engine(model, VOCABULARY, max_batch_rows=2).score(pairs)
    for (prompt, continuation), score in zip(pairs, found):
        with torch.no_grad():
            log_p = model.logits(model(torch.tensor([[*prompt, *continuation]]))[0]).log_softmax(-1)
        expected = sum(log_p[len(prompt) - 1 + i, id].item() for i, id in enumerate(continuation))
        assert score == pytest.approx(expected, abs=1e-4)


def test_the_model_is_evaluated_without_dropout_and_left_as_it_was(model):
    dropping = build_model(dropout=0.5)
    request = PROMPTS.text_to_image([5])
    assert dropping.training
    assert run(Engine(dropping, VOCABULARY), [(request, FREE)]) == run(Engine(model, VOCABULARY), [(request, FREE)])
    assert dropping.training


def test_no_requests_give_no_outputs(engine):
    assert engine.run([], FREE) == []


@pytest.mark.parametrize(
    ("changes", "chosen", "message"),
    [
        (
            {"prompt_ids": (2,) * 90},
            FREE,
            "90 prompt ids and asks for 16 .* 106; the model has 96 positions",
        ),
        ({"unconditional_ids": (2,) * 90}, GUIDED, "90 prompt ids"),
        ({"unconditional_ids": None}, GUIDED, "guidance_scale=3.0, .* set guidance_scale=1"),
        ({"max_new_tokens": 15}, FREE, "allows 15 new ids, .* at least 16"),
        ({"prompt_ids": ()}, FREE, "empty prompt"),
        ({"seeds": ()}, FREE, "no seeds"),
        ({"seeds": (-1,)}, FREE, "seeds"),
    ],
)
def test_what_cannot_be_served_is_refused(engine, changes, chosen, message):
    request = dataclasses.replace(PROMPTS.text_to_image([5, 6]), **changes)
    with pytest.raises(RequestError, match=message):
        engine.run([request], chosen)


def test_a_batch_must_hold_a_guided_row(model):
    with pytest.raises(RequestError, match="choose 2 or more"):
        Engine(model, VOCABULARY, max_batch_rows=1)


COMPILED = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
from cm3.generation.engine import Engine
from cm3.generation.prompts import Prompts
from cm3.generation.settings import SamplingSettings
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary

vocabulary = Vocabulary.build(40, 24, num_sentinels=16, multiple=8)
shape = dict(vocabulary_size=vocabulary.size, width=16, num_layers=1, num_heads=2, max_positions=64)
model = Transformer(ModelConfig(**shape, init_std=0.35, zero_init_outputs=False))
prompts = Prompts(vocabulary, (4, 4))
requests = [prompts.text_to_image([5, 6], seeds=(0, 1)), prompts.infill_text([5], [6], max_new_tokens=12)]
requests.append(prompts.text_to_image([7]))
settings = [SamplingSettings(guidance_scale=3.0, top_p=0.9), SamplingSettings(top_k=9, repetition_penalty=2.0)]
settings.append(SamplingSettings(sampler="cd-k", guidance_interval=(0.25, 0.75)))
plain, compiled = (
    [[ids.tolist() for ids in samples] for samples in engine.run(requests, settings)]
    for engine in (Engine(model, vocabulary), Engine(model, vocabulary, compile=True))
)
assert plain == compiled, (plain, compiled)
"""


def test_the_step_compiles_as_one_graph():
    """In a process of its own, without the shape checks of the suite, which no compiler can trace."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
