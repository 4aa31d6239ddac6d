"""What a logit may depend on, and that the same question gets the same answer.

Bits are compared on calls long enough for every expert to work on groups of fixed sizes.
"""

from dataclasses import replace

import pytest
import torch

from dsv4.testing.toys import flash_like, pro_like, toy_model, toy_token_ids

TOYS = {"flash_like": flash_like, "pro_like": pro_like}
TOKENS = 264
# Implementations and batch sizes differ in the order of float32 sums: see test_parity.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=TOYS)
def toy(request):
    config = TOYS[request.param]()
    return toy_model(config), toy_token_ids(config, 2, TOKENS)


def other_token(token_ids, position, vocab_size):
    changed = token_ids.clone()
    changed[:, position] = (changed[:, position] + 1) % vocab_size
    return changed


@pytest.mark.parametrize("position", [0, 3, 4, 16, 100, 127, 128, 255, 263])
def test_no_bit_before_a_changed_token_changes(toy, position):
    model, token_ids = toy
    with torch.no_grad():
        before = model(token_ids, mtp=True)
        after = model(other_token(token_ids, position, model.config.vocab_size), mtp=True)
    assert torch.equal(before.logits[:, :position], after.logits[:, :position])
    # Position i of the MTP block has seen token i + 1, and no later one.
    first = max(0, position - 1)
    assert torch.equal(before.mtp_logits[:, :first], after.mtp_logits[:, :first])
    assert (before.logits != after.logits)[:, position].any(dim=-1).all()
    assert (before.logits != after.logits)[:, -1].any(dim=-1).all()
    assert (before.mtp_logits != after.mtp_logits)[:, first].any(dim=-1).all()
    assert (before.mtp_logits != after.mtp_logits)[:, -1].any(dim=-1).all()


@pytest.mark.parametrize("tokens", [2, 5, 20, 40])
def test_before_a_changed_token_a_short_call_moves_by_rounding_alone(toy, tokens):
    """With few tokens an expert's matrix product has as many rows as tokens, a number that later tokens change."""
    model, token_ids = toy
    token_ids = token_ids[:, :tokens]
    with torch.no_grad():
        before = model(token_ids).logits
        after = model(other_token(token_ids, tokens - 1, model.config.vocab_size)).logits
    assert (before - after)[:, :-1].abs().max() < TOLERANCE
    assert (before - after)[:, -1].abs().max() > 100 * TOLERANCE


def test_two_runs_have_the_same_bits(toy):
    model, token_ids = toy
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    runs = []
    for _ in range(2):
        output = model(token_ids, mtp=True)
        loss = output.logits.square().mean() + output.mtp_logits.square().mean()
        runs.append((output, torch.autograd.grad(loss, parameters, allow_unused=True)))
    (first, grads), (second, again) = runs
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.mtp_logits, second.mtp_logits)
    for one, other in zip(grads, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_a_row_does_not_depend_on_its_neighbours(toy):
    model, token_ids = toy
    with torch.no_grad():
        together = model(token_ids, mtp=True)
        for row in range(2):
            alone = model(token_ids[row : row + 1], mtp=True)
            assert (together.logits[row] - alone.logits[0]).abs().max() < TOLERANCE
            assert (together.mtp_logits[row] - alone.mtp_logits[0]).abs().max() < TOLERANCE
        changed = token_ids.clone()
        changed[1] = (changed[1] + 1) % model.config.vocab_size
        assert torch.equal(model(changed).logits[0], together.logits[0])


def test_dense_is_sparse_while_every_entry_fits(toy):
    model, token_ids = toy
    exactly = 4 * model.config.indexer.top_k + 3  # as many entries as picks, and a rest
    with torch.no_grad():
        dense, sparse = model(token_ids, dense=True).logits, model(token_ids).logits
    difference = (dense - sparse).abs().amax(dim=(0, 2))
    assert difference[:exactly].max() < TOLERANCE
    # One more entry is visible than picked, from the token that completes it on.
    assert difference[exactly:].min() > 10 * TOLERANCE


def test_a_larger_choice_is_dense(toy):
    model, token_ids = toy
    wide = toy_model(replace(model.config, indexer=replace(model.config.indexer, top_k=TOKENS // 4)))
    with torch.no_grad():
        assert (wide(token_ids).logits - model(token_ids, dense=True).logits).abs().max() < TOLERANCE


def test_dense_continues_a_state(toy):
    model, token_ids = toy
    state = model.new_state(2)
    with torch.no_grad():
        parts = [model(part, state=state, dense=True).logits for part in token_ids.split([101, 1, 162], dim=1)]
        assert (torch.cat(parts, dim=1) - model(token_ids, dense=True).logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("backend", ["portable", "native"])
def test_reference_and_fast_paths_agree(toy, backend):
    fast, token_ids = toy
    fast = toy_model(fast.config, backend=backend)
    reference = toy_model(fast.config, backend="reference")
    token_ids = token_ids[:, :140]
    parameters = {n: p for n, p in fast.named_parameters() if p.requires_grad and ".indexer." not in n}
    results = []
    for model in (fast, reference):
        output = model(token_ids, mtp=True)
        weights = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(4))
        loss = (output.logits * weights).sum() + (output.mtp_logits * weights[:, 1:]).sum()
        results.append((output, torch.autograd.grad(loss, [model.get_parameter(name) for name in parameters])))
    (ours, grads), (expected, expected_grads) = results
    assert (ours.logits - expected.logits).abs().max() < TOLERANCE
    assert (ours.mtp_logits - expected.mtp_logits).abs().max() < TOLERANCE
    for name, one, other in zip(parameters, grads, expected_grads, strict=True):
        # The scale of the first mix nearly cancels in its gradient, see test_packed; others are within 5e-5.
        assert (one - other).norm() < 5e-4 * other.norm(), name


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'fast'; expected one of auto, reference, portable, native"):
        toy_model(flash_like(), backend="fast")
