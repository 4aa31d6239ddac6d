"""What the log gives back to the next engine: requests to go on with, and answers that nobody had taken."""

from dataclasses import replace

import numpy as np
import pytest

from dsv4.accounting.cache import page_bytes
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.engine.log import recover

PROMPTS = [[0, 3, 4], [0, 5] * 70, [0, 7, 7, 2]]
SAMPLINGS = [Sampling(max_tokens=n, seed=n, temperature=0, logprobs=2, ignore_eos=True) for n in (3, 9, 14)]


@pytest.fixture
def limits(small, tmp_path):
    return small(log=str(tmp_path / "log"))


def run(engine):
    while not engine.is_idle:
        engine.step()


def begin(model, limits, num_steps, **options):
    """An engine that was left after so many steps, without being closed cleanly."""
    with Engine(model, limits) as engine:
        ids = [engine.add(p, s, **options) for p, s in zip(PROMPTS, SAMPLINGS, strict=True)]
        for _ in range(num_steps):
            engine.step()
    return ids


def test_an_answer_that_was_not_taken_is_found_again(tiny, small, limits):
    """With its tokens, its log-probabilities and its end, as often as needed, and never after it was taken."""
    whole = Engine(tiny, small()).generate(PROMPTS, SAMPLINGS)
    ids = begin(tiny, limits, 10)
    for _ in range(2):
        with Engine(tiny, limits) as engine:
            assert engine.resume() == ids
            assert engine.resume() == []
            ended = [engine.completion(id) for id in ids if engine.completion(id).finish is not None]
            assert [c.id for c in ended] == ids[:2]
            for completion, wanted in zip(ended, whole, strict=False):
                assert (completion.token_ids, completion.logprobs) == (wanted.token_ids, wanted.logprobs)
                assert completion.finish == wanted.finish
    with Engine(tiny, limits) as engine:
        engine.resume()
        engine.take(ids[0])
        run(engine)
        engine.take(ids[2])
    with Engine(tiny, limits) as engine:
        assert engine.resume() == [ids[1]]
        assert engine.is_idle


def test_log_probabilities_go_on_where_they_stopped(tiny, small, limits):
    whole = Engine(tiny, small()).generate(PROMPTS, SAMPLINGS)
    begin(tiny, limits, 2)
    with Engine(tiny, limits) as engine:
        ids = engine.resume()
        run(engine)
        found = [engine.take(id) for id in ids]
    for completion, wanted in zip(found, whole, strict=True):
        assert completion.token_ids == wanted.token_ids
        assert len(completion.logprobs) == len(wanted.logprobs) == len(wanted.token_ids)
        for ours, theirs in zip(completion.logprobs, wanted.logprobs, strict=True):
            assert ours.chosen == pytest.approx(theirs.chosen, abs=1e-5)
            assert [id for id, _ in ours.top] == [id for id, _ in theirs.top]


def test_a_mask_must_be_given_again(tiny, small, limits):
    """Without it the tokens would be others, and nobody would know."""

    def even(output):
        return np.arange(11) % 2 == 0

    ids = begin(tiny, limits, 5, mask=even)
    with Engine(tiny, limits) as engine:
        with pytest.raises(ValueError, match=r"masks has none for \['request-1', 'request-2'\]; expected one for each"):
            engine.resume({ids[0]: even})
        assert engine.resume(dict.fromkeys(ids[1:], even)) == ids  # the first has ended
        run(engine)
        found = [engine.take(id) for id in ids]
    alone = Engine(tiny, small())
    for p, s in zip(PROMPTS, SAMPLINGS, strict=True):
        alone.add(p, s, mask=even)
    run(alone)
    assert [c.token_ids for c in found] == [alone.take(id).token_ids for id in ids]
    assert all(token % 2 == 0 for c in found for token in c.token_ids)


