"""The kernels of compression into pages: against the contiguous operations, every format, every cut, tails."""

import pytest
import torch

from dsv4.ops.compress import paged_triton
from dsv4.ops.compress.paged import compress_paged_
from dsv4.ops.places import Closing, Places
from tests.ops.compress import test_paged as shared
from tests.ops.compress.test_paged import EPS, FORMATS, POISON, Engine, code_step, in_parts
from tests.ops.triton_lane import DEVICE

# ratio, overlapped, entry width, rotary dims: fewer entries than the model's ratio of 4 has, which is in some tests
KINDS = [(32, True, 64, 16), (128, False, 48, 6), (64, True, 5, 4), (16, False, 37, 36)]
CSA = (4, True, 64, 16)
LENGTHS = {0: 135, 3: 7, 2: 21}
WHOLE = [[(3, 0, 7), (0, 0, 135), (2, 0, 21)]]


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch):
    monkeypatch.setattr(shared, "LENGTHS", LENGTHS)


class OnDevice(Engine):
    """The engine where kernels run."""

    def __init__(self, *args, backend="unproved", **given):
        super().__init__(*args, backend=backend, **given)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(DEVICE))
        self.tokens = {slot: x.to(DEVICE) for slot, x in self.tokens.items()}

    def places(self, step):
        slot, position, first, table, closing = super().places(step)
        closing = {ratio: Closing(*(x.to(DEVICE) for x in c)) for ratio, c in closing.items()}
        return Places(*(x.to(DEVICE) for x in (slot, position, first, table)), closing)


def cuts():
    return {
        "whole again": WHOLE,
        "side by side": in_parts([3, 2, 0], [5, 1, 1, 64, 2]),
        "one after the other": [*in_parts([2], [7]), *in_parts([3], [2]), *in_parts([0], [13, 1, 121])],
    }


