"""Measuring: rates and times by a clock that the test sets, bytes against the accounting, bits against another run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dsv4.accounting.cache import cache_bytes
from dsv4.config.engine import Limits, PrefixLimits
from dsv4.config.presets import smoke
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.engine.measure import (
    Answer,
    Meter,
    Percentiles,
    cache_use,
    decode_again,
    percentiles,
    predicted_bytes,
    run_lengths,
    run_one,
    run_requests,
    same_bits,
)
from dsv4.engine.prefix import fresh_start
from dsv4.model.init import new_model

STEP_SECONDS, TOKEN_SECONDS = 10.0, 0.25


@pytest.fixture(scope="module")
def model():
    return new_model(smoke(), seed=5).eval()


def sampling(max_tokens: int, **options) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0, **options)


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, 512, num_tokens).tolist()


class Timed:
    """An engine that takes 10 s for a step and 0.25 s for a token in it, by a clock that only it moves."""

    def __init__(self, model, **limits) -> None:
        self.engine = Engine(model, Limits(**{"cache_bytes": 2**21, **limits}))
        self.now, self.num_run, run = 0.0, 0, self.engine.runner.run

        def timed(entries, token_ids):
            count = sum(map(len, token_ids))
            self.num_run += count
            self.now += STEP_SECONDS + TOKEN_SECONDS * count
            return run(entries, token_ids)

        self.engine.runner.run = timed

    def clock(self) -> float:
        return self.now

    def meter(self, **options) -> Meter:
        return Meter(self.engine, self.clock, **options)


def test_one_request_alone(model):
    timed = Timed(model, step_tokens=40)
    speed = run_requests(timed.meter(), [prompt(100)], sampling(6), concurrency=1)
    assert (speed.total_prompt_tokens, speed.total_output_tokens) == (100, 6)
    prefill = 3 * STEP_SECONDS + 100 * TOKEN_SECONDS  # steps of 40, 40 and 20 tokens
    decode = STEP_SECONDS + TOKEN_SECONDS
    assert speed.prefill_tokens_per_s == 100 / prefill
    assert speed.decode_tokens_per_s == 1 / decode
    assert speed.seconds == prefill + 5 * decode
    assert speed.output_tokens_per_s == 6 / speed.seconds
    assert speed.first_token_s == Percentiles(prefill, prefill, prefill)
    assert speed.token_s == speed.pause_s == Percentiles(decode, decode, decode)
    assert speed.acceptance is None


def test_decoding_is_measured_where_all_decode(model):
    """Three requests, two at once: the second one's prompt and the last one's loneliness change nothing."""
    timed = Timed(model, step_tokens=64, max_requests=2)
    prompts = [prompt(n, seed=n) for n in (60, 150, 70)]
    speed = run_requests(timed.meter(), prompts, sampling(20), concurrency=2)
    assert speed.decode_tokens_per_s == 2 / (STEP_SECONDS + 2 * TOKEN_SECONDS)
    assert (speed.total_prompt_tokens, speed.total_output_tokens) == (280, 60)
    first, token = speed.first_token_s, speed.token_s
    assert first is not None
    assert token is not None
    assert first.p50 < first.p90 < first.p99
    assert token.p99 <= STEP_SECONDS + 64 * TOKEN_SECONDS  # nobody waits for another's prompt longer than a step


def test_no_decode_rate_without_a_step_of_decoding(model):
    speed = run_requests(Timed(model).meter(), [prompt(30)], sampling(1), concurrency=1)
    assert speed.decode_tokens_per_s is None
    assert speed.token_s is None
    assert speed.pause_s is None


def test_tokens_found_are_not_counted_as_run(model):
    timed = Timed(model)
    run_requests(timed.meter(), [prompt(300)], sampling(2), concurrency=1)
    again = run_requests(timed.meter(), [prompt(300)], sampling(2), concurrency=1)
    assert again.total_prompt_tokens == 300 - 256


def test_drafts_are_counted(model):
    timed = Timed(model, draft_tokens=2)
    speed = run_requests(timed.meter(), [prompt(50)], sampling(12), concurrency=1)
    assert speed.num_drafted > 0
    assert speed.acceptance == speed.num_accepted / speed.num_drafted
    assert speed.total_output_tokens == 12
    assert speed.total_prompt_tokens == 50


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "packed"])
def test_bytes_used_are_those_predicted_at_every_step(model, row_format, spare):
    limits = Limits(
        cache_bytes=2**21, cache_format=row_format, draft_tokens=spare, step_tokens=60, max_requests=3,
        prefix=PrefixLimits(memory=False),
    )  # fmt: skip
    engine = Engine(model, limits)
    for i, length in enumerate((5, 131, 250)):
        engine.add(prompt(length, seed=i), sampling(4))
    seen = []
    while not engine.is_idle:
        engine.step()
        use = cache_use(engine)
        seen.append(use.used_bytes)
        assert use.used_bytes == use.predicted_bytes
    assert len(set(seen)) > 3
    assert seen[-1] == 0  # all has been given back


def test_bytes_predicted_are_those_of_the_accounting():
    config = smoke()
    for length in (128, 256, 512):
        assert predicted_bytes(config, "packed", length) == cache_bytes(config, "packed", length)
    rows = 6 * 80 * 2  # bytes of one token in the rings of five layers and the MTP block
    assert predicted_bytes(config, "bfloat16", 3) - predicted_bytes(config, "bfloat16", 2) == rows
    assert predicted_bytes(config, "bfloat16", 17) == predicted_bytes(config, "bfloat16", 16)  # the window is full
    grown = predicted_bytes(config, "bfloat16", 129) - predicted_bytes(config, "bfloat16", 128)
    assert grown == 2 * 32 * (80 + 32) * 2 + 80 * 2  # a page: 32 entries and keys in two layers, one in another


def test_the_most_is_reported(model):
    timed = Timed(model, max_requests=2, prefix=PrefixLimits(memory=False))
    speed = run_requests(timed.meter(), [prompt(200), prompt(140, 1)], sampling(3), concurrency=2)
    assert speed.cache_used_bytes == speed.cache_predicted_bytes == 2 * cache_bytes(smoke(), "float32", 256)
    assert speed.cache_allocated_bytes == timed.engine.runner.cache.num_bytes() > speed.cache_used_bytes


@pytest.mark.parametrize("policy", ["full", "periodic", "zero"])
def test_a_restart_is_measured(model, tmp_path, policy):
    period = {"period": 256} if policy == "periodic" else {}
    limits = {"numerics": "invariant", "prefix": PrefixLimits(folder=str(tmp_path), policy=policy, **period)}
    with Timed(model, **limits).engine as engine:
        engine.generate([prompt(400)], sampling(1))
    timed = Timed(model, **limits)
    again = run_one(timed.meter(keeps_logits=True), prompt(440), sampling(5))
    start = fresh_start(384, window=16, depth=6)
    assert again.num_found == 384
    assert again.num_repeated == {"full": 0, "periodic": 384 - 256, "zero": 384 - start}[policy]
    assert timed.num_run == again.num_repeated + 440 - 384 + 4
    plain = run_one(Timed(model, numerics="invariant").meter(keeps_logits=True), prompt(440), sampling(5))
    assert (plain.num_found, plain.num_repeated) == (0, 0)
    assert same_bits(again, plain)
    assert len(plain.logits) == len(plain.token_ids) == 5
    assert plain.first_token_s == STEP_SECONDS * 2 + TOKEN_SECONDS * 440  # a chunk ends where a state is kept


def test_one_bit_is_a_difference():
    logits = np.array([[1.0, -0.0]], np.float32)
    one = Answer(first_token_s=1.0, token_ids=[0], logits=[logits], num_found=0, num_repeated=0)
    assert same_bits(one, replace(one, first_token_s=2.0, num_found=128, logits=[logits.copy()]))
    assert not same_bits(one, replace(one, token_ids=[1]))
    assert not same_bits(one, replace(one, logits=[np.array([[1.0, 0.0]], np.float32)]))
    assert not same_bits(one, replace(one, logits=[]))


def test_lengths_go_on_from_one_another(model, monkeypatch):
    monkeypatch.setattr("dsv4.engine.measure.SPAN_TOKENS", 100)
    timed = Timed(model, max_requests=1, step_tokens=64, numerics="invariant")
    told: list[int] = []
    found = list(
        run_lengths(
            timed.meter(), prompt(512), (100, 300, 512), decode_tokens=7, resident=lambda: 123, tell=told.append
        )
    )
    assert [at.length for at in found] == [100, 300, 512]
    # Each starts at the last page that the one before filled: 0, 0 and 256.
    assert timed.num_run == (100 - 8) + (300 - 8) + (512 - 8 - 256) + 3 * 7
    assert max(told) == 512 - 2  # what decodes last is not run, and a request that has ended is not seen
    assert all(b > a for a, b in pairwise(told[-5:]))
    assert [at.prefill_tokens for at in found] == [92, 100, 120]
    last = found[-1]  # steps of 64 and 56 tokens, the second of them behind the last page boundary
    assert last.prefill_tokens_per_s == 120 / (2 * STEP_SECONDS + 120 * TOKEN_SECONDS)
    for at in found:
        assert at.decode_tokens_per_s == 1 / (STEP_SECONDS + TOKEN_SECONDS)
        assert at.cache_used_bytes == at.cache_predicted_bytes
        assert at.resident_bytes == 123
    assert last.cache_used_bytes == cache_bytes(smoke(), "float32", 512)


def test_decoding_again_at_all_lengths(model):
    timed = Timed(model, max_requests=1, step_tokens=64)
    meter = timed.meter()
    list(run_lengths(meter, prompt(512), (100, 300), decode_tokens=7, resident=lambda: 0))
    before = timed.num_run
    rates = decode_again(meter, prompt(512), (100, 300), decode_tokens=7, rounds=3)
    assert rates == [[1 / (STEP_SECONDS + TOKEN_SECONDS)] * 3] * 2
    # From the prompts' last whole pages on, of 0 and 256 tokens, and the 7 again.
    assert timed.num_run - before == 3 * ((100 - 8) + (300 - 8 - 256) + 2 * 7)


def test_a_length_decodes_what_it_would_alone(model):
    """The tokens of every length are those of a request of its own."""
    timed = Timed(model, max_requests=1, step_tokens=64, numerics="invariant")
    meter = timed.meter(keeps_logits=True)
    list(run_lengths(meter, prompt(512), (200, 400), decode_tokens=3, resident=lambda: 0))
    alone = run_one(Timed(model, numerics="invariant").meter(keeps_logits=True), prompt(512)[:396], sampling(4))
    assert [x.tobytes() for x in meter.logits[-4:]] == [x.tobytes() for x in alone.logits]


def test_percentiles():
    assert percentiles([]) is None
    assert percentiles([3.0]) == Percentiles(3.0, 3.0, 3.0)
    assert percentiles([float(i) for i in range(101)]) == Percentiles(50.0, 90.0, 99.0)