@pytest.mark.parametrize(
    ("fewer", "reason"),
    [("max_context", "the prompt has 140 tokens; expected fewer than the context of 100"),
     ("cache_bytes", "140 tokens and max_tokens = 9 need 2 pages; expected at most the cache's 1")],
)  # fmt: skip
def test_what_does_not_fit_any_more_fails_and_keeps_nobody_back(tiny, small, limits, fewer, reason):
    """It has what it had, and its error is found again, until it is taken."""
    whole = Engine(tiny, small()).generate(PROMPTS, SAMPLINGS)
    ids = begin(tiny, limits, 2)
    given = {"max_context": 100, "cache_bytes": page_bytes(tiny.config, "float32")}[fewer]
    with Engine(tiny, replace(limits, **{fewer: given})) as engine:
        assert engine.resume() == ids
        failed = engine.completion(ids[1])
        assert (failed.finish, failed.token_ids) == ("error", whole[1].token_ids[: len(failed.token_ids)])
        assert len(failed.token_ids) == len(failed.logprobs) > 0
        assert str(failed.error).startswith("request request-1: ")
        assert reason in str(failed.error)
        run(engine)
        assert [engine.take(id).token_ids for id in (ids[0], ids[2])] == [whole[0].token_ids, whole[2].token_ids]
    with Engine(tiny, limits) as engine:
        assert engine.resume() == [ids[1]]
        assert engine.is_idle
        assert (engine.completion(ids[1]).finish, str(engine.completion(ids[1]).error)) == ("error", str(failed.error))
        engine.drop(ids[1])
    assert recover(limits.log) == []


def test_users_are_kept_apart_after_a_resume_too(tiny, limits):
    long = [0, *([3, 8] * 100)]
    with Engine(tiny, limits) as engine:
        for user in (b"one", b"two", b"two"):
            engine.add(long, Sampling(max_tokens=30, temperature=0, ignore_eos=True), salt=user)
        engine.step()
    with Engine(tiny, limits) as engine:
        ids = engine.resume()
        assert [engine._running[id].request.salt for id in ids] == [b"one", b"two", b"two"]


def test_a_new_id_is_no_one_elses(tiny, limits):
    """Neither of what runs, nor of what has ended and was not taken, nor of what was not resumed yet."""
    assert begin(tiny, limits, 1) == ["request-0", "request-1", "request-2"]
    with Engine(tiny, limits) as engine:
        assert engine.add([0, 4], SAMPLINGS[0]) == "request-3"
        for id in ("request-1", "request-3"):
            with pytest.raises(ValueError, match=f"request id is '{id}'; expected one of no other request"):
                engine.add([0, 4], SAMPLINGS[0], id=id)
        assert engine.resume() == ["request-0", "request-1", "request-2"]
        run(engine)
        with pytest.raises(ValueError, match="request id is 'request-3'; expected one of no other request"):
            engine.add([0, 4], SAMPLINGS[0], id="request-3")
        engine.take("request-3")
        assert engine.add([0, 4], SAMPLINGS[0], id="request-3") == "request-3"
        assert engine.add([0, 4], SAMPLINGS[0]) == "request-4"


def test_texts_of_answers_come_back(writer, tokenizer, small, tmp_path):
    """A stop string, a token that ends, and a text that was held back: each as it was given."""
    limits = small(log=str(tmp_path / "log"))
    (whole,) = Engine(writer, small(), tokenizer=tokenizer).generate(
        ["for"], Sampling(max_tokens=30, seed=4, ignore_eos=True)
    )
    samplings = [
        Sampling(max_tokens=30, seed=4, ignore_eos=True),
        Sampling(max_tokens=30, seed=4, ignore_eos=True, stop=(whole.text[9:12],)),
        Sampling(max_tokens=30, seed=4, ignore_eos=True, stop=(whole.text[-2:] + "!",)),
        Sampling(max_tokens=30, seed=4, ignore_eos=True, stop_token_ids=(whole.token_ids[20],)),
    ]
    with Engine(writer, limits, tokenizer=tokenizer) as engine:
        names = [engine.add("for", sampling) for sampling in samplings]
        run(engine)
        given = [engine.completion(name) for name in names]
    assert given[1].text == whole.text[: whole.text.index(whole.text[9:12])]
    assert given[2].text == given[0].text == whole.text
    assert whole.text.startswith(given[3].text)
    with Engine(writer, limits, tokenizer=tokenizer) as engine:
        assert engine.resume() == names
        found = [engine.take(name) for name in names]
    assert [c.finish for c in found] == ["length", "stop", "length", "stop"]
    assert [(c.text, c.token_ids, c.finish) for c in found] == [(c.text, c.token_ids, c.finish) for c in given]


def test_a_refused_list_of_prompts_leaves_nothing_to_resume(tiny, limits):
    with Engine(tiny, limits) as engine, pytest.raises(ValueError, match="the prompt is empty"):
        engine.generate([[0, 3], []], SAMPLINGS[0])
    assert recover(limits.log) == []
