"""What every step does: warm-up, ramp, cosine, weights, and the walk through the phases."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.config.recipes import flash, smoke
from dsv4.config.train import BatchConfig, Phase
from dsv4.train.schedule import Position, after, batch_tokens, learning_rate, mtp_weight, plan, total_tokens

LONGEST = 16  # tokens of a row in the random recipes


@st.composite
def recipes(draw):
    """Any schedule a recipe can state, of a few hundred steps at most."""
    phases, is_warm = [], False
    for i in range(draw(st.integers(1, 5))):
        kinds = [("dense", "all"), ("dense", "indexer"), *([("sparse", "all")] if is_warm else [])]
        attention, train = draw(st.sampled_from(kinds))
        is_warm = is_warm or train == "indexer"
        tokens, sequence = draw(st.integers(1, 300)), draw(st.sampled_from([4, 8, LONGEST]))
        phases.append(Phase(name=f"p{i}", tokens=tokens, sequence=sequence, attention=attention, train=train))
    small = smoke()
    peak, end = sorted(draw(st.tuples(*[st.floats(1e-5, 1.0)] * 2)), reverse=True)
    optimizer = replace(
        small.optimizer, peak_lr=peak, end_lr=end, warmup_steps=draw(st.integers(0, 30)),
        decay_fraction=draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))),
    )  # fmt: skip
    full = LONGEST * draw(st.integers(1, 6))
    batch = BatchConfig(
        start_tokens=draw(st.integers(1, full)), tokens=full, ramp_tokens=draw(st.integers(0, 500)),
        micro_tokens=draw(st.integers(LONGEST, 3 * LONGEST)),
    )  # fmt: skip
    return replace(small, optimizer=optimizer, batch=batch, phases=tuple(phases))


def walk(config):
    """Every step's position before it and its plan."""
    position, steps = Position(), []
    while (now := plan(config, position)) is not None:
        steps.append((position, now))
        position = after(position, now)
    return steps, position


def is_main(now):
    return now.phase.train == "all"


def main_total(config):
    return sum(phase.tokens for phase in config.phases if phase.train == "all")


# The walk


@given(recipes())
@settings(max_examples=150, deadline=None)
def test_a_walk_visits_every_phase_once_in_order_until_its_tokens_are_reached(config):
    steps, end = walk(config)
    assert [now.step for _, now in steps] == list(range(1, len(steps) + 1))
    assert [now.phase for _, now in steps if now.is_first] == list(config.phases)
    assert [now.phase for _, now in steps if now.is_last] == list(config.phases)
    for phase in config.phases:
        own = [now for _, now in steps if now.phase == phase]
        assert [now.is_first for now in own] == [True] + [False] * (len(own) - 1)
        assert [now.is_last for now in own] == [False] * (len(own) - 1) + [True]
        assert sum(now.tokens for now in own[:-1]) < phase.tokens <= sum(now.tokens for now in own)
    assert end.step == len(steps)
    assert end.tokens == sum(now.tokens for _, now in steps) >= total_tokens(config)
    assert end.main_steps == sum(is_main(now) for _, now in steps)
    assert end.main_tokens == sum(now.tokens for _, now in steps if is_main(now))
    assert (end.phase, end.phase_tokens) == (len(config.phases), 0)


@given(recipes())
@settings(max_examples=150, deadline=None)
def test_every_step_is_whole_rows_and_its_micro_batches_add_up(config):
    for position, now in walk(config)[0]:
        rows = now.micro_batches()
        assert sum(rows) == now.rows >= 1
        assert now.tokens == now.rows * now.phase.sequence
        assert all(0 < n * now.phase.sequence <= config.batch.micro_tokens for n in rows)
        assert len(set(rows[:-1])) <= 1  # alike,
        assert rows[-1] <= rows[0] == now.micro_rows  # the last possibly smaller
        wanted = batch_tokens(config, position.main_tokens)
        assert abs(now.tokens - wanted) <= now.phase.sequence / 2 or (now.rows == 1 and wanted < now.tokens)


@given(recipes())
@settings(max_examples=150, deadline=None)
def test_the_learning_rate_stays_between_nothing_and_its_peak(config):
    o = config.optimizer
    for position, now in walk(config)[0]:
        if not is_main(now):
            assert now.lr == config.loss.indexer_lr
            assert now.mtp_weight == 0
        elif position.main_steps < o.warmup_steps:
            assert now.lr == pytest.approx(o.peak_lr * (position.main_steps + 1) / o.warmup_steps, rel=1e-15)
            assert 0 < now.lr <= o.peak_lr * (1 + 1e-15)
        else:
            assert o.end_lr * (1 - 1e-15) <= now.lr <= o.peak_lr * (1 + 1e-15)


@given(recipes())
@settings(max_examples=100, deadline=None)
def test_warm_ups_of_the_indexer_move_nothing_of_the_main_training(config):
    """Without them the other steps are the same."""

    def main_steps(config):
        steps = [now for _, now in walk(config)[0] if is_main(now)]
        return [(now.phase.name, now.rows, now.lr, now.mtp_weight, now.is_first, now.is_last) for now in steps]

    others = tuple(replace(phase, attention="dense") for phase in config.phases if phase.train == "all")
    if others:
        assert main_steps(config) == main_steps(replace(config, phases=others))
    else:
        assert main_steps(config) == []


