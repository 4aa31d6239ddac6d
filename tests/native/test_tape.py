"""A played run gives what a run gives: kernels, torch's own operations, views and changes in place."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dsv4 import native
from dsv4.native.tape import Player, Tape
from dsv4.ops.linear import linear
from dsv4.ops.lookup import lookup
from dsv4.ops.rmsnorm import rmsnorm

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")

WEIGHT, TABLE, NORM = torch.randn(7, 5), torch.randn(9, 5), torch.rand(5)


def layer(_, ids, x):
    """Kernels with torch between them: a view, a new tensor, a change in place, a cast."""
    rows = lookup(TABLE, ids, backend="native")
    rows = rmsnorm(rows + x, NORM, 1e-6, backend="native")
    rows.view(-1)[:3].mul_(2.0)
    y = linear(rows, WEIGHT, backend="native")
    return y.bfloat16().T, rows


@torch.inference_mode()
def test_played_is_run_again():
    player = Player(layer, 4)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        ids, x = torch.randint(9, (3,), generator=g, dtype=torch.int32), torch.randn(3, 5, generator=g)
        got, wanted = player("key", ids, x), layer(None, ids, x)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)
    (tape, _, _) = player._kept["key"]
    assert tape.unplayable is None
    assert len(tape._calls) == 6


@torch.inference_mode()
def test_a_key_is_a_tape_and_the_oldest_goes():
    runs = []

    def function(key, x):
        runs.append(key)
        return (x * key,)

    player = Player(function, 2)
    for key in (2, 3, 2, 5, 2, 3):  # 5 drops 3, which then is recorded again
        assert torch.equal(player(key, torch.ones(4))[0], torch.full((4,), float(key)))
    assert runs == [2, 3, 5, 3]


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: (x * x.sum().item(),),
        lambda _, x: (x[x > 0],),
        lambda _, x: (x.nonzero().float(),),
    ],
)
@torch.inference_mode()
def test_what_depends_on_values_is_run_not_played(function):
    player = Player(function, 2)
    for x in (torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0]), torch.tensor([-1.0, -1.0])):
        assert torch.equal(player("key", x)[0], function("key", x)[0])


def test_recorded_only_while_entered():
    x = torch.ones(2, 5)
    with Tape() as tape:
        rmsnorm(x, NORM, 1e-6, backend="native")
    assert len(tape._calls) == 1
    rmsnorm(x, NORM, 1e-6, backend="native")
    assert len(tape._calls) == 1
    assert not native.recorders.now


def test_another_threads_kernels_are_not_recorded():
    x = torch.ones(2, 5)
    with Tape() as tape, ThreadPoolExecutor(1) as other:
        other.submit(rmsnorm, x, NORM, 1e-6, backend="native").result()
        rmsnorm(x, NORM, 1e-6, backend="native")
    assert len(tape._calls) == 1


@pytest.mark.parametrize(
    ("waits", "work"),
    [
        (False, lambda x: x[torch.tensor([2, 0])]),
        (True, lambda x: x[x > 0]),
        (True, lambda x: x.sum().item()),
        (True, lambda x: x * 2 if bool(x.any()) else x),
        (True, lambda x: x.nonzero()),
        (True, lambda x: (x > 0).to(torch.int64).bincount()),
        (True, lambda x: x.to("meta")),  # stands for another device: to copy there or back waits for it
        (False, lambda x: x.to(torch.promote_types(x.dtype, torch.float64))),
    ],
)
def test_what_hangs_on_a_number_or_waits_for_a_device_is_seen(waits, work):
    with Tape() as tape:
        work(torch.tensor([1.0, -2.0, 3.0]))
    assert (tape.unplayable is not None) == waits
