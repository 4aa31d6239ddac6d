"""The Triton kernels of the hyper-connections against float64, to the bit over neighbours and runs."""

from contextlib import nullcontext

import pytest
import torch

from dsv4.ops.mhc import portable, reference, triton_parts
from dsv4.ops.mhc import triton as kernels
from dsv4.testing.compare import evaluate
from tests.ops.triton_lane import DEVICE, DTYPES, IS_INTERPRETED, assert_near, poisoned

# One stream's weight reaches the result through the norm's eps alone: large, so that something is left to compare.
NORM_EPS, EPS = 0.1, 1e-3
# B, T, N, D: one channel, tails of every tile, more tokens than a block, streams that are no power of two, no tokens
SIZES = [
    (1, 1, 4, 1),
    (2, 5, 4, 17),
    (1, 19 if IS_INTERPRETED else 35, 2, 5),
    (1, 9, 3, 150),
    (1, 3, 1, 20),
    (1, 0, 4, 5),
]
# A dtype is rounded to in the same places whatever the sizes: the interpreter, which is slow, sees each of them once.
CASES = [(sizes, dtype) for dtype in DTYPES for sizes in SIZES if dtype == torch.float32 or sizes == SIZES[1]]
CASES = CASES if IS_INTERPRETED else [(sizes, dtype) for dtype in DTYPES for sizes in SIZES]
# It pays by the program: fewer of them, and of each kind several at these sizes.
FEW = {"tokens": 16, "channels": 32, "tokens_of_coefficients": 8, "channels_of_a_write": 64, "tokens_of_a_sum": 3}
FEW |= {"tokens_of_streams": 16, "channels_ahead": 32, "warps": 4, "stages": 1, "stages_ahead": 1}
ROUNDINGS = 4  # more than one rounding to a short dtype between input and result


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    if IS_INTERPRETED:
        use(triton_parts.Tiles(**FEW, parts=2), monkeypatch)


def use(tiles, monkeypatch):
    for module in (kernels, kernels.back):
        monkeypatch.setattr(module, "tiles", lambda dtype: tiles)


def dtype_of(name):
    """What a configuration is for."""
    return torch.float32 if name == "float32" else DTYPES[-1]


def inputs(B, T, N, D, rows=None, scales=3):
    rows = rows or N * (2 + N)
    return {
        "streams": torch.randn(B, T, N, D, device=DEVICE),
        "fn": torch.randn(rows, N * D, device=DEVICE) / (N * D) ** 0.5,
        "base": torch.randn(rows, device=DEVICE),
        "scale": torch.randn(scales, device=DEVICE),
        "norm_weight": torch.randn(D, device=DEVICE),
    }


def sublayer(room, iterations=4):
    def run(streams, y, fn, base, scale, norm_weight):
        *read, carried = room.pre(streams, fn, base, scale, norm_weight, NORM_EPS, EPS, iterations)
        return *read, room.post(carried, y, read[1], read[2])

    return run


def two_sublayers(room, iterations=3, written_and_read=True):
    """Reads, writes and reads the next input with other numbers in the same places, then writes again."""

    def run(streams, y, fn, base, scale, norm_weight):
        x, post, comb, carried = room.pre(streams, fn, base, scale, norm_weight, NORM_EPS, EPS, iterations)
        following = -fn, base.flip(0), 0.5 * scale, norm_weight, NORM_EPS, EPS, iterations
        if written_and_read and room is kernels:  # for others it is the one after the other
            read = room.write_read(carried, y, post, comb, *following, nullcontext)
        else:
            read = room.pre(room.post(carried, y, post, comb), *following)
        return x, *read, room.post(read[3], 2 * y, read[1], read[2])

    return run


def head(room):
    return lambda streams, fn, base, scale, norm_weight: room.head(streams, fn, base, scale, norm_weight, NORM_EPS, EPS)


def check(operation, dtype, some=lambda outputs: outputs, **given):
    """Streams and y in dtype, all else float32; the reference has the same numbers in float64."""
    given = {name: x.to(dtype) if name in ("streams", "y") else x for name, x in given.items()}
    with poisoned():
        found = evaluate(lambda **leaves: some(operation(kernels)(**leaves)), **given)
    wide = {name: x.double() for name, x in given.items()}
    wanted = evaluate(lambda **leaves: some(operation(reference)(**leaves)), **wide)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        if name.startswith("gradient"):
            assert found[name].dtype == given[name.removeprefix("gradient of ")].dtype
        if value.numel() and value.abs().max() > 0:
            assert_near(found[name], value, dtype, ROUNDINGS)
        else:
            assert not found[name].any()


@pytest.mark.parametrize(("sizes", "dtype"), CASES)
def test_two_sublayers(sizes, dtype):
    given = inputs(*sizes)
    check(two_sublayers, dtype, y=torch.randn_like(given["streams"][:, :, 0]), **given)


