"""What decoding computes, counted: passes, tokens, slots of the cache, copies, looks of the host at the device.

In torch's operations, but for one test: a step that is one call (`cm3.model.cpu_step`) would be none of them.
"""

import collections
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cm3.generation import grammar
from cm3.generation.engine import CHECK_INTERVAL, Engine
from cm3.generation.prompts import Prompts
from cm3.generation.request import Request
from cm3.generation.settings import SamplingSettings
from cm3.model import kernels
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(40, 24, num_sentinels=16, multiple=8)
LAYERS, WIDTH, POSITIONS = 2, 64, 320
GUIDED = SamplingSettings(guidance_scale=3.0, top_p=0.9)
FREE = SamplingSettings()
SMALLEST_MATRIX = WIDTH * WIDTH


def picture(codes, prompt=(2, 5, 6), seeds=(0,), unconditional=(2, 3)):
    """A request for a picture of as many codes."""
    return Request(
        prompt_ids=tuple(prompt),
        grammar=grammar.image(codes),
        max_new_tokens=codes,
        unconditional_ids=unconditional,
        seeds=seeds,
    )


def text(length):
    """A request for a text, which the budget ends."""
    request = Prompts(VOCABULARY, (2, 2)).infill_text([5], [6], max_new_tokens=length)
    return dataclasses.replace(request, seeds=(1,))


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    """As on a machine without a compiler."""
    monkeypatch.setattr(kernels, "library", lambda: None)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    shape = {"width": WIDTH, "num_layers": LAYERS, "num_heads": 4, "max_positions": POSITIONS}
    return Transformer(
        ModelConfig(vocabulary_size=VOCABULARY.size, **shape, init_std=0.3, zero_init_outputs=False)
    ).eval()


class Work(TorchDispatchMode):
    """Every operation: whether it makes the host wait, what it allocates, and which keys attention reads."""

    def __init__(self):
        super().__init__()
        self.waits, self.allocated, self.attended, self.operations = 0, [], [], collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function)
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        chosen = [each for each in tensors[1:] if "aten.index" in name and each.dtype == torch.bool]
        if "_local_scalar_dense" in name or "nonzero" in name or "masked_select" in name or chosen:
            self.waits += 1
        if "scaled_dot_product" in name:
            rows, _, slots, _ = args[1].shape
            self.attended.append(rows * slots)
        inputs = {each.untyped_storage().data_ptr() for each in tensors}
        outputs = [each for each in torch.utils._pytree.tree_leaves(out) if isinstance(each, torch.Tensor)]
        new = [each for each in outputs if each.untyped_storage().data_ptr() not in inputs]
        self.allocated += [(tuple(each.shape), name) for each in new]
        if new or name.split(".")[1].endswith("_"):
            self.operations[name] += 1
        return out


@pytest.fixture
def waits(monkeypatch):
    """Tensors that became Python values without an operation of their own."""
    seen = []
    for name in ("tolist", "numpy", "cpu", "__array__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, real=real, name=name: seen.append(name) or real(self, *args)
        )
    return seen


def worked(engine, waits, requests, settings):
    """What the requests took, and how often the host waited."""
    waits.clear()
    with Work() as work:
        engine.run(requests, settings)
    return work, work.waits + len(waits)


@pytest.mark.parametrize(
    "chosen", [FREE, GUIDED, dataclasses.replace(GUIDED, top_k=5), SamplingSettings(sampler="cd-k")]
)
def test_the_host_never_waits_for_a_code(model, waits, chosen):
    """However long a picture is, the host looks as often."""
    engine = Engine(model, VOCABULARY)
    counts = [worked(engine, waits, [picture(codes, seeds=(0, 1))] * 2, chosen)[1] for codes in (4, 32)]
    assert counts[0] == counts[1] <= 10


def test_the_host_waits_for_text_only_now_and_then(model, waits):
    engine = Engine(model, VOCABULARY)
    budgets = (CHECK_INTERVAL, 5 * CHECK_INTERVAL)
    assert len(engine.run([text(budgets[1])], FREE)[0][0]) > 4 * CHECK_INTERVAL
    short, long = (worked(engine, waits, [text(budget)], FREE)[1] for budget in budgets)
    assert long == short + 4


def test_the_counter_sees_what_it_counts(waits):
    with Work() as work:
        values = torch.arange(3)
        assert values[1] and values.max().item() == 2 and len(values[values > 0]) == 2
    assert work.waits == 3
    assert values.tolist() == values.numpy().tolist() == [0, 1, 2] and waits == ["tolist", "numpy"]


def test_passes_and_tokens_are_as_few_as_can_be(model):
    shapes = []
    handle = model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    engine = Engine(model, VOCABULARY)
    prompts = [(2, *range(3, 3 + length)) for length in (2, 5)]
    requests = [picture(8, prompt, seeds=(0, 1, 2)) for prompt in prompts]
    engine.run(requests, GUIDED)
    # the last id of a prompt is fed by the first step; three distinct prompts, six rows and six to compare with
    assert shapes == [(3, 5)] + [(12, 1)] * 8
    shapes.clear()
    engine.run(requests, [FREE, dataclasses.replace(GUIDED, guidance_interval=(0.0, 0.5))])
    handle.remove()
    assert shapes == [(3, 5)] + [(9, 1)] * 4 + [(6, 1)] * 4


