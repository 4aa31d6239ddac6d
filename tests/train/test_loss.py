"""The loss of a step: against loops in float64, whatever its division into micro-batches, part by part.

The model is float64, so that nothing hangs on the order of a sum: no expert and no entry is chosen by rounding. What
stays float32 is the loss as it is reported, and the weights of tokens: one part in 1e-7 each, 1e-6 with room.
"""

from dataclasses import replace

import pytest
import torch

from dsv4.config.recipes import smoke
from dsv4.config.train import Phase
from dsv4.data.batch import PADDING
from dsv4.model.record import IndexerRequest, LayerRecord
from dsv4.optim import Optimizer
from dsv4.optim.groups import is_indexer
from dsv4.testing.batches import packed_batch, split, work_of
from dsv4.testing.compare import relative_distance
from dsv4.testing.toys import flash_like, toy_model
from dsv4.train.loss import Counts, choose, count, mtp_targets
from dsv4.train.step import train_step

V, T = 101, 133  # enough for an HCA entry
LENGTHS = [[5, 37, 1, 3, 87], [70, 4, 6], [133], [2, 128], [1, 1, 80, 20]]  # rows 2, 4 and 5 end in padding
ROUNDING = 1e-6
DENSE = Phase(name="dense", tokens=10**6, sequence=T, attention="dense")
WARM_UP = replace(DENSE, name="warm-up", train="indexer")
SPARSE = replace(DENSE, name="sparse", attention="sparse")
PHASES = [DENSE, WARM_UP, SPARSE]
names = pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)


def recipe(*, balance=0.7, indexer=0.6, sample_queries=3):
    """Weights so large that every part shows."""
    small = smoke()
    loss = replace(small.loss, balance_weight=balance, indexer_weight=indexer)
    run = replace(small.run, sample_queries=sample_queries)
    return replace(small, loss=loss, run=run, optimizer=replace(small.optimizer, clip_norm=1e9))


def exact(config):
    model = toy_model(config).double()
    model.activation_dtype = torch.float64
    return model


@pytest.fixture(scope="module")
def model():
    return exact(flash_like())


@pytest.fixture(scope="module")
def without_mtp():
    return exact(replace(flash_like(), mtp_kinds=()))


@pytest.fixture(scope="module")
def batch():
    return packed_batch(V, LENGTHS, T)


def gradients(model, phase, batches, config, *, mtp_weight=0.3):
    """What a step reports, and the gradient of each parameter that has one."""
    work = work_of(phase, batches, mtp_weight=mtp_weight)
    result = train_step(model, Optimizer(model, config.optimizer), config, work)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return result, grads


def assert_same(got, wanted, tolerance=ROUNDING):
    """Hold each gradient to the wanted one, relative to its norm."""
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        if grad.norm() == 0:
            assert got[name].norm() == 0, name
        else:
            assert relative_distance(got[name], grad) < tolerance, name


def assert_alike(got, wanted, tolerance):
    """Hold reported numbers to each other; None is None."""
    assert got.keys() == wanted.keys()
    for name, number in wanted.items():
        assert got[name] == (None if number is None else pytest.approx(number, rel=tolerance)), name


def documents(batch):
    """Row, first token and end of every document, by loops; padding is none."""
    for row, ids in enumerate(batch.segment_ids.tolist()):
        start = 0
        for t in range(1, len(ids) + 1):
            if t == len(ids) or ids[t] != ids[start]:
                if ids[start] != PADDING:
                    yield row, start, t
                start = t


def mean_nll(logits, batch, ahead):
    """The mean over all tokens whose document goes on for ``ahead`` more of minus the log-probability of that one."""
    losses = []
    for row, start, end in documents(batch):
        for t in range(start, end - ahead):
            losses.append(-logits[row, t].double().log_softmax(dim=0)[batch.token_ids[row, t + ahead]])
    return torch.stack(losses).mean()


# The parts, each against its definition


@pytest.mark.parametrize("phase", [DENSE, SPARSE], ids=lambda phase: phase.name)
def test_next_token_and_mtp_are_means_over_what_documents_hold(model, batch, phase):
    out = model(batch.token_ids, segment_ids=batch.segment_ids, mtp=True, dense=phase is DENSE)
    result, _ = gradients(model, phase, split(batch, [3, 2]), recipe())
    assert result.numbers["loss"] == pytest.approx(mean_nll(out.logits, batch, 1).item(), rel=ROUNDING)
    assert result.numbers["mtp_loss"] == pytest.approx(mean_nll(out.mtp_logits, batch, 2).item(), rel=ROUNDING)
    assert result.loss == result.numbers["loss"]


