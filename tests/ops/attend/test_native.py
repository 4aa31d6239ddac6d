"""The softmax kernels of attention against the reference in float64, beside the portable path."""

import pytest
import torch

from dsv4 import native
from dsv4.ops.attend import Entries, attend, portable
from dsv4.testing.compare import assert_kernels_agree, evaluate

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")
DTYPES = [torch.float32, torch.bfloat16]


def case(kind, T, history, C=7, B=2, H=3, K=6):
    given = {
        "x": torch.randn(B, T, H, K),
        "kv": torch.randn(B, history + T, K),
        "sink": torch.randn(H),
    }
    own = history + torch.arange(T)
    starts = (torch.rand(B, history + T) < 0.05).long() * torch.arange(history + T)
    raw_begin = torch.minimum(starts.cummax(dim=1).values[:, history:], own)
    if kind == "none":
        return given, raw_begin, {}
    given["values"] = torch.randn(B, C, K)
    if kind == "picked":
        picked = torch.rand(B, T, C).argsort(dim=-1)[..., : C // 2]
        return given, raw_begin, {"picked": picked.masked_fill(torch.rand(picked.shape) < 0.3, -1)}
    begin = torch.randint(0, C, (B, T))
    return given, raw_begin, {"begin": begin, "end": begin + torch.randint(0, C + 1, (B, T))}


def operation(raw_begin, seen, window):
    def run(x, kv, sink, backend, values=None):
        entries = None if values is None else Entries(values.to(x.dtype), **seen)
        return attend(x, kv.to(x.dtype), sink, raw_begin, entries, window=window, scale=0.7, backend=backend)

    return run


@pytest.mark.parametrize("kind", ["none", "interval", "picked"])
@pytest.mark.parametrize(("T", "history", "window"), [(1, 0, 1), (9, 3, 5), (65, 40, 16), (130, 0, 128)])
def test_against_the_reference(kind, T, history, window):
    given, raw_begin, seen = case(kind, T, history)
    assert_kernels_agree(operation(raw_begin, seen, window), DTYPES, **given)


@pytest.mark.parametrize("kind", ["interval", "picked"])
def test_small_slices(kind, monkeypatch):
    for name, value in {"BLOCK": 5, "SCORES_HELD": 3000, "GATHERED_HELD": 400}.items():
        monkeypatch.setattr(portable, name, value)
    given, raw_begin, seen = case(kind, 70, 11, C=40)
    assert_kernels_agree(operation(raw_begin, seen, 16), DTYPES, **given)


@pytest.mark.parametrize("sink", [-300.0, 0.0, 300.0])
def test_peaks_far_apart(sink):
    given, raw_begin, seen = case("picked", 9, 3)
    given |= {"x": 60 * given["x"], "sink": torch.full((3,), sink)}
    assert_kernels_agree(operation(raw_begin, seen, 5), [torch.float32], **given)


def test_what_is_not_a_number_stays_so():
    given, raw_begin, seen = case("picked", 9, 3)
    given["x"][0, 4, 1, 2] = torch.nan
    out, log_total = operation(raw_begin, seen, 5)(**given, backend="native")
    assert out[0, 4, 1].isnan().all()
    assert log_total[0, 4, 1].isnan()
    assert out.isnan().sum() == out.shape[-1]


def test_results_do_not_depend_on_the_threads():
    given, raw_begin, seen = case("picked", 65, 40)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run = operation(raw_begin, seen, 16)
            results.append(evaluate(lambda run=run, **leaves: run(backend="native", **leaves), **given))
    finally:
        torch.set_num_threads(before)
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name
