"""The benchmark of whole layers, at tiny sizes on the CPU: what it measures, sums and draws."""

import json
from dataclasses import replace

import pytest
import torch

from bench.gpu import layers, layers_report, layers_twin, layers_v4, v32
from dsv4 import device as devices
from dsv4.accounting.cache import bytes_per_token, state_bytes
from dsv4.accounting.v32 import V32Config
from dsv4.config.presets import flash, pro, smoke
from dsv4.device import CPU
from dsv4.model.init import new_model

SMALL = smoke()
FLASH = replace(
    SMALL, layer_kinds=("window", "csa", "hca", "csa"), moe=replace(SMALL.moe, expert_dim=24)
)  # transformers' grouped products want multiples of 8
PRO = replace(FLASH, hidden_size=48, layer_kinds=("hca", "csa", "hca"), indexer=replace(FLASH.indexer, top_k=12))
OLD = V32Config(
    hidden_size=40, num_layers=5, num_dense_layers=2, dense_dim=36, num_experts=6, experts_per_token=2, expert_dim=28,
    num_heads=3, q_rank=24, kv_rank=64, nope_dims=12, rotary_dims=16, value_dims=20, index_heads=4, index_head_dim=32,
    index_top_k=9,
)  # fmt: skip
TINY = layers.Plan(
    flash=FLASH, pro=PRO, v32=OLD, train_tokens=(24,), prefill_tokens=(128, 384), chunk=256, contexts=(128, 256),
    batches=(1, 3), twin_tokens=(24, 128), twin_chunks=(64,), spend_s=0.0, backend="portable", device=CPU,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _not_collecting():
    """Collecting garbage takes longer than what is measured here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "free", lambda: None)
        yield


@pytest.fixture(scope="module")
def records(_not_collecting):
    return layers.measure(TINY)


def of(records, **wanted):
    (found,) = [r for r in records if all(r[key] == value for key, value in wanted.items())]
    return found


# ---- the plan ----


def test_the_true_sizes_are_those_of_the_models():
    assert (layers.TRUE.flash, layers.TRUE.pro, layers.TRUE.v32) == (flash(), pro(), V32Config())
    assert layers.TRUE.contexts[-1] == layers.TRUE.prefill_tokens[-1] == 2**20
    assert {model for model, _ in layers.TRUE.layers()} == {"flash", "pro", "v32"}
    assert v32.layers_of(V32Config()) == {"experts": 58, "dense": 3}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"only": ("flash.hsa",)}, "only has flash.hsa; expected layers among flash.window, flash.csa"),
        ({"what": ("decode", "speed")}, "what has speed; expected train, prefill or decode"),
    ],
)
def test_what_there_is_not_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        layers.measure(replace(TINY, **changed))


def test_a_part_can_be_chosen():
    part = {"only": ("pro.hca", "v32.dense"), "what": ("decode",), "contexts": (256,)}
    found = layers.measure(replace(TINY, **part, twin_tokens=()))
    assert [(r["layer"], r["kind"], r["what"], r["batch"]) for r in found] == [
        ("pro", "hca", "decode", 1), ("pro", "hca", "decode", 3), ("v32", "dense", "decode", 1),
        ("v32", "dense", "decode", 3),
    ]  # fmt: skip


# ---- what is measured ----


def test_every_layer_has_every_measurement(records):
    v4, old = 1 + 2 + 2 * 2, 2 + 2 * 2
    assert len(records) == 2 * 3 * v4 + 2 * old
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 0 and r["note"] is None for r in records)
    for r in records:
        done = r["batch"] if r["what"] == "decode" else r["tokens"]
        assert r["tokens_per_second"] == pytest.approx(done / r["seconds"])
    json.dumps(records)


def test_the_last_chunk_is_timed(records):
    for r in records:
        if r["what"] == "prefill":
            assert r["chunk"] == min(256, r["tokens"])
            assert 0 < r["end_seconds"] <= r["seconds"]
        else:
            assert r["end_seconds"] is None


@pytest.mark.parametrize(("model", "config"), [("flash", FLASH), ("pro", PRO)])
@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_cache_bytes_are_those_of_the_accounting(records, model, config, kind):
    one = layers_v4.one_layer(config, kind)
    for batch in (1, 3):
        found = of(records, layer=model, kind=kind, what="decode", tokens=256, batch=batch)
        assert found["cache_bytes_per_token"] == float(bytes_per_token(one, "packed"))
        assert found["cache_fixed_bytes"] == state_bytes(one, "packed")


def test_cache_bytes_of_v32(records):
    found = of(records, layer="v32", kind="dense", what="prefill", tokens=384)
    assert found["cache_bytes_per_token"] == (64 + 8 + 2 * 16) + (16 + 1)  # one scale, padded to 8; one of 32 codes
    true = v32.V32Cache(V32Config(), num_slots=1, context=64, row_format="packed", device=CPU)
    assert true.bytes_per_token() == 648 + 68


def test_what_does_not_fit_is_named_and_the_rest_goes_on(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(layers_v4.V4Layer, "train", full)
    found = layers.measure(replace(TINY, only=("flash.window",), twin_tokens=()))
    for r in found:
        assert (r["note"], r["seconds"] is None) == (("out of memory", True) if r["what"] == "train" else (None, False))
    assert layers.line(found[0]) == "flash.window train 24 x 1: out of memory"
    monkeypatch.setattr(v32.V32Layer, "__init__", full)
    assert {r["note"] for r in layers.measure(replace(TINY, only=("v32.dense",)))} == {"out of memory"}


def test_other_errors_are_not_hidden(monkeypatch):
    def wrong(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(layers_v4.V4Layer, "decode", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        layers.measure(replace(TINY, only=("flash.window",), what=("decode",), twin_tokens=()))


def test_the_fastest_way_is_v32s(monkeypatch):
    seconds = {"operation": 2.0, "torch": 1.0}
    monkeypatch.setattr(
        layers, "_time", lambda plan, work, record, device: record.update(seconds=seconds[way_of(work)])
    )
    plan = replace(TINY, only=("v32.dense",), what=("decode",), v32_attention=("operation", "torch"))

    def way_of(work):
        return work.layer.attention

    assert {(r["attention"], r["seconds"]) for r in layers.measure(plan)} == {("torch", 1.0)}
    seconds["torch"] = 3.0
    assert {(r["attention"], r["seconds"]) for r in layers.measure(plan)} == {("operation", 2.0)}


def test_tell_is_given_what_there_is():
    told = []
    layers.measure(
        replace(TINY, only=("flash.window",), what=("decode",), twin_tokens=()),
        tell=lambda records: told.append(sum(r["seconds"] is not None for r in records)),
    )
    assert told == [1, 2, 3, 4]


def test_short_runs_are_repeated_and_long_ones_not():
    calls = []
    assert layers.timed(lambda: calls.append(1), CPU, spend_s=0.0) > 0
    assert len(calls) == layers.WARM_UPS + 1
    layers.timed(lambda: calls.append(1), CPU, spend_s=0.01)
    assert len(calls) > 100
    begins = []
    layers.timed_chunks(begins.append, (0, 8, 16), CPU, spend_s=0.0)
    assert begins == [0, 16, 0, 8, 16]


def test_an_accelerators_peak_begins_anew(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", asked.append)
    devices.start_peak(CPU)
    assert asked == []
    other = torch.device("privateuseone", 0)
    devices.start_peak(other)
    assert asked == [other]


# ---- layers of V4 ----


def test_drawn_weights_are_a_plain_residual_layer_that_keeps_sizes():
    layer = layers_v4.V4Layer(FLASH, "csa", dtype=torch.float32, device=CPU, backend="portable")
    fresh = dict(new_model(layer.config).named_parameters())
    for name, parameter in layer.model.named_parameters():
        if parameter.dim() == 1 or name.endswith("ape"):
            assert torch.equal(parameter, fresh[name]), name
        elif name != "embed.weight":
            assert parameter.std().item() * parameter.shape[-1] ** 0.5 == pytest.approx(1, abs=0.2), name
    streams, _ = layer.model.run(torch.arange(50)[None])
    assert 0.5 < streams.std() < 5


def test_a_prompt_in_chunks_is_the_prompt_at_once():
    layer = layers_v4.V4Layer(FLASH, "csa", dtype=torch.float32, device=CPU, backend="portable")
    ends = []
    for chunk in (384, 128):
        torch.manual_seed(1)
        run, _ = layer.prefill(384, chunk)
        ends.append([run(begin) for begin in range(0, 384, chunk)][-1][:, -1])
    torch.testing.assert_close(*ends, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_a_filled_cache_holds_numbers_and_the_same_for_each_sequence(kind):
    layer = layers_v4.V4Layer(FLASH, kind, dtype=torch.float32, device=CPU, backend="portable")
    cache = layer._cache(3, 256)
    layers_v4.fill_(cache, 2, "portable")
    for part in cache.layers[0].compressors():
        first, *others = part.pages.split(2)
        assert first.any(dim=-1).all()  # no row was left out
        assert not torch.equal(first[0], first[1])
        assert all(torch.equal(first, other) for other in others)
        assert part.kv.std() > 0.5
    assert cache.layers[0].ring.any(dim=-1).all()


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_a_decoding_step_reads_the_cache_it_was_given(kind, monkeypatch):
    layer = layers_v4.V4Layer(FLASH, kind, dtype=torch.float32, device=CPU, backend="portable")
    torch.manual_seed(1)
    run, _ = layer.decode(256, 3)
    streams = run()
    assert streams.shape[:2] == (1, 3)
    assert streams.isfinite().all()
    monkeypatch.setattr(layers_v4, "fill_", lambda *_: None)
    torch.manual_seed(1)
    empty, _ = layer.decode(256, 3)
    assert not torch.allclose(streams, empty())


def test_places_of_decoding_end_at_the_context(monkeypatch):
    layer = layers_v4.V4Layer(FLASH, "csa", dtype=torch.float32, device=CPU, backend="portable")
    seen = []
    monkeypatch.setattr(layer.model, "step", lambda ids, cache, places: seen.append(places))
    layer.decode(256, 3)[0]()
    assert seen[0].position.tolist() == [255, 254, 253]
    assert seen[0].slot.tolist() == [0, 1, 2]
    assert seen[0].table.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert seen[0].closing[4].token.tolist() == [0, 0, 0]  # as many as tokens, as the engine lists them


def test_an_accelerator_replays_decoding_as_a_graph(monkeypatch):
    class Graph:
        def __init__(self, run):
            self.run, self.result = run, run()

        def replay(self):
            self.result.copy_(self.run())

    def capture(run, device):
        graphs.append(Graph(run))
        return graphs[-1], graphs[-1].result

    graphs, given = [], torch.ones(3)
    monkeypatch.setattr(devices, "has_graphs", lambda device: True)
    monkeypatch.setattr(devices, "capture", capture)
    run = layers_v4.replayed(lambda _, x: x + given, torch.arange(3.0), CPU)
    for number in range(1, 4):
        given.fill_(number)  # what a graph reads anew
        assert run().tolist() == [number, 1 + number, 2 + number]
    assert len(graphs) == 1


def test_a_context_of_broken_pages_is_refused():
    layer = layers_v4.V4Layer(FLASH, "hca", dtype=torch.float32, device=CPU, backend="portable")
    with pytest.raises(ValueError, match="context is 200; expected a multiple of 128"):
        layer.decode(200, 1)


# ---- transformers' layer ----


def test_the_twin_has_times_where_it_was_tried(records):
    for r in records:
        is_tried = r["layer"] != "v32" and r["tokens"] in TINY.twin_tokens and r["batch"] == 1
        assert (r["transformers_seconds"] is not None) == is_tried
        assert (r["transformers_note"] is None) == is_tried
    assert of(records, layer="v32", kind="dense", what="prefill", tokens=128)["transformers_note"] == "a layer of V3.2"
    assert "times that" in layers.line(of(records, layer="pro", kind="csa", what="train"))


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_the_twin_is_the_same_layer(kind):
    config = layers_v4.one_layer(FLASH, kind)
    twin = layers_twin.Twin(config, dtype=torch.float32, device=CPU)
    ours = layers_v4.V4Layer(FLASH, kind, dtype=torch.float32, device=CPU, backend="portable").model
    own = sum(p.numel() for name, p in ours.named_parameters() if not name.startswith("head"))
    tables = sum(b.numel() for name, b in twin.model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert sum(p.numel() for p in twin.model.parameters()) + tables == own
    torch.manual_seed(4)
    twin.prefill(128, 128)()
    cache = twin.prefill(128, 48)()
    assert cache.get_seq_length() == 128
    twin.decode(cache)()
    assert cache.get_seq_length() == 129


def test_a_prompt_that_does_not_fit_whole_is_tried_in_chunks(monkeypatch):
    tried = []

    def prefill(self, tokens, chunk):
        tried.append(chunk)
        if chunk > 64:
            raise torch.OutOfMemoryError
        return lambda: None

    monkeypatch.setattr(layers_twin.Twin, "prefill", prefill)
    plan = replace(TINY, only=("flash.window",), what=("prefill",), prefill_tokens=(128,), twin_chunks=(96, 64, 32))
    (found,) = layers.measure(plan)
    assert tried == [128, 96, 64]
    assert found["transformers_note"] == "in chunks of 64"
    assert found["transformers_seconds"] is not None
    (found,) = layers.measure(replace(plan, twin_chunks=(96,)))
    assert (found["transformers_note"], found["transformers_seconds"]) == ("out of memory", None)


def test_without_transformers_there_is_no_twin(monkeypatch):
    monkeypatch.setattr(layers_twin, "find_spec", lambda name: None)
    (found,) = layers.measure(replace(TINY, only=("flash.window",), what=("train",)))
    assert found["transformers_note"] == "transformers is not installed"
    monkeypatch.setattr(layers_twin, "find_spec", lambda name: None if "deepseek" in name else name)
    assert layers_twin.why_none().endswith("has no DeepSeek-V4")


# ---- sums and picture ----


def test_sums_are_over_the_layers_of_whole_models(records):
    found = layers_report.sums(records, FLASH, PRO, OLD)
    last = found["decode_step_seconds"][1]
    assert (last["context"], last["batch"]) == (256, 3)

    def seconds(model, kind):
        return of(records, layer=model, kind=kind, what="decode", tokens=256, batch=3)["seconds"]

    assert last["flash_total"] == pytest.approx(
        seconds("flash", "window") + 2 * seconds("flash", "csa") + seconds("flash", "hca")
    )
    assert last["pro_total"] == pytest.approx(seconds("pro", "csa") + 2 * seconds("pro", "hca"))
    assert last["v32_total"] == pytest.approx(3 * seconds("v32", "experts") + 2 * seconds("v32", "dense"))
    assert last["pro"] == last["pro_total"] / last["v32_total"]
    end = found["end_of_prompt_token_seconds"]
    assert end["context"] == 384
    dense, many = (of(records, layer="v32", kind=kind, what="prefill", tokens=384) for kind in ("dense", "experts"))
    assert end["v32_total"] == pytest.approx((2 * dense["end_seconds"] + 3 * many["end_seconds"]) / 128)


def test_sums_of_the_cache_and_the_report(records):
    found = layers_report.sums(records, FLASH, PRO, OLD)
    cache = found["cache_bytes_per_token"]
    assert cache["v32_total"] == 5 * 121
    assert cache["flash_total"] == float(bytes_per_token(replace(FLASH, mtp_kinds=()), "packed"))
    assert found["cache_of_published_v32"]["flash"] == cache["flash_total"] / (5 * (64 + 2 + 32 + 36))
    for what, model in (("flops", "pro"), ("flops", "flash"), ("cache", "pro"), ("cache", "flash")):
        assert found["counted"][what][model] == pytest.approx(found["report"][what][model], abs=0.011)
    assert found["counted"]["flops_alike"]["pro"] == pytest.approx(0.261, abs=5e-4)


def test_a_model_with_a_layer_missing_has_no_sum(records):
    some = [r for r in records if (r["layer"], r["kind"]) != ("v32", "dense")]
    for r in layers_report.sums(some, FLASH, PRO, OLD)["decode_step_seconds"]:
        assert r["v32_total"] is r["pro"] is r["flash"] is None
        assert r["pro_total"] > 0
    assert layers_report.sums([], FLASH, PRO, OLD)["decode_step_seconds"] == []


def test_the_picture(records, tmp_path):
    layers_report.draw(records, tmp_path / "layers.svg")
    text = (tmp_path / "layers.svg").read_text()
    for said in ("V4-Flash csa", "V4-Pro hca", "V3.2 experts", "A prompt", "A decoding step of 3 tokens", "384"):
        assert said in text
    layers_report.draw([], tmp_path / "none.svg")


def test_without_an_accelerator_true_sizes_are_not_begun(monkeypatch):
    monkeypatch.setattr(layers, "accelerator", lambda: None)
    with pytest.raises(SystemExit, match="no accelerator here"):
        layers.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layers, "TRUE", TINY)
    out = tmp_path / "layers.json"
    part = {"only": ("flash.csa",), "what": ("decode",), "backend": "portable", "twins": False}
    layers.main(json=out, plot=tmp_path / "layers.svg", **part)
    kept = json.loads(out.read_text())
    assert [r["seconds"] is not None for r in kept["records"]] == [True] * 4
    assert (kept["backend"], kept["graphs"]) == ("portable", False)
    assert kept["sums"]["report"]["flops"]["pro"] == 0.27
    assert "4 of 4 measured" in capsys.readouterr().out