def test_prompts_of_other_lengths_are_not_padded_to_the_longest(model):
    shapes = []
    handle = model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    engine = Engine(model, VOCABULARY)
    short, long = picture(4, [2, 5, 6]), picture(4, [2] + [7] * 250)
    together = engine.run([long, short, long], GUIDED)
    handle.remove()
    assert shapes == [(1, 2), (1, 250), (1, 1)] + [(6, 1)] * 4
    alone = [engine.run([request], GUIDED)[0] for request in (long, short, long)]
    assert [ids[0].tolist() for ids in together] == [ids[0].tolist() for ids in alone]


def test_attention_reads_the_filled_slots_alone(model, waits):
    engine = Engine(model, VOCABULARY)
    codes, lengths = 8, (2, 300)
    requests = [picture(codes, [2] + [7] * length) for length in lengths]
    work, _ = worked(engine, waits, requests, FREE)
    filled = sum(lengths) + sum(length + step for length in lengths for step in range(1, codes + 1))
    assert sum(work.attended) == LAYERS * filled


def work_of_a_step(engine, waits, chosen):
    """Shape and operation of each tensor that one more code of two pictures allocates."""

    def allocated(codes):
        requests = [picture(codes, [2] + [7] * 60, unconditional=(2, 4)), picture(codes)]
        return collections.Counter(worked(engine, waits, requests, chosen)[0].allocated)

    more = allocated(9) - allocated(8)
    assert sum(more.values()) > 10 * LAYERS
    return [(shape, name) for shape, name in more if shape[:1] != (LAYERS,)]  # without the longer cache itself


@pytest.mark.parametrize("chosen", [FREE, GUIDED])
def test_a_step_copies_neither_weights_nor_caches(model, waits, chosen):
    found = work_of_a_step(Engine(model, VOCABULARY), waits, chosen)
    assert [entry for entry in found if math.prod(entry[0]) >= SMALLEST_MATRIX] == []


@pytest.mark.parametrize("chosen", [FREE, GUIDED])
def test_among_codes_nothing_is_as_wide_as_the_vocabulary(model, waits, chosen):
    found = work_of_a_step(Engine(model, VOCABULARY), waits, chosen)
    assert [entry for entry in found if VOCABULARY.size in entry[0]] == []
    assert [entry for entry in found if entry[0][-1:] == (VOCABULARY.image_range.size,)] != []


CHAMELEON = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "qk_norm": True}


@pytest.mark.parametrize(
    ("variant", "chosen", "most_in_a_layer", "most_besides"),
    [({}, FREE, 14, 130), ({}, GUIDED, 14, 150), (CHAMELEON, FREE, 19, 136)],
)
def test_a_step_calls_few_operations(waits, variant, chosen, most_in_a_layer, most_besides):
    """Each costs a CPU some microseconds, however small its tensors are; views are not counted."""

    def operations(layers):
        shape = {"width": WIDTH, "num_layers": layers, "num_heads": 4, "max_positions": POSITIONS}
        engine = Engine(Transformer(ModelConfig(vocabulary_size=VOCABULARY.size, **shape, **variant)), VOCABULARY)
        short, long = (worked(engine, waits, [picture(codes)], chosen)[0].operations for codes in (8, 9))
        return long - short

    one, three = operations(1), operations(3)
    in_a_layer = (three.total() - one.total()) / 2
    assert 10 < in_a_layer <= most_in_a_layer, three
    assert 10 < one.total() - in_a_layer <= most_besides, one


@pytest.mark.parametrize("variant", [{}, CHAMELEON])
def test_with_a_compiler_layers_call_no_operations(monkeypatch, variant):
    monkeypatch.undo()
    if kernels.library() is None:
        pytest.skip("no C++ compiler here")

    def operations(layers):
        shape = {"width": WIDTH, "num_layers": layers, "num_heads": 4, "max_positions": POSITIONS}
        engine = Engine(Transformer(ModelConfig(vocabulary_size=VOCABULARY.size, **shape, **variant)), VOCABULARY)
        short, long = (worked(engine, [], [picture(codes)], FREE)[0].operations for codes in (8, 9))
        return (long - short).total()

    assert 10 < operations(1) == operations(3) <= 120


RECOMPILES = """
import functools, torch
graphs = []
def count(graph, inputs):
    graphs.append(graph)
    return graph.forward
torch.compile = functools.partial(torch.compile, backend=count, fullgraph=True)
from cm3.generation import grammar
from cm3.generation.engine import Engine
from cm3.generation.request import Request
from cm3.generation.settings import SamplingSettings
from cm3.model.config import ModelConfig
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary

vocabulary = Vocabulary.build(40, 24, num_sentinels=16, multiple=8)
shape = dict(vocabulary_size=vocabulary.size, width=16, num_layers=1, num_heads=2, max_positions=600)
engine = Engine(Transformer(ModelConfig(**shape)), vocabulary, compile=True)

def run(length, codes, scale, seed):
    request = Request(prompt_ids=(2,) * length, grammar=grammar.image(codes), max_new_tokens=codes,
                      unconditional_ids=(2, 3), seeds=(seed,))
    engine.run([request], SamplingSettings(guidance_scale=scale))

counts = []
for case in [(5, 4, 3.0, 0), (60, 9, 3.0, 1), (100, 20, 2.0, 2), (5, 4, 1.0, 0), (9, 12, 1.0, 5), (5, 4, 3.0, 7),
             (300, 4, 3.0, 0)]:
    run(*case)
    counts.append(len(graphs))
print(*counts)
"""


def test_a_step_is_compiled_once_for_each_number_of_rows_and_capacity():
    """In a process of its own, without the shape checks of the suite, which no compiler can trace."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", RECOMPILES], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1", "1", "2", "2", "2", "3"]
