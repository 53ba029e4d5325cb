"""Rows compared with other prompts: every sampler against a full forward pass of each prompt, and the rows' number."""

import dataclasses

import numpy as np
import pytest
import torch

from cm3.errors import RequestError
from cm3.generation import grammar, guidance, logits
from cm3.generation.engine import Engine
from cm3.generation.noise import TOKEN_NOISE, gumbel
from cm3.generation.prompts import Prompts
from cm3.generation.settings import SamplingSettings
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(16, 24, num_sentinels=4, multiple=8)
GRID = (2, 4)
NUM_CODES = 8
PROMPTS = Prompts(VOCABULARY, GRID)
CODES = np.arange(8).reshape(GRID)
PICTURE = tuple(VOCABULARY.codes_to_ids(CODES.ravel()).tolist())
E, B = VOCABULARY.eos_id, VOCABULARY.break_id
TEXT = dataclasses.replace(PROMPTS.text_to_image([5, 6, 7], negative=[8]), seeds=(3, 4))
EDIT = dataclasses.replace(TEXT, prompt_ids=(E, *PICTURE, B, 9, 5, B), image_only_ids=(E, *PICTURE, B), seeds=(5,))
CAPTION = dataclasses.replace(
    PROMPTS.infill_text([], [], CODES, max_new_tokens=12),
    unconditional_ids=PROMPTS.infill_text([], [], max_new_tokens=12).prompt_ids,
    seeds=(6, 7),
)
PLAIN = SamplingSettings()
GUIDED = SamplingSettings(guidance_scale=3.0, top_p=0.8)
APART = SamplingSettings(guidance_scale=4.0, image_guidance_scale=1.5)
CONTRAST = SamplingSettings(sampler="cd-k", contrast_k=4, temperature=0.8, amateur_temperature=0.7)
MIXED = dataclasses.replace(CONTRAST, sampler="mixed", guidance_scale=2.0, top_p=0.9)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    shape = {"width": 16, "num_layers": 1, "num_heads": 2, "max_positions": 40, "zero_init_outputs": False}
    spread = {"init_std": 0.5, "position_init_std": 0.4}
    return Transformer(ModelConfig(vocabulary_size=VOCABULARY.size, **shape, **spread)).eval()


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, VOCABULARY)


@pytest.fixture
def shapes(model):
    """Rows and columns of every forward pass."""
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    yield seen
    handle.remove()


def run(engine, *pairs):
    outputs = engine.run([request for request, _ in pairs], [chosen for _, chosen in pairs])
    return [[ids.tolist() for ids in samples] for samples in outputs]


def plain_sample(model, request, chosen, seed):
    """An image, each id from a full forward pass of each prompt, guidance of scale 1 outside of the interval."""
    image = VOCABULARY.image_range
    column = torch.tensor([1.0])
    new = []
    for step in range(NUM_CODES):

        def scores(prompt):
            with torch.no_grad():
                row = torch.tensor([[*prompt, *new]])
                return model.logits(model(row))[:, -1, image.start : image.stop]

        full, none = scores(request.prompt_ids), scores(request.unconditional_ids)
        start, stop = chosen.guidance_interval
        is_inside = start * NUM_CODES <= step < stop * NUM_CODES
        scale, image_scale = (chosen.guidance_scale, chosen.image_guidance_scale) if is_inside else (1.0, 1.0)
        if chosen.sampler == "cd-k" and is_inside:
            k = torch.tensor([chosen.contrast_k])
            rule = (column * chosen.contrast_alpha, k, column * chosen.amateur_temperature)
            combined = guidance.contrastive(full, none, *rule)
        elif request.image_only_ids:
            image_only = scores(request.image_only_ids)
            combined = guidance.image_text(none, image_only, full, column * image_scale, column * scale)
        else:
            combined = guidance.classifier_free(full, none, column * scale)
        combined = logits.temperature(combined, column * chosen.temperature)
        if chosen.sampler == "top-p" or (chosen.sampler == "cd-k" and not is_inside):
            combined = logits.top_p(combined, column * chosen.top_p)
        noise = gumbel(torch.tensor([seed]), torch.tensor([step]), TOKEN_NOISE, image.size, image.start)
        new.append(int((combined + noise).argmax()) + image.start)
    return new


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75), (0.5, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        (TEXT, GUIDED),
        (TEXT, dataclasses.replace(CONTRAST, top_p=0.5)),
        (EDIT, APART),
        (EDIT, SamplingSettings(guidance_scale=3.0)),
        (EDIT, SamplingSettings(guidance_scale=2.0, image_guidance_scale=2.0)),
        (EDIT, SamplingSettings(image_guidance_scale=2.0, temperature=0.0)),
    ],
)
def test_samples_are_those_of_full_forward_passes_of_each_prompt(model, engine, request_, chosen, interval):
    chosen = dataclasses.replace(chosen, guidance_interval=interval)
    expected = [plain_sample(model, request_, chosen, seed) for seed in request_.seeds]
    assert run(engine, (request_, chosen)) == [expected]


def test_the_temperature_sampler_ignores_the_cuts_of_top_p(engine):
    cut = SamplingSettings(top_p=0.2, top_k=2, temperature=1.5)
    free = dataclasses.replace(cut, sampler="temperature")
    open_ = SamplingSettings(temperature=1.5)
    assert run(engine, (TEXT, free)) == run(engine, (TEXT, open_)) != run(engine, (TEXT, cut))


