"""Paged attention in Triton kernels: the formula over lists of rows, and the same bits however steps and lists are cut.

Caches hold NaN wherever a step must not read; see ``test_paged.py``, whose worlds these are.
"""

import pytest
import torch

from dsv4.ops.attend import paged, paged_triton
from dsv4.ops.places import Places
from tests.ops.attend.test_paged import FORMATS, KINDS, POISON, World
from tests.ops.triton_lane import DEVICE, DTYPES, TOLERANCE, poisoned

LENGTHS = [9, 131, 300]
STEP = [(2, 299, 300), (0, 0, 1), (1, 126, 128)]  # a token, the first of a sequence, a chunk


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(paged_triton, "PIECE_KEYS", 32)  # two units of float32


def on_device(given):
    """Arguments as the kernels take them, in the order of their signature."""
    moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    moved["places"] = Places(*(x.to(DEVICE) for x in given["places"][:4]), {})
    names = ("q", "kv", "sink", "ring", "places", "pages", "picked", "window", "ratio", "row_format", "rotary_dims")
    return [*(moved[name] for name in names), moved["scale"]]


def run(given):
    with poisoned():
        return paged_triton.attend_paged(*on_device(given)).cpu()


def write(world, step, ring):
    kv = torch.cat([world.kv[n][begin:end] for n, begin, end in step]).to(DEVICE)
    places = Places(*(x.to(DEVICE) for x in world.places(step)[:4]), {})
    moved = ring.to(DEVICE)
    paged_triton.write_ring_(kv, moved, places, world.row_format, world.R)
    ring.copy_(moved)


def check(world, step, factor=1.0):
    got, (wanted, largest) = run(world.arguments(step)), world.wanted(step)
    dtype = world.q[0].dtype
    assert got.dtype == dtype
    assert (got.double() - wanted).abs().max() <= factor * TOLERANCE[dtype] * largest


# The formula


@pytest.mark.parametrize(
    ("row_format", "kind"),
    [*(("packed", kind) for kind in KINDS), *zip(["bfloat16", "float32"], KINDS[2:4], strict=True)],
)
def test_the_formula(row_format, kind):
    check(World(LENGTHS, row_format, torch.float32, kind), STEP)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize(
    ("row_format", "kind"),
    [("float32", (128, None)), ("bfloat16", (0, None)), ("packed", (4, 5)), ("packed-fp8", (0, None))],
)
def test_the_formula_in_16_bits(dtype, kind, row_format):
    check(World(LENGTHS, row_format, dtype, kind), STEP)


@pytest.mark.parametrize(
    ("row_format", "H", "K", "R", "window", "spare", "kind"),
    [
        ("packed", 1, 1, 0, 1, 0, (4, 3)),
        ("packed", 9, 64, 16, 16, 0, (4, 3)),
        ("packed", 4, 128, 64, 33, 2, (128, None)),
        ("packed", 17, 71, 6, 20, 5, (4, 3)),
        ("packed", 2, 330, 2, 9, 1, (0, None)),
        ("bfloat16", 17, 71, 6, 20, 5, (0, None)),
        ("bfloat16", 2, 330, 2, 9, 1, (0, None)),
        ("float32", 9, 64, 16, 16, 0, (128, None)),
        ("float32", 2, 330, 2, 9, 1, (0, None)),
    ],
)
def test_the_formula_in_other_shapes(row_format, H, K, R, window, spare, kind):
    """Scales at an eighth byte and not, rotary channels at an odd one, several blocks of channels and heads."""
    world = World([150, 5], row_format, torch.float32, kind, H=H, K=K, R=R, window=window, spare=spare)
    check(world, [(0, 149, 150), (1, 2, 3)])


@pytest.mark.parametrize("row_format", ["packed", "bfloat16"])
def test_blocks_of_128_channels(row_format):
    """Two scales in one, and one that is half coded and half stored."""
    check(World([70], row_format, DTYPES[-1], (4, 5), H=2, K=200, R=24), [(0, 68, 70)])


def test_more_groups_than_a_number_holds():
    """Nine scales, of which eight are read at once."""
    world = World([20], "packed", torch.float32, (4, None), H=1, K=64 * 9 + 8, R=8)
    check(world, [(0, 18, 20)])


