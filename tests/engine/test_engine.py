"""The engine's tokens are those of plain decoding, whatever else it does meanwhile."""

import asyncio
import random

import numpy as np
import pytest

from dsv4 import native
from dsv4.config.engine import Limits, PrefixLimits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.eval.generate import generate

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")

TOKENS = 24


def limits_of(**options):
    """With memory for a toy: the default is a GiB, which takes a second to make."""
    return Limits(**{"cache_bytes": 2**21, **options})


GREEDY = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
SAMPLED = Sampling(max_tokens=TOKENS, temperature=0.9, top_p=0.95, seed=5, ignore_eos=True)
LIMITS = {
    "one at a time": limits_of(numerics="invariant", max_requests=1, step_tokens=512),
    "all at once": limits_of(numerics="invariant"),
    "small steps": limits_of(numerics="invariant", max_requests=3, step_tokens=17),
    "drafts": limits_of(numerics="invariant", draft_tokens=1),
    "chained drafts, small steps": limits_of(numerics="invariant", max_requests=2, step_tokens=50, draft_tokens=3),
    "nothing shared": limits_of(numerics="invariant", prefix=PrefixLimits(memory=False)),
    "states every page": limits_of(numerics="invariant", prefix=PrefixLimits(state_every=128)),
}  # fmt: skip


def tokens_of(completions):
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="session")
def plain(model, prompts):
    """Greedy tokens of the model itself, with its contiguous state."""
    return [
        list(generate(model, prompt, num_tokens=TOKENS, temperature=0, top_p=1, seed=0, stop_ids=set()))
        for prompt in prompts
    ]


@pytest.mark.parametrize("numerics", ["fast", pytest.param("invariant", marks=needs_kernels)])
def test_greedy_tokens_are_those_of_the_model(model, prompts, plain, numerics):
    assert tokens_of(Engine(model, limits_of(numerics=numerics)).generate(prompts, GREEDY)) == plain


