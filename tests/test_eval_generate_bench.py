"""`cm3 bench generate` at its smallest size: both sides make the same thing, and what is counted and printed."""

import math
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from cm3 import cli_bench
from cm3.cli import main
from cm3.errors import ConfigError
from cm3.eval import generate_bench
from cm3.eval.generate_bench import (
    GENERATE_SIZES,
    GenerateBench,
    GenerateCost,
    bytes_of_step,
    measure,
    random_prompts,
    table,
)
from cm3.eval.generate_sides import Case
from cm3.eval.machine import ReadRate, peak_memory, reset_peak_memory
from cm3.interop.chameleon import as_chameleon, has_transformers
from cm3.interop.chameleon_generate import foreign_copy, foreign_generate, generate_settings
from cm3.model.config import ModelConfig, parameter_count
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(40, 24, num_sentinels=8)
CONFIG = as_chameleon(
    ModelConfig(vocabulary_size=VOCABULARY.size, width=32, num_layers=2, num_heads=4, max_positions=32, init_std=0.2)
)
PROMPTS = ((5, 6, 7), (8, 9, 10, 11, 12, 13, 14), (15,))
CPU = torch.device("cpu")
SMALL = GenerateBench(
    size="small", batches=(3,), prompt_length=16, new_tokens=3, guidance=(3.0,), precisions=("fp32",), repeats=1
)
needs_transformers = pytest.mark.skipif(not has_transformers(), reason="transformers is not installed")


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    return Transformer(replace(CONFIG, zero_init_outputs=False)).eval()


@pytest.fixture(scope="module")
def foreign(ours):
    return foreign_copy(ours)


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_have_the_same_weights(ours, dtype):
    model = Transformer(ours.config).eval()
    model.load_state_dict(ours.state_dict())
    model.to(dtype)
    foreign = foreign_copy(model)
    assert {parameter.dtype for parameter in foreign.parameters()} == {dtype}
    ids_BT = torch.randint(VOCABULARY.size, (2, 9))
    with torch.no_grad():
        expected = model.logits(model(ids_BT)).float()
        found = foreign(input_ids=ids_BT).logits.float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@needs_transformers
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_settings_of_transformers_draw_the_same_ids(foreign, scale):
    """One generator, one distribution: whichever setting is fastest, the work is the same."""
    settings = generate_settings(scale != 1, compile=False)
    assert len(settings) == (2 if scale == 1 else 4)
    drawn = [
        foreign_generate(foreign, PROMPTS, (2, 3), new_tokens=6, guidance_scale=scale, setting=setting, seed=1)
        for setting in settings
    ]
    assert drawn[0].shape == (3, 6)
    assert all(torch.equal(drawn[0], each) for each in drawn[1:])
    other = foreign_generate(foreign, PROMPTS, (2, 3), new_tokens=6, guidance_scale=9.0, setting=settings[-1], seed=1)
    assert not torch.equal(drawn[0], other)


@needs_transformers
def test_guidance_of_transformers_is_that_of_the_paper(ours, foreign):
    """A guided draw from one prompt is likeliest where our guided logits are."""
    drawn = foreign_generate(
        foreign,
        PROMPTS[:1] * 400,
        (2, 3),
        new_tokens=1,
        guidance_scale=2.0,
        setting=generate_settings(True, False)[1],
        seed=0,
    )
    with torch.no_grad():
        full, none = (ours.logits(ours(torch.tensor([prompt])))[0, -1] for prompt in (PROMPTS[0], (2, 3)))
    p = (none + 2.0 * (full - none)).softmax(dim=-1)
    counts = torch.bincount(drawn.flatten(), minlength=VOCABULARY.size) / 400
    assert (counts - p).abs().sum() / 2 < 0.15  # total variation of 400 draws
    assert (counts - full.softmax(dim=-1)).abs().sum() / 2 > 0.25


def test_compiled_settings_are_there_when_asked_for():
    assert [name for name in generate_settings(False, True) if "compiled" in name] == ["static cache, compiled"]
    assert len(generate_settings(True, True)) == 6


def test_prompts_have_evenly_different_lengths():
    prompts = random_prompts(8, 64, VOCABULARY, seed=0)
    assert [len(prompt) for prompt in prompts] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert len(random_prompts(1, 64, VOCABULARY, seed=0)[0]) == 64
    assert all(VOCABULARY.is_text(id) and id > 3 for prompt in prompts for id in prompt)
    assert prompts == random_prompts(8, 64, VOCABULARY, seed=0) != random_prompts(8, 64, VOCABULARY, seed=1)