@pytest.mark.parametrize(("sizes", "dtype"), CASES)
def test_the_head(sizes, dtype):
    check(head, dtype, **inputs(*sizes, rows=sizes[2], scales=1))


@pytest.mark.parametrize("parts", [(0,), (1,), (2,), (3,), (0, 3)])
def test_each_output_alone_carries_its_gradient(parts):
    given = inputs(2, 5, 4, 6)

    def read(room):
        return lambda streams, fn, base, scale, norm_weight: room.pre(
            streams, fn, base, scale, norm_weight, NORM_EPS, EPS, 3
        )

    check(read, torch.float32, some=lambda outputs: [outputs[part] for part in parts], **given)


@pytest.mark.parametrize(
    ("shape", "iterations"),
    [((5, 4, 4), 1), ((5, 4, 4), 20), ((2, 9, 3, 3), 2), ((0, 2, 2), 2), ((3, 8, 8), 3), ((1, 1, 1), 1)],
)
def test_sinkhorn(shape, iterations):
    logits = 3 * torch.randn(shape, device=DEVICE)
    with poisoned():
        found = evaluate(lambda logits: kernels.sinkhorn(logits, EPS, iterations), logits=logits)
    wanted = evaluate(lambda logits: reference.sinkhorn(logits, EPS, iterations), logits=logits.double())
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        if value.numel():
            # A matrix of one is its own projection but for eps: its gradient is what rounding leaves of nothing.
            torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@pytest.mark.parametrize("logit", [-200.0, -20.0, 0.0, 80.0])
def test_gates_at_the_ends_of_the_exponential(logit):
    given = inputs(1, 2, 4, 3) | {"base": torch.full((24,), logit, device=DEVICE), "fn": torch.zeros(24, 12).to(DEVICE)}
    for found, wanted in zip(
        kernels.pre(*given.values(), NORM_EPS, EPS, 3), reference.pre(*given.values(), NORM_EPS, EPS, 3), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_is_read_is_rounded_to_the_dtype_of_the_streams():
    """Before its norm, which would make anything of nothing."""
    given = inputs(1, 2, 1, 3) | {"streams": torch.full((1, 2, 1, 3), 2.0**-24, device=DEVICE).half()}
    given |= {"fn": torch.zeros(3, 3, device=DEVICE), "base": torch.full((3,), -1.0, device=DEVICE)}
    assert not kernels.pre(*given.values(), 1e-20, EPS, 1)[0].any()
    assert kernels.pre(*(given | {"base": 0 * given["base"] + 1}).values(), 1e-20, EPS, 1)[0].all()


def test_tokens_of_very_different_sizes():
    given = inputs(1, 6, 4, 9)
    given["streams"] *= torch.logspace(-4, 4, 6, device=DEVICE)[:, None, None]
    found = kernels.pre(*given.values(), NORM_EPS, EPS, 3)
    wanted = reference.pre(*(x.double() for x in given.values()), NORM_EPS, EPS, 3)
    for one, other in zip(found, wanted, strict=True):
        for t in range(6):
            assert_near(one[:, t], other[:, t], torch.float32, ROUNDINGS)


def test_non_contiguous_input():
    given = inputs(2, 3, 2, 7) | {"y": torch.randn(7, 3, 2, device=DEVICE).transpose(0, 2)}
    given["streams"] = torch.randn(3, 2, 2, 7, device=DEVICE).transpose(0, 1)
    check(sublayer, torch.float32, **given)
    given["streams"] = torch.randn(2, 3, 1, 7, device=DEVICE).expand(2, 3, 2, 7)
    check(sublayer, torch.float32, **given)


@pytest.mark.parametrize("name", triton_parts.CONFIGS)
def test_every_config(name, monkeypatch):
    use(triton_parts.CONFIGS[name], monkeypatch)
    given = inputs(1, 5, 4, 40)
    check(sublayer, dtype_of(name), y=torch.randn_like(given["streams"][:, :, 0]), **given)


def test_weights_are_not_rounded_to_the_dtype_of_the_streams():
    given = inputs(1, 5, 4, 40)
    given["streams"] = given["streams"].to(DTYPES[-1])
    _, *found, _ = kernels.pre(*given.values(), NORM_EPS, EPS, 3)
    _, *wanted, _ = reference.pre(*(x.double() for x in given.values()), NORM_EPS, EPS, 3)
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=3e-6, atol=3e-6)


