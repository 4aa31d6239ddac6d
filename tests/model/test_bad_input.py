"""Every call that cannot be computed is refused with the value and what was expected, and changes nothing."""

from dataclasses import replace

import pytest
import torch

from dsv4.testing.toys import flash_like, toy_model, toy_token_ids

FILLED = 21  # tokens in the state: a partly filled window after its wrap, five CSA entries, a tail


@pytest.fixture(scope="module")
def model():
    return toy_model(replace(flash_like(), max_context=64))


@pytest.fixture(scope="module")
def other_model():
    return toy_model(replace(flash_like(), max_context=64), seed=3)


def ids(batch_size=2, tokens=6):
    return torch.arange(batch_size * tokens).view(batch_size, tokens)


def with_token(token):
    token_ids = ids()
    token_ids[1, 3] = token
    return token_ids


BAD_TOKENS = {
    "past_the_vocabulary": (with_token(101), "token_ids holds 101; expected 0 <= id < vocab_size = 101"),
    "negative": (with_token(-1), "token_ids holds -1; expected 0 <= id < vocab_size = 101"),
    "int32": (ids().int(), "token_ids has dtype torch.int32; expected torch.int64"),
    "float": (ids().float(), "token_ids has dtype torch.float32; expected torch.int64"),
    "one_dimension": (ids()[0], r"token_ids has shape \[6\]; expected \[B, T\]"),
    "three_dimensions": (ids()[None], r"token_ids has shape \[1, 2, 6\]; expected \[B, T\]"),
    "no_tokens": (ids()[:, :0], r"token_ids has shape \[2, 0\]; expected \[B, T\] with B and T at least 1"),
    "no_rows": (ids()[:0], r"token_ids has shape \[0, 6\]; expected \[B, T\] with B and T at least 1"),
    "too_long": (
        torch.zeros(2, 65, dtype=torch.int64),
        "would bring the sequence to .. tokens; expected at most max_context = 64",
    ),
}


@pytest.mark.parametrize(("token_ids", "message"), BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_bad_token_ids(model, token_ids, message):
    with pytest.raises(ValueError, match=message):
        model(token_ids)


BAD_OPTIONS = {
    "segments_of_another_length": (
        {"segment_ids": ids()[:, :5]},
        r"segment_ids is torch.int64 \[2, 5\]; expected torch.int64 \[2, 6\]",
    ),
    "segments_of_another_dtype": (
        {"segment_ids": ids().int()},
        r"segment_ids is torch.int32 \[2, 6\]; expected torch.int64 \[2, 6\]",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_segment_ids(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(ids(), **options)


def test_mtp_of_one_token(model):
    with pytest.raises(ValueError, match="token_ids has 1 token; expected at least 2 with mtp"):
        model(ids(tokens=1), mtp=True)


def test_mtp_without_the_block():
    without = toy_model(replace(flash_like(), mtp_kinds=()))
    assert without(ids()).mtp_logits is None
    with pytest.raises(ValueError, match="mtp is True; expected False: this model has no MTP block"):
        without(ids(), mtp=True)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_state_of_no_sequences(model, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; expected at least 1"):
        model.new_state(batch_size)


def snapshot(state):
    """All tensors of a state, copied, by their place in it."""

    def walk(value, place):
        if isinstance(value, torch.Tensor):
            yield place, value.clone()
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                yield from walk(item, f"{place}.{number}")
        elif type(value).__module__ == "dsv4.model.state":
            for name, item in vars(value).items():
                yield from walk(item, f"{place}.{name}")

    return dict(walk(state, "state"))


REFUSED = {
    **{
        name: ({"token_ids": token_ids}, message)
        for name, (token_ids, message) in BAD_TOKENS.items()
        if name != "no_rows"
    },
    "three_rows_for_two": ({"token_ids": ids(3)}, "state holds 2 sequences; expected the 3 of token_ids"),
    "one_row_for_two": ({"token_ids": ids(1)}, "state holds 2 sequences; expected the 1 of token_ids"),
    "segments": ({"segment_ids": ids()}, "segment_ids and state are both given; expected one of them"),
    "mtp": ({"mtp": True}, "mtp and state are both given; expected one of them"),
    "past_the_context": (
        {"token_ids": torch.zeros(2, 64 - FILLED + 1, dtype=torch.int64)},
        "would bring the sequence to 65 tokens; expected at most max_context = 64",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_call_leaves_the_state_as_it_was(model, options, message):
    state = model.new_state(2)
    token_ids = toy_token_ids(model.config, 2, FILLED + 6)
    with torch.no_grad():
        model(token_ids[:, :FILLED], state=state)
        before = snapshot(state)
        with pytest.raises(ValueError, match=message):
            model(**{"token_ids": ids(), "state": state} | options)
        assert state.length == FILLED
        after = snapshot(state)
        assert len(before) > 20
        assert before.keys() == after.keys()
        assert all(torch.equal(before[place], after[place]) for place in before)
        model(token_ids[:, FILLED:], state=state)
    assert state.length == FILLED + 6


def test_a_state_of_another_model(model, other_model):
    state = other_model.new_state(2)
    with pytest.raises(ValueError, match="state belongs to another model; expected one made by this model's new_state"):
        model(ids(), state=state)
    assert state.length == 0
    assert not snapshot(state)


def test_the_longest_context_is_allowed(model):
    state = model.new_state(1)
    with torch.no_grad():
        model(torch.zeros(1, 63, dtype=torch.int64), state=state)
        model(torch.zeros(1, 1, dtype=torch.int64), state=state)
    assert state.length == 64


def test_a_call_that_fails_half_way_spoils_the_state_for_good(model, monkeypatch):
    state = model.new_state(2)
    model(ids(), state=state)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(model.layers[4], "forward", fail)
    with pytest.raises(MemoryError):
        model(ids(), state=state)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="state was left half advanced by a call that failed"):
        model(ids(), state=state)
