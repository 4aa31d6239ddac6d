"""Indexer keys in FP8: the bits of those in FP4 where the model rounds them so, finer ones where it does not."""

import pytest

import dsv4
from dsv4 import native
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine

GREEDY = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=5)
pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")


def run(model, prompts, cache_format, **options):
    """The tokens of each request, and the log-probabilities of each of them."""
    limits = Limits(cache_bytes=2**21, numerics="invariant", cache_format=cache_format, **options)
    with Engine(model, limits) as engine:
        assert engine.runner.cache.row_format == cache_format
        return [(found.token_ids, found.logprobs) for found in engine.generate(prompts, GREEDY)]


@pytest.fixture(scope="module")
def alone(model, prompts):
    return [run(model, [prompt], "packed-fp8")[0] for prompt in prompts[1:3]]


@pytest.mark.parametrize(
    "options", [{"step_tokens": 70}, {"draft_tokens": 2, "max_requests": 2}], ids=["steps", "drafts"]
)
def test_requests_together_say_what_each_says_alone(model, prompts, alone, options):
    assert run(model, prompts[1:3], "packed-fp8", **options) == alone


def test_keys_that_fp4_would_round_choose_other_entries(model, prompts, alone):
    assert run(model, prompts[1:3], "packed") != alone


def test_a_model_in_released_precision_says_the_same_with_keys_of_either_kind(released, prompts):
    model = dsv4.load_model(released, "released")
    wanted = run(model, prompts[1:3], "packed")
    assert run(model, prompts[1:3], "packed-fp8") == wanted
    assert run(model, prompts[1:3], "float32") == wanted
