"""Mistakes that other implementations made, put in one at a time: each moves the logits away from the oracle's.

The oracle is the published code with the same weights, so a mistake made in this package fails here too. Of
each mistake three things are known: the first position it touches, that nothing before it moves, and a bound
on the largest change of any logit, less than half of what is seen for these weights.
"""

import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from dsv4.ops import rope
from dsv4.ops.mhc import reference as mhc_reference

SAME = 2e-5  # rounding, see test_parity
TOUCHED = 20 * SAME  # the first position moves by more, which is far from rounding
MTP_ONLY = -1


@dataclass(frozen=True)
class Mistake:
    """How to put it in, the first position it touches, and how far it moves some logit at least."""

    put_in: Callable
    first: int
    bound: float


def change(path, edit):
    """Replace a function: ``edit`` is called with the original before its arguments."""

    def put_in(monkeypatch, parity):
        module, name = path.rsplit(".", 1)
        original = getattr(pkgutil.resolve_name(module), name)
        monkeypatch.setattr(path, lambda *args, **kwargs: edit(original, *args, **kwargs))

    return put_in


def all_of(*changes):
    def put_in(monkeypatch, parity):
        for one in changes:
            one(monkeypatch, parity)

    return put_in


def change_call(edit):
    """Replace the call that the layers read; ``edit`` gets the call and the config."""
    return change(
        "dsv4.model.transformer.make_call",
        lambda original, config, *args, **kwargs: edit(original(config, *args, **kwargs), config),
    )


def change_blocks(ratio, edit):
    """Replace what the queries see of the entries of one ratio; ``edit`` gets the call's rows and their blocks."""

    def edit_call(call, config):
        if ratio not in call.rows.blocks:
            return call
        blocks = edit(call.rows, call.rows.blocks[ratio])
        return replace(call, rows=replace(call.rows, blocks=call.rows.blocks | {ratio: blocks}))

    return change_call(edit_call)


def transposed(post, reading, y, **kwargs):
    return post(reading._replace(comb=reading.comb.transpose(2, 3)), y, **kwargs)


def halved(post, reading, y, **kwargs):
    return post(reading._replace(post=reading.post / 2), y, **kwargs)


def half_split(rotate, x, cos, sin, *args, **kwargs):
    """Pair channel k with channel k + R / 2 instead of its neighbour."""
    head, tail = x[..., : -2 * cos.shape[-1]], x[..., -2 * cos.shape[-1] :]
    tail = tail.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    turned = rotate(torch.cat([head, tail], dim=-1), cos, sin, *args, **kwargs)
    tail = turned[..., head.shape[-1] :].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return torch.cat([turned[..., : head.shape[-1]], tail], dim=-1)


def first_channels(rotate, x, cos, sin, *args, **kwargs):
    turned = 2 * cos.shape[-1]
    return rotate(x.roll(-turned, -1), cos, sin, *args, **kwargs).roll(turned, -1)


def no_inverse(rotate, x, cos, sin, *, inverse=False, **kwargs):
    return x if inverse else rotate(x, cos, sin, **kwargs)


def every_rotation(edit):
    """Of queries and outputs, and of keys and entries, which the room's own function turns once they are normalised."""
    places = ("dsv4.model.attention.rotate", "dsv4.model.attention.rotate_unit", "dsv4.ops.rope.rotate")
    return all_of(*(change(place, edit) for place in places))


def window_layers_on_the_compress_table(call, config):
    return replace(call, token_rotation=call.token_rotation | {"window": call.token_rotation["csa"]})


def mtp_on_the_compress_table(call, config):
    return call if call.rows.blocks else window_layers_on_the_compress_table(call, config)


def frequencies_of(theta=None, **yarn):
    """Replace base or YaRN of the compress table, the one formed with a factor."""

    def edit(original, dims, base, **kwargs):
        return original(dims, theta or base, **kwargs | yarn) if kwargs else original(dims, base)

    return change("dsv4.ops.rope.frequencies", edit)


