"""The kernels for hyper-connections against the reference in float64, beside the portable path."""

import pytest
import torch

from dsv4 import native
from dsv4.ops import mhc
from dsv4.testing.compare import assert_kernels_agree, evaluate

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")
DTYPES = [torch.float32, torch.bfloat16]
# B, T, N, D: tails of every tile and vector, more tokens than one block of partial sums, many streams
SIZES = [(1, 1, 4, 3), (2, 5, 4, 16), (1, 70, 2, 5), (1, 133, 3, 17), (3, 47, 8, 20), (1, 0, 4, 5)]


def inputs(B, T, N, D, rows=None, scales=3):
    rows = rows or N * (2 + N)
    return {
        "streams": torch.randn(B, T, N, D),
        "fn": torch.randn(rows, N * D) / (N * D) ** 0.5,
        "base": torch.randn(rows),
        "scale": torch.randn(scales),
        "norm_weight": torch.randn(D),
    }


def sublayer(streams, y, fn, base, scale, norm_weight, backend):
    reading = mhc.pre(
        streams, mhc.Mix(fn, base, scale), norm_weight, norm_eps=1e-2, eps=1e-3, iterations=7, backend=backend
    )
    return (*reading[:3], mhc.post(reading, y, backend=backend))


@pytest.mark.parametrize("sizes", SIZES)
def test_a_sublayer(sizes):
    given = inputs(*sizes)
    assert_kernels_agree(sublayer, DTYPES, y=torch.randn_like(given["streams"][:, :, 0]), **given)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_head(sizes):
    def head(streams, fn, base, scale, norm_weight, backend):
        return mhc.head(streams, mhc.Mix(fn, base, scale), norm_weight, norm_eps=1e-2, eps=1e-3, backend=backend)

    assert_kernels_agree(head, DTYPES, **inputs(*sizes, rows=sizes[2], scales=1))


@pytest.mark.parametrize("parts", [(0,), (1,), (2,), (3,), (0, 3)])
def test_each_output_alone_carries_its_gradient(parts):
    def some(backend, **leaves):
        outputs = sublayer(backend=backend, **leaves)
        return [outputs[part] for part in parts]

    assert_kernels_agree(some, DTYPES, y=torch.randn(2, 9, 6), **inputs(2, 9, 4, 6))


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("shape", [(5, 4, 4), (2, 19, 3, 3), (0, 2, 2), (33, 8, 8)])
def test_sinkhorn(shape, iterations):
    def project(logits, backend):
        return mhc.sinkhorn(logits, eps=1e-3, iterations=iterations, backend=backend)

    assert_kernels_agree(project, [torch.float32], logits=3 * torch.randn(shape))


@pytest.mark.parametrize("logit", [-200.0, -90.0, -20.0, 0.0, 88.0, 200.0, float("nan")])
def test_gates_at_the_ends_of_the_exponential(logit):
    """A mix of zero leaves the base alone in the gate."""
    given = inputs(1, 5, 4, 3) | {"base": torch.full((24,), logit), "fn": torch.zeros(24, 12)}

    def read(backend):
        mix = mhc.Mix(given["fn"], given["base"], given["scale"])
        kwargs = {"norm_eps": 1e-2, "eps": 1e-3, "iterations": 3, "backend": backend}
        return mhc.pre(given["streams"], mix, given["norm_weight"], **kwargs)

    for one, other in zip(read("native")[:3], read("reference")[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_results_do_not_depend_on_the_threads():
    given, y = inputs(1, 150, 4, 40), torch.randn(1, 150, 40)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(lambda **leaves: sublayer(backend="native", **leaves), y=y, **given))
    finally:
        torch.set_num_threads(before)
    for name, first in results[0].items():
        if name != "gradient of fn":  # a matrix product of torch's own
            assert all(torch.equal(first, other[name]) for other in results[1:]), name


def test_a_token_does_not_depend_on_its_neighbours():
    given, y = inputs(1, 23, 4, 12), torch.randn(1, 23, 12)
    together = sublayer(backend="native", y=y, **given)
    for t in range(23):
        alone = sublayer(backend="native", y=y[:, t : t + 1], **given | {"streams": given["streams"][:, t : t + 1]})
        for whole, one in zip(together, alone, strict=True):
            assert torch.equal(whole[:, t : t + 1], one)


def test_what_the_kernels_do_not_take_goes_to_the_portable_path(monkeypatch):
    monkeypatch.setattr(native, "call", lambda *_: pytest.fail("a kernel ran"))
    for given in ({k: v.double() for k, v in inputs(1, 3, 4, 5).items()}, inputs(1, 3, 9, 5)):
        sublayer(backend="native", y=torch.randn(1, 3, 5).to(given["streams"].dtype), **given)
