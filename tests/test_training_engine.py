"""The engine: a loss or gradient that is not finite changes nothing, at any ZeRO stage and in either format."""

import pytest
import torch
from process_group import process_group
from torch import nn

from cm3.training.engine import STATE_KINDS, Engine, deepspeed_config

pytest.importorskip("deepspeed")

SETTINGS = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
GOOD = (torch.tensor([[1.0, 2.0]]), torch.ones(3), torch.zeros(1))
OTHER = (torch.tensor([[-1.0, 0.5]]), torch.ones(3), torch.zeros(1))
FAULTS = {
    "infinite loss, finite gradient": (GOOD[0], GOOD[1], torch.tensor([float("inf")])),
    "finite loss, gradient NaN": (GOOD[0], torch.zeros(3), GOOD[2]),
    "all NaN": (torch.full((1, 2), float("nan")), GOOD[1], GOOD[2]),
}


class Toy(nn.Module):
    """Two parameters, one of which no even number of processes can share out evenly."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -1.0], [0.5, 2.0]]))
        self.odd = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x_B2, z_3, constant):
        matrix, odd = self.matrix, self.odd
        product = (x_B2.to(matrix.dtype) @ matrix).float()
        root = (odd * z_3.to(odd.dtype)).abs().sum().float().sqrt()  # at 0 its value is finite and its gradient not
        return (product.square().mean() + root + constant.sum(),)


@pytest.fixture(scope="module", autouse=True)
def group():
    with process_group():
        yield


def make_engine(stage, bf16, accumulation=2, clip=1.0):
    module = Toy()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    config = deepspeed_config(
        micro_batch_rows=1,
        accumulation_steps=accumulation,
        zero_stage=stage,
        bf16=bf16,
        gradient_clip=clip,
        offload_optimizer=False,
    )
    return Engine(module, optimizer, config)


def step(engine, *batches):
    for batch in batches:
        engine.backward(engine(*batch)[0] / len(batches))
    return engine.applied()


def snapshot(engine):
    tensors = {(kind, name): tensor.clone() for kind in STATE_KINDS for name, tensor in engine.state(kind)}
    with torch.no_grad():
        return tensors | {("working copy", "its loss"): engine(*GOOD)[0].clone()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("stage", "bf16"), SETTINGS)
def test_a_step_that_is_not_finite_changes_nothing_and_leaves_no_trace(stage, bf16):
    undisturbed, engine = make_engine(stage, bf16), make_engine(stage, bf16)
    for each in (undisturbed, engine):
        assert step(each, GOOD, OTHER)
    before = snapshot(engine)
    for fault in FAULTS.values():
        assert not step(engine, fault, OTHER)
        assert not step(engine, GOOD, fault)
        assert engine.gradient_norm() == float("inf")
    assert same(snapshot(engine), before)
    for each in (undisturbed, engine):
        assert step(each, OTHER, GOOD)
        assert 0 < each.gradient_norm() < 100
    assert same(snapshot(engine), snapshot(undisturbed)) and not same(snapshot(engine), before)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_first_step_may_be_bad_and_clipping_off(clip):
    for stage, bf16 in ((0, False), (1, True), (2, True), (3, False)):
        engine = make_engine(stage, bf16, accumulation=1, clip=clip)
        before = snapshot(engine)
        assert not step(engine, FAULTS["finite loss, gradient NaN"])
        assert same(snapshot(engine), before)


@pytest.mark.parametrize(("stage", "bf16"), SETTINGS)
def test_an_update_is_that_of_plain_adamw(stage, bf16):
    engine, plain = make_engine(stage, bf16, clip=0.5), Toy()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for batches in ((GOOD, OTHER), (OTHER, OTHER)):
        assert step(engine, *batches)
        sum(plain(*batch)[0] / 2 for batch in batches).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert engine.gradient_norm() == pytest.approx(float(norm), rel=2e-2 if bf16 else 1e-5)
    for name, tensor in engine.state("weights"):
        torch.testing.assert_close(tensor, plain.get_parameter(name).detach(), rtol=1e-5, atol=2e-2 if bf16 else 1e-6)