def test_bytes_of_a_step_by_hand():
    case = Case(
        prompts=((5, 6, 7), (5,)),
        unconditional=(2, 3),
        new_tokens=5,
        guidance_scale=1.0,
        precision="fp32",
        seed=0,
    )
    weights = parameter_count(CONFIG) - (2 * VOCABULARY.size - 24) * 32  # embedding rows are looked up
    slot = 2 * 2 * 32  # keys and values, two layers
    assert bytes_of_step(CONFIG, VOCABULARY, case) == 4 * (weights + slot * (3 + 2 + 1 + 2))
    guided = replace(case, guidance_scale=2.0, precision="bf16")
    slots = 3 + 2 + 1 + 2 + 2 * (2 + 2)
    assert bytes_of_step(CONFIG, VOCABULARY, guided) == 2 * (weights + slot * slots)
    head = 24 * 32
    rounded = replace(guided, precision="int8")
    assert bytes_of_step(CONFIG, VOCABULARY, rounded) == weights - head + 2 * (head + slot * slots)


COST = GenerateCost(
    side="ours",
    setting="engine",
    case=next(SMALL.cases("fp32")),
    seconds=0.5,
    first_seconds=0.1,
    peak_bytes=1.5e9,
    limit=0.75,
)


def test_the_table_and_the_ratio():
    assert COST.tokens_per_second == pytest.approx(3 * 3 / 0.5) and COST.step_seconds == pytest.approx(0.2)
    lines = list(table(SMALL, [COST, replace(COST, side="transformers", setting="static cache", seconds=1.25)]))
    assert lines[0].startswith("small: 0 M parameters, 64 of ") and "median of 1, seed 0; CPU, " in lines[0]
    assert lines[4] == "| fp32 | 3 | 3 | ours | engine | 18.0 | 100.0 | 200.00 | 1.500 | 75 |"
    assert [line.count("|") for line in lines[2:6]] == [11] * 4
    assert lines[7] == "fp32, batch 3, guidance 3: 2.50 times the tokens/s of transformers"


class InProcess:
    """What is wanted of `ProcessPoolExecutor`, without another process."""

    def __init__(self, *_):
        self.shutdown = lambda: None

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


def test_int8_is_measured_on_our_side_alone_and_compared_with_bf16(monkeypatch):
    monkeypatch.setattr(generate_bench, "ProcessPoolExecutor", InProcess)
    config = replace(SMALL, precisions=("int8",))
    (cost,) = measure(config)
    assert (cost.side, cost.case.precision) == ("ours", "int8") and cost.seconds > 0
    bf16 = replace(COST, case=replace(COST.case, precision="bf16"))
    int8 = replace(COST, case=replace(COST.case, precision="int8"), seconds=0.25)
    assert "int8, batch 3, guidance 3: 2.00 times those of bf16" in list(table(config, [bf16, int8]))


def test_the_command_measures_both_sides_in_turn(capsys):
    options = "--size small --batches 3 --prompt-length 16 --new-tokens 3 --guidance 3 --precisions fp32 --repeats 1"
    assert main(["bench", "generate", *options.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| fp32 | 3 | 3 | ")]
    assert rows[0].startswith("| fp32 | 3 | 3 | ours | engine | ")
    assert len(rows) == 1 + has_transformers()
    if has_transformers():
        setting = rows[1].split("|")[5].strip()
        assert rows[1].startswith("| fp32 | 3 | 3 | transformers | ") and setting in generate_settings(True, False)
        speeds = [float(row.split("|")[6]) for row in rows]
        assert float(lines[-1].split(": ")[1].split()[0]) == pytest.approx(speeds[0] / speeds[1], rel=0.05)


def test_without_transformers_ours_is_measured_alone(monkeypatch):
    monkeypatch.setattr(generate_bench, "has_transformers", lambda: False)
    (cost,) = measure(SMALL)
    assert (cost.side, cost.setting) == ("ours", "engine") and cost.seconds > 0
    assert math.isnan(cost.peak_bytes) or cost.peak_bytes > 1e6
    assert list(table(SMALL, [cost]))[-1].startswith("transformers is not installed: nothing to compare with")


def test_the_rate_of_reading_is_the_best_seen():
    rate = ReadRate(CPU, num_bytes=1 << 22)
    rate.measure(1)
    first = rate.bytes_per_second
    assert first > 1e7
    rate.measure(1)
    assert rate.bytes_per_second >= first


def test_the_peak_of_memory_can_begin_anew():
    numbers = torch.ones(1 << 25)
    before = peak_memory(CPU)
    if math.isnan(before):
        pytest.skip("the system does not count memory")
    del numbers
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < before - 1e8


def test_impossible_settings_are_refused(capsys):
    assert cli_bench._GENERATE_SIZES == GENERATE_SIZES
    with pytest.raises(ConfigError, match="size 'demo' is unknown; choose one of small, 100m, 350m, 760m, 7b"):
        GenerateBench(size="demo")
    with pytest.raises(ConfigError, match=r"batches=\(1, 0\); choose 1 or more of them"):
        GenerateBench(batches=(1, 0))
    assert main(["bench", "generate", "--new-tokens", "1"]) == 2
    assert capsys.readouterr().err == "error: --new-tokens 1; choose 2 or more\n"


def test_the_default_has_about_a_hundred_million_parameters():
    model, vocabulary = GenerateBench().model()
    assert 0.9e8 < parameter_count(model) < 1.2e8
    assert vocabulary.image_range.size == 8192 and model.max_positions == 256
