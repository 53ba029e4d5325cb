"""Cached decoding equals the full forward, row by row, whatever the neighbours and the padding."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model_transformer import CHAMELEON, CONFIG, CONFIGS, build, random_ids

from cm3.errors import ConfigError, RequestError
from cm3.model import cache as cache_module
from cm3.model import layers
from cm3.model.cache import RUN_COST, KeyValueCache, Run, plan_capacity, similar_runs

LENGTHS = [9, 3, 6]


def prefill(model, ids, lengths=LENGTHS, capacity=30):
    """Right-padded prefill; the padding holds noise that nothing may notice."""
    cache = KeyValueCache.create(model.config, len(ids), capacity)
    hidden = model(ids[:, : max(lengths)], cache=cache, num_new_B=torch.tensor(lengths))
    return cache, hidden


@CONFIGS
@pytest.mark.parametrize("backend", ["math", "sdpa"])
@torch.inference_mode()
def test_ragged_prefill_and_steps_equal_the_full_forward(config, backend):
    model, ids = build(config).eval(), random_ids(3)
    model.attention_backend = backend
    full = model(ids)
    cache, hidden = prefill(model, ids)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(hidden[row, :length], full[row, :length], rtol=1e-4, atol=1e-4)
    assert cache.lengths_B.tolist() == LENGTHS
    rows = torch.arange(3)
    for _ in range(10):
        position = cache.lengths_B.clone()
        hidden = model(ids[rows, position][:, None], cache=cache)
        torch.testing.assert_close(hidden[:, 0], full[rows, position], rtol=1e-4, atol=1e-4)


@CONFIGS
@torch.inference_mode()
def test_chunks_of_several_tokens_with_resting_rows(config):
    model, ids = build(config).eval(), random_ids(3)
    full = model(ids)
    cache, _ = prefill(model, ids)
    for num_new in ([4, 0, 2], [0, 4, 1], [1, 1, 1]):
        before = cache.lengths_B.clone()
        columns = before[:, None] + torch.arange(4)
        hidden = model(ids.gather(1, columns), cache=cache, num_new_B=torch.tensor(num_new))
        assert hidden.isfinite().all()
        for row, count in enumerate(num_new):
            start = int(before[row])
            torch.testing.assert_close(hidden[row, :count], full[row, start : start + count], rtol=1e-4, atol=1e-4)
    assert cache.lengths_B.tolist() == [14, 8, 10]


@torch.inference_mode()
def test_a_row_may_fill_the_cache_to_its_last_slot_and_rest():
    model, ids = build(CHAMELEON).eval(), random_ids(2)
    full = model(ids)
    cache, _ = prefill(model, ids, [9, 3], capacity=10)
    for length_0, length_1 in ((9, 3), (10, 4), (10, 5)):
        num_new = torch.tensor([int(length_0 < 10), 1])
        step_ids = torch.stack([ids[0, length_0], ids[1, length_1]])[:, None]
        hidden = model(step_ids, cache=cache, num_new_B=num_new)
        if length_0 < 10:
            torch.testing.assert_close(hidden[0, 0], full[0, length_0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(hidden[1, 0], full[1, length_1], rtol=1e-4, atol=1e-4)
    assert cache.lengths_B.tolist() == [10, 6]


@torch.inference_mode()
def test_padding_and_neighbours_do_not_reach_a_row():
    """Bit for bit, with other noise in the padding and other rows around."""
    model, ids = build(CONFIG).eval(), random_ids(3)
    other = (ids + 7) % 64
    for row, length in enumerate(LENGTHS):
        other[row, :length] = ids[row, :length]
    other[0] = 5
    results = []
    for prompt in (ids, other):
        cache, hidden = prefill(model, prompt)
        step = model(torch.tensor([[3], [4], [5]]), cache=cache)
        results.append((hidden, step))
    (hidden, step), (other_hidden, other_step) = results
    assert torch.equal(hidden[1, :3], other_hidden[1, :3])
    assert torch.equal(hidden[2, :6], other_hidden[2, :6])
    assert torch.equal(step[1:], other_step[1:])


@CONFIGS
@torch.inference_mode()
def test_samples_share_a_prompts_prefill(config):
    model, ids = build(config).eval(), random_ids(3)
    cache, _ = prefill(model, ids)
    expanded = cache.expand(2)
    assert expanded.lengths_B.tolist() == [9, 9, 3, 3, 6, 6]
    paired = cache.select(torch.tensor([2, 0]))
    assert paired.lengths_B.tolist() == [6, 9]
    next_ids = torch.tensor([[1], [2], [3], [4], [5], [6]])
    hidden = model(next_ids, cache=expanded)
    for row in range(6):
        alone = torch.cat([ids[row // 2, : LENGTHS[row // 2]], next_ids[row]])[None]
        torch.testing.assert_close(hidden[row, 0], model(alone)[0, -1], rtol=1e-4, atol=1e-4)
    assert cache.lengths_B.tolist() == LENGTHS  # the original is untouched
    torch.testing.assert_close(model(next_ids[[4, 0]], cache=paired)[:, 0], hidden[[4, 0], 0])


@torch.inference_mode()
def test_lower_precision_cache():
    model, ids = build(CHAMELEON).eval().to(torch.bfloat16), random_ids(2)
    cache = KeyValueCache.create(CHAMELEON, 2, 20, torch.bfloat16)
    hidden = torch.cat([model(ids[:, :8], cache=cache), model(ids[:, 8:9], cache=cache)], dim=1).float()
    full = model(ids[:, :9]).float()
    assert (hidden - full).abs().mean() < 0.03 * full.abs().mean()


def test_shapes_never_change():
    cache = KeyValueCache.create(CONFIG, 2, 20)
    assert cache.keys_LBSGK.shape == (2, 2, 21, 4, 8)
    assert cache.capacity == 20
    pointer = cache.keys_LBSGK.data_ptr()
    with torch.inference_mode():
        build(CONFIG)(random_ids(2, 5), cache=cache)
    assert cache.keys_LBSGK.data_ptr() == pointer
    assert (cache.keys_LBSGK[:, :, 5:] == 0).all()
    assert not (cache.keys_LBSGK[:, :, :5] == 0).all(dim=-1).any()


def test_overflow_is_refused_when_planning():
    assert plan_capacity(CONFIG, [3, 10], 38) == 48
    with pytest.raises(RequestError, match="10 tokens and 39 new ones .* context is 48 tokens; shorten"):
        plan_capacity(CONFIG, [3, 10], 39)
    with pytest.raises(RequestError, match="49 tokens a row .* 48 positions"):
        KeyValueCache.create(CONFIG, 1, 49)
    with pytest.raises(RequestError, match="8 tokens do not fit a cache of 5"):
        build(CONFIG)(random_ids(1, 8), cache=KeyValueCache.create(CONFIG, 1, 5))


def test_documents_and_cache_exclude_each_other():
    cache = KeyValueCache.create(CONFIG, 1, 5)
    with pytest.raises(ConfigError, match="exclude each other"):
        build(CONFIG)(random_ids(1, 3), cache=cache, document_ids_BT=torch.zeros(1, 3, dtype=torch.int32))


@torch.inference_mode()
def test_training_settings_do_not_disturb_decoding():
    model, ids = build(replace(CHAMELEON, dropout=0.5)).eval(), random_ids(3)
    model.activation_checkpointing = True
    cache, _ = prefill(model, ids)
    assert cache.lengths_B.tolist() == LENGTHS


def cost_of(lengths, cuts):
    """Slots that the runs between the cuts read, and what the runs cost themselves."""
    edges = [0, *cuts, len(lengths)]
    return sum(RUN_COST + (stop - start) * max(lengths[start:stop]) for start, stop in pairwise(edges))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=7))
def test_runs_cost_as_little_as_any_others(lengths):
    runs = similar_runs(lengths)
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])] and runs[-1].stop == len(lengths)
    assert all(run.longest == max(lengths[run.rows]) for run in runs)
    places = range(1, len(lengths))
    every = (cuts for count in range(len(lengths)) for cuts in combinations(places, count))
    assert cost_of(lengths, [run.start for run in runs[1:]]) == min(cost_of(lengths, cuts) for cuts in every)


def test_runs_by_hand():
    assert similar_runs([5, 7, 300, 310, 4]) == (Run(0, 2, 7), Run(2, 4, 310), Run(4, 5, 4))
    assert similar_runs([30, 1, 2]) == (Run(0, 3, 30),)
    assert similar_runs([]) == ()


@CONFIGS
@torch.inference_mode()
def test_a_bounded_cache_reads_less_and_gives_the_same(config, monkeypatch):
    """Rows in several runs, some of them at rest, one of them full."""
    monkeypatch.setattr(cache_module, "RUN_COST", 1)
    model, ids = build(config).eval(), random_ids(3)
    model.attention_backend = "sdpa"
    free, _ = prefill(model, ids, capacity=11)
    bounded = replace(free, keys_LBSGK=free.keys_LBSGK.clone(), values_LBSGK=free.values_LBSGK.clone())
    bounded = replace(bounded, lengths_B=free.lengths_B.clone()).bounded(LENGTHS)
    assert bounded.runs == (Run(0, 1, 9), Run(1, 2, 3), Run(2, 3, 6))
    read = []
    real = layers.attend
    monkeypatch.setattr(
        layers, "attend", lambda q, k, v, **more: read.append(tuple(k.shape[:2])) or real(q, k, v, **more)
    )
    for num_new in ([1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 1, 0]):
        step_ids, num_new = ids[torch.arange(3), free.lengths_B][:, None], torch.tensor(num_new)
        expected = model(step_ids, cache=free, num_new_B=num_new)
        read.clear()
        found = model(step_ids, cache=bounded, num_new_B=num_new)
        real_rows = num_new > 0
        torch.testing.assert_close(found[real_rows], expected[real_rows], rtol=1e-5, atol=1e-5)
    assert read == [(1, 11), (1, 7), (1, 10)] * config.num_layers
    assert bounded.lengths_B.tolist() == free.lengths_B.tolist() == [11, 6, 9]
    assert bounded.runs == (Run(0, 1, 11), Run(1, 2, 7), Run(2, 3, 10))  # the host counts a step that a row rested in


@torch.inference_mode()
def test_a_bounded_prefill_reads_its_own_columns(monkeypatch):
    model, ids = build(CONFIG).eval(), random_ids(2)
    read = []
    real = layers.attend
    monkeypatch.setattr(
        layers, "attend", lambda q, k, v, **more: read.append(tuple(k.shape[:2])) or real(q, k, v, **more)
    )
    whole = KeyValueCache.create(CONFIG, 4, 30)
    part = whole.rows(slice(1, 3)).bounded([0, 0])
    hidden = model(ids[:, :9], cache=part, num_new_B=torch.tensor([9, 4]))
    assert read == [(2, 9)] * CONFIG.num_layers
    torch.testing.assert_close(hidden[1, :4], model(ids[1:, :4])[0], rtol=1e-4, atol=1e-4)
    assert whole.lengths_B.tolist() == [0, 9, 4, 0] and whole.runs is None
    assert (whole.keys_LBSGK[:, 1, :9] != 0).any() and (whole.keys_LBSGK[:, [0, 3]] == 0).all()
