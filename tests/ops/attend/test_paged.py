"""Paged attention: the formula over plain lists of rows, caches whose unused bytes are NaN, and the same bits however
a sequence is cut into steps."""

import itertools

import pytest
import torch

from dsv4 import native
from dsv4.ops import rows
from dsv4.ops.attend.paged import attend_paged, write_ring_
from dsv4.ops.places import Places

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler here")
BACKENDS = ["reference", "portable", pytest.param("native", marks=needs_compiler)]
FORMATS = ["float32", "bfloat16", "packed"]
DTYPES = [torch.float32, torch.bfloat16]
KINDS = [(0, None), (4, None), (4, 5), (128, None), (128, 2)]  # ratio, and picks of a query
SCALE = 0.4
POISON = 255  # as float32, bfloat16, E4M3 and E8M0 it is NaN


class World:
    """Sequences of random tokens: all that is ever in their caches, and caches that hold it.

    Slots and pages are given out at random; there are more of them than are used.
    """

    def __init__(self, lengths, row_format, dtype, kind, *, H=3, K=21, R=5, window=9, spare=3):
        self.ratio, self.num_picks = kind
        self.row_format, self.R, self.window, self.spare = row_format, R, window, spare
        self.q = [torch.randn(n, H, K).to(dtype) for n in lengths]
        self.kv = [torch.randn(n, K).to(dtype) for n in lengths]
        self.sink = torch.randn(H)
        self.slots = torch.randperm(len(lengths) + 2)[: len(lengths)].tolist()
        num_pages = max(lengths) // 128 + 1
        self.table = torch.randperm((len(lengths) + 2) * num_pages).int().view(-1, num_pages)
        self.entries = [torch.randn(n // self.ratio, K).to(dtype) for n in lengths] if self.ratio else None
        self.picked = None
        if self.num_picks:
            self.picked = [self._picks(n) for n in lengths]

    def _picks(self, length):
        picked = torch.full((length, self.num_picks), -1, dtype=torch.int32)
        for position in range(length):
            num_seen = (position + 1) // self.ratio
            some = torch.randperm(num_seen)[: min(self.num_picks, int(torch.randint(0, num_seen + 1, ())) + 1)]
            picked[position, : len(some)] = some.sort().values.int()
        return picked

    def places(self, step):
        """step: (sequence, begin, end) of each sequence that takes part."""
        slot = [self.slots[n] for n, begin, end in step for _ in range(begin, end)]
        position = [p for _, begin, end in step for p in range(begin, end)]
        first = [f for f, (_, begin, end) in zip(self._firsts(step), step, strict=True) for _ in range(begin, end)]
        return Places(*(torch.tensor(x, dtype=torch.int32) for x in (slot, position, first)), self.table, {})

    @staticmethod
    def _firsts(step):
        return itertools.accumulate([end - begin for _, begin, end in step[:-1]], initial=0)

    def pack(self, x):
        return rows.pack(x, row_format=self.row_format, rotary_dims=self.R)

    def as_stored(self, x):
        """x as the cache keeps it, in float64."""
        how = {"row_format": self.row_format, "channels": x.shape[-1], "rotary_dims": self.R}
        return rows.unpack(self.pack(x), **how, dtype=x.dtype).double()

    def ring(self, step):
        """Rings that hold what the window of the next tokens needs and NaN elsewhere."""
        num_slots, width = len(self.table), self.pack(self.kv[0]).shape[-1]
        ring = torch.full((num_slots, self.window + self.spare, width), POISON, dtype=torch.uint8)
        for n, begin, _ in step:
            older = torch.arange(max(0, begin - self.window + 1), begin)
            ring[self.slots[n], older % ring.shape[1]] = self.pack(self.kv[n][older])
        return ring

    def pages(self, step):
        """Pages with the entries that these tokens see and NaN elsewhere."""
        if not self.ratio:
            return None
        each = 128 // self.ratio
        pages = torch.full((self.table.numel(), each, self.pack(self.kv[0]).shape[-1]), POISON, dtype=torch.uint8)
        for n, _, end in step:
            entry = torch.arange(end // self.ratio)
            page = self.table[self.slots[n]].long()[entry // each]
            pages[page, entry % each] = self.pack(self.entries[n][entry])
        return pages

    def arguments(self, step, ring=None):
        kwargs = {"window": self.window, "ratio": self.ratio, "row_format": self.row_format, "rotary_dims": self.R}
        picked = None if self.picked is None else torch.cat([self.picked[n][begin:end] for n, begin, end in step])
        return {
            "q": torch.cat([self.q[n][begin:end] for n, begin, end in step]),
            "kv": torch.cat([self.kv[n][begin:end] for n, begin, end in step]),
            "sink": self.sink,
            "ring": self.ring(step) if ring is None else ring,
            "places": self.places(step),
            "pages": self.pages(step),
            "picked": picked,
            "scale": SCALE,
            **kwargs,
        }

    def run(self, step, backend, ring=None):
        return attend_paged(**self.arguments(step, ring), backend=backend)

    def write(self, step, ring, backend):
        kv = torch.cat([self.kv[n][begin:end] for n, begin, end in step])
        write_ring_(kv, ring, self.places(step), row_format=self.row_format, rotary_dims=self.R, backend=backend)

    def seen(self, n, position):
        """The rows that a token sees, in float64: [rows, K]."""
        raw = self.as_stored(self.kv[n][max(0, position - self.window + 1) : position + 1])
        if not self.ratio:
            return raw
        num_seen = (position + 1) // self.ratio
        entry = (
            list(range(num_seen)) if self.picked is None else [e for e in self.picked[n][position].tolist() if e >= 0]
        )
        return torch.cat([raw, self.as_stored(self.entries[n][:num_seen])[entry]])

    def wanted(self, step):
        """The formula of ``dsv4.ops.attend``, one token after the other in float64; and the largest value seen."""
        out, largest = [], 0.0
        for n, begin, end in step:
            for position in range(begin, end):
                seen = self.seen(n, position)
                weights = (SCALE * self.q[n][position].double() @ seen.T).exp()  # [H, rows]
                out.append(weights @ seen / (weights.sum(dim=-1) + self.sink.double().exp())[:, None])
                largest = max(largest, seen.abs().max().item())
        return torch.stack(out), largest


STEPS = [
    [(0, 0, 1)],  # the first token of a sequence: no entries yet, an empty ring
    [(2, 299, 300), (0, 3, 4), (1, 130, 131)],  # one token each
    [(1, 0, 131)],  # a whole prompt
    [(1, 7, 30), (0, 8, 9), (2, 120, 140), (3, 12, 13)],  # chunks and tokens together
]
LENGTHS = [9, 131, 300, 14]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_format", FORMATS)
def test_the_formula(backend, dtype, kind, row_format):
    world = World(LENGTHS, row_format, dtype, kind)
    for step in STEPS:
        got, (wanted, largest) = world.run(step, backend), world.wanted(step)
        assert got.dtype == dtype
        # A score is a sum of 21 products no larger than 60 together, so it is off by 21 x 2^-24 x 60 < 1e-4 at most,
        # its weight by as much relatively, and the mean of values by twice that of the largest.
        allowed = 2e-4 * largest
        if dtype == torch.bfloat16:
            # The output is rounded to 8 bits; the portable path also rounds weights and partial sums.
            allowed += (2**-8 if backend != "portable" else 3 * 2**-8) * largest
        assert (got.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("H", "K", "R", "window", "spare"),
    [(1, 1, 0, 1, 0), (1, 1, 1, 2, 1), (9, 64, 16, 16, 0), (4, 128, 64, 33, 2), (17, 70, 6, 140, 5), (8, 130, 0, 9, 1)],
)
@pytest.mark.parametrize("row_format", FORMATS)
def test_the_formula_in_other_shapes(backend, H, K, R, window, spare, row_format):
    """Whole and broken vectors of channels, rows read in place and copied, heads beyond a tile, windows beyond all."""
    for dtype, kind in itertools.product(DTYPES, [(4, 3), (128, None)]):
        world = World([150, 5], row_format, dtype, kind, H=H, K=K, R=R, window=window, spare=spare)
        step = [(0, 140, 150), (1, 2, 5)]
        got, (wanted, largest) = world.run(step, backend), world.wanted(step)
        allowed = 2e-3 * largest + (3 * 2**-8 * largest if dtype == torch.bfloat16 else 0)
        assert (got.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_tokens(backend):
    world = World([5], "packed", torch.bfloat16, (4, 2))
    given = world.arguments([(0, 0, 5)])
    given |= {name: given[name][:0] for name in ("q", "kv", "picked")}
    given["places"] = Places(*(x[:0] for x in given["places"][:3]), world.table, {})
    assert attend_paged(**given, backend=backend).shape == (0, 3, 21)
    ring = given["ring"].clone()
    write_ring_(given["kv"], ring, given["places"], row_format="packed", rotary_dims=5, backend=backend)
    assert ring.equal(given["ring"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_sinks_of_ten_thousand_stay_finite(backend, dtype):
    world = World([40], "packed", dtype, (4, 5))
    given = world.arguments([(0, 20, 40)])
    assert attend_paged(**given | {"q": 1e4 * given["q"]}, backend=backend).isfinite().all()
    none = attend_paged(**given | {"sink": torch.full((3,), 1e4)}, backend=backend)
    assert none.count_nonzero() == 0
    alone = attend_paged(**given | {"sink": torch.full((3,), -1e4)}, backend=backend)
    without = attend_paged(**given | {"sink": torch.full((3,), -torch.inf)}, backend=backend)
    assert alone.isfinite().all()
    torch.testing.assert_close(alone, without)


@pytest.mark.parametrize("backend", BACKENDS)
def test_later_tokens_do_not_reach_earlier_ones(backend):
    world = World([60], "bfloat16", torch.float32, (4, None))
    given = world.arguments([(0, 10, 60)])
    before = attend_paged(**given, backend=backend)
    given["kv"][30:] += 3
    after = attend_paged(**given, backend=backend)
    assert after[:30].equal(before[:30])
    assert (after[30:] != before[30:]).any(dim=-1).all()


@needs_compiler
def test_strided_input():
    world = World([60], "packed", torch.float32, (4, 3))
    given = world.arguments([(0, 10, 60)])
    q, kv = (torch.stack([given[name]] * 2, dim=-1)[..., 0] for name in ("q", "kv"))
    strided = attend_paged(**given | {"q": q, "kv": kv}, backend="native")
    assert strided.equal(attend_paged(**given, backend="native"))


# The same bits


def chunks(length, *cuts):
    return list(itertools.pairwise([0, *cuts, length]))


def in_steps(world, steps):
    """Run steps one after the other on one ring. Returns each sequence's output."""
    ring, done = torch.full_like(world.ring([]), POISON), {}
    for step in steps:
        parts = world.run(step, "native", ring).split([end - begin for _, begin, end in step])
        for (n, _, _), part in zip(step, parts, strict=True):
            done.setdefault(n, []).append(part)
        world.write(step, ring, "native")
    return [torch.cat(done[n]) for n in sorted(done)]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_format", FORMATS)
def test_the_same_bits_however_a_sequence_is_cut(dtype, kind, row_format):
    sizes = {"H": 9, "K": 64, "R": 16} if row_format != "float32" else {}
    world = World([150, 40], row_format, dtype, kind, **sizes)
    wanted = [in_steps(world, [[(n, 0, length)]])[0] for n, length in enumerate([150, 40])]
    singly = in_steps(world, [[(0, p, p + 1)] for p in range(150)])[0]
    assert singly.equal(wanted[0])
    for cuts in ([1], [127, 128, 129], [4, 13, 60, 149]):
        assert in_steps(world, [[(0, *chunk)] for chunk in chunks(150, *cuts)])[0].equal(wanted[0])
    together = [[(1, 0, 30), (0, 0, 60)], [(0, 60, 149), (1, 30, 31)], [(0, 149, 150), (1, 31, 40)]]
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert all(got.equal(one) for got, one in zip(in_steps(world, together), wanted, strict=True))
        assert in_steps(world, [[(0, p, min(150, p + 8))] for p in range(0, 150, 8)])[0].equal(wanted[0])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0, 4])
@pytest.mark.parametrize("row_format", FORMATS)
def test_the_same_bits_of_a_long_list_by_all_threads_together(dtype, ratio, row_format):
    """More rows than a thread takes alone, of few tokens and of many: several segments, the last of them broken."""
    length, window = (2500, 2200) if ratio == 0 else (8900, 9)
    world = World([length], row_format, dtype, (ratio, None), H=10, K=24, R=6, window=window)
    torch.set_num_threads(1)
    together = [(0, length - 9, length)]
    wanted = world.run(together, "native")
    formula, largest = world.wanted(together[:1])
    assert (wanted.double() - formula).abs().max() <= (2e-3 + (2**-8 if dtype == torch.bfloat16 else 0)) * largest
    for num_threads, count in itertools.product((1, 2, 3), (1, 2)):
        torch.set_num_threads(num_threads)
        assert world.run([(0, length - count, length)], "native").equal(wanted[-count:])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [64, 70])  # rows in one of the formats are read in place, or in none
def test_formats_that_lose_nothing_give_the_same_bits(dtype, K):
    """Rows on the grid of the packed format, as a released model makes them, in each format that holds them."""
    outputs = []
    for row_format in (*FORMATS, "packed-fp8"):
        torch.manual_seed(7)
        world = World([150], row_format, dtype, (4, 5), K=K, R=6)
        grid = {"row_format": "packed", "rotary_dims": 6}
        for name in ("kv", "entries"):
            stored = rows.pack(getattr(world, name)[0], **grid)
            setattr(world, name, [rows.unpack(stored, **grid, channels=K, dtype=dtype)])
        outputs += in_steps(world, [[(0, 0, 100)], [(0, 100, 150)]])
    assert all(output.equal(outputs[0]) for output in outputs)


# Rings


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_format", FORMATS)
def test_a_ring_keeps_the_last_tokens_of_each_sequence(backend, dtype, row_format):
    world = World([9, 131, 300], row_format, dtype, (0, None))  # rings of 12
    ring = torch.full_like(world.ring([]), POISON)
    step = [(1, 100, 131), (0, 3, 9), (2, 7, 19)]
    wanted = ring.clone()
    for n, begin, end in ((1, 119, 131), (0, 3, 9), (2, 7, 19)):
        for position in range(begin, end):
            wanted[world.slots[n], position % 12] = world.pack(world.kv[n][position])
    world.write(step, ring, backend)
    assert ring.equal(wanted)


@needs_compiler
def test_drafts_that_were_refused_are_written_over():
    """Three drafted tokens fill the spare rows; going back to before them is only a matter of positions."""
    world = World([60], "packed", torch.bfloat16, (4, 3))
    ring = torch.full_like(world.ring([]), POISON)
    world.write([(0, 0, 50)], ring, "native")
    wanted = world.run([(0, 50, 60)], "native", ring)
    good = world.kv[0].clone()
    world.kv[0][50:53] = torch.nan
    world.write([(0, 50, 53)], ring, "native")
    world.kv[0] = good
    assert world.run([(0, 50, 60)], "native", ring).equal(wanted)
    assert torch.cat([world.run([(0, 50, 51)], "native", ring)]).equal(wanted[:1])


# Errors


def given_for_errors():
    return World([9, 131], "bfloat16", torch.float32, (4, 2)).arguments([(0, 0, 9)])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q[:, :, :4], r"q has shape \[9, 3, 4\]; expected \[9, 3, 21\]"),
        ("q", lambda q: q.double(), r"q has dtype torch\.float64; expected torch\.float32"),
        ("kv", lambda kv: kv[None], r"kv has shape \[1, 9, 21\]; expected \[1, 21\]"),
        ("sink", lambda sink: sink[:2], r"sink has shape \[2\]; expected \[3\]"),
        ("ring", lambda ring: ring[:, :, :-1], r"ring has shape \[4, 12, 41\]; expected \[4, 12, 42\]"),
        ("ring", lambda ring: ring[:3], r"ring has shape \[3, 12, 42\]; expected \[4, 12, 42\]"),
        ("ring", lambda ring: ring.char(), r"ring has dtype torch\.int8; expected torch\.uint8"),
        ("ring", lambda ring: ring.transpose(0, 1).contiguous().transpose(0, 1), "ring has strides"),
        ("pages", lambda pages: pages[:, :31], r"pages has shape \[8, 31, 42\]; expected \[8, 32, 42\]"),
        ("pages", lambda _: None, "pages are missing; expected them unless ratio is 0"),
        ("ratio", lambda _: 0, "pages are given; expected them unless ratio is 0"),
        ("ratio", lambda _: 8, "ratio is 8; expected 0, 4 or 128"),
        ("ratio", lambda _: 128, r"pages has shape \[8, 32, 42\]; expected \[8, 1, 42\]"),
        ("picked", lambda picked: picked[1:], r"picked has shape \[8, 2\]; expected \[9, 2\]"),
        ("picked", lambda picked: picked.long(), r"picked has dtype torch\.int64; expected torch\.int32"),
        ("window", lambda _: 0, "window is 0; expected 1 to 12, the tokens of a ring"),
        ("window", lambda _: 13, "window is 13; expected 1 to 12, the tokens of a ring"),
        ("rotary_dims", lambda _: 22, "rotary_dims is 22; expected 0 to 21, the channels"),
        ("row_format", lambda _: "fp8", "row_format is 'fp8'; expected one of float32, bfloat16, packed, packed-fp8"),
        ("places", lambda p: p._replace(slot=p.slot[1:]), r"places\.slot has shape \[8\]; expected \[9\]"),
        ("places", lambda p: p._replace(first=p.first.long()), r"places\.first has dtype torch\.int64"),
        ("places", lambda p: p._replace(table=p.table.t()), "ring has shape"),
        ("places", lambda p: p._replace(table=p.table.long()), r"places\.table has dtype torch\.int64"),
        ("backend", lambda _: "cuda", "backend is 'cuda'; expected one of reference, portable, native"),
    ],
)
def test_what_does_not_fit_is_an_error(name, change, message):
    given = given_for_errors() | {"backend": "portable"}
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        attend_paged(**given)


def test_picks_need_pages():
    given = given_for_errors() | {"pages": None, "ratio": 0}
    with pytest.raises(ValueError, match="picked is given without pages; expected None"):
        attend_paged(**given)
