"""The layer of V3.2 against its formula, at tiny sizes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import v32
from dsv4.accounting.v32 import V32Config
from dsv4.device import CPU
from dsv4.ops import rope
from dsv4.ops.route import affinity

OLD = V32Config(
    hidden_size=40, num_layers=5, num_dense_layers=2, dense_dim=36, num_experts=6, experts_per_token=2, expert_dim=28,
    num_heads=3, q_rank=24, kv_rank=64, nope_dims=12, rotary_dims=16, value_dims=20, index_heads=4, index_head_dim=32,
    index_top_k=9,
)  # fmt: skip


def old_layer(kind="experts", attention="operation", **changed):
    torch.manual_seed(2)
    config = replace(OLD, **changed)
    layer = v32.V32Layer(config, kind, dtype=torch.float32, device=CPU, backend="portable", attention=attention)
    for norm in (layer.attn_norm, layer.ffn_norm, layer.q_norm, layer.kv_norm):
        norm.uniform_(0.5, 1.5)
    return layer


def steps(layer, x, cuts, slots=1):
    """Run sequences of x [slots, T, D] together, cut at these places; [slots, T, D] float32."""
    cache = layer.new_cache(slots, 64, "float32")
    found = []
    for begin, end in pairwise((0, *cuts, x.shape[1])):
        count = end - begin
        slot = torch.arange(slots, dtype=torch.int32).repeat_interleave(count)
        position = torch.arange(begin, end, dtype=torch.int32).repeat(slots)
        places = cache.places(slot, position, slot * count)
        found.append(layer.step(x[:, begin:end].flatten(0, 1), cache, places).unflatten(0, (slots, count)))
    return torch.cat(found, dim=1)


def unit(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + v32.EPS).sqrt() * weight


def formula(layer, x, num_seen):
    """The layer token by token, nothing absorbed: keys and values of each head, and a softmax of what is seen."""
    c, T, H = layer.config, len(x), layer.config.num_heads
    cos, sin = rope.angles(torch.arange(T)[None], layer.frequencies)

    def turn(part):
        return rope.rotate(part.reshape(1, T, -1, part.shape[-1]), cos, sin)[0]  # [T, heads, channels]

    y = unit(x, layer.attn_norm)
    q_low = unit(y @ layer.wq_a.T, layer.q_norm)
    q = turn((q_low @ layer.wq_b.T).view(T, H, -1))
    latent, rotary = (y @ layer.wkv.T).split([c.kv_rank, c.rotary_dims], dim=-1)
    latent = unit(latent, layer.kv_norm)
    keys = torch.einsum("hkn,tk->thn", layer.key_up, latent)
    keys = torch.cat([keys, turn(rotary[:, None]).expand(-1, H, -1)], dim=-1)
    values = torch.einsum("hvk,tk->thv", layer.value_up, latent)
    index_q = turn((q_low @ layer.index_q.T).view(T, c.index_heads, -1))
    index_k = turn(F.layer_norm(y @ layer.index_k.T, (c.index_head_dim,))[:, None])[:, 0]
    scores = torch.einsum("ti,tis->ts", y @ layer.index_weights.T, (index_q @ index_k.T).relu())
    out = torch.empty(T, H, c.value_dims)
    for t in range(T):
        best = scores[t, :t].sort(descending=True, stable=True).indices[: num_seen - 1]  # equal ones: the first
        seen = torch.cat([best, torch.tensor([t])])
        weights = torch.einsum("hc,nhc->hn", q[t], keys[seen]) / (c.nope_dims + c.rotary_dims) ** 0.5
        out[t] = torch.einsum("hn,nhv->hv", weights.softmax(-1), values[seen])
    x = x + out.flatten(1) @ layer.wo.T
    y = unit(x, layer.ffn_norm)

    def swiglu(w1, w2, w3, rows):
        return (F.silu(rows @ w1.T) * (rows @ w3.T)) @ w2.T

    total = swiglu(*layer.shared.parts, y)
    if layer.kind == "experts":
        chance = affinity(y @ layer.gate.T)
        for t in range(T):
            chosen = chance[t].topk(c.experts_per_token).indices
            for e in chosen:
                share = v32.ROUTED_SCALE * chance[t, e] / chance[t, chosen].sum()
                total[t] += share * swiglu(*(w[e] for w in layer.routed.parts), y[t : t + 1])[0]
    return x + total


@pytest.mark.parametrize("kind", v32.KINDS)
@pytest.mark.parametrize("attention", ["operation", "torch"])
@pytest.mark.parametrize("cuts", [(), (7, 20), tuple(range(1, 40))])
def test_v32_is_its_formula_however_a_prompt_is_cut(kind, attention, cuts, monkeypatch):
    monkeypatch.setattr(v32, "GATHERED_HELD", 3000)  # several groups
    layer = old_layer(kind, attention)
    x = torch.randn(1, 40, OLD.hidden_size)
    wanted = formula(layer, x[0], OLD.index_top_k)
    torch.testing.assert_close(steps(layer, x, cuts)[0], wanted, atol=2e-4, rtol=2e-4)


def test_v32_sequences_of_a_batch_do_not_see_each_other():
    layer, x = old_layer(), torch.randn(3, 40, OLD.hidden_size)
    together = steps(layer, x, (15, 16, 17), slots=3)
    alone = torch.cat([steps(layer, one[None], (15, 16, 17)) for one in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_v32_picks_matter():
    """Or the test of the formula would not see the indexer."""
    layer, x = old_layer(), torch.randn(1, 40, OLD.hidden_size)
    assert not torch.allclose(formula(layer, x[0], OLD.index_top_k), formula(layer, x[0], 40), atol=1e-2)


@pytest.mark.parametrize("attention", ["operation", "torch"])
def test_v32_decodes_over_a_filled_cache(attention):
    work = v32.V32Work(old_layer(attention=attention))
    torch.manual_seed(3)
    run, _ = work.decode(64, 3)
    assert run().isfinite().all()
    cache = work.layer.new_cache(2, 64)
    v32.fill_(cache, work.layer)
    for pages in (cache.latent, cache.keys):
        first, second = pages.split(2)
        assert first.any(dim=-1).all()
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["kind", "attention"])
def test_v32_refuses_what_it_has_not(name):
    with pytest.raises(ValueError, match=f"{name} is 'sparse'; expected one of"):
        old_layer(**{name: "sparse"})


def test_v32_refuses_a_context_of_broken_pages():
    with pytest.raises(ValueError, match="context is 40; expected a multiple of 32"):
        v32.V32Cache(OLD, num_slots=1, context=40, row_format="packed", device=CPU)
