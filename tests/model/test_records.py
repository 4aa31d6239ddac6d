"""What layers tell and how they are steered: looking changes nothing, routing is recorded, forced and balanced."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from dsv4.model.record import IndexerRequest, LayerRecord
from dsv4.testing.toys import flash_like, toy_model, toy_token_ids

CSA = (2, 4)  # layers of flash_like
HASHED = (0, 1)
LENGTHS = [[5, 37, 1, 3, 54, 2, 18], [50, 4, 66]]  # documents of two rows
T = 120
MODES = [(dense, learn) for dense in (False, True) for learn in (False, True)]


@pytest.fixture(scope="module")
def model():
    return toy_model(flash_like())


@pytest.fixture(scope="module")
def token_ids(model):
    return toy_token_ids(model.config, 2, T)


@pytest.fixture(scope="module")
def segment_ids():
    ids = [torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in LENGTHS]
    return torch.stack(ids)


def documents():
    """Row and tokens of every document."""
    for row, lengths in enumerate(LENGTHS):
        for length, end in zip(lengths, itertools.accumulate(lengths), strict=True):
            yield slice(row, row + 1), slice(end - length, end)


def asked(model, shape, *, learn=True, sample_queries=5, weights=None, forced=None):
    """A record for each layer that asks for everything; every token weighs 1 unless weights say otherwise."""
    weights = torch.ones(shape) if weights is None else weights
    request = IndexerRequest(weights, learn, sample_queries)
    forced = [None] * len(model.layers) if forced is None else forced
    return [LayerRecord(forced=experts, balance_weights=weights, indexer=request) for experts in forced]


def run(model, token_ids, *, dense=False, segment_ids=None, **kwargs):
    """Streams of a call, and its records."""
    records = asked(model, token_ids.shape, **kwargs)
    streams, _ = model.run(token_ids, dense=dense, segment_ids=segment_ids, records=records)
    return streams, records


def indexed(records):
    return [records[layer].indexed for layer in CSA]


def gradients(model, loss):
    """By parameter; None where the loss does not depend on it."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learning, torch.autograd.grad(loss, learning.values(), allow_unused=True), strict=True))


# Nothing is changed by looking


@pytest.mark.parametrize(("dense", "learn"), MODES)
@pytest.mark.parametrize("is_packed", [False, True])
def test_records_change_no_bit(model, token_ids, segment_ids, dense, learn, is_packed):
    packing = segment_ids if is_packed else None
    plain, call = model.run(token_ids, dense=dense, segment_ids=packing)
    streams, records = run(model, token_ids, dense=dense, segment_ids=packing, learn=learn)
    assert torch.equal(streams, plain)
    record = LayerRecord(balance_weights=torch.ones(2, T - 1))
    hidden = model.mtp_hidden(streams, call, packing, record)
    assert torch.equal(hidden, model.mtp_hidden(plain, call, packing))
    assert record.balance is not None
    wanted, got = (gradients(model, x.square().mean()) for x in (plain, streams))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(wanted.values(), got.values(), strict=True))
    assert all(record.chosen is not None for record in records)


@pytest.mark.parametrize(("dense", "learn"), MODES)
def test_who_answers_what(model, token_ids, dense, learn):
    _, records = run(model, token_ids, dense=dense, learn=learn)
    assert [layer for layer, record in enumerate(records) if record.indexed is not None] == list(CSA)
    assert [layer for layer, record in enumerate(records) if record.balance is None] == list(HASHED)
    assert all((result.loss is not None) == learn for result in indexed(records))
    model.run(token_ids, dense=dense, records=(bare := [LayerRecord() for _ in model.layers]))
    assert all(record.balance is None and record.indexed is None for record in bare)
    assert all(torch.equal(a.chosen, b.chosen) for a, b in zip(bare, records, strict=True))


@pytest.mark.parametrize(("dense", "learn"), MODES)
def test_the_specification_tells_the_same(model, token_ids, segment_ids, dense, learn):
    reference = toy_model(flash_like(), backend="reference")
    (_, records), (_, wanted) = (
        run(one, token_ids, segment_ids=segment_ids, dense=dense, learn=learn) for one in (model, reference)
    )
    for record, other in zip(records, wanted, strict=True):
        assert torch.equal(record.chosen.sort(dim=-1).values, other.chosen.sort(dim=-1).values)
        assert (record.balance is None) == (other.balance is None)
        if record.balance is not None:
            assert record.balance.item() == pytest.approx(other.balance.item(), rel=1e-5)
        if record.indexed is not None:
            for name, value in vars(other.indexed).items():
                if value is not None:
                    found = getattr(record.indexed, name)
                    torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4, equal_nan=name == "recall")


