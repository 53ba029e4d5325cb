"""A decoding step in one call equals the blocks of the model, whatever the architecture, the type and the rows."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from test_model_transformer import CHAMELEON, CONFIG, PER_HEAD, build

from cm3.errors import RequestError
from cm3.model import kernels
from cm3.model.cache import KeyValueCache
from cm3.model.quantized import quantize_blocks

WIDE = replace(CHAMELEON, width=128, num_heads=2, num_key_value_heads=1, feed_forward_width=192, norm_order="pre")
GELU = replace(CONFIG, width=64, activation="gelu", norm="rmsnorm", norm_order="swin", qk_norm=True)
CONFIGS = pytest.mark.parametrize(
    "config", [CONFIG, CHAMELEON, PER_HEAD, WIDE, GELU], ids=["cm3leon", "chameleon", "per-head", "wide", "gelu"]
)
LENGTHS = [9, 1, 6, 3, 8, 2]


@pytest.fixture(autouse=True)
def compiled():
    if kernels.library() is None:
        pytest.skip("no C++ compiler here")


def varied(config, dtype=torch.float32):
    """A model in which norms have weights and biases of their own."""
    model = build(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def steps(model, rows, backend, num_steps=4):
    """Hidden states of a prefill's next tokens, the second row resting at every other step, and the cache."""
    model.attention_backend = backend
    ids = torch.randint(0, 64, (rows, 12 + num_steps), generator=torch.Generator().manual_seed(3))
    cache = KeyValueCache.create(model.config, rows, 24, model.embedding.weight.dtype)
    model(ids[:, :9], cache=cache, num_new_B=torch.tensor(LENGTHS[:rows]))
    hidden = []
    for step in range(num_steps):
        num_new = torch.ones(rows, dtype=torch.long)
        num_new[1:2] = step % 2
        states = model(ids[:, 12 + step, None], cache=cache, num_new_B=num_new)
        hidden.append(states[num_new > 0])
    return torch.cat(hidden), cache


@CONFIGS
@pytest.mark.parametrize("rows", [1, 2, 6])
@torch.inference_mode()
def test_a_step_is_that_of_the_blocks(config, rows):
    model = varied(config)
    expected, plain = steps(model, rows, "sdpa")
    found, cache = steps(model, rows, "auto")
    assert cache.cpu_step and not plain.cpu_step
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cache.lengths_B.tolist() == plain.lengths_B.tolist()
    for row, length in enumerate(cache.lengths_B.tolist()):
        torch.testing.assert_close(cache.keys_LBSGK[:, row, :length], plain.keys_LBSGK[:, row, :length])
        torch.testing.assert_close(cache.values_LBSGK[:, row, :length], plain.values_LBSGK[:, row, :length])


@CONFIGS
@pytest.mark.parametrize("rows", [1, 6])
@torch.inference_mode()
def test_in_16_bit_it_is_no_further_from_float32(config, rows):
    model = varied(config, torch.bfloat16)
    exact, _ = steps(varied(config, torch.bfloat16).float(), rows, "math")
    plain, _ = steps(model, rows, "sdpa")
    found, cache = steps(model, rows, "auto")
    assert cache.cpu_step and found.dtype == torch.bfloat16 and cache.keys_LBSGK.dtype == torch.bfloat16
    assert (found - exact).norm() <= 1.1 * (plain - exact).norm()
    assert (found - exact).norm() < 0.1 * exact.norm()


@torch.inference_mode()
def test_with_weights_of_8_bits():
    model = varied(replace(WIDE, vocabulary_size=64))
    quantize_blocks(model)
    expected, _ = steps(model, 6, "sdpa")
    found, cache = steps(model, 6, "auto")
    assert cache.cpu_step
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_threads_change_nothing():
    model = varied(WIDE)
    threads = torch.get_num_threads()
    one, _ = steps(model, 6, "auto")
    try:
        torch.set_num_threads(3)
        several, _ = steps(model, 6, "auto")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, several)


@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours():
    """Bit for bit in float32."""
    model = varied(WIDE)
    together, cache = steps(model, 3, "auto", num_steps=1)
    other = KeyValueCache.create(model.config, 2, 24)
    ids = torch.randint(0, 64, (3, 13), generator=torch.Generator().manual_seed(3))
    other.keys_LBSGK.copy_(cache.keys_LBSGK[:, [2, 0]])
    other.values_LBSGK.copy_(cache.values_LBSGK[:, [2, 0]])
    other.lengths_B.copy_(torch.tensor(LENGTHS)[[2, 0]])
    found = model(ids[[2, 0], 12, None], cache=other)
    assert other.cpu_step and torch.equal(found, together[[1, 0]])  # the second row rested


@torch.inference_mode()
def test_a_row_may_be_filled_to_the_last_slot_and_no_further():
    model = varied(CHAMELEON)
    cache = KeyValueCache.create(CHAMELEON, 2, 5)
    ids = torch.full((2, 1), 7)
    for _ in range(5):
        assert model(ids, cache=cache).isfinite().all()
    rest = torch.zeros(2, dtype=torch.long)
    before = cache.keys_LBSGK[:, :, :5].clone()
    assert model(ids, cache=cache, num_new_B=rest).isfinite().all()
    assert cache.cpu_step and torch.equal(cache.keys_LBSGK[:, :, :5], before) and cache.lengths_B.tolist() == [5, 5]
    cache.lengths_B[1] = 6
    with pytest.raises(RequestError, match="1 rows of a cache of 5 tokens are full and were given one more; create it"):
        model(ids, cache=cache)


