"""What an indexer learns from its layer, what is told of it, and that both stay apart from the rest of the model."""

import itertools
import math

import pytest
import torch

from dsv4.model import rows
from dsv4.model.record import IndexerRequest, LayerRecord, num_indexed
from dsv4.ops.attend import attend
from dsv4.ops.index import select
from dsv4.ops.indexer_kl import indexer_kl
from dsv4.testing.toys import flash_like, toy_model, toy_token_ids

CSA = (2, 4)  # layers of flash_like
HASHED = (0, 1)
TOP_K = 8
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


def asked(model, shape, *, learn=True, sample_queries=5, weights=None):
    """A record for each layer that asks for everything; every token weighs 1 unless weights say otherwise."""
    weights = torch.ones(shape) if weights is None else weights
    request = IndexerRequest(weights, learn, sample_queries)
    return [LayerRecord(balance_weights=weights, indexer=request) for _ in model.layers]


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


def is_nothing(gradient):
    return gradient is None or not gradient.any()


class Seen:
    """What attention and the choice of entries were given in a call, CSA layers only."""

    def __init__(self, monkeypatch):
        self.attended, self.projected = [], []
        monkeypatch.setattr("dsv4.model.attention.attend", self.attend)
        monkeypatch.setattr("dsv4.model.study.indexer_kl", self.compare)

    def attend(self, q, kv, sink, raw_begin, entries, **kwargs):
        if entries is not None and entries.values.shape[1] > 0:  # no HCA layer has an entry yet
            self.attended.append((q, kv, sink, raw_begin, entries, kwargs))
        return attend(q, kv, sink, raw_begin, entries, **kwargs)

    def compare(self, *args, **kwargs):
        self.projected.append(args[:3])
        return indexer_kl(*args, **kwargs)


def masses(q, kv, sink, raw_begin, entries, kwargs):
    """What all heads give to each entry, [B, T, C] float64: as it comes out of attention itself, 0 for entries that
    a query does not see; and as the log-sum-exp tells it, for any entry.
    """
    C, K = entries.values.shape[1:]
    q, kv, values = (x.detach().double() for x in (q, kv, entries.values))
    q, kv = (torch.nn.functional.pad(x, (0, C)) for x in (q, kv))
    marks = torch.eye(C, dtype=torch.float64).expand(len(q), C, C)
    marked = entries._replace(values=torch.cat([values, marks], dim=-1))
    kwargs = kwargs | {"backend": "reference"}
    out, log_sum_exp = attend(q, kv, sink.detach().double(), raw_begin, marked, **kwargs)
    scores = torch.einsum("bthk,bck->bthc", q[..., :K], values) * kwargs["scale"]
    return out[..., K:].sum(dim=2), (scores - log_sum_exp[..., None]).exp().sum(dim=2)


def loop_divergence(mass, scores):
    """From the teacher's mass and the student's score of each entry: the divergence, and the uniform one's."""
    total, largest = sum(mass), max(scores, default=0)
    normaliser = sum(math.exp(score - largest) for score in scores)
    kl = uniform = 0.0
    for m, score in zip(mass, scores, strict=True):
        p = m / total
        kl += p * (math.log(p) - (score - largest - math.log(normaliser)))
        uniform += p * math.log(p * len(mass))
    return kl, uniform


def known(result):
    """The recall of queries that choose."""
    return result.recall[~result.recall.isnan()].tolist()


@pytest.mark.parametrize("dense", [False, True])
def test_divergence_and_recall_from_the_attention_that_took_place(model, token_ids, segment_ids, monkeypatch, dense):
    seen, weights = Seen(monkeypatch), torch.rand(2, T)
    weights[0, 85:97] = 0  # tokens with more entries than picks
    with torch.no_grad():
        _, records = run(model, token_ids, segment_ids=segment_ids, dense=dense, weights=weights, sample_queries=1)
    assert len(seen.attended) == len(CSA)
    blocks = rows.packed(segment_ids, [4]).blocks[4]
    for result, attended, projected in zip(indexed(records), seen.attended, seen.projected, strict=True):
        mass, any_mass = masses(*attended)
        q, k, head_weights = (x.double() for x in projected)
        scores = torch.einsum("bti,btic->btc", head_weights, torch.einsum("btij,bcj->btic", q, k).relu())
        loss = kl = uniform = num_queries = 0
        shares = []
        for b, t in itertools.product(range(2), range(T)):
            visible = mass[b, t].nonzero().flatten().tolist()
            one = loop_divergence(mass[b, t, visible].tolist(), scores[b, t, visible].tolist())
            loss += weights[b, t].item() * one[0]
            if weights[b, t] > 0 and visible:
                kl, uniform, num_queries = kl + one[0], uniform + one[1], num_queries + 1
            choice = range(int(blocks.begin[b, t]), int(blocks.end[b, t]))
            best, picked = (
                set(sorted(choice, key=lambda c, x=x[b, t]: -x[c].item())[:TOP_K]) for x in (any_mass, scores)
            )  # fmt: skip
            chooses = weights[b, t] > 0 and len(choice) > TOP_K
            shares.append(len(best & picked) / TOP_K if chooses else math.nan)
        assert result.loss.item() == pytest.approx(loss, rel=1e-4)
        assert result.kl.item() == pytest.approx(kl, rel=1e-4)
        assert result.uniform_kl.item() == pytest.approx(uniform, rel=1e-4)
        assert result.num_queries == num_queries == num_indexed(segment_ids, weights > 0)
        assert result.recall.flatten().tolist() == pytest.approx(shares, nan_ok=True)
        assert len(set(known(result))) > 2


