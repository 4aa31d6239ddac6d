"""A NaN or an infinity: where it began is said, and nothing has changed."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dsv4.config.recipes import smoke
from dsv4.config.train import Phase
from dsv4.optim import Optimizer
from dsv4.testing.batches import packed_batch, split, work_of
from dsv4.testing.toys import flash_like, toy_model
from dsv4.train.nonfinite import NonFiniteError, first_module, last_parameter
from dsv4.train.step import choose_experts, train_step

V, T = 101, 59
SPARSE = Phase(name="sparse", tokens=10**6, sequence=T, attention="sparse")
WARM_UP = Phase(name="warm-up", tokens=10**6, sequence=T, attention="dense", train="indexer")


@pytest.fixture
def run():
    """A model, an optimiser that has taken a step with it, and the recipe."""
    model, config = toy_model(flash_like()), smoke()
    optimizer = Optimizer(model, config.optimizer)
    train_step(model, optimizer, config, work(seed=1)).apply()
    return model, optimizer, config


def work(seed=0, phase=SPARSE):
    return work_of(phase, split(packed_batch(V - 1, [[30, 9, 20], [40, 17]], T, seed), [1, 1]), step=7)


def everything(model, optimizer):
    tensors = dict(model.named_parameters()) | optimizer.state_tensors()
    return {name: x.detach().clone() for name, x in tensors.items()}, optimizer.state()


def assert_refused(run, work, where):
    """The step is refused for what began in ``where``, and model and optimiser are as before, to the bit."""
    model, optimizer, config = run
    before, counts = everything(model, optimizer)
    with pytest.raises(NonFiniteError, match=rf"^step 7: loss .* began in {where}\. The step was not taken") as error:
        train_step(model, optimizer, config, work)
    after, same_counts = everything(model, optimizer)
    assert counts == same_counts
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.int32), after[name].view(torch.int32)), name
    assert all(parameter.grad is None for parameter in model.parameters())
    return str(error.value)


def poison(model, name, where=..., value=math.nan):
    with torch.no_grad():
        model.get_parameter(name)[where] = value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layer", [0, 3])
def test_an_experts_weight(run, layer, value):
    model = run[0]
    chosen = choose_experts(model, work())[0][layer]
    poison(model, f"layers.{layer}.ffn.experts.w2", (int(chosen[5, 2]), 3, 4), value)
    assert "loss nan" in assert_refused(run, work(), rf"layers\.{layer}\.ffn")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("layers.1.attn.attn_sink", "layers.1.attn"),
        ("layers.2.attn.attn_sink", "layers.2.attn"),
        ("layers.3.attn.attn_sink", "layers.3.attn"),
        ("layers.4.attn.wq_a.weight", "layers.4.attn.wq_a"),
        ("layers.5.ffn.shared_experts.w2.weight", "layers.5.ffn.shared_experts.w2"),
        ("mtp.0.h_proj.weight", "mtp.0.h_proj"),
        ("mtp.0.attn.attn_sink", "mtp.0.attn"),
        ("embed.weight", "embed"),
        ("layers.2.hc_attn_base", "layers.2"),
        ("head.weight", "the head, or the fold and norm before it"),
        ("norm.weight", "the head, or the fold and norm before it"),
    ],
)
def test_a_weight_of_a_layer(run, name, module):
    poison(run[0], name)
    assert_refused(run, work(), module.replace(".", r"\."))


def test_it_is_found_in_the_micro_batch_that_has_it(run):
    """Token 100 stands in the second one alone."""
    now = work()
    now.batches[1].token_ids[0, 3] = 100
    poison(run[0], "embed.weight", 100)
    assert_refused(run, now, "embed")


def test_it_is_found_with_the_routing_of_the_step(run):
    """No token would choose this expert now."""
    model, now = run[0], work()
    routing = choose_experts(model, now)
    expert = int(routing[0][4][0, 0])
    poison(model, "layers.4.ffn.experts.w1", expert)
    poison(model, "layers.4.ffn.gate.bias", expert, -100.0)
    assert all(expert not in chosen[4] for chosen in choose_experts(model, now))
    train_step(*run, now)
    assert_refused(run, replace(now, routing=routing), r"layers\.4\.ffn")


def test_in_a_warm_up_of_the_indexer(run):
    """The forward does not need it over dense attention: the gradient tells."""
    poison(run[0], "layers.2.attn.indexer.weights_proj.weight", 0)
    assert_refused(run, work(phase=WARM_UP), r"layers\.2\.attn\.indexer\..*")


@pytest.mark.parametrize("name", ["layers.3.attn.wq_b.weight", "embed.weight", "layers.4.attn.indexer.wq_b.weight"])
def test_an_infinity_of_the_gradient_alone_names_its_parameter(run, name):
    handle = run[0].get_parameter(name).register_hook(lambda grad: grad * math.inf)
    message = assert_refused(run, work(), name.replace(".", r"\."))
    assert "loss nan" not in message
    handle.remove()
    train_step(*run, work())


def test_after_a_refused_step_training_goes_on_as_if_it_had_not_been(run):
    model, optimizer, config = run
    healthy = model.layers[2].attn.attn_sink.detach().clone()
    poison(model, "layers.2.attn.attn_sink")
    assert_refused(run, work(), r"layers\.2\.attn")
    poison(model, "layers.2.attn.attn_sink", ..., healthy)
    train_step(model, optimizer, config, work()).apply()

    other, config = toy_model(flash_like()), smoke()
    fresh = Optimizer(other, config.optimizer)
    train_step(other, fresh, config, work(seed=1)).apply()
    train_step(other, fresh, config, work()).apply()
    for name, tensor in everything(other, fresh)[0].items():
        assert torch.equal(tensor, everything(model, optimizer)[0][name]), name


# The two searches


class Halves(nn.Module):
    """Returns a tuple with integers; ``scale`` times its input is what is passed from first to second."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return torch.tensor([1, 2]), self.second(self.scale * self.first(x))


@pytest.mark.parametrize(("scales", "where"), [((1, 1), None), ((1, math.inf), "1"), ((math.nan, 1), "0")])
def test_the_first_module_is_the_one_that_makes_it_of_finite_inputs(scales, where):
    """Not the one inside that passes it on, nor one that comes after."""
    model = nn.ModuleList([Halves(scale) for scale in scales])
    assert first_module(model, lambda: [module(torch.ones(3)) for module in model]) == where
    assert not any(module._forward_hooks for module in model.modules())


def test_what_begins_between_modules_is_named_by_the_first_to_pass_it_on():
    model = Halves(math.inf)
    assert first_module(model, lambda: model(torch.ones(3))) == "second"
    assert first_module(model, lambda: model.first(torch.full((3,), math.nan))) == "first"


def test_hooks_go_when_the_forward_fails():
    model = Halves(1)
    with pytest.raises(RuntimeError):
        first_module(model, lambda: model(torch.ones(4)))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_last_parameter_is_the_one_backward_met_first():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert last_parameter(model) is None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert last_parameter(model) is None
    model[1].bias.grad = None
    model[1].weight.grad[0, 1] = math.inf
    model[0].weight.grad[0, 1] = math.nan
    assert last_parameter(model) == "1.weight"
