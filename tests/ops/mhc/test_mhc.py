"""Hyper-connections: reading, writing and the head against plain loops, and the portable backward."""

import math

import pytest
import torch

from dsv4.ops.mhc import Mix, Reading, head, portable, post, pre, sinkhorn
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, evaluate
from dsv4.testing.memory import saved_elements

BACKENDS = ["reference", "portable"]
# Both large enough that their places in the formulas show.
NORM_EPS, EPS = 1e-2, 1e-3
ITERATIONS = [1, 3, 20]
# B, T, N, D
SIZES = [(1, 1, 4, 3), (2, 5, 4, 7), (2, 6, 2, 5), (1, 9, 3, 1), (1, 0, 4, 5)]


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mix(N, D, num_rows, num_scales):
    return {
        "fn": float64(num_rows, N * D) / (N * D) ** 0.5,
        "base": float64(num_rows),
        "scale": float64(num_scales),
        "norm_weight": float64(D),
    }


def inputs(B, T, N, D):
    return {"streams": float64(B, T, N, D)} | mix(N, D, N * (2 + N), 3)


def head_inputs(B, T, N, D):
    return {"streams": float64(B, T, N, D)} | mix(N, D, N, 1)


def read(streams, fn, base, scale, norm_weight, backend="portable", iterations=3):
    kwargs = {"norm_eps": NORM_EPS, "eps": EPS, "iterations": iterations, "backend": backend}
    return pre(streams, Mix(fn, base, scale), norm_weight, **kwargs)


def write(streams, y, post_weights, comb, backend="portable"):
    return post(Reading(y, post_weights, comb, streams), y, backend=backend)


def read_head(streams, fn, base, scale, norm_weight, backend="portable"):
    return head(streams, Mix(fn, base, scale), norm_weight, norm_eps=NORM_EPS, eps=EPS, backend=backend)


def sublayer(streams, y_weight, backend="portable", **mix):
    """Read, a stand-in for the sub-layer, write: gradients meet in the streams."""
    reading = read(streams, backend=backend, **mix)
    return post(reading, torch.tanh(reading.x) * y_weight.to(reading.x.dtype), backend=backend)


# Reading and writing, one token at a time


def loop_normalise(u, weight):
    root = math.sqrt(sum(v * v for v in u) / len(u) + NORM_EPS)
    return [v / root * w for v, w in zip(u, weight, strict=True)]


def loop_mixes(streams, fn):
    """The maps of one token's streams, normalised over all of them together."""
    flat = [value for stream in streams for value in stream]
    root = math.sqrt(sum(v * v for v in flat) / len(flat) + NORM_EPS)
    return [sum(w * v for w, v in zip(row, flat, strict=True)) / root for row in fn]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def weighted_sum(weights, streams):
    return [sum(w * stream[d] for w, stream in zip(weights, streams, strict=True)) for d in range(len(streams[0]))]