@given(recipes())
@settings(max_examples=100, deadline=None)
def test_the_ramp_rises_to_the_full_batch(config):
    steps = walk(config)[0]
    for phase in config.phases:
        rows = [now.rows for _, now in steps if now.phase == phase]
        assert rows == sorted(rows)
    for position, now in steps:
        if position.main_tokens >= config.batch.ramp_tokens:
            assert now.tokens == config.batch.tokens


@given(recipes())
@settings(max_examples=100, deadline=None)
def test_the_mtp_weight_falls_exactly_when_the_learning_rate_begins_to(config):
    total, fraction = main_total(config), config.optimizer.decay_fraction
    for position, now in walk(config)[0]:
        if is_main(now):
            done = min(position.main_tokens, total)
            falls = done - total * (1 - fraction) > 0
            assert now.mtp_weight == (config.loss.mtp_weight_decay if falls else config.loss.mtp_weight)
            if now.lr < config.optimizer.peak_lr * (1 - 1e-15) and position.main_steps >= config.optimizer.warmup_steps:
                assert falls


# The curves


def test_the_smoke_recipe_ramps_as_computed_by_hand():
    """512 tokens + 512 x (tokens done) / 4096, in rows of 64."""
    rows = [now.rows for _, now in walk(smoke())[0]][:9]
    assert rows == [8, 9, 10, 11, 13, 14, 16, 16, 16]


def test_flash_at_points_computed_by_hand():
    config = flash()
    billion, million_tokens = 10**9, 1024 * 1024
    assert main_total(config) == 31_997_900 * 10**6

    first = plan(config, Position())
    assert first is not None
    assert (first.rows, first.micro_rows, len(first.micro_batches())) == (3072, 256, 12)
    assert first.lr == pytest.approx(1.35e-7, rel=1e-14)
    assert learning_rate(config, 999, billion) == pytest.approx(1.35e-4, rel=1e-14)
    assert learning_rate(config, 1999, billion) == 2.7e-4
    assert learning_rate(config, 2000, billion) == 2.7e-4
    assert learning_rate(config, 300_000, 25_598_320 * 10**6) == 2.7e-4  # four fifths
    assert learning_rate(config, 300_000, 28_798_110 * 10**6) == pytest.approx(1.485e-4, rel=1e-12)  # nine tenths
    assert learning_rate(config, 300_000, 27_198_215 * 10**6) == pytest.approx(2.344135e-4, rel=1e-6)  # an eighth turn
    assert learning_rate(config, 300_000, 31_997_900 * 10**6) == 2.7e-5
    assert mtp_weight(config, 25_598_320 * 10**6) == 0.3
    assert mtp_weight(config, 25_598_320 * 10**6 + 1) == 0.1

    assert batch_tokens(config, 234_500 * 10**6) == 42 * million_tokens
    late = plan(config, Position(step=9, main_steps=9000, main_tokens=31 * 10**12, phase=4, phase_tokens=1))
    assert late is not None
    assert (late.phase.sequence, late.rows, late.micro_rows, late.is_dense) == (million_tokens, 72, 1, False)
    warm_up = plan(config, Position(step=9, main_steps=9000, main_tokens=10**12, phase=2))
    assert warm_up is not None
    assert (warm_up.lr, warm_up.mtp_weight, warm_up.is_dense, warm_up.rows) == (1e-3, 0.0, True, 72 * 16)


@given(recipes(), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_the_cosine_falls_to_its_end_and_no_further(config, shares):
    o, total = config.optimizer, main_total(config)
    if total == 0 or o.decay_fraction < 1e-6:
        return
    assert learning_rate(config, 10**6, total) == o.end_lr
    assert learning_rate(config, 10**6, 3 * total) == o.end_lr
    early, late = sorted(int(share * total) for share in shares)
    assert learning_rate(config, 10**6, late) <= learning_rate(config, 10**6, early)


def test_the_cosine_against_its_formula():
    config = replace(smoke(), phases=(Phase(name="only", tokens=1000, sequence=64, attention="dense"),))
    o = replace(config.optimizer, decay_fraction=0.3, peak_lr=0.5, end_lr=0.1)
    config = replace(config, optimizer=o)
    for tokens in (0, 512, 699, 700):
        assert learning_rate(config, 99, tokens) == 0.5
    for tokens in (701, 775, 850, 999, 1000):
        wanted = 0.3 + 0.2 * math.cos(math.pi * (tokens - 700) / 300)
        assert learning_rate(config, 99, tokens) == pytest.approx(wanted, rel=1e-14)


def test_without_decay_the_rate_stays_at_its_peak_even_where_a_phase_goes_over_its_tokens():
    config = smoke()
    phases = (
        Phase(name="long", tokens=65, sequence=64, attention="dense"),  # 512 are taken
        Phase(name="short", tokens=1, sequence=64, attention="dense"),
    )
    config = replace(config, phases=phases, optimizer=replace(config.optimizer, warmup_steps=1, decay_fraction=0.0))
    steps, _ = walk(config)
    assert [(now.lr, now.mtp_weight) for _, now in steps] == [(config.optimizer.peak_lr, 0.3)] * 2


def test_a_position_is_all_there_is_to_know():
    """Planning ahead plans the steps that will be done."""
    config = smoke()
    steps, end = walk(config)
    assert plan(config, end) is None
    for position, now in steps:
        assert plan(config, Position(**vars(position))) == now
