"""A sequence cut into calls in any way gives the logits of one call, and its state holds what it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.config.model import RATIO
from dsv4.model.state import Growing
from dsv4.testing.toys import flash_like, pro_like, toy_model, toy_token_ids

# A cut changes the sizes of matrix products and so the order of float32 sums, nothing else: see test_parity.
TOLERANCE = 2e-5
TOKENS = 264  # two HCA blocks and a rest
TOYS = {"flash_like": flash_like, "pro_like": pro_like}


@pytest.fixture(scope="module", params=TOYS)
def whole(request):
    """A model, token ids, and the logits of one call without a state."""
    config = TOYS[request.param]()
    model = toy_model(config)
    token_ids = toy_token_ids(config, 2, TOKENS)
    with torch.no_grad():
        return model, token_ids, model(token_ids).logits


def continue_by(model, token_ids, sizes, state):
    """Logits of consecutive calls of these sizes."""
    with torch.no_grad():
        return torch.cat([model(part, state=state).logits for part in token_ids.split(sizes, dim=1)], dim=1)


def test_one_call_with_a_state_is_one_call_without(whole):
    model, token_ids, logits = whole
    state = model.new_state(2)
    # The same sizes and the same operations: the same bits.
    assert torch.equal(continue_by(model, token_ids, [TOKENS], state), logits)
    assert state.length == TOKENS


def test_token_by_token(whole):
    model, token_ids, logits = whole
    assert (continue_by(model, token_ids, [1] * TOKENS, model.new_state(2)) - logits).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "sizes",
    [
        [128, 128, 8],
        [127, 1, 1, 127, 8],
        [3, 1, 1, 11, 1, 1, 246],
        [1, 263],
        [263, 1],
        [17] * 15 + [9],
        [4] * 66,
    ],
    ids=["hca_blocks", "hca_ends", "csa_ends", "1_then_rest", "rest_then_1", "window_and_1", "csa_blocks"],
)
def test_cuts_at_and_around_blocks_and_the_window(whole, sizes):
    model, token_ids, logits = whole
    assert (continue_by(model, token_ids, sizes, model.new_state(2)) - logits).abs().max() < TOLERANCE


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, TOKENS - 1), max_size=9), singles=st.integers(0, TOKENS - 9))
def test_any_cuts(whole, cuts, singles):
    model, token_ids, logits = whole
    edges = sorted(cuts | set(range(singles, singles + 8)) | {TOKENS})  # eight tokens one by one, anywhere
    sizes = [b - a for a, b in zip([0, *edges], edges, strict=False) if b > a]
    assert (continue_by(model, token_ids, sizes, model.new_state(2)) - logits).abs().max() < TOLERANCE


def test_gradients_wanted_or_not_the_values_are_the_same(whole):
    model, token_ids, _ = whole
    sizes = [130, 1, 1, 60, 72]
    plain = continue_by(model, token_ids, sizes, model.new_state(2))
    state = model.new_state(2)
    parts = [model(part, state=state).logits for part in token_ids.split(sizes, dim=1)]
    assert all(part.requires_grad for part in parts)
    assert torch.equal(torch.cat(parts, dim=1), plain)


def test_a_call_has_gradients_of_its_own_and_none_of_earlier_calls(whole):
    model, token_ids, _ = whole
    state = model.new_state(2)
    model(token_ids[:, :150], state=state).logits.sum()
    later = model(token_ids[:, 150:], state=state).logits.sum()
    (grad,) = torch.autograd.grad(later, [model.embed.weight])
    used = torch.zeros(len(grad), dtype=torch.bool)
    used[token_ids[:, 150:]] = True
    assert grad[used].abs().sum(dim=1).all()
    assert not grad[~used].any()  # tokens of the earlier call alone


def test_two_states_do_not_touch_each_other(whole):
    model, token_ids, logits = whole
    states = [model.new_state(1), model.new_state(1)]
    parts = [[], []]
    with torch.no_grad():
        for piece in token_ids.split([60, 70, 1, 133], dim=1):
            for row in (0, 1):
                parts[row].append(model(piece[row : row + 1], state=states[row]).logits)
    both = torch.cat([torch.cat(row, dim=1) for row in parts])
    assert (both - logits).abs().max() < TOLERANCE


def test_length_counts_tokens(whole):
    model, token_ids, _ = whole
    state = model.new_state(2)
    assert state.length == 0
    assert state.num_bytes() == 0
    for size, expected in ((1, 1), (5, 6), (140, 146)):
        continue_by(model, token_ids[:, :size], [size], state)
        assert state.length == expected


def expected_bytes(config, batch_size, tokens):
    """Bytes of the state after one call: window, entries, tails (twice: kv and gate), all float32."""
    K, J, W = config.attention.head_dim, config.indexer.head_dim, config.attention.window
    total = 0
    for kind in config.layer_kinds:
        total += min(tokens, W - 1) * K
        if kind == "hca":
            total += tokens // 128 * K + 2 * (tokens % 128) * K
        if kind == "csa":
            kept = tokens % 4 + (4 if tokens >= 4 else 0)
            total += (tokens // 4 + 2 * kept * 2) * (K + J)
    return 4 * batch_size * total


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 15, 16, 127, 128, 264])
def test_bytes_of_a_state_filled_by_one_call(whole, tokens):
    model, token_ids, _ = whole
    state = model.new_state(2)
    continue_by(model, token_ids[:, :tokens], [tokens], state)
    assert state.num_bytes() == expected_bytes(model.config, 2, tokens)


def test_bytes_grow_with_the_entries_and_stay_within_twice_of_them(whole):
    model, token_ids, _ = whole
    state = model.new_state(2)
    for tokens in range(8, TOKENS + 1, 8):
        continue_by(model, token_ids[:, tokens - 8 : tokens], [8], state)
        needed = expected_bytes(model.config, 2, tokens)
        per_token = sum(
            (model.config.attention.head_dim + (model.config.indexer.head_dim if kind == "csa" else 0)) / RATIO[kind]
            for kind in model.config.layer_kinds
            if kind != "window"
        )
        assert needed <= state.num_bytes() <= needed + 4 * 2 * tokens * per_token


def test_buffers_double():
    growing = Growing()
    sizes, moves, last = [], 0, None
    for step in range(100):
        rows = growing.extend(torch.full((2, 1, 3), float(step)))
        assert rows[:, :, 0].tolist() == [list(range(step + 1))] * 2
        moves += growing.num_bytes() != last
        last = growing.num_bytes()
        sizes.append(last // (2 * 3 * 4))
    assert growing.count == 100
    assert moves == len(set(sizes)) == 8  # 1, 2, 4, ..., 128 rows
    assert all(size <= 2 * (step + 1) for step, size in enumerate(sizes))


def test_growing_hands_the_new_rows_on_with_their_gradient():
    growing = Growing()
    growing.extend(torch.ones(1, 2, 3, requires_grad=True))
    new = torch.ones(1, 1, 3, requires_grad=True)
    everything = growing.extend(new)
    everything.sum().backward()
    assert new.grad.tolist() == [[[1.0, 1.0, 1.0]]]
    assert not growing.extend(torch.ones(1, 1, 3)).requires_grad