def test_all_picks_and_none():
    world = World([300], "packed", torch.float32, (4, 40))
    given = world.arguments([(0, 297, 300)])
    given["picked"][0] = -1
    given["picked"][1] = torch.arange(34, 74)
    given["picked"][2] = torch.cat([torch.arange(39), torch.tensor([-1])])
    for i, entries in enumerate(([], range(34, 74), range(39))):
        world.picked[0][297 + i] = -1
        world.picked[0][297 + i, : len(entries)] = torch.tensor(list(entries), dtype=torch.int32)
    wanted, largest = world.wanted([(0, 297, 300)])
    assert (run(given).double() - wanted).abs().max() <= TOLERANCE[torch.float32] * largest


def test_scores_and_sinks_of_ten_thousand_stay_finite():
    world = World([40], "packed", torch.float32, (4, 5))
    given = world.arguments([(0, 39, 40)])
    assert run(given | {"q": 1e4 * given["q"]}).isfinite().all()
    assert run(given | {"sink": torch.full((3,), 1e4)}).count_nonzero() == 0
    alone = run(given | {"sink": torch.full((3,), -1e4)})
    assert alone.isfinite().all()
    torch.testing.assert_close(alone, run(given | {"sink": torch.full((3,), -torch.inf)}))


def test_a_row_gone_wrong_is_seen_by_those_that_see_it():
    world = World([40], "packed", torch.float32, (0, None))
    given = world.arguments([(0, 18, 32)])
    given["kv"][2, 3] = torch.nan
    is_nan = run(given).isnan()
    assert is_nan[2:11].all()  # a window of nine
    assert not is_nan[:2].any()
    assert not is_nan[11:].any()


def test_without_tokens():
    world = World([5], "packed", torch.float32, (4, 2))
    given = world.arguments([(0, 0, 5)])
    given |= {name: given[name][:0] for name in ("q", "kv", "picked")}
    given["places"] = Places(*(x[:0] for x in given["places"][:3]), world.table, {})
    assert run(given).shape == (0, 3, 21)
    ring = given["ring"].to(DEVICE)
    paged_triton.write_ring_(given["kv"], ring, given["places"], "packed", 5)
    assert ring.cpu().equal(given["ring"])


def test_strided_input():
    world = World([60], "packed", torch.float32, (4, 3))
    given = world.arguments([(0, 58, 60)])
    q, kv = (torch.stack([given[name]] * 2, dim=-1)[..., 0] for name in ("q", "kv"))
    assert run(given | {"q": q, "kv": kv}).equal(run(given))


def test_float64_is_refused():
    given = World([5], "float32", torch.float64, (0, None)).arguments([(0, 0, 5)])
    with pytest.raises(ValueError, match=r"q has dtype torch\.float64; expected float32, float16 or bfloat16"):
        run(given)


# The same bits


def in_steps(world, steps, ring):
    """Run steps one after the other on one ring. Returns each sequence's output."""
    done = {}
    for step in steps:
        parts = run(world.arguments(step, ring)).split([end - begin for _, begin, end in step])
        for (n, _, _), part in zip(step, parts, strict=True):
            done.setdefault(n, []).append(part)
        write(world, step, ring)
    return [torch.cat(done[n]) for n in sorted(done)]


@pytest.mark.parametrize(
    ("row_format", "kind", "dtype"),
    [("packed", (4, 3), torch.float32), ("bfloat16", (4, None), torch.float16), ("float32", (0, None), torch.float32)],
)
def test_the_same_bits_however_a_sequence_is_cut(row_format, kind, dtype):
    """Tokens 15 to 19 of a window of 18, in which the second unit of it begins, and the start of another sequence."""
    world = World([20, 4], row_format, dtype, kind, H=2, window=18)

    def found(*steps):
        return in_steps(world, steps, world.ring([(0, 15, 20)]))

    wanted = found([(0, 15, 20), (1, 0, 4)])
    for other in (
        [[(0, 15 + i, 16 + i)] for i in range(5)],  # token by token
        [[(1, 0, 2), (0, 15, 18)], [(0, 18, 20), (1, 2, 3)], [(1, 3, 4)]],
    ):
        assert all(got.equal(one) for got, one in zip(found(*other), wanted, strict=False))


