"""Spikes of the loss: what is flagged and what is not."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cm3.training.spikes import FEWEST, WINDOW, SpikeDetector

NOISE = np.random.default_rng(0).normal(0, 0.05, 400)


def flagged(losses):
    detector = SpikeDetector()
    return [step for step, loss in enumerate(losses) if detector.excess(loss) > 0]


def test_a_noisy_falling_loss_has_none():
    assert flagged(8 * np.exp(-np.arange(400) / 100) + 2 + NOISE) == []


def test_spikes_are_flagged_and_do_not_hide_each_other():
    losses = 3 + NOISE
    losses[[100, 101, 150, 399]] += (1.0, 2.0, 0.6, 5.0)
    assert flagged(losses) == [100, 101, 150, 399]
    detector = SpikeDetector(losses[:100])
    assert detector.excess(losses[100]) == losses[100] - np.median(losses[50:100])


def test_a_loss_that_stays_high_is_the_new_normal():
    steps = flagged([*(3 + NOISE[:100]), *(4 + NOISE[:200])])
    assert steps and min(steps) == 100 and max(steps) <= 100 + WINDOW


def test_a_flat_loss_may_move_by_two_percent():
    assert flagged([2.0] * 20 + [2.03]) == [] and flagged([2.0] * 20 + [2.05]) == [20]


@given(st.lists(st.floats(0.1, 10), max_size=FEWEST - 1), st.floats(0.1, 1e6))
def test_too_few_losses_to_judge(losses, last):
    assert SpikeDetector(losses).excess(last) == 0


def test_what_is_not_finite_is_no_loss():
    detector = SpikeDetector([2.0, 2.1] * 5)
    assert [detector.excess(loss) for loss in (math.nan, math.inf, 2.05)] == [0, math.inf, 0]


def test_a_resumed_run_judges_as_an_uninterrupted_one():
    losses = 3 + NOISE
    losses[250] += 1
    whole, resumed = SpikeDetector(losses[:200]), SpikeDetector(losses[200 - WINDOW : 200])
    assert [whole.excess(loss) for loss in losses[200:]] == [resumed.excess(loss) for loss in losses[200:]]