# Routing


class Routers:
    """Router inputs and outputs of a call, by layer."""

    def __init__(self, model, monkeypatch):
        self.seen = {}
        for number, layer in enumerate(model.layers):
            monkeypatch.setattr(layer.ffn.gate, "forward", self.wrap(number, layer.ffn.gate.forward))

    def wrap(self, number, forward):
        def run(x, call, record):
            result = forward(x, call, record)
            self.seen[number] = (x.detach(), *result)
            return result

        return run


def loop_affinities(x, weight):
    logits = x.double() @ weight.double().T
    return [[math.sqrt(math.log1p(math.exp(logit))) for logit in token] for token in logits.tolist()]


def test_chosen_experts_and_balance_in_loops(model, token_ids, segment_ids, monkeypatch):
    routers, A = Routers(model, monkeypatch), model.config.moe.experts_per_token
    weights = torch.rand(2, T)
    _, records = run(model, token_ids, segment_ids=segment_ids, weights=weights)
    for number, layer in enumerate(model.layers):
        affinities = loop_affinities(routers.seen[number][0], layer.ffn.gate.weight)
        chosen = records[number].chosen.tolist()
        if number in HASHED:
            assert chosen == layer.ffn.gate.tid2eid[token_ids.flatten()].tolist()
            continue
        bias = layer.ffn.gate.bias.tolist()
        for token, experts in zip(affinities, chosen, strict=True):
            best = sorted(range(len(bias)), key=lambda e, token=token: -(token[e] + bias[e]))[:A]
            assert sorted(experts) == sorted(best)
        wanted = 0.0
        for row, tokens in documents():
            inside = [row.start * T + t for t in range(tokens.start, tokens.stop)]
            f = [len(bias) / (A * len(inside)) * sum(e in chosen[t] for t in inside) for e in range(len(bias))]
            p = [sum(affinities[t][e] / sum(affinities[t]) for t in inside) / len(inside) for e in range(len(bias))]
            wanted += weights[row, tokens].sum().item() * sum(a * b for a, b in zip(f, p, strict=True))
        assert records[number].balance.item() == pytest.approx(wanted, rel=1e-5)


def test_without_packing_a_row_is_one_document(model, token_ids):
    _, plain = run(model, token_ids)
    _, packed = run(model, token_ids, segment_ids=torch.zeros_like(token_ids))
    assert plain[3].balance.item() == pytest.approx(packed[3].balance.item(), rel=1e-5)
    halves = [run(model, token_ids[row : row + 1])[1][3].balance.item() for row in range(2)]
    assert plain[3].balance.item() == pytest.approx(sum(halves), rel=1e-5)


def test_the_balance_loss_reaches_the_router(model, token_ids):
    _, records = run(model, token_ids)
    got = gradients(model, records[3].balance)
    assert got["layers.3.ffn.gate.weight"].any()
    assert got["layers.3.ffn.experts.w1"] is None
    assert got["layers.4.ffn.gate.weight"] is None


@pytest.mark.parametrize("is_packed", [False, True])
def test_forcing_a_models_own_choice_changes_no_bit(model, token_ids, segment_ids, is_packed):
    packing = segment_ids if is_packed else None
    streams, call = model.run(token_ids, segment_ids=packing, records=(free := [LayerRecord() for _ in model.layers]))
    again = [LayerRecord(forced=record.chosen) for record in free]
    forced, _ = model.run(token_ids, segment_ids=packing, records=again)
    assert torch.equal(forced, streams)
    loss, forced_loss = (gradients(model, x.square().mean()) for x in (streams, forced))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(loss.values(), forced_loss.values(), strict=True))
    own = LayerRecord()
    hidden = model.mtp_hidden(streams, call, packing, own)
    assert torch.equal(model.mtp_hidden(streams, call, packing, LayerRecord(forced=own.chosen)), hidden)


