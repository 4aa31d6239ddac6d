"""The optimiser of a whole model: a step line by line, who moves and who does not, clipping, and its state."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from dsv4.accounting.memory import training_memory
from dsv4.config.presets import PRESETS
from dsv4.config.train import OptimizerConfig
from dsv4.model.transformer import Transformer
from dsv4.ops.orthogonalize import orthogonalize
from dsv4.optim import Optimizer
from dsv4.optim.groups import assign, is_indexer
from dsv4.testing.toys import flash_like, pro_like, toy_model, toy_token_ids


def settings(**changes):
    values = {
        "peak_lr": 1e-3, "end_lr": 1e-4, "warmup_steps": 0, "decay_fraction": 0.1, "muon_momentum": 0.95,
        "muon_update_rms": 0.18, "muon_per_head": False, "muon_dtype": "float32", "adam_betas": (0.9, 0.95),
        "adam_eps": 1e-20, "weight_decay": 0.1, "clip_norm": 1.0,
    }  # fmt: skip
    return OptimizerConfig(**values | changes)


def fill_gradients(model, seed, where=lambda name: True):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.grad = grad if parameter.requires_grad and where(name) else None


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def weights_of(model):
    return copied(dict(model.named_parameters()))


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def everything(optimizer, model):
    return copied(optimizer.state_tensors()), optimizer.state(), weights_of(model)


# Steps


def matrices(tensor, number):
    return tensor.view(number, -1, tensor.shape[-1])


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("make", [flash_like, pro_like])
def test_two_steps_line_by_line_in_float64(make, per_head):
    model = toy_model(make()).double()
    optimizer = Optimizer(model, settings(muon_per_head=per_head))
    groups = assign([name for name, _ in model.named_parameters()], model.config, per_head=per_head)
    wanted = weights_of(model)
    state = {name: [torch.zeros_like(weight), torch.zeros_like(weight)] for name, weight in wanted.items()}
    for step in (1, 2):
        fill_gradients(model, step)
        for name, number in groups.muon.items():
            momentum, grad = state[name][0], model.get_parameter(name).grad
            momentum.mul_(0.95).add_(grad)
            ahead = matrices(grad + 0.95 * momentum, number)
            for weight, matrix in zip(matrices(wanted[name], number), ahead, strict=True):
                direction = orthogonalize(matrix, dtype=torch.float64, backend="reference")
                weight.mul_(1 - 0.01 * 0.1).sub_(0.01 * 0.18 * max(matrix.shape) ** 0.5 * direction)
        for name in groups.adamw:
            (mean, square), grad = state[name], model.get_parameter(name).grad
            mean.copy_(0.9 * mean + 0.1 * grad)
            square.copy_(0.95 * square + 0.05 * grad**2)
            update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-20)
            wanted[name].mul_(1 - 0.01 * 0.1).sub_(0.01 * update)
        optimizer.step(0.01)
    for name, parameter in model.named_parameters():
        # The iteration itself runs in float32 here; an update is of the order of 0.01.
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=0, atol=1e-6, msg=lambda m, n=name: n + m)


def test_everything_with_a_gradient_moves_and_a_routing_bias_does_not():
    model = toy_model(flash_like())
    optimizer = Optimizer(model, settings())
    before = weights_of(model)
    fill_gradients(model, 1)
    optimizer.step(1e-3)
    assert before.keys() - changed(before, weights_of(model)) == {n for n in before if n.endswith("gate.bias")}


def test_a_parameter_without_a_gradient_keeps_its_weight_and_its_state():
    model = toy_model(flash_like())
    optimizer = Optimizer(model, settings())
    fill_gradients(model, 1)
    optimizer.step(1e-3)
    tensors, state, weights = everything(optimizer, model)
    absent = ("layers.1.attn.wq_a.weight", "layers.2.ffn.experts.w2", "norm.weight", "layers.4.attn.attn_sink")
    fill_gradients(model, 2, lambda name: name not in absent)
    optimizer.step(1e-3)
    assert {n for n in weights.keys() - changed(weights, weights_of(model)) if "gate.bias" not in n} == set(absent)
    still = tensors.keys() - changed(tensors, optimizer.state_tensors())
    assert {name.split(".", 2)[2] for name in still} == set(absent)
    assert {n for n, count in optimizer.state()["adamw.steps"].items() if count == 1} == set(absent[2:])
    assert set(state["adamw.steps"].values()) == {1}


def test_the_warm_up_of_the_indexer_moves_nothing_else():
    model = toy_model(flash_like())
    optimizer = Optimizer(model, settings())
    fill_gradients(model, 1)
    optimizer.step(1e-3)
    tensors, _, weights = everything(optimizer, model)
    fill_gradients(model, 2)  # every parameter has one
    optimizer.step(1e-3, train="indexer")
    assert changed(weights, weights_of(model)) == {name for name in weights if is_indexer(name)}
    assert changed(tensors, optimizer.state_tensors()) == {name for name in tensors if is_indexer(name)}
    assert all(count == 1 + is_indexer(name) for name, count in optimizer.state()["adamw.steps"].items())


def test_zero_grad_lets_go():
    model = toy_model(flash_like())
    optimizer = Optimizer(model, settings())
    fill_gradients(model, 1)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    before = everything(optimizer, model)
    optimizer.step(1e-3)
    after = everything(optimizer, model)
    assert not changed(before[0], after[0])
    assert not changed(before[2], after[2])


def test_gradients_of_any_layout():
    one, other = (toy_model(flash_like()) for _ in range(2))
    for model in (one, other):
        optimizer = Optimizer(model, settings())
        fill_gradients(model, 1)
        if model is other:
            for parameter in model.parameters():
                if parameter.grad is not None and parameter.dim() > 1:
                    parameter.grad = parameter.grad.mT.contiguous().mT
        optimizer.step(1e-3)
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(other.get_parameter(name).detach(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_learns_a_sequence_by_heart(dtype):
    model = toy_model(flash_like())
    optimizer = Optimizer(model, settings(muon_dtype=dtype, weight_decay=0.0))
    token_ids = toy_token_ids(model.config, 2, 33)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        logits = model(token_ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
        loss.backward()
        optimizer.clip(1.0)
        optimizer.step(0.02)
        losses.append(loss.item())
    assert losses[0] > math.log(101) - 0.5
    assert losses[-1] < 0.5 * losses[0]


# Clipping


def norm(model, which):
    grads = [p.grad for name, p in model.named_parameters() if p.grad is not None and which(name)]
    return math.sqrt(sum(grad.double().square().sum().item() for grad in grads))


def is_main(name):
    return not is_indexer(name)


def test_the_indexer_is_clipped_apart():
    model = toy_model(flash_like())
    optimizer = Optimizer(model, settings())
    fill_gradients(model, 1)
    main, indexer = norm(model, is_main), norm(model, is_indexer)
    assert main > 2 * indexer > 20
    norms = optimizer.clip(10.0)
    # Sums of 1e5 squares in float32.
    assert norms == pytest.approx((main, indexer), rel=1e-5)
    assert (norm(model, is_main), norm(model, is_indexer)) == pytest.approx((10, 10), rel=1e-5)


def test_a_large_loss_of_the_indexer_does_not_shorten_the_other_gradients():
    model = toy_model(flash_like())
    optimizer = Optimizer(model, settings())
    fill_gradients(model, 1)
    main = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and is_main(name)}
    for name, parameter in model.named_parameters():
        if is_indexer(name):
            parameter.grad.mul_(1e6)
    norms = optimizer.clip(1e4)
    assert norms.main < 1e4 < norms.indexer
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in main.items())
    assert norm(model, is_indexer) == pytest.approx(1e4, rel=1e-5)


def test_small_gradients_and_none_at_all():
    model = toy_model(flash_like())
    optimizer = Optimizer(model, settings())
    assert optimizer.clip(1.0) == (0.0, 0.0)
    fill_gradients(model, 1, is_main)
    before = copied({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    norms = optimizer.clip(1e9)
    assert norms.indexer == 0.0 < norms.main
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in before.items())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_returned_and_scales_nothing(wrong):
    model = toy_model(flash_like())
    optimizer = Optimizer(model, settings())
    fill_gradients(model, 1)
    before = model.get_parameter("embed.weight").grad.clone()
    model.get_parameter("norm.weight").grad[3] = wrong
    norms = optimizer.clip(1.0)
    assert norms.main == wrong or (math.isnan(norms.main) and math.isnan(wrong))
    assert math.isfinite(norms.indexer)
    assert torch.equal(model.get_parameter("embed.weight").grad, before)
    assert norm(model, is_indexer) == pytest.approx(1.0, rel=1e-5)


# State


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
def test_the_state_is_whole_from_the_start_and_as_large_as_accounted(make):
    with torch.device("meta"):
        model = Transformer(make())
    tensors = Optimizer(model, settings()).state_tensors()
    kinds = {"muon.momentum": 0, "adamw.mean": 0, "adamw.square": 0}
    for name, tensor in tensors.items():
        kind = next(kind for kind in kinds if name.startswith(kind + "."))
        assert tensor.shape == model.get_parameter(name.removeprefix(kind + ".")).shape
        assert tensor.dtype == torch.float32
        kinds[kind] += tensor.nbytes
    memory = training_memory(make())
    assert kinds["muon.momentum"] == memory.muon_bytes
    assert kinds["adamw.mean"] + kinds["adamw.square"] == memory.adamw_bytes


@pytest.mark.parametrize("train", ["all", "indexer"])
def test_a_resumed_optimiser_takes_the_same_steps_bit_for_bit(train):
    model, other = toy_model(flash_like()), toy_model(flash_like(), seed=5)
    optimizer = Optimizer(model, settings(muon_dtype="bfloat16"))
    for step in range(3):
        fill_gradients(model, step, is_main if step == 1 else lambda name: True)
        optimizer.step(1e-3)
    tensors, state, _ = everything(optimizer, model)
    other.load_state_dict(model.state_dict())
    resumed = Optimizer(other, settings(muon_dtype="bfloat16"))
    resumed.load_state(tensors, json.loads(json.dumps(state)))
    for step in range(3, 6):
        for one, by in ((model, optimizer), (other, resumed)):
            fill_gradients(one, step)
            by.clip(1.0)
            by.step(1e-3, train=train)
    assert not changed(weights_of(model), weights_of(other))
    assert not changed(optimizer.state_tensors(), resumed.state_tensors())
    assert optimizer.state() == resumed.state()


def test_a_loaded_state_is_a_copy():
    model = toy_model(flash_like())
    optimizer, other = (Optimizer(model, settings()) for _ in range(2))
    fill_gradients(model, 1)
    optimizer.step(1e-3)
    other.load_state(optimizer.state_tensors(), optimizer.state())
    kept = copied(other.state_tensors())
    optimizer.step(1e-3)
    assert not changed(kept, other.state_tensors())
    assert set(other.state()["adamw.steps"].values()) == {1}


def refused(optimizer, tensors, state):
    before = copied(optimizer.state_tensors())
    with pytest.raises(ValueError) as error:
        optimizer.load_state(tensors, state)
    assert not changed(before, optimizer.state_tensors())
    return str(error.value).splitlines()


def test_a_state_that_does_not_fit_is_an_error_that_names_all_of_it():
    optimizer = Optimizer(toy_model(flash_like()), settings())
    good = {name: tensor + 1 for name, tensor in optimizer.state_tensors().items()}
    counts = optimizer.state()["adamw.steps"]
    momentum, mean = "muon.momentum.hc_head_fn", "adamw.mean.norm.weight"
    missing = {n: t for n, t in good.items() if n not in (momentum, mean)} | {"muon.momentum.norm.weight": good[mean]}
    wrong_counts = {"adamw.steps": {n: c for n, c in counts.items() if n != "norm.weight"} | {"hc_head_fn": 3}}
    assert refused(optimizer, missing, wrong_counts) == [
        f"tensor {mean} is missing; expected it",
        f"tensor {momentum} is missing; expected it",
        "tensor muon.momentum.norm.weight is unknown; expected no such name",
        "adamw.steps norm.weight is missing; expected it",
        "adamw.steps hc_head_fn is unknown; expected no such name",
    ]
    unknown = refused(optimizer, good, {"muon.steps": counts})
    assert unknown[:2] == [
        "state adamw.steps is missing; expected it",
        "state muon.steps is unknown; expected no such name",
    ]
    assert len(unknown) == 2 + len(counts)
    wrong = good | {momentum: good[momentum].T, mean: good[mean].bfloat16()}
    assert refused(optimizer, wrong, {"adamw.steps": counts}) == [
        f"{momentum} is torch.float32 [120, 3]; expected torch.float32 [3, 120]",
        f"{mean} is torch.bfloat16 [40]; expected torch.float32 [40]",
    ]
    optimizer.load_state(good, {"adamw.steps": counts})


def test_a_model_whose_parameters_are_no_masters_is_an_error():
    model = Transformer(flash_like(), weight_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"embed\.weight has dtype torch\.bfloat16; expected torch\.float32"):
        Optimizer(model, settings())