def test_the_gradient_is_that_of_the_weighted_means(model, batch):
    """With the other weights 0 the whole gradient is that of loops over logits."""
    result, grads = gradients(model, SPARSE, split(batch, [4, 1]), recipe(balance=0.0, indexer=0.0), mtp_weight=0.45)
    out = model(batch.token_ids, segment_ids=batch.segment_ids, mtp=True)
    total = mean_nll(out.logits, batch, 1) + 0.45 * mean_nll(out.mtp_logits, batch, 2)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(total, [parameters[name] for name in grads], materialize_grads=True)
    assert_same(grads, dict(zip(grads, wanted, strict=True)), 1e-5)  # of a mix's scale most cancels
    assert result.norms.indexer == 0
    assert all(grads[name].norm() == 0 for name in grads if is_indexer(name))


@torch.no_grad()
def test_balance_is_the_mean_over_documents_by_length_and_layers(model, batch):
    """Each document by itself; in the MTP block it is a token shorter, and joins no other document's."""
    main, mtp = torch.zeros(4, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, start, end in documents(batch):
        token_ids = batch.token_ids[row : row + 1, start:end]
        records = [LayerRecord(balance_weights=torch.ones(1, end - start)) for _ in model.layers]
        streams, call = model.run(token_ids, records=records, dense=True)
        assert [record.balance is None for record in records] == [True, True, False, False, False, False]
        main += torch.stack([record.balance for record in records[2:]])
        if end - start > 1:
            record = LayerRecord(balance_weights=torch.ones(1, end - start - 1))
            model.mtp_hidden(streams, call, None, record)
            mtp += record.balance
    counts = count([batch])
    wanted = (main.sum() / counts.tokens + mtp / counts.targets) / 5
    with torch.enable_grad():
        result, _ = gradients(model, DENSE, split(batch, [1, 4]), recipe())
    assert result.numbers["balance_loss"] == pytest.approx(float(wanted), rel=ROUNDING)


def test_the_balance_reaches_the_gradient_by_its_weight(model, batch):
    """Linearly: twice the weight adds twice as much, to the routers first of all."""
    grads = [gradients(model, DENSE, [batch], recipe(balance=weight))[1] for weight in (0.0, 0.5, 1.0)]
    none, half, whole = grads
    for name in ("layers.2.ffn.gate.weight", "layers.5.ffn.gate.weight", "mtp.0.ffn.gate.weight", "embed.weight"):
        change = half[name] - none[name]
        assert change.norm() > 1e-3 * none[name].norm()
        assert relative_distance(whole[name] - none[name], 2 * change) < ROUNDING
    assert relative_distance(whole["mtp.0.ffn.experts.w1"], none["mtp.0.ffn.experts.w1"]) < ROUNDING  # after the last


@pytest.mark.parametrize(("phase", "weight"), [(WARM_UP, 0.6), (WARM_UP, 0.0), (SPARSE, 0.6)])
def test_the_indexers_learn_from_the_mean_over_queries_summed_over_layers(model, batch, phase, weight):
    """In a warm-up at full weight, whatever weight the recipe gives it later."""
    result, grads = gradients(model, phase, split(batch, [2, 2, 1]), recipe(indexer=weight))
    is_real = (batch.segment_ids != PADDING).float()
    request = IndexerRequest(weights=is_real, learn=True, sample_queries=1)
    records = [LayerRecord(indexer=request) for _ in model.layers]
    model.run(batch.token_ids, segment_ids=batch.segment_ids, dense=phase is WARM_UP, records=records)
    queries = sum(max(0, end - start - 3) for _, start, end in documents(batch))
    both = torch.stack([records[layer].indexed.loss.double() for layer in (2, 4)]) / queries
    parameters = {name: p for name, p in model.named_parameters() if is_indexer(name)}
    wanted = torch.autograd.grad(both.sum() * (1.0 if phase is WARM_UP else weight), list(parameters.values()))
    assert_same({n: grads[n] for n in parameters}, dict(zip(parameters, wanted, strict=True)))
    assert result.numbers["indexer_kl"] == pytest.approx(both.mean().item(), rel=1e-5)
    uniform = sum(float(records[layer].indexed.uniform_kl) for layer in (2, 4))
    assert result.numbers["indexer_captured"] == pytest.approx(1 - both.sum().item() * queries / uniform, rel=1e-5)


# Micro-batches


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [4, 1], [2, 3]], ids=str)
@names
def test_any_division_into_micro_batches_gives_one_loss_and_gradient(model, batch, phase, sizes):
    whole, wanted = gradients(model, phase, [batch], recipe())
    parts, grads = gradients(model, phase, split(batch, sizes), recipe())
    assert_same(grads, wanted)
    assert torch.equal(parts.load, whole.load)
    assert_alike(parts.numbers, whole.numbers, 1e-5)
    assert parts.norms == pytest.approx(whole.norms, rel=ROUNDING)


