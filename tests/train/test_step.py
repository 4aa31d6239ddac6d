"""A step: nothing moves before it is taken, then parameters by their gradients and routing biases towards balance."""

from dataclasses import replace

import pytest
import torch

from dsv4.config import presets
from dsv4.config.recipes import smoke
from dsv4.config.train import Phase
from dsv4.optim import Optimizer
from dsv4.optim.groups import is_indexer
from dsv4.testing.batches import packed_batch, split, work_of
from dsv4.testing.toys import flash_like, toy_model
from dsv4.train.setup import build_model
from dsv4.train.step import choose_experts, move_biases, train_step

V, T = 101, 67
LENGTHS = [[5, 37, 1, 3, 21], [50, 4, 6], [67], [2, 60]]
DENSE = Phase(name="dense", tokens=10**6, sequence=T, attention="dense")
WARM_UP = replace(DENSE, name="warm-up", train="indexer")
SPARSE = replace(DENSE, name="sparse", attention="sparse")
PHASES = [DENSE, WARM_UP, SPARSE]
names = pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)


def recipe(*, clip_norm=1.0, **loss):
    small = smoke()
    optimizer = replace(small.optimizer, clip_norm=clip_norm)
    return replace(small, loss=replace(small.loss, **loss), optimizer=optimizer)


def test_a_model_is_computed_as_the_recipe_says():
    found = build_model(replace(smoke(), backend="reference"), presets.smoke())
    assert (found.backend, build_model(smoke(), presets.smoke()).backend) == ("reference", "auto")


class Run:
    """A fresh model with its optimiser."""

    def __init__(self, **changes):
        self.model, self.config = toy_model(flash_like()), recipe(**changes)
        self.optimizer = Optimizer(self.model, self.config.optimizer)

    def form(self, phase, batches, step=1, **changes):
        return train_step(
            self.model, self.optimizer, self.config, replace(work_of(phase, batches, step=step), **changes)
        )

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def gradients(self):
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def everything(self):
        tensors = {f"optimizer {name}": x.clone() for name, x in self.optimizer.state_tensors().items()}
        return self.weights() | tensors, self.optimizer.state()

    def biases(self):
        return {name: weight for name, weight in self.weights().items() if name.endswith("gate.bias")}


def micro_batches(seed=0):
    return split(packed_batch(V, LENGTHS, T, seed), [1, 3])


def differing(a, b):
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


# Before and after a step is taken


@names
def test_nothing_moves_before_a_step_is_taken(phase):
    run = Run()
    run.form(SPARSE, micro_batches(3)).apply()
    before, counts = run.everything()
    result = run.form(phase, micro_batches())
    after, same_counts = run.everything()
    assert differing(after, before) == set()
    assert same_counts == counts
    assert run.gradients()
    result.apply()
    assert run.gradients() == {}
    assert differing(run.everything()[0], before)


def test_a_step_that_is_not_taken_leaves_no_trace():
    """As after a spike: the next step's gradients are its own."""
    run, other = Run(), Run()
    run.form(DENSE, micro_batches(5))
    run.form(WARM_UP, micro_batches(6))
    run.form(SPARSE, micro_batches()).apply()
    other.form(SPARSE, micro_batches()).apply()
    assert differing(run.everything()[0], other.everything()[0]) == set()


def test_two_runs_from_one_state_are_the_same_to_the_bit():
    runs = Run(), Run()
    for step, phase in enumerate([DENSE, WARM_UP, SPARSE, SPARSE]):
        results = [run.form(phase, micro_batches(step)) for run in runs]
        assert results[0].record() == results[1].record()
        assert differing(*(run.gradients() for run in runs)) == set()
        for result in results:
            result.apply()
        assert differing(*(run.everything()[0] for run in runs)) == set()


def test_each_phase_moves_what_it_trains():
    run = Run()
    for phase in (WARM_UP, DENSE, SPARSE):
        before = run.weights()
        run.form(phase, micro_batches()).apply()
        moved = differing(run.weights(), before)
        own = {name for name in before if is_indexer(name)}
        if phase is WARM_UP:
            assert moved == own
        else:
            short = {n for n in before if n.startswith(("layers.3.attn.compressor", "layers.5.attn.compressor"))}
            wanted = set(before) - (own if phase is DENSE else set())
            assert moved | short == wanted  # no row is long enough for an HCA entry
            assert run.biases().keys() <= moved


def test_the_learning_rate_is_the_plans():
    slow, fast = Run(), Run()
    plan = work_of(SPARSE, micro_batches()).plan
    for run, lr in ((slow, 1e-4), (fast, 2e-4)):
        run.before = run.weights()
        run.form(SPARSE, micro_batches(), plan=replace(plan, lr=lr)).apply()
    for name in ("head.weight", "layers.2.attn.wkv.weight", "layers.4.attn.indexer.wq_b.weight"):
        once, twice = (run.weights()[name] - run.before[name] for run in (slow, fast))
        # A weight of 1 has float32 steps of 6e-8, the update is 1e-5 or more of it.
        torch.testing.assert_close(2 * once, twice, rtol=0, atol=0.02 * float(twice.abs().max()))


# Clipping


def test_the_indexers_loss_does_not_shorten_the_main_step():
    weak, strong = Run(clip_norm=0.1, indexer_weight=1.0), Run(clip_norm=0.1, indexer_weight=1000.0)
    first, second = (run.form(SPARSE, micro_batches()) for run in (weak, strong))
    assert first.norms.main == second.norms.main > 0.1
    assert second.norms.indexer == pytest.approx(1000 * first.norms.indexer, rel=1e-4)
    for grads in (weak.gradients(), strong.gradients()):
        for part in (True, False):
            norm = torch.stack([grad.norm() for name, grad in grads.items() if is_indexer(name) == part]).norm()
            assert norm == pytest.approx(0.1, rel=1e-4)
    different = differing(weak.gradients(), strong.gradients())
    assert all(is_indexer(name) for name in different)