@pytest.mark.parametrize("dense", [False, True])
def test_each_loss_reaches_its_own_parameters(model, dense):
    token_ids = toy_token_ids(model.config, 2, 136)  # long enough for an HCA entry
    streams, records = run(model, token_ids, dense=dense)
    names = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("mtp.")]
    inside = [name for name in names if ".indexer." in name]
    assert len(inside) == 2 * 6
    language = gradients(model, model.logits(model.hidden(streams)).square().mean())
    assert [name for name in names if is_nothing(language[name])] == inside
    for layer, result in zip(CSA, indexed(records), strict=True):
        got = gradients(model, result.loss)
        mine = [name for name in inside if name.startswith(f"layers.{layer}.")]
        assert [name for name, gradient in got.items() if not is_nothing(gradient)] == mine
        assert all(got[name].isfinite().all() for name in mine)


def test_a_frozen_model_warms_its_indexers_up():
    model = toy_model(flash_like())
    token_ids = toy_token_ids(model.config, 2, 60)
    _, records = run(model, token_ids, dense=True)
    wanted = gradients(model, sum(result.loss for result in indexed(records)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." in name)
    _, records = run(model, token_ids, dense=True)
    sum(result.loss for result in indexed(records)).backward()
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            assert torch.equal(parameter.grad, wanted[name])
        else:
            assert parameter.grad is None


def test_learning_lowers_the_divergence_and_nothing_else():
    model = toy_model(flash_like())
    token_ids = toy_token_ids(model.config, 2, 60)
    before = model(token_ids, dense=True).logits
    learning = [p for name, p in model.named_parameters() if ".indexer." in name]
    losses = []
    for _ in range(12):
        _, records = run(model, token_ids, dense=True, weights=torch.full((2, 60), 1 / 120))
        loss = sum(result.loss for result in indexed(records))
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, gradient in zip(learning, torch.autograd.grad(loss, learning), strict=True):
                parameter -= 0.01 * gradient.sign()
    assert losses[-1] < losses[0] / 2
    assert torch.equal(model(token_ids, dense=True).logits, before)


@pytest.mark.parametrize("num_tokens", [4 * TOP_K + 3, 4 * (TOP_K + 3)])
def test_sparse_is_dense_until_there_are_more_entries_than_picks(model, token_ids, num_tokens):
    (_, sparse), (_, dense) = (run(model, token_ids[:, :num_tokens], dense=dense) for dense in (False, True))
    results = [indexed(sparse)[0], indexed(dense)[0]]  # up to the first CSA layer nothing else differs
    one, other = (gradients(model, result.loss) for result in results)
    is_same = num_tokens < 4 * (TOP_K + 1)
    assert (results[0].loss.item() == pytest.approx(results[1].loss.item(), rel=1e-5)) == is_same
    for name, gradient in one.items():
        if name.startswith("layers.2.attn.indexer."):
            assert ((gradient - other[name]).norm() < 1e-5 * gradient.norm()) == is_same, name


@pytest.mark.parametrize("dense", [False, True])
def test_packed_documents_are_separate_ones(model, token_ids, segment_ids, dense):
    _, packed = run(model, token_ids, segment_ids=segment_ids, dense=dense, sample_queries=1)
    apart = [run(model, token_ids[where], dense=dense, sample_queries=1)[1] for where in documents()]
    for number, layer in enumerate(model.layers):
        choices = [records[number].chosen for records in apart]
        assert torch.equal(torch.cat(choices), packed[number].chosen)
        if number not in HASHED:
            total = sum(records[number].balance for records in apart)
            assert packed[number].balance.item() == pytest.approx(total.item(), rel=1e-5)
        if number not in CSA:
            continue
        results = [records[number].indexed for records in apart]
        for name in ("loss", "kl", "uniform_kl", "num_queries"):
            total = sum(getattr(result, name) for result in results)
            assert getattr(packed[number].indexed, name).item() == pytest.approx(total.item(), rel=1e-4), name
        assert known(packed[number].indexed) == [share for result in results for share in known(result)]
        together = gradients(layer.attn.indexer, packed[number].indexed.loss)
        alone = gradients(layer.attn.indexer, sum(result.loss for result in results))
        for name, gradient in together.items():
            assert (gradient - alone[name]).norm() < 5e-4 * gradient.norm(), name


@pytest.mark.parametrize(("dense", "learn"), MODES)
def test_documents_without_an_entry_teach_exactly_nothing(model, token_ids, dense, learn):
    segment_ids = torch.arange(T).expand(2, -1) // 3
    for packing, tokens in ((segment_ids, T), (None, 3)):
        here = None if packing is None else packing[:, :tokens]
        _, records = run(model, token_ids[:, :tokens], segment_ids=here, dense=dense, learn=learn, sample_queries=1)
        for result in indexed(records):
            assert result.kl == result.uniform_kl == result.num_queries == 0
            assert known(result) == []
            if learn:
                assert result.loss == 0
                assert all(is_nothing(gradient) for gradient in gradients(model, result.loss).values())


@pytest.mark.parametrize("dense", [False, True])
def test_measuring_tells_of_the_sampled_queries_what_learning_tells(model, token_ids, segment_ids, dense):
    weights = torch.rand(2, T)
    weights[1, 100:110] = 0
    is_sampled = torch.arange(T) % 5 == 4
    _, measured = run(model, token_ids, segment_ids=segment_ids, dense=dense, learn=False, weights=weights)
    _, learned = run(model, token_ids, segment_ids=segment_ids, dense=dense, weights=weights * is_sampled)
    for one, other in zip(indexed(measured), indexed(learned), strict=True):
        assert one.num_queries == other.num_queries > 20
        assert one.kl.item() == pytest.approx(other.kl.item(), rel=1e-4)
        assert one.uniform_kl.item() == pytest.approx(other.uniform_kl.item(), rel=1e-4)
        assert known(one) == known(other)
        assert len(known(one)) > 5
        assert not any(x.requires_grad for x in (one.kl, one.uniform_kl, one.recall))


def test_measuring_a_dense_call_projects_sampled_queries_only(model, token_ids):
    shapes = []
    hook = model.layers[2].attn.indexer.wq_b.register_forward_hook(lambda *given: shapes.append(given[1][0].shape[1]))
    try:
        for learn in (False, True):
            run(model, token_ids, dense=True, learn=learn, sample_queries=7)
        model.run(token_ids, dense=True, records=[LayerRecord() for _ in model.layers])
        run(model, token_ids[:, :6], dense=True, learn=False, sample_queries=7)
    finally:
        hook.remove()
    assert shapes == [T // 7, T, 0]  # nothing asked, nothing projected


def test_padding_is_neither_learned_from_nor_measured(model, token_ids):
    segment_ids = torch.zeros_like(token_ids)
    segment_ids[:, 75:] = 1  # long enough for more entries than picks
    weights = (segment_ids == 0).float()
    _, padded = run(model, token_ids, segment_ids=segment_ids, weights=weights, sample_queries=1)
    _, short = run(model, token_ids[:, :75], segment_ids=segment_ids[:, :75], sample_queries=1)
    for one, other in zip(indexed(padded), indexed(short), strict=True):
        for name in ("loss", "kl", "uniform_kl", "num_queries"):
            assert getattr(one, name).item() == pytest.approx(getattr(other, name).item(), rel=1e-4), name
        assert known(one) == known(other)
    assert padded[3].balance.item() == pytest.approx(short[3].balance.item(), rel=1e-5)


def test_the_choice_of_a_learning_indexer_is_that_of_the_operation(model, token_ids, monkeypatch):
    seen = Seen(monkeypatch)
    run(model, token_ids)
    for (*_, entries, _), (q, k, weights) in zip(seen.attended, seen.projected, strict=True):
        end = ((torch.arange(T) + 1) // 4).expand(2, T)
        assert torch.equal(entries.picked, select(q, k, weights, torch.zeros_like(end), end, TOP_K))


def test_queries_with_an_entry_are_counted_without_a_model(model, token_ids, segment_ids):
    wanted = sum(max(0, length - 3) for lengths in LENGTHS for length in lengths)
    assert num_indexed(segment_ids) == wanted
    _, records = run(model, token_ids, segment_ids=segment_ids)
    assert all(result.num_queries == wanted for result in indexed(records))
    assert num_indexed(segment_ids, segment_ids > 0) == wanted - (5 - 3) - (50 - 3)