def test_a_micro_batch_without_any_target_adds_nothing(model):
    """A row of documents of one token each, and padding."""
    full = packed_batch(V, [[40, 31], [1] * 9], T)
    silent = recipe(balance=0.0)
    _, wanted = gradients(model, SPARSE, split(full, [1, 1])[:1], silent)
    result, grads = gradients(model, SPARSE, split(full, [1, 1]), silent)
    assert_same(grads, wanted)
    assert result.numbers["loss"] > 1


def test_a_step_without_any_target_is_refused(model):
    with pytest.raises(ValueError, match="no target; expected documents of at least two tokens"):
        gradients(model, SPARSE, [packed_batch(V, [[1] * 9], T)] * 2, recipe())


# What has no loss


def test_mtp_targets_against_loops(batch):
    wanted = torch.full((len(LENGTHS), T - 1), -1)
    for row, start, end in documents(batch):
        for t in range(start, end - 2):
            wanted[row, t] = batch.token_ids[row, t + 2]
    assert torch.equal(mtp_targets(batch.targets), wanted)


def test_counts_against_loops(batch):
    lengths = [end - start for _, start, end in documents(batch)]
    assert sorted(lengths) == sorted(length for row in LENGTHS for length in row)
    wanted = Counts(
        targets=sum(n - 1 for n in lengths),
        mtp_targets=sum(max(0, n - 2) for n in lengths),
        tokens=sum(lengths),
        joined=sum(n - 1 for n in lengths),
        indexed=sum(max(0, n - 3) for n in lengths),
    )
    assert count([batch]) == count(split(batch, [1, 3, 1])) == wanted


def test_what_is_not_predicted_is_still_read(model):
    """Targets decide what is counted, and nothing of what layers and the MTP block see: balance and loads too."""
    whole = packed_batch(V, [[60, 73]], T)
    targets = whole.targets.clone()
    targets[:, :40] = -1
    targets[:, 60:] = -1
    some = replace(whole, targets=targets)
    counts = count([some])
    assert counts == replace(count([whole]), targets=19, mtp_targets=18)
    first, _ = gradients(model, SPARSE, [whole], recipe())
    result, grads = gradients(model, SPARSE, [some], recipe())
    assert torch.equal(result.load, first.load)
    assert result.numbers["balance_loss"] == pytest.approx(first.numbers["balance_loss"], rel=1e-6)
    # What the MTP block reads before the first target reaches its loss: without it the gradient would be another.
    token_ids = whole.token_ids.clone()
    token_ids[0, 30] = (token_ids[0, 30] + 1) % V
    other, _ = gradients(model, SPARSE, [replace(some, token_ids=token_ids)], recipe())
    assert other.numbers["mtp_loss"] != result.numbers["mtp_loss"]
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@names
def test_padding_and_last_tokens_carry_no_loss(model, phase):
    """What stands only there gets no gradient; and it can be anything."""
    batch = packed_batch(V - 2, [[40, 3, 20], [30, 29]], T)
    token_ids = batch.token_ids.clone()
    token_ids[batch.segment_ids == PADDING] = V - 1
    for row, _, end in documents(batch):
        token_ids[row, end - 1] = V - 2
    ends = [(row, end - 2) for row, _, end in documents(batch)]
    targets = batch.targets.clone()
    targets[tuple(zip(*ends, strict=True))] = V - 2
    last = replace(batch, token_ids=token_ids, targets=targets)
    config = recipe(balance=0.0)
    result, grads = gradients(model, phase, [last], config)
    if phase is not WARM_UP:
        rows = grads["embed.weight"].norm(dim=1)
        assert rows[V - 1] == 0
        assert rows[V - 2] == 0  # read as an input of MTP at the last but one, which predicts nothing either
        assert (rows[batch.token_ids.unique()] > 0).sum() > V / 2
    token_ids[batch.segment_ids == PADDING] = 7
    again, others = gradients(model, phase, [replace(last, token_ids=token_ids)], config)
    assert_same(others, grads, 1e-12)
    assert_alike(again.numbers, result.numbers, 1e-6)
    assert torch.equal(again.load, result.load)