def with_mscale(call, config):
    scale = 0.1 * math.log(config.rope.factor) + 1
    tables = [
        {kind: (c, s) if kind == "window" else (c * scale, s * scale) for kind, (c, s) in table.items()}
        for table in (call.token_rotation, call.entry_rotation)
    ]
    return replace(call, token_rotation=tables[0], entry_rotation=tables[1])


def entries_rotated_to(position_of):
    """Rotate the entries to another position than that of their first token."""

    def edit(make_call, config, token_ids, rows, **kwargs):
        blocks = {
            ratio: replace(blocks, entry_positions=position_of(blocks.entry_positions, ratio))
            for ratio, blocks in rows.blocks.items()
        }
        return make_call(config, token_ids, replace(rows, blocks=blocks), **kwargs)

    return change("dsv4.model.transformer.make_call", edit)


def swapped_halves(pool, kv, gate, position_bias, *, overlap, **kwargs):
    if overlap:
        half = kv.shape[-1] // 2
        kv, gate, position_bias = (t.roll(half, -1) for t in (kv, gate, position_bias))
    return pool(kv, gate, position_bias, overlap=overlap, **kwargs)


def one_short(attend, *args, window, **kwargs):
    return attend(*args, window=window - 1, **kwargs)


def no_sink(attend, q, kv, sink, *args, **kwargs):
    return attend(q, kv, torch.full_like(sink, -1e4), *args, **kwargs)