@pytest.fixture(scope="session", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def alone(model, prompts, request):
    """A sampling, and the tokens that it gives when each prompt runs in an engine of its own."""
    engines = [Engine(model, limits_of(numerics="invariant")) for _ in prompts]
    return request.param, tokens_of(e.generate([p], request.param)[0] for e, p in zip(engines, prompts, strict=True))


@needs_kernels
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_tokens_do_not_depend_on_batch_steps_drafts_and_prefixes(model, prompts, limits, alone):
    sampling, wanted = alone
    engine = Engine(model, limits)
    assert tokens_of(engine.generate(prompts, sampling)) == wanted
    again = engine.generate(prompts, sampling)
    assert tokens_of(again) == wanted
    hits = [completion.num_cached for completion in again]
    assert hits == ([0, 128, 256, 0, 256] if limits.prefix.memory else [0] * 5)
    engine.pool.assert_consistent()
    assert engine.pool.num_free == engine.pool.num_pages


@needs_kernels
def test_a_cache_too_small_for_all_preempts_and_gives_the_same(model, prompts, plain):
    size = Engine(model, limits_of()).runner.cache.page_bytes()
    limits = limits_of(numerics="invariant", cache_bytes=4 * size, step_tokens=100)
    engine = Engine(model, limits)
    assert tokens_of(engine.generate(prompts, GREEDY)) == plain
    assert engine.pool.num_free == engine.pool.num_pages == 4


@needs_kernels
@pytest.mark.parametrize("policy", ["full", "periodic", "zero"])
def test_a_folder_restores_to_the_same_bits(model, prompts, plain, tmp_path, policy):
    period = {"period": 128} if policy == "periodic" else {}
    prefix = PrefixLimits(folder=str(tmp_path), policy=policy, **period)
    limits = limits_of(numerics="invariant", prefix=prefix)
    with Engine(model, limits) as first:
        assert tokens_of(first.generate(prompts, GREEDY)) == plain
    with Engine(model, limits) as second:  # another process would find the same files
        found = second.generate(prompts, GREEDY)
    assert tokens_of(found) == plain
    assert [completion.num_cached for completion in found] == [0, 128, 256, 0, 256]
    states = list(tmp_path.glob("*-state-*"))
    assert bool(states) == (policy != "zero")


@needs_kernels
def test_a_damaged_folder_is_a_miss(model, prompts, plain, tmp_path, caplog):
    limits = limits_of(numerics="invariant", prefix=PrefixLimits(folder=str(tmp_path), policy="full"))
    with Engine(model, limits) as first:
        first.generate(prompts, GREEDY)
    for path in tmp_path.glob("*.prefix"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with Engine(model, limits) as second:
        found = second.generate(prompts, GREEDY)
    assert tokens_of(found) == plain
    assert caplog.records
    assert found[1].num_cached == 0


@needs_kernels
def test_another_model_finds_nothing_in_the_folder(model, prompts, tmp_path):
    from dsv4.testing.toys import flash_like, toy_model

    limits = limits_of(prefix=PrefixLimits(folder=str(tmp_path)))
    with Engine(model, limits) as first:
        first.generate(prompts, GREEDY)
    other = toy_model(flash_like(), seed=1).requires_grad_(False)
    with Engine(other, limits) as second:
        assert [c.num_cached for c in second.generate(prompts[:3], GREEDY)] == [0, 0, 0]


@needs_kernels
def test_a_log_resumes_to_the_same_tokens(model, prompts, tmp_path):
    limits = limits_of(numerics="invariant", log=str(tmp_path / "log"), draft_tokens=2)
    wanted = tokens_of(Engine(model, limits_of(numerics="invariant")).generate(prompts, SAMPLED))
    for num_steps in (1, 3, 8):
        with Engine(model, limits) as engine:
            if num_steps == 1:
                for prompt in prompts:
                    engine.add(prompt, SAMPLED)
            else:
                engine.resume()
            for _ in range(num_steps):
                engine.step()
    with Engine(model, limits) as engine:
        ids = engine.resume()
        while not engine.is_idle:
            engine.step()
        assert [engine.take(id).token_ids for id in ids] == wanted
    with Engine(model, limits) as engine:
        assert engine.resume() == []


def test_random_events_leak_nothing(model, prompts):
    draw = random.Random(0)
    size = Engine(model, limits_of()).runner.cache.page_bytes()
    engine = Engine(model, limits_of(max_requests=3, step_tokens=48, cache_bytes=7 * size, draft_tokens=1))
    running: list[str] = []
    for _ in range(400):
        if draw.random() < 0.2:
            sampling = Sampling(
                max_tokens=draw.randint(1, 30), temperature=0.8, seed=draw.randrange(99), ignore_eos=True
            )
            running.append(engine.add(draw.choice(prompts), sampling))
        if running and draw.random() < 0.1:
            engine.cancel(running.pop(draw.randrange(len(running))))
        engine.step()
        engine.pool.assert_consistent()
    while not engine.is_idle:
        engine.step()
    assert engine.pool.num_free == engine.pool.num_pages


def test_a_long_prompt_does_not_stop_who_decodes(model, prompts):
    engine = Engine(model, limits_of(max_requests=2, step_tokens=16))
    short = engine.add(prompts[0], GREEDY)
    engine.step()
    engine.add(prompts[2], GREEDY)
    for _ in range(5):
        assert short in [piece.id for piece in engine.step()]


def test_a_mask_decides_what_is_possible(model, prompts):
    size = model.config.vocab_size

    def even_then_odd(output):
        allowed = np.zeros(size, bool)
        allowed[len(output) % 2 :: 2] = True
        return allowed

    engine = Engine(model, limits_of(draft_tokens=2))
    id = engine.add(prompts[0], Sampling(max_tokens=9, seed=1, ignore_eos=True), mask=even_then_odd)
    while not engine.is_idle:
        engine.step()
    assert [token % 2 for token in engine.take(id).token_ids] == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_ends(model, prompts, plain):
    third = plain[0][2]
    engine = Engine(model, limits_of())
    stopped = engine.generate(
        [prompts[0]], Sampling(max_tokens=9, temperature=0, stop_token_ids=(third,), ignore_eos=True)
    )
    assert (stopped[0].token_ids, stopped[0].finish) == (plain[0][: plain[0].index(third) + 1], "stop")
    assert engine.generate([prompts[0]], Sampling(max_tokens=2, temperature=0, ignore_eos=True))[0].finish == "length"


def test_log_probabilities_are_the_models(model, prompts):
    sampling = Sampling(max_tokens=4, temperature=0, logprobs=2, ignore_eos=True)
    for drafts in (0, 2):
        (completion,) = Engine(model, limits_of(draft_tokens=drafts)).generate([prompts[3]], sampling)
        assert len(completion.logprobs) == 4
        for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
            assert found.top[0] == (token, found.chosen)  # greedy takes the likeliest


def test_streams_of_one_loop(model, prompts, plain):
    engine = Engine(model, limits_of(max_requests=2))

    async def one(prompt):
        return [token async for piece in engine.stream(prompt, GREEDY) for token in piece.token_ids]

    async def first_of(prompt):
        async for piece in engine.stream(prompt, GREEDY):
            return piece.token_ids

    async def all_of_them():
        return await asyncio.gather(*(one(prompt) for prompt in prompts), first_of(prompts[2]))

    *found, left = asyncio.run(all_of_them())
    assert found == plain
    assert left
    assert engine.is_idle


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([3, 101], GREEDY, "prompt holds 101; expected 0 <= id < vocab_size = 101"),
        ([-1], GREEDY, "prompt holds -1"),
        ("text", GREEDY, "prompt is text, but the engine has no tokenizer"),
        ([3] * 1024, GREEDY, "the prompt has 1024 tokens; expected fewer than the context of 1024"),
        ([3], Sampling(logit_bias=((101, 1.0),)), "sampling.logit_bias holds 101; expected ids below vocab_size = 101"),
        ([3], Sampling(stop_token_ids=(500,)), "sampling.stop_token_ids holds 500"),
        ([3], Sampling(stop=("x",)), "sampling.stop is .* the engine has no tokenizer"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(model, prompt, sampling, message):
    engine = Engine(model, limits_of())
    with pytest.raises(ValueError, match=message):
        engine.generate([[5, 6], prompt], sampling)
    assert engine.is_idle
    assert engine.pool.num_free == engine.pool.num_pages


def test_bad_limits_are_refused(model):
    with pytest.raises(ValueError, match="cache_bytes is 10; expected at least the"):
        Engine(model, limits_of(cache_bytes=10))
    from dsv4.testing.toys import flash_like, toy_model

    portable = toy_model(flash_like(), backend="portable")
    with pytest.raises(ValueError, match="numerics is 'invariant' with the backend 'portable'"):
        Engine(portable, limits_of(numerics="invariant"))
