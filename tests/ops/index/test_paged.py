"""The indexer's choice through pages: against the contiguous one, and over every way to cut a batch into steps."""

import itertools

import pytest
import torch

from dsv4 import native
from dsv4.ops.index.paged import select_paged
from dsv4.ops.index.reference import all_scores
from dsv4.ops.places import Places
from dsv4.ops.rows import index_row_bytes, pack_index, read_index_pages, unpack_index, write_index_pages_

BACKENDS = ["reference", "portable", *(["native"] if native.available() else [])]
FORMATS = ["float32", "bfloat16", "packed", "packed-fp8"]
DTYPES = [torch.float32, torch.bfloat16]
NUM_SLOTS = 5
needs_native = pytest.mark.skipif(not native.available(), reason="no C compiler here")

# Slot, position of the first token, tokens of each sequence. None or few entries, whole and broken pages, groups of
# queries that end inside a sequence, decoding beside a prompt.
STEPS = [
    [(0, 0, 1)],
    [(3, 0, 3), (1, 0, 4)],
    [(2, 126, 3)],
    [(4, 0, 131)],
    [(1, 500, 1), (0, 200, 40), (3, 3, 1), (2, 1023, 1), (4, 0, 33)],
]


class Cache:
    """Keys of a few sequences, [C, J] each, in pages that hold NaN wherever nothing was written."""

    def __init__(self, keys, row_format):
        self.keys, self.row_format = keys, row_format
        num_pages = -(-max(len(k) for k in keys) // 32) + 1
        self.table = torch.randperm(NUM_SLOTS * num_pages, dtype=torch.int32).view(NUM_SLOTS, num_pages)
        width = index_row_bytes(row_format, keys[0].shape[1])
        self.pages = torch.full((self.table.numel(), 32, width), 255, dtype=torch.uint8)
        for slot, own in enumerate(keys):
            entry = torch.arange(len(own))
            self.write(self.table[slot, entry // 32].long(), entry % 32, pack_index(own, row_format=row_format))

    def write(self, page, entry, rows):
        channels = self.keys[0].shape[1]
        write_index_pages_(self.pages, page, entry, rows, row_format=self.row_format, channels=channels)

    def rows(self):
        return read_index_pages(self.pages, row_format=self.row_format, channels=self.keys[0].shape[1])

    def places(self, step):
        """Slot, position and the first of its sequence, of each token of a step."""
        firsts = [0, *itertools.accumulate(count for _, _, count in step)]
        columns = [
            (slot, begin + i, first)
            for (slot, begin, count), first in zip(step, firsts, strict=False)
            for i in range(count)
        ]
        return Places(*torch.tensor(columns, dtype=torch.int32).view(-1, 3).T.contiguous(), self.table, {})

    def select(self, queries, step, num_picks, backend):
        """``queries``: of each slot q [T, I, J] and weights [T, I], by position."""
        q, weights = (
            torch.cat([queries[slot][part][begin : begin + count] for slot, begin, count in step]) for part in (0, 1)
        )
        return select_paged(
            q, weights, self.pages, self.places(step), num_picks, row_format=self.row_format, backend=backend
        )


def made(step, I, J, dtype, make=torch.randn):  # noqa: E741
    """Queries of every position that a step reaches, and the keys of the entries that it sees."""
    tokens = [max([0, *(begin + count for slot, begin, count in step if slot == s)]) for s in range(NUM_SLOTS)]
    queries = [(make(n, I, J).to(dtype), make(n, I).to(dtype)) for n in tokens]
    return queries, [make(n // 4, J).to(dtype) for n in tokens]


def small_integers(*shape):
    """All sums are exact, equal scores are equal in bits, and there are many."""
    return torch.randn(*shape).round().clamp(-1, 1)


def larger_integers(*shape):
    """Products of up to 15 bits, exact until they are rounded."""
    return torch.randint(-20, 21, shape)


def on_the_grid(*shape):
    """Numbers that FP4 holds, with scales of their own."""
    return torch.randint(-3, 4, shape) * 2.0 ** torch.randint(-2, 3, shape[:-1]).unsqueeze(-1)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(1, 32), (3, 7), (16, 64), (18, 96)])
def test_exact_scores_and_their_ties_choose_as_the_specification_does(row_format, dtype, heads, width):
    for step, num_picks in itertools.product(STEPS, (1, 8, 40)):
        queries, keys = made(step, heads, width, dtype, small_integers)
        cache = Cache(keys, row_format)
        wanted, *picked = (cache.select(queries, step, num_picks, backend) for backend in BACKENDS)
        for chosen in picked:
            assert chosen.dtype == torch.int32
            assert torch.equal(chosen, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_format", FORMATS[:2])
def test_products_are_rounded_to_the_dtype_of_q(dtype, row_format):
    step = [(1, 0, 200), (0, 900, 20)]
    queries, keys = made(step, 16, 64, dtype, larger_integers)
    wanted, *picked = (Cache(keys, row_format).select(queries, step, 12, backend) for backend in BACKENDS)
    assert all(torch.equal(chosen, wanted) for chosen in picked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_sees_an_entry_from_the_last_of_its_tokens_on(backend):
    queries, keys = made([(2, 0, 12)], 2, 3, torch.float32)
    picked = Cache(keys, "float32").select(queries, [(2, 2, 10)], 4, backend)
    assert picked.tolist() == [[-1] * 4] + [[0, -1, -1, -1]] * 4 + [[0, 1, -1, -1]] * 4 + [[0, 1, 2, -1]]


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_no_entry_left_out_scores_higher(row_format, dtype, backend):
    step = STEPS[-1]
    queries, keys = made(step, 16, 64, dtype)
    cache = Cache(keys, row_format)
    picked = cache.select(queries, step, 9, backend).split([count for _, _, count in step])
    for (slot, begin, count), chosen in zip(step, picked, strict=True):
        q, weights = (x[None, begin : begin + count] for x in queries[slot])
        end = (begin + torch.arange(count) + 1) // 4
        k = pack_index(keys[slot], row_format=row_format)
        k = unpack_index(k, row_format=row_format, channels=64, dtype=dtype)[None]
        scores = all_scores(q, k, weights)[0]  # [t, C]
        is_visible = torch.arange(k.shape[1]) < end[:, None]
        is_picked = torch.zeros(count, k.shape[1] + 1, dtype=torch.bool)
        is_picked.scatter_(1, chosen.long().where(chosen >= 0, k.shape[1]), value=True)
        is_picked = is_picked[:, :-1]
        assert not (is_picked & ~is_visible).any()
        assert torch.equal(is_picked.sum(dim=1), end.clamp(max=9))
        # The order of a sum moves it by a few 2^-24 of its terms; in bfloat16 that may tip a product's rounding.
        sizes = all_scores(q.float().abs(), k.float().abs(), weights.float().abs())[0].amax(dim=1)
        lowest = scores.masked_fill(~is_picked, torch.inf).amin(dim=1)
        highest = scores.masked_fill(~is_visible | is_picked, -torch.inf).amax(dim=1)
        assert (highest <= lowest + sizes * (2**-20 if dtype == torch.float32 else 2**-8)).all()


@needs_native
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_choice_hangs_on_nothing_beside_its_own_sequence(row_format, dtype):
    whole = [(3, 0, 700), (0, 0, 150), (2, 0, 600)]
    queries, keys = made(whole, 16, 64, dtype)
    cache = Cache(keys, row_format)
    alone = {slot: cache.select(queries, [(slot, 0, count)], 20, "native") for slot, _, count in whole}
    steps = [
        whole,
        [(0, 5, 1), (2, 599, 1), (3, 0, 401)],
        [(3, 699, 1)],
        [(2, 123, 33), (0, 149, 1), (3, 64, 300)],
        [(0, 0, 1), (2, 0, 1), (3, 0, 1)],
    ]
    for step, threads in itertools.product(steps, (1, 2, 3)):
        torch.set_num_threads(threads)
        picked = cache.select(queries, step, 20, "native")
        wanted = torch.cat([alone[slot][begin : begin + count] for slot, begin, count in step])
        assert torch.equal(picked, wanted)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_query_split_over_threads(threads):
    torch.set_num_threads(threads)
    step = [(1, 4 * 3001, 1)]
    queries, keys = made(step, 16, 64, torch.bfloat16, small_integers)
    cache = Cache(keys, "bfloat16")
    assert torch.equal(cache.select(queries, step, 70, "native"), cache.select(queries, step, 70, "reference"))


@needs_native
@pytest.mark.parametrize(
    "order", ["rising", "neighbours", "falling", "equal", "waves", "negative", "vanishing", "extreme"]
)
@pytest.mark.parametrize("num_picks", [1, 30, 500, 999, 1000, 1001])
def test_candidates_in_any_order(order, num_picks):
    rising = torch.arange(1000.0)
    values = {
        "rising": rising,
        "neighbours": 1 + rising * 2**-23,
        "falling": -rising + 1000,
        "equal": torch.ones(1000),
        "waves": rising % 37,
        "negative": torch.zeros(1000),
        "vanishing": 1e-30 * (rising % 2),
        "extreme": torch.where(rising % 3 == 0, 2.0 ** (rising % 200 - 100), 2.0**127).where(rising % 7 > 0, 0),
    }
    cache = Cache([values[order][:, None]], "float32")
    weights = torch.zeros(4000, 8)  # below zero, or so near it that a score is -0
    weights[:, 7] = {"negative": -1.0, "vanishing": -1e-30}.get(order, 1.0)
    queries = [(torch.ones(4000, 8, 1), weights)]
    step = [(0, 3000, 1000)]
    picked, wanted = (cache.select(queries, step, num_picks, backend) for backend in ("native", "reference"))
    assert torch.equal(picked, wanted)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 64, 80])
def test_formats_that_hold_a_key_give_the_same_bits(dtype, width):
    step = STEPS[-1]
    queries, keys = made(step, 8, width, dtype)
    keys = [on_the_grid(*k.shape) for k in keys]
    picked = [Cache(keys, row_format).select(queries, step, 8, "native") for row_format in FORMATS]
    assert all(torch.equal(chosen, picked[0]) for chosen in picked[1:])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_format", FORMATS[2:])
@pytest.mark.parametrize(
    ("scales", "factor", "bits"),
    [((90, 165), 1.0, 255), ((120, 123), 1.0, 0x8F), ((2, 14), 2.0**100, 255), ((185, 200), 2.0**-60, 255)],
)
def test_every_packed_code_and_scale_reads_as_the_format_says(row_format, dtype, scales, factor, bits):
    """FP8's subnormal codes among themselves, and scales by whose power of two bfloat16's bits are not moved."""
    cache = Cache([torch.zeros(1024, 64)], row_format)
    codes = torch.randint(256, (len(cache.pages), 32, 64 if row_format == "packed-fp8" else 32))
    codes[codes % 128 == 127] = 126  # a NaN is one by its scale
    codes &= bits
    scales = torch.randint(*scales, (len(cache.pages), 32, 2))
    for page, rows in enumerate(torch.cat([codes, scales], dim=2).to(torch.uint8)):
        cache.write(torch.full((32,), page), torch.arange(32), rows)
    wide = Cache([torch.zeros(1024, 64)], "bfloat16")
    wide.table = cache.table
    values = unpack_index(cache.rows(), row_format=row_format, channels=64, dtype=torch.float32)
    wide.pages = pack_index(values, row_format="bfloat16")
    queries = [((torch.randn(4096, 4, 64) * factor).to(dtype), torch.randn(4096, 4))]
    step = [(0, 4000, 96)]
    assert torch.equal(cache.select(queries, step, 50, "native"), wide.select(queries, step, 50, "native"))


def on_the_packed_grid(*shape):
    """Random keys as packing rounds them: a scale of its own for each group."""
    x = torch.randn(*shape) * 2.0 ** torch.randint(-3, 4, (shape[0], 1))
    return unpack_index(
        pack_index(x, row_format="packed"), row_format="packed", channels=shape[1], dtype=torch.bfloat16
    )


def assert_packed_keys_choose_alike(queries, keys, step, num_picks):
    """Packed keys, of which many are only bounded, choose as the same ones in bfloat16, which all have scores."""
    packed, wide = (Cache(keys, row_format) for row_format in ("packed", "bfloat16"))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        wanted, picked = (cache.select(queries, step, num_picks, "native") for cache in (wide, packed))
        assert torch.equal(picked, wanted)


# One query alone, fewer than a tile, several tiles.
DEEP_STEPS = [[(0, 8599, 1)], [(0, 8560, 5), (1, 700, 1)], [(0, 8581, 19)]]


@needs_native
@pytest.mark.parametrize("num_picks", [1, 2, 30])
@pytest.mark.parametrize(("heads", "width"), [(1, 64), (3, 32), (9, 128), (2, 96)])
def test_bounds_leave_out_no_entry_that_is_picked(heads, width, num_picks):
    queries = [(torch.randn(8600, heads, width).bfloat16(), torch.randn(8600, heads).bfloat16()) for _ in range(2)]
    keys = [on_the_packed_grid(count, width) for count in (2150, 200)]
    for step in DEEP_STEPS:
        assert_packed_keys_choose_alike(queries, keys, step, num_picks)
    fine = Cache(keys, "packed-fp8")  # of these there are no bounds
    for step in DEEP_STEPS[:1]:
        wanted = Cache(keys, "bfloat16").select(queries, step, num_picks, "native")
        assert torch.equal(fine.select(queries, step, num_picks, "native"), wanted)


def aligned():
    """Keys that differ in a step of one channel, and queries that agree with all channels."""
    keys = torch.full((2150, 64), 6.0)
    keys[torch.arange(2150), torch.randint(64, (2150,))] = 4.0
    return torch.rand(8600, 2, 64) + 0.5, keys * torch.where(torch.randn(2150, 1) < 0, -1, 1)


def balanced():
    """Keys of two channels that take each other off but for what 8 bits of a query do not tell apart."""
    q, keys = 1 + torch.rand(8600, 2, 64) / 64, torch.zeros(2150, 64)
    q[..., 0] = 2
    pair = torch.rand(2150, 63).topk(2).indices + 1
    return q, keys.scatter(1, pair, torch.tensor([6.0, -6.0]).expand(2150, 2))


@needs_native
@pytest.mark.parametrize("num_picks", [1, 2])
@pytest.mark.parametrize("make", [aligned, balanced])
def test_bounds_hold_where_scores_are_close(make, num_picks):
    q, keys = make()
    weights = torch.where(torch.rand(8600, 2) < 0.5, -1.0, 1.0)
    for step in ([(0, 8599, 1)], [(0, 8581, 19)]):
        assert_packed_keys_choose_alike([(q.bfloat16(), weights)], [keys.bfloat16()], step, num_picks)


@needs_native
def test_many_equal_scores_under_a_bound():
    queries, keys = [(small_integers(8600, 2, 64), small_integers(8600, 2))], [small_integers(2150, 64)]
    queries, keys = [(q.bfloat16(), w.bfloat16()) for q, w in queries], [k.bfloat16() for k in keys]
    for step, num_picks in itertools.product(([(0, 8599, 1)], [(0, 8581, 19)]), (1, 2, 30)):
        cache = Cache(keys, "packed")
        wanted, picked = (cache.select(queries, step, num_picks, backend) for backend in ("reference", "native"))
        assert torch.equal(picked, wanted)


@needs_native
@pytest.mark.parametrize(
    ("what", "factor"),
    [
        *itertools.product(["q", "weights", "keys"], [0.0, 2.0**-118, 2.0**-70, 2.0**70, 2.0**118]),
        *itertools.product(["q", "one channel", "weights"], [torch.inf, torch.nan]),  # no key is stored with them
    ],
)
def test_numbers_beyond_the_reach_of_bounds(what, factor):
    """A third of the queries, heads or keys are so large or small that a bound could not hold."""
    q, weights, keys = torch.randn(8600, 2, 64), torch.randn(8600, 2), on_the_packed_grid(2150, 64).float()
    changed = {"q": q, "one channel": q[..., 5], "weights": weights, "keys": keys}[what]
    changed[torch.rand(changed.shape[:1] if what == "keys" else changed.shape[:2]) < 1 / 3] *= factor
    stored = pack_index(keys, row_format="packed")
    keys = unpack_index(stored, row_format="packed", channels=64, dtype=torch.bfloat16)
    for step in ([(0, 8599, 1)], [(0, 8581, 19)]):
        assert_packed_keys_choose_alike([(q.bfloat16(), weights.bfloat16())], [keys], step, 2)


@needs_native
def test_a_head_that_is_not_a_number_takes_nothing_off():
    q, keys = torch.rand(8600, 2, 64) + 0.5, on_the_packed_grid(2150, 64).abs()
    q[:, 0, 5] = torch.nan
    for step in ([(0, 8599, 1)], [(0, 8581, 19)]):
        assert_packed_keys_choose_alike([(q.bfloat16(), -torch.ones(8600, 2))], [keys], step, 2)


@needs_native
def test_keys_with_a_group_that_is_not_a_number():
    keys = [on_the_packed_grid(2150, 64)]
    packed, wide = Cache(keys, "packed"), Cache(keys, "bfloat16")
    is_spoilt = torch.rand(packed.pages.shape[:2]) < 1 / 3
    rows = packed.rows()
    rows[..., 32][is_spoilt] = 255  # the first group's scale
    for page, own in enumerate(rows):
        packed.write(torch.full((32,), page), torch.arange(32), own)
    values = unpack_index(rows, row_format="packed", channels=64, dtype=torch.bfloat16)
    wide.table, wide.pages = packed.table, values.view(torch.uint8)
    queries = [(torch.randn(8600, 2, 64).bfloat16(), torch.randn(8600, 2).bfloat16())]
    for step in ([(0, 8599, 1)], [(0, 8581, 19)]):
        wanted, picked = (cache.select(queries, step, 2, "native") for cache in (wide, packed))
        assert torch.equal(picked, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_and_weights_of_another_dtype(backend):
    step = [(1, 0, 90)]
    queries, keys = made(step, 4, 6, torch.bfloat16, small_integers)
    cache = Cache(keys, "bfloat16")
    wanted = cache.select(queries, step, 5, "reference")
    q, weights = queries[1]
    strided = q.transpose(0, 1).contiguous().transpose(0, 1), weights.float().T.contiguous().T
    assert torch.equal(cache.select([None, strided], step, 5, backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_choose_nothing(backend):
    cache = Cache([torch.zeros(4, 3)], "float32")
    picked = select_paged(
        torch.zeros(0, 2, 3), torch.zeros(0, 2), cache.pages, cache.places([]), 4, row_format="float32", backend=backend
    )
    assert picked.shape == (0, 4)


def test_float64_goes_to_the_portable_path():
    step = [(1, 0, 90)]
    queries, keys = made(step, 4, 6, torch.float64)
    cache = Cache([k.float() for k in keys], "float32")
    picked = [cache.select(queries, step, 5, backend) for backend in ("portable", "native")]
    assert torch.equal(*picked)


# Errors

Q, WEIGHTS = torch.zeros(3, 4, 5), torch.zeros(3, 4)
PAGES = torch.zeros(6, 32, 20, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, r"q has shape \[4, 5\]; expected \[T, I, J\]"),
        ({"weights": WEIGHTS[:, :2]}, r"weights has shape \[3, 2\]; expected \[T, I\] with .*I = 4"),
        ({"pages": PAGES[:, :16]}, r"pages has shape \[6, 16, 20\]; expected \[pages, 32, 20\]"),
        ({"pages": PAGES.float()}, r"pages has dtype torch\.float32 .*; expected contiguous uint8"),
        ({"pages": PAGES.transpose(0, 1).contiguous().transpose(0, 1)}, "expected contiguous uint8"),
        ({"q": Q[:2], "weights": WEIGHTS[:2]}, r"places\.slot has shape \[3\]; expected \[T\] with T = 2"),
        ({"places": "position"}, r"places\.position has dtype torch\.int64; expected contiguous int32"),
        ({"num_picks": 0}, "num_picks is 0; expected at least 1"),
        ({"row_format": "packed"}, r"pages has shape \[6, 32, 20\]; expected \[pages, 32, 4\]"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    places = Cache([torch.zeros(4, 5)], "float32").places([(0, 0, 3)])
    if "places" in changed:
        changed = {"places": places._replace(position=places.position.long())}
    fitting = {"q": Q, "weights": WEIGHTS, "pages": PAGES, "places": places, "num_picks": 2, "row_format": "float32"}
    with pytest.raises(ValueError, match=message):
        select_paged(**fitting | changed)
