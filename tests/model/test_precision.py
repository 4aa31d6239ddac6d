"""Models that round as released: weights rounded for each product, or held in codes alone, in forward and engine."""

import copy
from dataclasses import replace

import pytest
import torch

from dsv4 import native
from dsv4.config.engine import Limits
from dsv4.config.presets import smoke
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.model.init import new_model
from dsv4.model.precision import is_packed, pack, quantised_maps, set_rounding
from dsv4.ops.lowbit import dequantise

BACKENDS = ["portable", *(["native"] if native.available() else [])]
needs_native = pytest.mark.skipif(not native.available(), reason="no C compiler here")


@pytest.fixture(scope="module")
def config():
    return replace(smoke(), hidden_size=96, moe=replace(smoke().moe, expert_dim=64))


def made(config, backend="auto"):
    """A model as training holds it: float32 weights, bfloat16 activations; no norm is 1, no bias 0."""
    model = new_model(config, seed=3)
    model.backend, model.activation_dtype = backend, torch.bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return model


def tokens(config, *shape):
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_alone_give_the_bits_of_weights_that_are_rounded(config, backend):
    model, ids = made(config, backend), tokens(config, 2, 150)
    packed = pack(copy.deepcopy(model))
    set_rounding(model, "fp4")
    with torch.no_grad():
        assert torch.equal(model(ids, mtp=True).logits, packed(ids, mtp=True).logits)
        assert torch.equal(model(ids, mtp=True).mtp_logits, packed(ids, mtp=True).mtp_logits)


def test_rounding_can_be_switched_on_and_off(config):
    model, ids = made(config), tokens(config, 1, 90)
    with torch.no_grad():
        plain = model(ids).logits
        seen = {}
        for rounding in ("fp8", "fp4"):
            set_rounding(model, rounding)
            seen[rounding] = model(ids).logits
        set_rounding(model, "none")
        assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(seen["fp8"], plain)
    assert not torch.equal(seen["fp8"], seen["fp4"])


@pytest.mark.parametrize("rounding", ["fp8", "fp4"])
def test_a_loss_with_gradients_is_that_without_up_to_summation(config, rounding):
    model, ids = made(config), tokens(config, 2, 70)
    set_rounding(model, rounding)
    with torch.no_grad():
        wanted = model(ids).logits
    found = model(ids).logits
    assert found.requires_grad
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_gradients_pass_straight_through_to_the_weights(config):
    """They are those of a model that holds the rounded values, at the same inputs: one map by itself."""
    model = made(config)
    set_rounding(model, "fp4")
    map_ = model.layers[0].attn.wq_a
    x = torch.randn(5, config.hidden_size, requires_grad=True)
    y = map_(x, "portable")
    grad = torch.randn_like(y)
    y.backward(grad)
    values = dequantise(map_.packed("portable"), torch.float32)
    torch.testing.assert_close(x.grad, grad @ values)
    from dsv4.ops.lowbit import round_rows

    torch.testing.assert_close(map_.weight.grad, grad.T @ round_rows(x.detach()))


def test_every_weight_learns(config):
    model, ids = made(config), tokens(config, 2, 150)
    set_rounding(model, "fp4")
    model(ids, mtp=True).logits.square().mean().backward()
    experts = model.layers[1].ffn.experts
    for parameter in (
        experts.w1,
        experts.w2,
        experts.w3,
        model.layers[1].attn.wo_a.weight,
        model.layers[1].attn.wo_b.weight,
    ):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_what_is_quantised_is_what_the_release_quantises(config):
    packed = pack(made(config))
    assert is_packed(packed)
    assert packed.config.storage == "fp4"
    maps = quantised_maps(packed.config)
    assert "layers.0.attn.wq_a" in maps
    assert "layers.1.ffn.experts.2.w3" in maps
    assert "layers.2.attn.indexer.wq_b" in maps
    assert not any("gate" in name or "compressor" in name or "head" in name for name in maps)
    plain = {name: p.dtype for name, p in packed.named_parameters()}
    assert not any(name.removesuffix(".weight") in maps for name in plain)
    assert plain["embed.weight"] == plain["layers.0.attn_norm.weight"] == torch.bfloat16
    assert plain["layers.0.hc_attn_fn"] == torch.float32


def answers(model, prompts, **limits):
    """The tokens of an engine and, of each request, all logits to the bit."""
    engine = Engine(model, Limits(cache_bytes=2**22, max_requests=2, numerics="invariant", **limits))
    engine.keeps_logits = True
    ids = [engine.add(p, Sampling(max_tokens=9, temperature=0.0, ignore_eos=True)) for p in prompts]
    logits = {id: [] for id in ids}
    while not engine.is_idle:
        engine.step()
        for ran, rows in zip(engine.last_step.entries, engine.last_step.logits, strict=True):
            if rows is not None:
                logits[ran.request.id].append(rows.tobytes())
    return [(engine.take(id).token_ids, logits[id]) for id in ids]


@needs_native
def test_an_engine_of_codes_gives_the_same_bits_in_every_cache_format(config):
    packed, prompts = pack(made(config)), tokens(config, 2, 140).tolist()
    found = [answers(packed, prompts, cache_format=form) for form in ("packed", "bfloat16", "float32")]
    assert found[0] == found[1] == found[2]
    assert found[0] == answers(packed, prompts, step_tokens=37)


@needs_native
def test_an_engine_refuses_weights_that_are_rounded_as_they_are_used(config):
    model = made(config).eval()
    set_rounding(model, "fp4")
    with pytest.raises(ValueError, match=r"rounds its weights .*expected .*pack"):
        Engine(model, Limits(cache_bytes=2**22))


def test_bad_values(config):
    model = made(config)
    with pytest.raises(ValueError, match=r"rounding is 'fp5'; expected 'none', 'fp8' or 'fp4'"):
        set_rounding(model, "fp5")
    with pytest.raises(ValueError, match=r"codes alone; expected one with weights"):
        set_rounding(pack(model), "fp8")