def test_contrast_takes_the_place_of_guidance_and_cuts(engine):
    other = dataclasses.replace(CONTRAST, guidance_scale=5.0, image_guidance_scale=2.0, top_k=1, top_p=0.1)
    assert run(engine, (TEXT, other)) == run(engine, (TEXT, CONTRAST)) != run(engine, (TEXT, PLAIN))


@pytest.mark.parametrize("request_", [TEXT, CAPTION])
def test_mixed_samples_are_those_of_the_single_samplers(engine, request_):
    several = dataclasses.replace(request_, seeds=(3, 4, 5, 6))
    (mixed,) = run(engine, (several, MIXED))
    top_p, cd_k = (
        run(engine, (several, dataclasses.replace(MIXED, sampler=sampler)))[0] for sampler in ("top-p", "cd-k")
    )
    assert mixed == [top_p[0], cd_k[1], top_p[2], cd_k[3]]
    assert mixed != top_p


def test_rows_of_all_kinds_share_a_batch_and_do_not_depend_on_it(model, engine):
    late = dataclasses.replace(GUIDED, guidance_interval=(0.5, 1.0), repetition_penalty=2.0)
    early = dataclasses.replace(APART, guidance_interval=(0.0, 0.375))
    middle = dataclasses.replace(CONTRAST, guidance_interval=(0.25, 0.625), repetition_penalty=1.5)
    pairs = [(TEXT, late), (CAPTION, middle), (EDIT, early), (CAPTION, MIXED), (TEXT, PLAIN), (EDIT, APART)]
    together = run(engine, *pairs)
    assert together == [run(engine, pair)[0] for pair in pairs]
    assert run(Engine(model, VOCABULARY, max_batch_rows=5), *pairs) == together
    assert run(engine, *reversed(pairs)) == together[::-1]


def test_contrast_in_text_counts_only_ids_that_may_come(engine):
    """With k = 1 and alpha = 1 a cd-k row is the greedy row: the mask of the grammar comes before the k-th."""
    strict = SamplingSettings(sampler="cd-k", contrast_k=1, contrast_alpha=1.0)
    assert run(engine, (CAPTION, strict)) == run(engine, (CAPTION, SamplingSettings(temperature=0.0)))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.0, 1.0), [(2, 4)] + [(4, 1)] * 8),
        ((0.25, 0.75), [(1, 4)] + [(2, 1)] * 2 + [(2, 4)] + [(4, 1)] * 4 + [(2, 1)] * 2),
        ((0.5, 1.0), [(1, 4)] + [(2, 1)] * 4 + [(2, 6)] + [(4, 1)] * 4),
        ((0.0, 0.5), [(2, 4)] + [(4, 1)] * 4 + [(2, 1)] * 4),
        ((0.0, 0.01), [(1, 4)] + [(2, 1)] * 8),
    ],
)
def test_rows_outside_the_interval_are_not_computed(engine, shapes, interval, expected):
    """Two samples: a prefill of the prompts, steps, and one prefill in which late rows catch up."""
    run(engine, (TEXT, dataclasses.replace(GUIDED, guidance_interval=interval)))
    assert shapes == expected


def test_a_row_that_has_ended_is_not_compared_any_more(engine, shapes):
    """A row that ends before its interval begins never gets the row it would be compared with."""
    two_codes = grammar.infill([grammar.Span(VOCABULARY.sentinel_id(0), 2)], VOCABULARY.eoss_id)
    stop = dataclasses.replace(CAPTION, seeds=(0,), grammar=two_codes)
    late = dataclasses.replace(GUIDED, guidance_interval=(0.75, 1.0))
    (ended, images) = run(engine, (stop, late), (TEXT, late))
    assert len(ended[0]) == 3 < 9 and len(images) == 2  # 0.75 of the budget of 12 are 9
    assert max(rows for rows, _ in shapes) == 3 + 2


@pytest.mark.parametrize(
    ("chosen", "rows"),
    [
        (APART, 3),
        (SamplingSettings(guidance_scale=2.0), 2),
        (SamplingSettings(guidance_scale=2.0, image_guidance_scale=2.0), 2),
        (CONTRAST, 2),
        (PLAIN, 1),
    ],
)
def test_all_streams_run_in_one_pass_and_none_without_weight(engine, shapes, chosen, rows):
    run(engine, (EDIT, chosen))
    assert [shape for shape in shapes if shape[1] == 1] == [(rows, 1)] * NUM_CODES


@pytest.mark.parametrize(
    ("changes", "chosen", "message"),
    [
        ({"unconditional_ids": None}, CONTRAST, "request 0 asks for sampler='cd-k', .* choose sampler='top-p'"),
        ({"unconditional_ids": None}, dataclasses.replace(MIXED, guidance_scale=1.0), "asks for sampler='mixed'"),
        ({"image_only_ids": None}, APART, "image_guidance_scale=1.5, .* set image_guidance_scale=1"),
        ({"unconditional_ids": None}, APART, "no unconditional prompt to compare with; set guidance_scale=1"),
        ({"image_only_ids": (E,) * 35}, APART, "35 prompt ids and asks for 8"),
    ],
)
def test_what_lacks_a_prompt_or_room_is_refused(engine, changes, chosen, message):
    with pytest.raises(RequestError, match=message):
        engine.run([dataclasses.replace(EDIT, **changes, seeds=(0, 1))], chosen)


def test_three_streams_need_three_rows(model):
    with pytest.raises(RequestError, match="takes 3 rows of a forward pass, but max_batch_rows=2; choose 3"):
        Engine(model, VOCABULARY, max_batch_rows=2).run([EDIT], APART)
