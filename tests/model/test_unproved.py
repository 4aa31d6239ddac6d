"""A whole model on all Triton kernels at once: it writes and learns as on the portable path, and waits for nothing."""

import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.model.linear import Linear
from dsv4.model.record import IndexerRequest, LayerRecord
from dsv4.native.tape import Tape
from dsv4.ops.cross_entropy import cross_entropy
from dsv4.ops.vocabulary_kl import vocabulary_kl
from dsv4.testing.toys import flash_like, toy_model

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

PROMPTS = [[2, 5, 3, 9, 4, 7, 7], [6, 2, 8, 3, 5, 4]]
GREEDY = Sampling(max_tokens=3, temperature=0, ignore_eos=True, logprobs=2)


def small(backend):
    """Every kind of layer, and what a hash table chooses."""
    toy = flash_like()
    config = replace(
        toy,
        vocab_size=11,
        hidden_size=16,
        layer_kinds=("window", "csa", "hca"),
        mtp_kinds=("window",),
        attention=replace(toy.attention, num_heads=2, head_dim=8, rotary_dims=4, q_rank=8, o_rank=4, window=5),
        indexer=replace(toy.indexer, num_heads=3, top_k=2),
        hyper_connections=replace(toy.hyper_connections, streams=2, sinkhorn_iterations=3),
        moe=replace(toy.moe, num_experts=3, experts_per_token=2, expert_dim=7, num_hash_layers=1),
        max_context=256,
    )
    return toy_model(config, seed=3, backend=backend)


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch):
    """Numbers are looked at on a CPU alone; here they lie on one."""
    for module in ("model.rows", "ops.shapes", "ops.balance.portable"):
        monkeypatch.setattr(f"dsv4.{module}.is_accelerator", lambda device: True)


@pytest.fixture
def asked(monkeypatch):
    """Which kernels operations ask for from here on, ``module:function``, and the backends that they name."""
    found = {}

    def told(run):
        def tell(backend, *name, triton=None, **others):
            for kernel in filter(None, (triton, *name)):
                found.setdefault(kernel, set()).add(backend)
            return run(backend, *name, **others) if triton is None else run(backend, triton=triton, **others)

        return tell

    for name, module in [*sys.modules.items()]:
        for asks in ("pick", "triton_kernel"):
            if name.startswith("dsv4.ops.") and name != "dsv4.ops.backend" and hasattr(module, asks):
                monkeypatch.setattr(module, asks, told(getattr(module, asks)))
    return found


def assert_all(asked, rooms):
    """Every operation that asked for a kernel got it, and there was one in each of these rooms."""
    assert {kernel: backends for kernel, backends in asked.items() if backends != {"unproved"}} == {}
    assert sorted({kernel.split(".")[0] for kernel in asked}) == rooms.split()


def test_an_engine_writes_the_same(asked):
    models = [small(backend).requires_grad_(False).eval() for backend in ("portable", "unproved")]
    answers = []
    for model in models:
        asked.clear()
        answers.append(Engine(model, Limits(max_requests=2, step_tokens=16)).generate(PROMPTS, GREEDY))
    assert_all(asked, "attend compress experts index linear mhc rmsnorm rope route")
    for portable, triton in zip(*answers, strict=True):
        assert triton.token_ids == portable.token_ids
        for one, other in zip(triton.logprobs, portable.logprobs, strict=True):
            assert one.chosen == pytest.approx(other.chosen, abs=1e-4)


@pytest.mark.parametrize("backend", ["portable", "unproved"])
def test_a_step_waits_for_nothing(backend):
    """As a tape sees it, which tells a number that is read. The portable path reads some."""
    engine = Engine(small(backend).requires_grad_(False).eval(), Limits(max_requests=2, step_tokens=16))
    for prompt in PROMPTS:
        engine.add(prompt, GREEDY)
    waits, step = [], engine.runner._step

    def watched(*given):
        with Tape() as tape:
            found = step(*given)
        waits.append(tape.unplayable)
        return found

    engine.runner._step = watched
    while not engine.is_idle:
        engine.step()
    assert len(waits) == 3
    assert all((found is None) == (backend == "unproved") for found in waits), waits


def learn(model):
    """Losses of all kinds of a packed batch, and the gradients of all parameters."""
    ids = torch.tensor([[2, 5, 3, 9, 4, 7, 7, 2, 6, 2, 8, 3]])
    segments = torch.tensor([[1] * 7 + [2] * 5])
    request = IndexerRequest(weights=torch.full(ids.shape, 0.1), learn=True, sample_queries=2)
    records = [LayerRecord(indexer=request, balance_weights=torch.full(ids.shape, 0.1)) for _ in range(3)]
    streams, call = model.run(ids, segment_ids=segments, records=records, mtp=True)
    weights = torch.full((11,), 0.1)
    hidden = [model.hidden(streams)[0, :-1], model.mtp_hidden(streams, call, segments, LayerRecord())[0]]
    losses = [cross_entropy(one, model.head.weight, ids[0, 1:], weights, backend=model.backend)[0] for one in hidden]
    taught = (hidden[0].detach() / 2, model.head.weight.detach())
    losses.append(vocabulary_kl(hidden[0], model.head.weight, *taught, weights, backend=model.backend)[0])
    losses += [r.balance for r in records if r.balance is not None]
    losses += [r.indexed.loss for r in records if r.indexed is not None]
    torch.stack(losses).sum().backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_learns_the_same_and_waits_for_nothing(asked):
    losses, grads = learn(small("portable"))
    asked.clear()
    with Tape() as tape:
        found, found_grads = learn(small("unproved"))
    assert tape.unplayable is None
    rooms = "attend compress cross_entropy experts index indexer_kl linear mhc rmsnorm rope route vocabulary_kl"
    assert_all(asked, rooms)
    assert torch.stack(found).tolist() == pytest.approx(torch.stack(losses).tolist(), rel=1e-4)
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert (found_grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp(min=1e-6), name


@pytest.mark.parametrize("learns", [True, False])
def test_maps_round_by_kernels_too(asked, learns):
    map_ = Linear(128, 3, torch.float32).requires_grad_(learns)
    torch.nn.init.normal_(map_.weight)
    map_.rounds = "fp8"
    y = map_(torch.randn(2, 128), "unproved")
    assert y.requires_grad == learns
    assert_all(asked, "linear lowbit")