# What a weight of 0 and a phase leave alone


def test_an_mtp_weight_of_0_leaves_its_block_alone(model, batch):
    config = recipe(balance=0.0)
    _, without = gradients(model, SPARSE, [batch], config, mtp_weight=0.0)
    _, with_it = gradients(model, SPARSE, [batch], config, mtp_weight=0.3)
    own = [name for name in without if name.startswith("mtp.")]
    assert len(own) > 20
    assert all(without[name].norm() == 0 for name in own)
    assert all(with_it[name].norm() > 0 for name in own)
    assert without["embed.weight"].norm() > 0


def test_only_the_indexers_learn_in_their_warm_up_and_the_loss_is_measured(model, batch):
    measured, grads = gradients(model, WARM_UP, split(batch, [2, 3]), recipe())
    assert set(grads) == {name for name, _ in model.named_parameters() if is_indexer(name)}
    assert all(grad.norm() > 0 for grad in grads.values())
    trained, after = gradients(model, DENSE, split(batch, [2, 3]), recipe())
    assert measured.numbers["loss"] == pytest.approx(trained.numbers["loss"], rel=1e-6)
    assert measured.numbers["mtp_loss"] is None
    assert measured.norms.main == 0
    biases = {name for name, _ in model.named_parameters() if name.endswith("gate.bias")}
    assert set(after) == {name for name, _ in model.named_parameters() if not is_indexer(name)} - biases


def test_before_the_warm_up_the_indexers_are_measured_but_do_not_learn(model, batch):
    result, grads = gradients(model, DENSE, split(batch, [2, 3]), recipe())
    assert not any(is_indexer(name) for name in grads)
    assert result.norms.indexer == 0
    assert result.numbers["indexer_kl"] > 0
    assert result.numbers["indexer_captured"] < 1
    assert 0 < result.numbers["indexer_recall"] < 1


def test_what_no_query_tells_is_not_known(model):
    """Recall needs a query with more than top_k = 8 entries, a divergence one with any."""
    config = recipe(sample_queries=1)
    some = packed_batch(V, [[33, 3], [17]], T)
    numbers = gradients(model, SPARSE, [some], config)[0].numbers
    assert numbers["indexer_recall"] is None
    assert numbers["indexer_captured"] is not None
    none = packed_batch(V, [[3, 2, 3], [3]], T)
    for phase in PHASES:
        numbers = gradients(model, phase, [none], config)[0].numbers
        assert [numbers[f"indexer_{what}"] for what in ("kl", "captured", "recall")] == [None] * 3


def test_a_model_without_mtp_trains_without_it(without_mtp, batch):
    result, _ = gradients(without_mtp, SPARSE, [batch], recipe())
    assert result.numbers["mtp_loss"] is None
    assert len(result.load) == 6


@names
def test_choices_are_those_of_the_step_and_all_that_are_real_are_its_load(model, batch, phase):
    """In the MTP block those are tokens that have a next one; it has no part in a warm-up."""
    chosen = choose(model, batch, work_of(phase, [batch]).plan)
    assert [len(x) for x in chosen] == [len(LENGTHS) * T] * 6 + [len(LENGTHS) * (T - 1)]
    result, _ = gradients(model, phase, split(batch, [2, 3]), recipe())
    wanted = torch.zeros(7, 9)
    for row, start, end in documents(batch):
        for t in range(start, end):
            for layer in range(6):
                wanted[layer, chosen[layer][row * T + t]] += 1
            if phase is not WARM_UP and t < end - 1:
                wanted[6, chosen[6][row * (T - 1) + t]] += 1
    assert torch.equal(result.load, wanted)
    assert result.load[:6].sum(dim=1).tolist() == [batch.num_real * 5] * 6
