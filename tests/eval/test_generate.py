"""Generation: the model's own choices, draws that are the seed's alone, and every way to end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dsv4.eval import generate as decoding
from dsv4.eval.generate import generate
from dsv4.testing.toys import flash_like, toy_model, toy_token_ids

CONFIG = replace(flash_like(), max_context=70)
PROMPT = toy_token_ids(CONFIG, 1, 50)[0].tolist()


@pytest.fixture(scope="module")
def model():
    return toy_model(CONFIG)


def tokens(model, prompt=PROMPT, **changes):
    options = {"num_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 3, "stop_ids": set()} | changes
    return list(generate(model, prompt, **options))


def test_greedy_is_the_likeliest_token_of_a_fresh_call_each_time(model):
    expected = list(PROMPT)
    for _ in range(12):
        expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert tokens(model, temperature=0.0) == expected[len(PROMPT) :]
    assert tokens(model, temperature=5e-324) == expected[len(PROMPT) :]
    assert tokens(model, top_p=1e-9) == expected[len(PROMPT) :]


def test_the_prompt_is_one_call_and_every_token_another(model, monkeypatch):
    lengths = []
    run = model.run
    monkeypatch.setattr(model, "run", lambda ids, **options: lengths.append(ids.shape[1]) or run(ids, **options))
    assert len(tokens(model, num_tokens=4)) == 4
    assert lengths == [50, 1, 1, 1]


def test_the_seed_alone_decides(model):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tokens(model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert tokens(model) == first
    assert tokens(model, seed=4) != first


def test_draws_follow_temperature_and_top_p():
    logits = torch.tensor([2.0, -1.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = 2000

    def frequencies(temperature, top_p):
        counts = Counter(decoding._choose(logits, temperature, top_p, generator) for _ in range(draws))
        return torch.tensor([counts[i] / draws for i in range(5)], dtype=torch.float64)

    p = (logits / 0.7).softmax(dim=0)  # 0.66, 0.01, 0.16, 0.08, 0.16
    error = 4 * 0.5 / draws**0.5  # four deviations of a frequency near a half
    torch.testing.assert_close(frequencies(0.7, 1.0), p, atol=error, rtol=0)
    for top_p, kept in ((0.6, [0]), (0.7, [0, 2]), (0.83, [0, 2, 4]), (0.99, [0, 2, 3, 4])):
        expected = torch.zeros_like(p)
        expected[kept] = p[kept] / p[kept].sum()
        drawn = frequencies(0.7, top_p)
        torch.testing.assert_close(drawn, expected, atol=error, rtol=0)
        assert drawn.nonzero()[:, 0].tolist() == kept


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(model):
    whole = tokens(model)
    assert len(set(whole)) > 5
    stop = whole[5]
    assert tokens(model, stop_ids={stop, 100}) == whole[: whole.index(stop)]


def test_the_text_ends_where_the_context_is_full(model):
    assert len(tokens(model, num_tokens=1000)) == 20
    assert tokens(model, prompt=toy_token_ids(CONFIG, 1, 70)[0].tolist()) == []
    assert tokens(model, num_tokens=0) == []


def test_a_stopped_reader_leaves_gradients_on(model):
    text = generate(model, PROMPT, num_tokens=5, temperature=0.0, top_p=1.0, seed=0, stop_ids=set())
    next(text)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt_ids has 0 tokens; expected 1 to max_context = 70"),
        ({"prompt": [1] * 71}, "prompt_ids has 71 tokens; expected 1 to max_context = 70"),
        ({"num_tokens": -1}, "num_tokens is -1; expected 0 or more"),
        ({"temperature": -0.1}, "temperature is -0.1; expected a finite number, 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_wrong_options_are_refused_at_once(model, changes, message):
    options = {"num_tokens": 2, "temperature": 1.0, "top_p": 1.0, "seed": 0, "stop_ids": set()} | changes
    with pytest.raises(ValueError, match=message):
        generate(model, options.pop("prompt", PROMPT), **options)  # the first token is not asked for