def late(ratio):
    return change_blocks(ratio, lambda rows, blocks: replace(blocks, end=rows.positions // ratio))


def early(ratio):
    return change_blocks(ratio, lambda rows, blocks: replace(blocks, end=(rows.positions + 2) // ratio))


def blind_indexer(select, q, k, weights, begin, end, *args, **kwargs):
    return select(q, k, weights, begin, torch.full_like(end, k.shape[1]), *args, **kwargs)


def three_rounds(pre, *args, iterations, **kwargs):
    return pre(*args, iterations=3, **kwargs)


def ending_on_rows(pre, *args, **kwargs):
    reading = pre(*args, **kwargs)
    return reading._replace(comb=reading.comb / reading.comb.sum(dim=-1, keepdim=True))


def no_clamp(function, *args, backend):
    return function(*args[:-1], math.inf, backend=backend)


def no_final_norm(head, streams, mix, weight, *, norm_eps, eps, backend):
    mixes = mhc_reference.mixes(streams, mix.fn, norm_eps)
    return mhc_reference.read(streams, torch.sigmoid(mix.scale * mixes + mix.base) + eps)


def no_token_ids(call, config):
    return replace(call, token_ids=torch.zeros_like(call.token_ids)) if call.rows.blocks else call


def no_unit(rotate_unit, q, cos, sin, eps, *, backend):
    return rope.rotate(q, cos, sin, backend=backend)


def no_shared_expert_in_hash_layers(monkeypatch, parity):
    for layer in parity.ours.layers[: parity.config.moe.num_hash_layers]:
        monkeypatch.setattr(layer.ffn.shared_experts, "forward", lambda x, call: torch.zeros_like(x))


def no_bias(choose, affinities, bias, *args):
    return choose(affinities, torch.zeros_like(bias), *args)


def collapsed(join, block, streams, *args):
    return join(block, streams.mean(dim=2, keepdim=True).expand_as(streams), *args)


MISTAKES = {
    "mix_not_transposed": Mistake(change("dsv4.ops.mhc.post", transposed), 0, 1.5),
    "post_without_its_factor_2": Mistake(change("dsv4.ops.mhc.post", halved), 0, 2.0),
    "sinkhorn_with_3_iterations": Mistake(change("dsv4.ops.mhc.pre", three_rounds), 0, 0.5),
    "sinkhorn_ending_on_rows": Mistake(change("dsv4.ops.mhc.pre", ending_on_rows), 0, 0.3),
    "rope_pairs_half_split": Mistake(every_rotation(half_split), 1, 3.0),
    "rope_on_the_first_channels": Mistake(every_rotation(first_channels), 1, 3.0),
    "output_not_rotated_back": Mistake(change("dsv4.model.attention.rotate", no_inverse), 1, 3.0),
    "window_layers_on_the_compress_table": Mistake(change_call(window_layers_on_the_compress_table), 1, 0.4),
    "compressed_layers_on_the_main_table": Mistake(frequencies_of(theta=10000, factor=1.0), 1, 2.0),
    "compress_table_with_base_40000": Mistake(frequencies_of(theta=40000), 1, 1.5),
    "compress_table_without_yarn": Mistake(frequencies_of(factor=1.0), 1, 2.0),
    "yarn_mscale": Mistake(change_call(with_mscale), 0, 2.0),
    "entries_not_rotated": Mistake(entries_rotated_to(lambda position, ratio: position * 0), 7, 1.5),
    "entries_rotated_to_their_index": Mistake(entries_rotated_to(lambda position, ratio: position // ratio), 7, 1.5),
    "overlap_halves_swapped": Mistake(change("dsv4.ops.compress.pool", swapped_halves), 3, 1.5),
    "window_one_short": Mistake(change("dsv4.model.attention.attend", one_short), 15, 2.0),
    "csa_entry_seen_one_token_late": Mistake(late(4), 3, 0.6),
    "csa_entry_seen_one_token_early": Mistake(early(4), 2, 0.8),
    "hca_entry_seen_one_token_late": Mistake(late(128), 127, 0.3),
    "hca_entry_seen_one_token_early": Mistake(early(128), 126, 0.2),
    "indexer_without_causal_mask": Mistake(change("dsv4.ops.index.select", blind_indexer), 0, 2.0),
    "no_sink": Mistake(change("dsv4.model.attention.attend", no_sink), 0, 1.7),
    "query_heads_not_normalised": Mistake(change("dsv4.model.attention.rotate_unit", no_unit), 0, 2.0),
    "shared_expert_not_clamped": Mistake(change("dsv4.model.moe.swiglu", no_clamp), 0, 1.4),
    "routed_experts_not_clamped": Mistake(change("dsv4.model.moe.experts", no_clamp), 0, 1.2),
    "hash_layers_without_token_ids": Mistake(change_call(no_token_ids), 0, 2.0),
    "hash_layers_without_shared_expert": Mistake(no_shared_expert_in_hash_layers, 0, 2.5),
    "routing_bias_forgotten": Mistake(change("dsv4.ops.route.choose", no_bias), 0, 1.0),
    "final_norm_forgotten": Mistake(change("dsv4.ops.mhc.head", no_final_norm), 0, 9.0),
    "mtp_treated_as_compressed": Mistake(change_call(mtp_on_the_compress_table), MTP_ONLY, 0.7),
    "mtp_reads_collapsed_streams": Mistake(change("dsv4.model.transformer.MTP.join", collapsed), MTP_ONLY, 0.5),
}


@pytest.fixture(scope="module")
def oracle(parity):
    with torch.no_grad():
        return parity.their_logits(mtp=True)


def distances(parity, oracle):
    """The largest difference at each position, main and MTP: [T] and [T - 1]."""
    with torch.no_grad():
        ours = parity.ours(parity.token_ids, mtp=True)
    return [(a - b).abs().amax(dim=(0, 2)) for a, b in zip((ours.logits, ours.mtp_logits), oracle, strict=True)]


def test_without_a_mistake_nothing_shows(parity, oracle):
    assert all(distance.max() < SAME for distance in distances(parity, oracle))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows_from_its_first_position_on(parity, oracle, monkeypatch, name):
    mistake = MISTAKES[name]
    mistake.put_in(monkeypatch, parity)
    main, mtp = distances(parity, oracle)
    if mistake.first == MTP_ONLY or (name.startswith("window_layers") and "window" not in parity.config.layer_kinds):
        assert main.max() < SAME
        assert mtp.max() > mistake.bound
        return
    assert not (main[: mistake.first] > SAME).any()
    assert main[mistake.first] > TOUCHED
    assert main.max() > mistake.bound