@pytest.mark.parametrize("layer", range(6))
def test_forced_experts_are_used_and_weighed_by_the_affinities_of_today(model, token_ids, monkeypatch, layer):
    routers, moe = Routers(model, monkeypatch), model.config.moe
    streams, _ = run(model, token_ids)
    others = torch.rand(2 * T, moe.num_experts).argsort(dim=-1)[:, : moe.experts_per_token]
    forced = [others if number == layer else None for number in range(6)]
    changed, records = run(model, token_ids, forced=forced)
    assert not torch.equal(changed, streams)
    assert torch.equal(records[layer].chosen, others)
    x, chosen, weights = routers.seen[layer]
    assert torch.equal(chosen, others)
    affinities = loop_affinities(x, model.layers[layer].ffn.gate.weight)
    for token, experts, got in zip(affinities, others.tolist(), weights.tolist(), strict=True):
        total = sum(token[e] for e in experts)
        assert got == pytest.approx([moe.routed_scale * token[e] / total for e in experts], rel=1e-4)


def test_routing_is_recorded_and_forced_while_a_state_goes_on(model, token_ids):
    parts, recorded, state = token_ids.split([70, 50], dim=1), [], model.new_state(2)
    with torch.no_grad():
        for part in parts:
            records = [LayerRecord(balance_weights=torch.ones(part.shape)) for _ in model.layers]
            recorded.append((model.run(part, state=state, records=records)[0], records))
        state = model.new_state(2)
        for part, (streams, records) in zip(parts, recorded, strict=True):
            forced = [LayerRecord(forced=record.chosen) for record in records]
            assert torch.equal(model.run(part, state=state, records=forced)[0], streams)
    assert recorded[1][1][3].chosen.shape == (100, 5)
    assert recorded[1][1][3].balance > 0


# Errors


def wrong(**fields):
    def make(model):
        records = asked(model, (2, 6))
        records[3] = replace(records[3], **fields)
        return records

    return make


BAD_RECORDS = {
    "too_few": (lambda model: asked(model, (2, 6))[1:], "records holds 5 records; expected 6, one for each layer"),
    "forced_shape": (
        wrong(forced=torch.zeros(6, 5).long()),
        r"records\[3\].forced is torch.int64 \[6, 5\]; expected torch.int64 \[12, 5\]",
    ),
    "forced_dtype": (wrong(forced=torch.zeros(12, 5)), r"records\[3\].forced is torch.float32"),
    "forced_too_high": (
        wrong(forced=torch.full((12, 5), 9)),
        r"records\[3\].forced holds 9; expected 0 <= expert < 9",
    ),
    "forced_negative": (wrong(forced=torch.full((12, 5), -1)), r"records\[3\].forced holds -1"),
    "balance_shape": (
        wrong(balance_weights=torch.ones(12)),
        r"records\[3\].balance_weights is torch.float32 \[12\]; expected torch.float32 \[2, 6\]",
    ),
    "indexer_shape": (
        wrong(indexer=IndexerRequest(torch.ones(2, 5), True, 1)),
        r"records\[3\].indexer.weights is torch.float32 \[2, 5\]; expected torch.float32 \[2, 6\]",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_records_that_do_not_fit(model, token_ids, make, message):
    with pytest.raises(ValueError, match=message):
        model.run(token_ids[:, :6], records=make(model))


def test_the_record_of_the_mtp_block_has_a_token_less(model, token_ids):
    streams, call = model.run(token_ids[:, :6])
    with pytest.raises(ValueError, match=r"balance_weights is torch.float32 \[2, 6\]; expected torch.float32 \[2, 5\]"):
        model.mtp_hidden(streams, call, record=LayerRecord(balance_weights=torch.ones(2, 6)))


def test_an_indexer_is_not_studied_while_a_state_goes_on(model, token_ids):
    state = model.new_state(2)
    with pytest.raises(ValueError, match=r"records\[0\].indexer and state are both given"):
        model.run(token_ids[:, :6], state=state, records=asked(model, (2, 6)))
    assert state.is_whole


def test_sampling_every_0_queries():
    with pytest.raises(ValueError, match="sample_queries is 0; expected at least 1"):
        IndexerRequest(torch.ones(2, 6), True, 0)
