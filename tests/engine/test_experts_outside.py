"""An engine whose experts lie in files says what it says with experts in memory, whatever the pool."""

import pytest

import dsv4
from dsv4 import native
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine

SLOT = 10560  # bytes of one of the toy's experts
PACKED_SLOT = 3 * (96 * 64 // 2 + 96 * 64 // 32)  # and of one in FP4, as wide as groups of 32 make it
GREEDY = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=20)
# All experts of a chunk at once or in passes, with slots for each layer or fewer, and all of the model's
POOLS = [None, 1, 3, 7 * 3 + 1, 63]


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "toy"
    dsv4.save_model(model, directory)
    return directory


def run(model, prompts, limits):
    """The tokens of each request, and the log-probabilities of each of them and of the 20 likeliest."""
    with Engine(model, limits) as engine:
        return [(found.token_ids, found.logprobs) for found in engine.generate(prompts, GREEDY)]


@pytest.mark.skipif(not native.available(), reason="no C compiler here")
@pytest.mark.parametrize("slots", POOLS)
@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_prefill_and_decode_have_the_bits_of_experts_in_memory(model, prompts, directory, slots, draft_tokens):
    limits = Limits(max_requests=3, step_tokens=64, cache_bytes=10**6, draft_tokens=draft_tokens, numerics="invariant")
    stored = dsv4.load_model(directory, weights="mapped", expert_bytes=None if slots is None else slots * SLOT)
    assert run(stored, prompts, limits) == run(model, prompts, limits)
    assert (stored.expert_pool is None) == (slots is None)


@pytest.mark.skipif(not native.available(), reason="no C compiler here")
@pytest.mark.parametrize("weights", ["mapped", "memory"])
@pytest.mark.parametrize("slots", [None, 1, 7 * 3 + 1, 63])
def test_codes_in_files_have_the_bits_of_codes_in_memory(released, prompts, slots, weights):
    limits = Limits(max_requests=3, step_tokens=64, cache_bytes=10**6, draft_tokens=2)
    wanted = run(dsv4.load_model(released, "released"), prompts[:2], limits)
    pool = None if slots is None else slots * PACKED_SLOT
    stored = dsv4.load_model(released, "released", weights=weights, expert_bytes=pool)
    assert run(stored, prompts[:2], limits) == wanted
    if slots is not None:
        counts = stored.expert_pool.counts
        assert len(stored.expert_pool.memory) == slots
        assert counts.bytes_read == counts.misses * PACKED_SLOT > 0


def test_a_step_reads_each_expert_once(model, prompts, directory):
    stored = dsv4.load_model(directory, weights="mapped", expert_bytes=2 * SLOT)
    with Engine(stored, Limits(max_requests=1, step_tokens=200, cache_bytes=10**6)) as engine:
        engine.add(prompts[1], GREEDY)
        engine.step()
    hits, misses, bytes_read = stored.expert_pool.counts
    assert hits == 0
    assert 6 * 5 < misses <= 6 * stored.config.moe.num_experts  # of six layers, more than one token chooses
    assert bytes_read == misses * SLOT


def test_with_room_for_all_nothing_is_read_twice(model, prompts, directory):
    stored = dsv4.load_model(directory, weights="mapped", expert_bytes=100 * SLOT)
    run(stored, prompts, Limits(cache_bytes=10**6))
    counts = stored.expert_pool.counts
    assert counts.misses <= 6 * stored.config.moe.num_experts
    assert counts.hits > counts.misses