def test_when_the_blocks_are_called(monkeypatch):
    model, called = varied(CONFIG), []
    ids = torch.ones(1, 1, dtype=torch.long)

    def count(**more):
        cache = KeyValueCache.create(CONFIG, 1, 8)
        model(ids, cache=cache, **more)
        return cache.cpu_step

    assert not count()  # gradients are made
    with torch.no_grad():
        assert count() and not count(positions_BT=torch.tensor([[3]]))
        handle = model.blocks[0].feed_forward.register_forward_hook(lambda *_: called.append(1))
        assert not count() and called == [1]
        handle.remove()
        linear, model.blocks[1].attention.out = model.blocks[1].attention.out, torch.nn.Identity()
        assert not count()
        model.blocks[1].attention.out = linear
        assert count()
        monkeypatch.setattr(kernels, "library", lambda: None)
        assert not count()


@torch.inference_mode()
def test_rows_of_ids_must_be_those_of_the_cache():
    model = varied(CONFIG)
    cache = KeyValueCache.create(CONFIG, 1, 8)
    for rows in (2, 0, 500):
        with pytest.raises(RequestError, match=f"{rows} rows of ids were given for 1 lengths and a cache of 1 rows"):
            model(torch.ones(rows, 1, dtype=torch.long), cache=cache)
    model(torch.ones(1, 1, dtype=torch.long), cache=cache)
    cache.lengths_B = torch.zeros(2, dtype=torch.long)
    with pytest.raises(
        RequestError, match="2 rows of ids were given for 2 lengths and a cache of 1 rows; give one row"
    ):
        model(torch.ones(2, 1, dtype=torch.long), cache=cache)


@torch.inference_mode()
def test_lengths_may_be_of_32_bits():
    model = varied(CONFIG)
    ids, found = torch.tensor([[5], [7]]), []
    for dtype in (torch.int64, torch.int32):
        cache = KeyValueCache.create(CONFIG, 2, 8)
        cache.lengths_B = cache.lengths_B.to(dtype)
        found.append(torch.cat([model(ids, cache=cache), model(ids, cache=cache)]))
        assert cache.cpu_step and cache.lengths_B.tolist() == [2, 2]
    assert torch.equal(*found)


@torch.inference_mode()
def test_a_cache_may_be_fed_by_another_model_and_copied():
    first, second = varied(CONFIG), varied(CONFIG)
    second.load_state_dict({name: -value for name, value in first.state_dict().items()})
    ids = torch.tensor([[5], [7]])

    def fed(backend):
        cache = KeyValueCache.create(CONFIG, 2, 8)
        first.attention_backend = second.attention_backend = backend
        states = [model(ids, cache=cache) for model in (first, second, first)]
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        assert not any(other.cpu_step or other.cpu_step_model for other in copies)
        states += [first(ids, cache=other) for other in copies]
        assert cache.lengths_B.tolist() == [3, 3] and not cache.keys_LBSGK[:, :, 3].any()
        assert all(bool(other.cpu_step) == (backend == "auto") for other in (cache, *copies))
        return torch.stack(states)

    found, expected = fed("auto"), fed("sdpa")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[3], found[4])


@torch.inference_mode()
def test_models_and_caches_it_is_not_for():
    """The blocks know what to do with them."""
    ids = torch.tensor([[5], [7]])

    def taken(model, cache):
        model(ids, cache=cache)
        return bool(cache.cpu_step)

    watched, cut = varied(CONFIG), varied(CONFIG)
    assert taken(watched, KeyValueCache.create(CONFIG, 2, 8))
    called = []
    watched.final_norm.register_forward_hook(lambda *_: called.append(1))
    assert not taken(watched, KeyValueCache.create(CONFIG, 2, 8)) and called == [1]
    del cut.blocks[-1]
    assert not taken(cut, KeyValueCache.create(CONFIG, 2, 8))

    def cache_of(memory):
        plain = KeyValueCache.create(CONFIG, 2, 8)
        return KeyValueCache(memory(plain.keys_LBSGK), plain.values_LBSGK, plain.lengths_B)

    def slots_apart(part):
        return part.repeat(1, 1, 2, 1, 1)[:, :, ::2]

    def rows_apart(part):
        return part.repeat(1, 2, 1, 1, 1)[:, ::2]

    model = varied(CONFIG)
    assert taken(model, cache_of(torch.clone))
    assert not taken(model, cache_of(slots_apart)) and not taken(model, cache_of(rows_apart))
    twice = KeyValueCache.create(CONFIG, 4, 8)
    assert taken(model, KeyValueCache(twice.keys_LBSGK[:, ::2], twice.values_LBSGK[:, ::2], twice.lengths_B[::2]))
    assert twice.keys_LBSGK[:, ::2, 0].all(-1).all() and not twice.keys_LBSGK[:, 1::2].any()