# Routing biases


def expected_load(run, batches, phase):
    """Slots of each expert over all micro-batches, by loops; padding and what MTP cannot join left out."""
    work = work_of(phase, batches)
    load = torch.zeros(7, 9)
    for batch, routing in zip(batches, choose_experts(run.model, work), strict=True):
        real = [batch.segment_ids != -1] * 6 + [batch.targets[:, :-1] >= 0]
        for layer, (chosen, counts) in enumerate(zip(routing, real, strict=True)):
            for token in counts.flatten().nonzero()[:, 0].tolist():
                load[layer, chosen[token]] += 1
    return load


BIASED = {2: "layers.2", 3: "layers.3", 4: "layers.4", 5: "layers.5", 6: "mtp.0"}


@pytest.mark.parametrize("phase", [DENSE, SPARSE], ids=lambda phase: phase.name)
def test_biases_move_by_their_speed_towards_balance_over_all_micro_batches(phase):
    run, batches = Run(bias_speed=0.25), micro_batches()[::-1]
    load, before = expected_load(run, batches, phase), run.biases()
    last = expected_load(run, batches[-1:], phase)
    result = run.form(phase, batches)
    assert torch.equal(result.load, load)
    result.apply()
    assert run.biases().keys() == {f"{layer}.ffn.gate.bias" for layer in BIASED.values()}  # no hash layer has one
    signs_of_last = []
    for layer, name in BIASED.items():
        mean = float(load[layer].sum()) / 9
        up = torch.tensor([0.25 if slots < mean else -0.25 if slots > mean else 0.0 for slots in load[layer].tolist()])
        assert torch.equal(run.biases()[f"{name}.ffn.gate.bias"], before[f"{name}.ffn.gate.bias"] + up)
        assert {0.25, -0.25} <= set(up.tolist())
        signs_of_last.append(torch.equal(up.sign(), torch.sign(last[layer].mean() - last[layer])))
    assert not all(signs_of_last)  # the last micro-batch alone would have moved them otherwise


def test_biases_stay_in_a_warm_up_of_the_indexer():
    run = Run(bias_speed=0.25)
    before = run.biases()
    result = run.form(WARM_UP, micro_batches())
    assert result.load[:6].sum() > 0
    result.apply()
    assert differing(run.biases(), before) == set()


def test_a_bias_in_balance_stays():
    run = Run()
    before = run.biases()
    load = torch.full((7, 9), 5.0)
    load[3, :3] = torch.tensor([4.0, 5.0, 6.0])
    move_biases(run.model, load, 0.5)
    assert differing(run.biases(), before) == {"layers.3.ffn.gate.bias"}
    moved = run.biases()["layers.3.ffn.gate.bias"] - before["layers.3.ffn.gate.bias"]
    assert moved.tolist() == pytest.approx([0.5, 0.0, -0.5, *[0.0] * 6], abs=1e-6)


# Forced routing


def test_with_no_delay_forced_routing_is_plain_routing_to_the_bit():
    """Three steps of every phase: dt = 0 chooses by the parameters that use the choice."""
    plain, forced = Run(), Run()
    for step, phase in enumerate([DENSE] * 3 + [WARM_UP] * 3 + [SPARSE] * 3):
        batches = micro_batches(step)
        routing = choose_experts(forced.model, work_of(phase, batches))
        results = plain.form(phase, batches, step + 1), forced.form(phase, batches, step + 1, routing=routing)
        assert results[0].record() == results[1].record()
        assert torch.equal(results[0].load, results[1].load)
        assert differing(plain.gradients(), forced.gradients()) == set()
        for result in results:
            result.apply()
        assert differing(plain.everything()[0], forced.everything()[0]) == set()


def test_choosing_changes_nothing_and_keeps_no_gradient():
    run = Run()
    before = run.weights()
    chosen = choose_experts(run.model, work_of(SPARSE, micro_batches()))
    assert [len(routing) for routing in chosen] == [7, 7]
    assert {x.dtype for routing in chosen for x in routing} == {torch.int64}
    assert not any(x.requires_grad for routing in chosen for x in routing)
    assert differing(run.weights(), before) == set()
    assert run.gradients() == {}


def test_each_micro_batch_is_forced_to_its_own_routing():
    """Choices of other parameters are what the step uses, and what its load counts."""
    old, new = Run(), Run()
    old.form(SPARSE, micro_batches(4)).apply()
    with torch.no_grad():
        for name, parameter in old.model.named_parameters():
            if name.endswith("gate.bias"):
                parameter.normal_()
    batches = micro_batches()
    routing = choose_experts(old.model, work_of(SPARSE, batches))
    result = new.form(SPARSE, batches, routing=routing)
    assert torch.equal(result.load, expected_load(old, batches, SPARSE))
    assert not torch.equal(result.load, expected_load(new, batches, SPARSE))


# What is logged


@names
def test_the_record_of_a_step(phase):
    run = Run()
    result = run.form(phase, micro_batches())
    record = result.record()
    trains_all = phase is not WARM_UP
    assert record["loss"] == result.loss > 1
    assert (record["mtp_loss"] is not None) == trains_all
    assert (record["grad_norm"] > 0) == trains_all
    assert (record["indexer_grad_norm"] is None) == (phase is DENSE)
    wanted = [max(slots) / (sum(slots) / 9) for slots in result.load.tolist() if sum(slots)]
    assert record["expert_load"] == pytest.approx(wanted, abs=1e-4)
    assert len(record["expert_load"]) == 6 + trains_all