@pytest.mark.parametrize(("kind", "length"), [((4, None), 400), ((4, 33), 200), ((0, None), 20)])
def test_the_same_bits_however_lists_are_cut(kind, length, monkeypatch):
    """Into units, of which a list has up to nine, or pieces, up to four; tokens in one launch or in several."""
    world = World([length, 30, 150], "packed", torch.float32, kind, H=2, window=18)
    step, outputs = [(1, 2, 3), (2, 149, 150), (0, length - 1, length)], []
    for busy, scratch in ((0, 1 << 28), (0, 1), (10**9, 1 << 28)):
        monkeypatch.setattr(paged_triton, "BUSY_PROGRAMS", busy)
        monkeypatch.setattr(paged_triton, "SCRATCH_BYTES", scratch)
        outputs.append(run(world.arguments(step)))
    wanted, largest = world.wanted(step)
    assert (outputs[0].double() - wanted).abs().max() <= TOLERANCE[torch.float32] * largest
    assert all(output.equal(outputs[0]) for output in outputs)
    assert run(world.arguments(step[1:])).equal(outputs[0][1:])


def test_tables_wider_than_a_sequence_change_no_bit():
    """What a program beyond the end of a token would read or leave is NaN."""
    world = World([140, 300], "packed", torch.float32, (4, None), H=2)
    step = [(0, 139, 140)]
    wanted = run(world.arguments(step))
    wide = torch.randint(0, 1 << 30, (len(world.table), 7), dtype=torch.int32)  # pages that there are not
    wide[:, :3] = world.table
    given = world.arguments(step)
    given["places"] = given["places"]._replace(table=wide)
    assert run(given).equal(wanted)


def test_nothing_waits_for_the_device(monkeypatch):
    world = World(LENGTHS, "packed", torch.float32, (4, 5))
    given = on_device(world.arguments(STEP))

    def refuse(*_):
        raise AssertionError("the host looked at a tensor")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    paged_triton.attend_paged(*given)
    paged_triton.write_ring_(given[1], given[3], given[4], "packed", 5)


def test_the_door_takes_the_kernels():
    world = World([30], "packed", torch.float32, (4, 3))
    given = world.arguments([(0, 28, 30)])
    moved = on_device(given)
    names = ("q", "kv", "sink", "ring", "places", "pages", "picked", "window", "ratio", "row_format", "rotary_dims")
    found = paged.attend_paged(**dict(zip(names, moved, strict=False)), scale=given["scale"], backend="unproved")
    assert found.cpu().equal(run(given))
    rings = [given["ring"].to(DEVICE, copy=True) for _ in range(2)]
    for ring, backend in zip(rings, ("portable", "unproved"), strict=True):
        paged.write_ring_(moved[1], ring, moved[4], row_format="packed", rotary_dims=5, backend=backend)
    assert rings[0].equal(rings[1])
    assert not rings[0].cpu().equal(given["ring"])


# Rings


@pytest.mark.parametrize(("K", "R"), [(21, 5), (64, 16), (71, 6)])
@pytest.mark.parametrize("row_format", FORMATS)
def test_a_ring_keeps_the_last_tokens_of_each_sequence(row_format, K, R):
    for dtype in (torch.float32, torch.bfloat16):
        world = World([9, 131, 300], row_format, dtype, (0, None), K=K, R=R)  # rings of 12
        ring = torch.full_like(world.ring([]), POISON)
        wanted = ring.clone()
        for n, begin, end in ((1, 119, 131), (0, 3, 9), (2, 7, 19)):
            for position in range(begin, end):
                wanted[world.slots[n], position % 12] = world.pack(world.kv[n][position])
        write(world, [(1, 100, 131), (0, 3, 9), (2, 7, 19)], ring)
        assert ring.equal(wanted)


def test_of_what_a_ring_cannot_hold_nothing_is_written():
    """Programs run in any order. Here the first tokens would go where the last ones, if they stood so, do not."""
    world = World([20], "packed", torch.float32, (0, None))  # a ring of 12
    ring = torch.full_like(world.ring([]), POISON)
    places = world.places([(0, 0, 20)])
    places.position[:8] = 2 * torch.arange(8) + 1
    places.position[8:] = 2 * torch.arange(12)
    places = places._replace(first=torch.zeros(40, dtype=torch.int32)[:20])  # whose end is that of the step
    moved = ring.to(DEVICE, copy=True)
    paged_triton.write_ring_(
        world.kv[0].to(DEVICE), moved, Places(*(x.to(DEVICE) for x in places[:4]), {}), "packed", 5
    )
    assert moved[:, 1::2].cpu().equal(ring[:, 1::2])
    assert not moved[:, ::2].cpu().equal(ring[:, ::2])