def test_a_token_is_the_same_alone(monkeypatch):
    """Of three parts two orders of adding are two sums."""
    if IS_INTERPRETED:
        use(triton_parts.Tiles(**FEW, parts=3), monkeypatch)
    given = inputs(1, 18, 2, 70)
    given |= {"scale": 8 * torch.ones(3, device=DEVICE), "base": 0 * given["base"]}  # small gates show a mix's last bit
    y = torch.randn_like(given["streams"][:, :, 0])
    cotangents = [torch.randn(1, 18, *size, device=DEVICE) for size in ((70,), (2,), (2, 2), (2, 70))]

    def all_of(tokens):
        leaves = [x[:, tokens].clone().requires_grad_() for x in (given["streams"], y)]
        outputs = sublayer(kernels)(*leaves, *list(given.values())[1:])
        grads = torch.autograd.grad(outputs, leaves, [x[:, tokens] for x in cotangents])
        return *(x.detach() for x in outputs), *grads

    whole = all_of(slice(None))
    for tokens in (slice(17, 18), slice(9, 18)):
        for all_tokens, some in zip(whole, all_of(tokens), strict=True):
            assert torch.equal(all_tokens[:, tokens], some)


def test_what_the_kernels_do_not_take_goes_to_the_portable_path(monkeypatch):
    for name in ("_Pre", "_Post", "_Sinkhorn"):
        monkeypatch.setattr(getattr(kernels, name), "apply", lambda *_: pytest.fail("a kernel ran"))
    for given in ({k: v.double() for k, v in inputs(1, 3, 4, 5).items()}, inputs(1, 3, 9, 5)):
        given = {name: x.cpu() for name, x in given.items()}
        y = torch.randn(1, 3, 5).to(given["streams"].dtype)
        found, wanted = sublayer(kernels)(y=y, **given), sublayer(portable)(y=y, **given)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    logits = torch.randn(2, 9, 9)
    assert torch.equal(kernels.sinkhorn(logits, EPS, 2), portable.sinkhorn(logits, EPS, 2))


# Writing and reading at once


@pytest.mark.parametrize("name", ["deep", "float32"])
def test_writing_and_reading_has_the_bits_of_one_after_the_other(name, monkeypatch):
    """In equal steps; channels of one step of a part, of several, and of parts that are not full."""
    use(triton_parts.CONFIGS[name], monkeypatch)
    dtype = dtype_of(name)
    for sizes in ((1, 35, 2, 5), (2, 1, 1, 600)):
        given = inputs(*sizes)
        streams, y = given.pop("streams").to(dtype), torch.randn(sizes[0], sizes[1], sizes[3], device=DEVICE)
        _, post, comb, carried = kernels.pre(streams, *given.values(), NORM_EPS, EPS, 2)
        given = carried, y.to(dtype), post, comb, *given.values()
        with poisoned():
            found = kernels.write_read(*given, NORM_EPS, EPS, 2, nullcontext)
        written = kernels.post(*given[:4])
        for mine, other in zip(found, kernels.pre(written, *given[4:], NORM_EPS, EPS, 2), strict=True):
            assert torch.equal(mine, other)


def test_what_is_written_has_the_same_bits_in_other_steps(monkeypatch):
    use(triton_parts.CONFIGS["wide"], monkeypatch)
    given = inputs(1, 3, 3, 150)
    streams, y = given.pop("streams").to(DTYPES[-1]), torch.randn(1, 3, 150, device=DEVICE).to(DTYPES[-1])
    _, post, comb, carried = kernels.pre(streams, *given.values(), NORM_EPS, EPS, 2)
    found = kernels.write_read(carried, y, post, comb, *given.values(), NORM_EPS, EPS, 2, nullcontext)
    assert torch.equal(found[3], kernels.post(carried, y, post, comb))


def test_gradients_of_writing_and_reading_have_the_bits_of_one_after_the_other():
    """All but the kernel that does both run twice, so that two runs give the same bits."""
    given = inputs(1, 3, 3, 20)
    given["y"] = torch.randn_like(given["streams"][:, :, 0])
    found = evaluate(two_sublayers(kernels), **given)
    wanted = evaluate(two_sublayers(kernels, written_and_read=False), **given)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_strided_inputs_are_written_and_read():
    given = inputs(2, 3, 2, 7) | {"y": torch.randn(7, 3, 2, device=DEVICE).transpose(0, 2)}
    given["streams"] = torch.randn(3, 2, 2, 7, device=DEVICE).transpose(0, 1)
    check(two_sublayers, torch.float32, **given)


def test_what_is_not_served_is_written_and_read_by_portable(monkeypatch):
    for name in ("_Pre", "_Post", "_PostAhead"):
        monkeypatch.setattr(getattr(kernels, name), "apply", lambda *_: pytest.fail("a kernel ran"))
    given = {name: x.double().cpu() for name, x in inputs(1, 3, 4, 5).items()}
    y = torch.randn(1, 3, 5).double()
    found, wanted = two_sublayers(kernels)(y=y, **given), two_sublayers(portable)(y=y, **given)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