def loop_read(streams, fn, base, scale, norm_weight, iterations):
    N = len(streams)
    m = loop_mixes(streams, fn)
    pre_weights = [sigmoid(scale[0] * m[j] + base[j]) + EPS for j in range(N)]
    post_weights = [2 * sigmoid(scale[1] * m[N + j] + base[N + j]) for j in range(N)]
    rows = [[2 * N + N * j + k for k in range(N)] for j in range(N)]
    logits = torch.tensor([[scale[2] * m[i] + base[i] for i in row] for row in rows], dtype=torch.float64)
    comb = sinkhorn(logits, eps=EPS, iterations=iterations, backend="reference").tolist()
    return loop_normalise(weighted_sum(pre_weights, streams), norm_weight), post_weights, comb


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (1, 2, 2, 3)])
def test_reading_in_plain_loops(backend, sizes):
    given = inputs(*sizes)
    reading = read(**given, backend=backend)
    parameters = [given[name].tolist() for name in ("fn", "base", "scale", "norm_weight")]
    tokens = given["streams"].flatten(0, 1).tolist()
    wanted = zip(*(loop_read(token, *parameters, iterations=3) for token in tokens), strict=True)
    for got, rows in zip(reading[:3], wanted, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), torch.tensor(rows, dtype=torch.float64))
    assert torch.equal(reading.streams, given["streams"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_head_in_plain_loops(backend):
    given = head_inputs(2, 3, 4, 5)
    wanted = []
    for token in given["streams"].flatten(0, 1).tolist():
        m = loop_mixes(token, given["fn"].tolist())
        weights = [sigmoid(given["scale"].item() * m[j] + given["base"][j].item()) + EPS for j in range(4)]
        wanted.append(loop_normalise(weighted_sum(weights, token), given["norm_weight"].tolist()))
    got = read_head(**given, backend=backend)
    torch.testing.assert_close(got.flatten(0, 1), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_writing_sums_over_the_first_index_of_comb(backend):
    streams = torch.tensor([[[[1.0], [10.0]]]])
    comb = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    reading = Reading(torch.zeros(1, 1, 1), torch.tensor([[[5.0, 7.0]]]), comb, streams)
    written = post(reading, torch.tensor([[[100.0]]]), backend=backend)
    assert written.tolist() == [[[[500 + 1 * 1 + 3 * 10], [700 + 2 * 1 + 4 * 10]]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_maps_write_with_weight_one_and_mix_evenly(backend):
    given = {name: torch.zeros_like(value) for name, value in inputs(1, 2, 4, 3).items()}
    reading = read(**given, backend=backend)
    torch.testing.assert_close(reading.post, torch.ones(1, 2, 4, dtype=torch.float64))
    torch.testing.assert_close(reading.comb, torch.full((1, 2, 4, 4), 0.25, dtype=torch.float64), rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_comb_is_sinkhorn_of_the_last_mixes_row_by_row(backend):
    given = inputs(1, 1, 2, 3)
    given |= {
        "scale": torch.zeros(3, dtype=torch.float64),
        "base": torch.tensor([0, 0, 0, 0, 1.0, 2.0, 3.0, 5.0]).double(),
    }
    comb = read(**given, backend=backend).comb[0, 0]
    rows = sinkhorn(torch.tensor([[1.0, 2.0], [3.0, 5.0]]).double(), eps=EPS, iterations=3, backend="reference")
    torch.testing.assert_close(comb, rows)


# Backends


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_reading_backends_agree(sizes, iterations):
    def operation(backend, **given):
        return tuple(read(**given, backend=backend, iterations=iterations))

    assert_backends_agree(operation, **inputs(*sizes))


@pytest.mark.parametrize("used", [["x"], ["post"], ["comb"], ["streams"], ["x", "comb"], ["post", "streams"]])
def test_backends_agree_when_only_a_part_of_the_reading_is_used(used):
    def operation(backend, **given):
        return [getattr(read(**given, backend=backend), name) for name in used]

    assert_backends_agree(operation, **inputs(2, 5, 4, 3))


@pytest.mark.parametrize("sizes", SIZES)
def test_writing_backends_agree(sizes):
    B, T, N, D = sizes
    given = {"streams": float64(*sizes), "y": float64(B, T, D)}
    assert_backends_agree(write, **given, post_weights=float64(B, T, N), comb=float64(B, T, N, N))


@pytest.mark.parametrize("sizes", SIZES)
def test_sublayer_backends_agree(sizes):
    assert_backends_agree(sublayer, **inputs(*sizes), y_weight=float64(sizes[-1]))


@pytest.mark.parametrize("sizes", SIZES)
def test_head_backends_agree(sizes):
    assert_backends_agree(read_head, **head_inputs(*sizes))


@pytest.mark.parametrize("held", [1, 4, 10])
def test_backends_agree_in_small_slices(monkeypatch, held):
    monkeypatch.setattr(portable, "TOKENS_AT_ONCE", held)
    assert_backends_agree(sublayer, **inputs(2, 5, 4, 3), y_weight=float64(3))
    assert_backends_agree(read_head, **head_inputs(2, 5, 4, 3))


@pytest.mark.parametrize("operation", [sublayer, read_head])
def test_backends_agree_on_streams_expanded_from_the_embedding(operation):
    given, extra = (inputs, {"y_weight": float64(3)}) if operation is sublayer else (head_inputs, {})
    streams = float64(2, 5, 1, 3).expand(2, 5, 4, 3)
    assert_backends_agree(operation, **given(2, 5, 4, 3) | {"streams": streams}, **extra)


@pytest.mark.parametrize(("operation", "given"), [(read, inputs), (read_head, head_inputs)])
def test_reading_backends_agree_on_non_contiguous_input(operation, given):
    streams = float64(5, 2, 4, 3).transpose(0, 1)
    assert_backends_agree(
        lambda backend, **given: tuple(operation(**given, backend=backend)),
        **given(2, 5, 4, 3) | {"streams": streams},
    )


def test_writing_backends_agree_on_non_contiguous_input():
    given = {"streams": float64(5, 2, 4, 3).transpose(0, 1), "y": float64(3, 5, 2).transpose(0, 2)}
    comb = float64(2, 5, 4, 4).mT
    assert_backends_agree(write, **given, post_weights=float64(4, 5, 2).transpose(0, 2), comb=comb)


def test_gradients_are_those_of_finite_differences():
    given = [value.requires_grad_() for value in inputs(1, 2, 2, 3).values()]
    assert torch.autograd.gradcheck(lambda *given: tuple(read(*given)[:4]), given)
    y_weight, names = float64(3).requires_grad_(), ("fn", "base", "scale", "norm_weight")

    def whole(streams, y_weight, *mix):
        return sublayer(streams, y_weight, **dict(zip(names, mix, strict=True)))

    assert torch.autograd.gradcheck(whole, (given[0], y_weight, *given[1:]))


def test_head_gradients_are_those_of_finite_differences():
    given = [value.requires_grad_() for value in head_inputs(1, 2, 2, 3).values()]
    assert torch.autograd.gradcheck(read_head, given)


def test_bfloat16_streams_have_float32_coefficients():
    given = {name: value.float() for name, value in inputs(2, 6, 4, 32).items()}
    given |= {name: given[name].bfloat16() for name in ("streams", "norm_weight")}
    rounded = read(**given)
    exact = read(**given | {name: given[name].float() for name in ("streams", "norm_weight")})
    assert rounded.x.dtype == rounded.streams.dtype == torch.bfloat16
    assert rounded.post.dtype == rounded.comb.dtype == torch.float32
    # The same numbers go in, so the coefficients differ by the order of float32 sums alone.
    torch.testing.assert_close(rounded.post, exact.post, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rounded.comb, exact.comb, rtol=1e-5, atol=1e-6)
    # x is rounded twice to 8 bits, before its normalisation and after: 2^-8 of itself each, and the first
    # moves the root mean square by at most as much again.
    torch.testing.assert_close(rounded.x.float(), exact.x, rtol=3 * 2**-8, atol=1e-6)


def test_bfloat16_streams_are_written_with_one_rounding():
    y, comb = torch.randn(2, 6, 32).bfloat16(), torch.rand(2, 6, 4, 4)
    reading = Reading(y, torch.rand(2, 6, 4), comb, torch.randn(2, 6, 4, 32).bfloat16())
    exact = post(reading._replace(streams=reading.streams.float()), y.float())
    written = post(reading, y)
    assert written.dtype == torch.bfloat16
    torch.testing.assert_close(written.float(), exact, rtol=2**-7.99, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradients_return_in_the_dtypes_of_their_inputs(backend):
    given = {name: value.float() for name, value in inputs(1, 3, 4, 8).items()}
    given |= {"streams": given["streams"].bfloat16(), "y_weight": torch.randn(8)}
    result = evaluate(lambda **given: sublayer(backend=backend, **given), **given)
    assert all(result[f"gradient of {name}"].dtype == value.dtype for name, value in given.items())


def test_two_runs_give_the_same_bits():
    given = {name: value.float() for name, value in inputs(2, 600, 4, 8).items()}
    assert_repeatable(sublayer, **given, y_weight=torch.randn(8))


def test_reading_keeps_the_streams_and_a_few_numbers_a_token():
    def keeps(T):
        given = {name: value.requires_grad_() for name, value in inputs(1, T, 4, 16).items()}
        parameters = sum(value.numel() for name, value in given.items() if name != "streams")
        return saved_elements(lambda: read(**given).x) - parameters

    assert keeps(300) <= 300 * (4 * 16 + 24 + 1)


# Errors

STREAMS, WEIGHT = torch.zeros(2, 3, 4, 5), torch.zeros(5)
MIX, HEAD_MIX = (Mix(torch.zeros(M, 20), torch.zeros(M), torch.zeros(n)) for M, n in ((24, 3), (4, 1)))
EPSILONS = {"norm_eps": NORM_EPS, "eps": EPS}


def pre_twice(streams, mix, weight):
    return pre(streams, mix, weight, **EPSILONS, iterations=2)


def head_once(streams, mix, weight):
    return head(streams, mix, weight, **EPSILONS)


@pytest.mark.parametrize(("operation", "mix"), [(pre_twice, MIX), (head_once, HEAD_MIX)])
def test_streams_and_norms_that_do_not_fit_are_errors(operation, mix):
    with pytest.raises(ValueError, match=r"streams has shape \[3, 4, 5\]; expected \[B, T, N, D\]"):
        operation(STREAMS[0], mix, WEIGHT)
    with pytest.raises(ValueError, match=r"norm_weight has shape \[4\]; expected \[D\] with D = 5 \(from streams\)"):
        operation(STREAMS, mix, WEIGHT[:4])


@pytest.mark.parametrize(
    ("operation", "mix", "message"),
    [
        (pre_twice, MIX._replace(fn=HEAD_MIX.fn), r"mix\.fn has shape \[4, 20\]; expected \[24, 20\]"),
        (pre_twice, MIX._replace(base=HEAD_MIX.base), r"mix\.base has shape \[4\]; expected \[24\]"),
        (pre_twice, MIX._replace(scale=HEAD_MIX.scale), r"mix\.scale has shape \[1\]; expected \[3\]"),
        (head_once, HEAD_MIX._replace(fn=MIX.fn), r"mix\.fn has shape \[24, 20\]; expected \[4, 20\]"),
        (head_once, HEAD_MIX._replace(base=MIX.base), r"mix\.base has shape \[24\]; expected \[4\]"),
        (head_once, HEAD_MIX._replace(scale=MIX.scale), r"mix\.scale has shape \[3\]; expected \[1\]"),
    ],
)
def test_a_mix_of_another_size_is_an_error(operation, mix, message):
    with pytest.raises(ValueError, match=message):
        operation(STREAMS, mix, WEIGHT)


def test_a_reading_needs_a_round():
    with pytest.raises(ValueError, match="iterations is 0; expected at least 1"):
        pre(STREAMS, MIX, WEIGHT, **EPSILONS, iterations=0)


Y, READING = torch.zeros(2, 3, 5), Reading(torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 4), STREAMS)


@pytest.mark.parametrize(
    ("reading", "y", "message"),
    [
        (READING._replace(streams=STREAMS[0]), Y, r"reading\.streams has shape \[3, 4, 5\]; expected \[B, T, N, D\]"),
        (READING, Y[..., :4], r"y has shape \[2, 3, 4\]; expected \[B, T, D\] with .*D = 5 \(from reading\.streams\)"),
        (READING._replace(post=Y), Y, r"reading\.post has shape \[2, 3, 5\]; expected \[B, T, N\] with .*N = 4"),
        (READING._replace(comb=STREAMS), Y, r"reading\.comb has shape \[2, 3, 4, 5\]; expected \[B, T, N, N\]"),
    ],
)
def test_what_does_not_fit_a_writing_is_an_error(reading, y, message):
    with pytest.raises(ValueError, match=message):
        post(reading, y)


@pytest.mark.parametrize(
    "call",
    [
        lambda backend: pre(STREAMS, MIX, WEIGHT, **EPSILONS, iterations=2, backend=backend),
        lambda backend: head(STREAMS, HEAD_MIX, WEIGHT, **EPSILONS, backend=backend),
        lambda backend: post(READING, Y, backend=backend),
    ],
)
def test_an_unknown_backend_is_an_error(call):
    with pytest.raises(ValueError, match="backend is 'numpy'; expected one of reference, portable"):
        call("numpy")
