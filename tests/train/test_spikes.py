"""Spikes: none in a noisy fall, one at the very step of a jump, and a state that goes on where it was."""

import json
import math
import random

import pytest

from dsv4.train.spikes import SpikeDetector

FALLS = {
    "exponential": lambda t: 2.5 + 6 * math.exp(-t / 200),
    "power": lambda t: 1.5 + 8 * (1 + t / 20) ** -0.4,
    "in two stages": lambda t: 3 + 5 * math.exp(-t / 30) + (1 if t < 900 else math.exp(-(t - 900) / 150)),
}


def curve(name, steps, noise=0.04):
    draw = random.Random(f"{name} {noise}")
    return [FALLS[name](t) + draw.gauss(0, noise) for t in range(steps)]


def following(losses, deviations=6.0, memory=100):
    detector = SpikeDetector(deviations, memory)
    assert not any(detector.is_spike(loss) for loss in losses)
    return detector


@pytest.mark.parametrize("noise", [0.004, 0.04, 0.2])
@pytest.mark.parametrize("name", FALLS)
def test_a_noisy_fall_is_no_spike(name, noise):
    following(curve(name, 4000, noise))


@pytest.mark.parametrize("at", [500, 900, 3000])
@pytest.mark.parametrize("name", FALLS)
def test_a_jump_is_a_spike_at_that_very_step_and_leaves_no_trace(name, at):
    losses = curve(name, at + 400)
    detector = following(losses[:at])
    before = detector.state()
    jump = losses[at] + 0.6  # 15 deviations of the noise
    assert detector.is_spike(jump)
    assert detector.is_spike(jump)  # nothing was learnt from it
    assert detector.state() == before
    assert not any(detector.is_spike(loss) for loss in losses[at:])


def test_a_fall_is_no_spike_however_deep():
    detector = following(curve("power", 500))
    assert not detector.is_spike(0.5)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("seen", [0, 3, 300])
def test_what_is_not_finite_is_a_spike_at_any_time(loss, seen):
    detector = following(curve("exponential", seen))
    before = detector.state()
    assert detector.is_spike(loss)
    assert detector.state() == before


@pytest.mark.parametrize("memory", [1, 2, 7])
def test_nothing_is_a_spike_before_memory_is_full(memory):
    """Losses that double each time: every one is far above what went before."""
    detector = following([2.0**i for i in range(memory)], deviations=0.01, memory=memory)
    assert detector.seen == memory
    assert detector.is_spike(2.0**40)


def test_averages_by_hand():
    """Memory 3: shares of 2/3, 2/4, then 2/4 for ever; by Holt's rule for level and trend."""
    detector = following([4.0, 2.0], memory=3)
    assert detector.deviation == pytest.approx(4 / 3)  # |2 - 4| x 2/3
    assert detector.level == pytest.approx(8 / 3)  # 4 - 2 x 2/3
    assert detector.trend == pytest.approx(-8 / 9)  # (8/3 - 4) x 2/3
    assert detector.expected == pytest.approx(16 / 9)
    detector.is_spike(16 / 9 + 1)
    assert detector.deviation == pytest.approx(7 / 6)  # half of 4/3 and 1
    assert detector.level == pytest.approx(16 / 9 + 1 / 2)
    assert detector.trend == pytest.approx(-8 / 9 + (1 / 2) / 2)  # the level moved by the trend and 1/2
    before = detector.trend
    detector.is_spike(detector.expected + 2)
    assert detector.deviation == pytest.approx(7 / 12 + 1)
    assert detector.trend == pytest.approx(before + 1 / 2)


def test_a_spike_is_measured_in_deviations():
    detector = following(curve("power", 300), deviations=5.0, memory=50)
    limit = detector.expected + 5 * detector.deviation
    assert detector.is_spike(limit + 1e-9)
    assert not detector.is_spike(limit - 1e-9)


@pytest.mark.parametrize("cut", [0, 1, 40, 137])
def test_a_state_goes_on_where_it_was(cut):
    losses = curve("exponential", 300)
    losses[200] += 3
    whole, first = SpikeDetector(6.0, 100), SpikeDetector(6.0, 100)
    for loss in losses[:cut]:
        first.is_spike(loss)
        whole.is_spike(loss)
    second = SpikeDetector(6.0, 100)
    second.load_state(json.loads(json.dumps(first.state())))
    after = [(second.is_spike(loss), second.expected, second.deviation) for loss in losses[cut:]]
    assert after == [(whole.is_spike(loss), whole.expected, whole.deviation) for loss in losses[cut:]]
    assert sum(spiked for spiked, _, _ in after) == 1