def assert_entries(engine, tolerance):
    for slot, length in LENGTHS.items():
        got, rest = engine.rows(slot).tensor_split([length // engine.ratio])
        found, wanted = engine.values(got), engine.values(engine.wanted(slot))
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        if engine.dtype != torch.float32 and len(got):  # sums in another order seldom tip a rounding
            assert (found == wanted).float().mean() > 0.95
        assert (rest == POISON).all()


@pytest.mark.parametrize(
    ("kind", "is_index"), [(CSA, False), *((kind, is_index) for kind in KINDS for is_index in (False, True))]
)
def test_entries_are_those_of_the_contiguous_operations(kind, is_index):
    assert_entries(OnDevice(kind, "float32", is_index=is_index).run(*WHOLE), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_index", [False, True])
@pytest.mark.parametrize("row_format", FORMATS)
def test_an_entry_is_rounded_when_pooled_normalised_rotated_and_stored(kind, is_index, row_format):
    engine = OnDevice(kind, row_format, is_index=is_index, dtype=torch.bfloat16).run(*WHOLE)
    assert_entries(engine, code_step(row_format, is_index))


@pytest.mark.parametrize(
    ("kind", "is_index", "dtype"),
    [
        ((64, True, 64, 16), False, torch.bfloat16),
        ((64, True, 64, 16), True, torch.bfloat16),
        ((128, False, 96, 16), False, torch.float16),
        ((64, True, 128, 20), True, torch.float32),
        ((64, True, 128, 20), False, torch.float32),
        ((64, False, 32, 32), False, torch.bfloat16),
        ((64, False, 32, 32), True, torch.float16),
    ],
)
def test_entries_are_rounded_as_released(kind, is_index, dtype):
    """In every format the same values, on the grid of their codes."""
    given = {"is_index": is_index, "dtype": dtype, "rounds": True}
    engines = {row_format: OnDevice(kind, row_format, **given).run(*WHOLE) for row_format in FORMATS}
    assert_entries(engines["float32"], 0.5 if is_index else 2**-3)
    plain = OnDevice(kind, "float32", **given | {"rounds": False}).run(*WHOLE)
    values = {name: e.values(e.rows(0)[: 135 // kind[0]]) for name, e in engines.items()}
    if dtype == torch.bfloat16:
        assert torch.equal(values["float32"], values["bfloat16"])
        assert torch.equal(values["float32"], values["packed"])
        assert torch.equal(values["float32"], values["packed-fp8"])
    changed = (values["float32"] != plain.values(plain.rows(0)[: 135 // kind[0]])).float().mean()
    assert (changed > 0.3) == (is_index or kind[2] > kind[3])


@pytest.mark.parametrize("kind", [CSA, KINDS[1], KINDS[2]])
def test_every_cut_gives_the_same_bytes_and_tails(kind):
    row_format = "packed"
    whole = OnDevice(kind, row_format, dtype=torch.bfloat16).run(*WHOLE)
    for steps in cuts().values():
        engine = OnDevice(kind, row_format, dtype=torch.bfloat16).run(*steps)
        assert torch.equal(engine.pages, whole.pages)
        for part, tail in enumerate((engine.tail_kv, engine.tail_gate)):
            wanted = torch.full_like(tail, torch.nan)
            for slot, length in LENGTHS.items():
                last = torch.arange(max(0, length - tail.shape[1]), length, device=DEVICE)
                wanted[slot, last % tail.shape[1]] = engine.tokens[slot][part, last]
            assert torch.equal(tail.view(torch.int32), wanted.view(torch.int32))


def test_chunks_of_any_size_give_the_same_entries(monkeypatch):
    kind = (64, True, 6, 2)
    wanted = OnDevice(kind, "float32").run(*WHOLE)
    monkeypatch.setattr(paged_triton, "ELEMENTS", 8 * 16)
    found = OnDevice(kind, "float32").run(*WHOLE)
    torch.testing.assert_close(found.values(found.rows(0)[:2]), wanted.values(wanted.rows(0)[:2]))


def test_the_first_block_takes_nothing_from_a_tail_that_another_sequence_left():
    engine, fresh = (OnDevice(CSA, "float32") for _ in range(2))
    engine.tail_kv.fill_(100.0)
    engine.tail_gate.fill_(100.0)
    for each in (engine, fresh):
        each.run([(0, 0, 3)], [(0, 3, 1)], [(0, 4, 4)])
    assert torch.equal(engine.pages, fresh.pages)


def test_gates_far_apart_and_far_from_zero():
    engine = OnDevice(KINDS[0], "float32")
    for tokens in engine.tokens.values():
        tokens[1] = tokens[1] * 1e3 + 1e4
    assert_entries(engine.run(*WHOLE), 1e-5)


def test_strided_inputs_and_a_weight_in_bfloat16():
    engine, cut = (OnDevice(CSA, "float32", dtype=torch.bfloat16) for _ in range(2))
    cut.tokens = {slot: x.mT.contiguous().mT for slot, x in cut.tokens.items()}
    cut.weight = torch.stack([cut.weight, cut.weight], 1)[:, 0]
    cut.bias = cut.bias.T.contiguous().T
    engine.run([(0, 0, 20)])
    cut.run([(0, 0, 20)])
    assert torch.equal(engine.pages, cut.pages)


def test_a_step_that_completes_no_block_and_one_without_tokens():
    engine = OnDevice(KINDS[1], "float32").run([(0, 0, 127), (2, 0, 5)])
    assert (engine.pages == POISON).all()
    assert torch.equal(engine.tail_kv[2, :5], engine.tokens[2][0, :5])
    before = engine.tail_kv.clone()
    nothing = torch.zeros(0, 48, device=DEVICE)
    compress_paged_(
        nothing, nothing, engine.bias, engine.weight, *torch.zeros(2, 0, 3, device=DEVICE), engine.tail_kv,
        engine.tail_gate, engine.pages, engine.places([]), overlap=False, eps=EPS, row_format="float32", is_index=False,
        dtype=torch.float32, backend="unproved",
    )  # fmt: skip
    assert torch.equal(engine.tail_kv.view(torch.int32), before.view(torch.int32))
    assert (engine.pages == POISON).all()


def test_tokens_that_later_ones_replace_are_not_stored():
    """They would be in a race with those: none of the first tokens writes, where only these run."""
    engine, length, kept = OnDevice(KINDS[2], "float32"), 9, 4
    slot, position, first, *_ = engine.places([(3, 0, 5), (0, 7, length)])
    kv = torch.randn(5 + length, 10, device=DEVICE)
    tail = torch.full((5, kept, 10), torch.nan, device=DEVICE)
    for programs, written in ((1, 0), (5, 4), (5 + length - kept, 4), (5 + length, 8)):
        paged_triton._tail_kernel[(programs, 1)](
            kv, kv, tail, tail.clone(), slot, position, first, len(kv), 10, kept, BLOCK=16
        )
        assert (~tail.isnan()).all(dim=-1).sum() == written
    assert torch.equal(tail[0, position[-kept:] % kept], kv[-kept:])


def test_a_row_that_is_in_shared_pages_already_is_not_written():
    """Blocks that close are those that the places name, whatever the tokens are."""
    engine = OnDevice(CSA, "float32")
    places = engine.places([(0, 0, 20)])
    few = {4: Closing(*(x[3:].contiguous() for x in places.closing[4]))}
    engine.places = lambda step: places._replace(closing=few)
    engine.run([(0, 0, 20)])
    rows = engine.rows(0)
    assert (rows[:3] == POISON).all()
    assert not (rows[3:5] == POISON).all(dim=-1).any()
