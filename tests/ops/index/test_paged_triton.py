"""The indexer's choice through pages by Triton kernels: against the reference, in every format and kind of step."""

import pytest
import torch
from triton import jit
from triton import language as tl

from dsv4.ops.index import paged, triton
from dsv4.ops.index.triton_scores import _load_keys, pages_of
from dsv4.ops.rows import pack_index, unpack_index
from tests.ops.index.test_paged import FORMATS, Cache, made, small_integers
from tests.ops.index.test_triton import WAYS, go, shrink
from tests.ops.triton_lane import DEVICE, DTYPES, poisoned


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink(monkeypatch)


def select_paged(cache, queries, step, num_picks, backend="unproved"):
    """Through the public door, on the device."""
    q, weights = (torch.cat([queries[s][i][first : first + n] for s, first, n in step]).to(DEVICE) for i in (0, 1))
    places = cache.places(step)
    places = places._replace(**{name: getattr(places, name).to(DEVICE) for name in ("slot", "position", "first")})
    places = places._replace(table=places.table.to(DEVICE))
    pages = cache.pages.to(DEVICE)
    return paged.select_paged(q, weights, pages, places, num_picks, row_format=cache.row_format, backend=backend)


def check_paged(cache, queries, step, num_picks):
    with poisoned():
        picked = select_paged(cache, queries, step, num_picks)
    assert picked.dtype == torch.int32
    assert picked.equal(select_paged(cache, queries, step, num_picks, "reference"))


STEP = [(1, 170, 1), (0, 70, 2), (3, 3, 1), (2, 259, 1)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_format", FORMATS)
def test_keys_in_pages(way, dtype, row_format, monkeypatch):
    go(way, monkeypatch)
    for heads, width in ((3, 7), (18, 96)) if row_format in FORMATS[2:] else ((3, 7),):
        queries, keys = made(STEP, heads, width, dtype, small_integers)
        keys = [k * 2.0 ** (torch.arange(width) // 32) for k in keys]  # groups of different scales
        check_paged(Cache(keys, row_format), queries, STEP, 7)


@pytest.mark.parametrize("num_picks", [1, 40, 64, 2000])
def test_numbers_of_picks_from_pages(num_picks):
    """Some see more, some less, and the table has less than the most."""
    queries, keys = made(STEP, 3, 32, torch.float32, small_integers)
    check_paged(Cache(keys, "packed"), queries, STEP, num_picks)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [[(0, 0, 1)], [(3, 0, 3), (1, 0, 4)], [(2, 126, 3)], [(0, 31, 2), (1, 129, 1)]])
def test_steps_of_few_entries(way, step, monkeypatch):
    go(way, monkeypatch)
    queries, keys = made(step, 2, 32, torch.float32, small_integers)
    check_paged(Cache(keys, "packed"), queries, step, 3)


def test_a_step_without_tokens():
    queries, keys = made(STEP, 2, 32, torch.float32)
    assert select_paged(Cache(keys, "packed"), queries, [(0, 0, 0)], 3).shape == (0, 3)


@jit
def _read(pages, words, table, values, C, DTYPE: tl.constexpr, LAYOUT: tl.constexpr):
    """The keys of entries of one sequence as scores take them, 32 channels each."""
    first = tl.program_id(0) * 64
    keys = _load_keys(words, pages, table, tl.program_id(0) * 0, first, C, C, C // 32, DTYPE, LAYOUT, 32, 32, 64)
    tl.store(values + (first + tl.arange(0, 64))[:, None] * 32 + tl.arange(0, 32)[None, :], keys)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("row_format", "count"), [("packed", 16), ("packed-fp8", 256)])
def test_every_code_under_every_scale_to_the_bit(row_format, count, dtype):
    keys = torch.arange(count).view(-1, min(count, 32)).repeat(256, 1).repeat(1, 32 // min(count, 32)).byte()
    if row_format == "packed":
        keys = keys[:, 0::2] | keys[:, 1::2] << 4
    keys[keys & 127 == 127] = 126 if row_format == "packed-fp8" else 127  # a NaN is one by its scale
    scales = torch.arange(256).byte().repeat_interleave(len(keys) // 256)
    rows = torch.cat([keys, scales[:, None]], dim=1)
    cache, entry = Cache([torch.zeros(len(rows), 32)], row_format), torch.arange(len(rows))
    cache.write(cache.table[0, entry // 32].long(), entry % 32, rows)
    found = pages_of(cache.pages.to(DEVICE), cache.table.to(DEVICE), row_format, torch.empty(1, 1, 32))
    values = torch.full((len(rows), 32), 7, dtype=dtype, device=DEVICE)
    own = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    _read[(len(rows) // 64,)](found.scales, found.data, found.table, values, len(rows), own, found.layout)
    wanted = unpack_index(rows, row_format=row_format, channels=32, dtype=dtype)
    assert wanted.isfinite().float().mean() > 0.5
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert ((values.cpu().view(bits) == wanted.view(bits)) | (values.cpu().isnan() & wanted.isnan())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 24])
def test_every_packed_code_and_scale(dtype, width):
    """Keys of one code in one channel, over codes and scales, by products that keep them apart."""
    codes = torch.arange(16).repeat_interleave(16)
    scales = (torch.arange(256) % 16 + 120).to(torch.uint8)
    rows = torch.zeros(256, width // 2 + 1, dtype=torch.uint8)
    rows[:, 0], rows[:, width // 2 - 1] = codes, (codes << 4)
    rows[:, -1] = scales
    cache = Cache([torch.zeros(256, width)], "packed")
    entry = torch.arange(256)
    cache.write(cache.table[0, entry // 32].long(), entry % 32, rows)
    q = torch.zeros(1024, 2, width, dtype=dtype)
    q[:, 0, 0], q[:, 1, width - 1] = 1, -2
    queries = [(q, torch.tensor([1.0, 0.75]).expand(1024, 2))]
    for num_picks in (77, 130):
        check_paged(cache, queries, [(0, 1023, 1)], num_picks)


@pytest.mark.parametrize("scale", [0, 1, 252])
def test_scales_at_the_ends(scale):
    rows = torch.zeros(256, 17, dtype=torch.uint8)
    rows[:, 3], rows[:, -1] = torch.arange(256), scale
    cache, entry = Cache([torch.zeros(256, 32)], "packed"), torch.arange(256)
    cache.write(cache.table[0, entry // 32].long(), entry % 32, rows)
    q = torch.zeros(1024, 1, 32)
    q[:, 0, 6], q[:, 0, 7] = 1, 0.25
    check_paged(cache, [(q, torch.ones(1024, 1))], [(0, 1023, 1)], 99)


def test_formats_that_hold_a_key_choose_alike():
    queries, keys = made(STEP, 8, 64, torch.float32)
    keys = [unpack_index(pack_index(k, row_format="packed"), row_format="packed", channels=64, dtype=k.dtype)
            for k in keys]  # fmt: skip
    picked = [select_paged(Cache(keys, row_format), queries, STEP, 8) for row_format in ("float32", *FORMATS[2:])]
    assert picked[0].ge(0).any()
    for chosen in picked[1:]:
        assert chosen.tolist() == picked[0].tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_token_does_not_depend_on_the_rest_of_its_step(way, dtype, monkeypatch):
    queries, keys = made(STEP, 4, 32, dtype)
    cache = Cache(keys, "packed")
    go("few", monkeypatch)
    whole = select_paged(cache, queries, STEP, 8)
    go(way, monkeypatch)
    assert select_paged(cache, queries, [STEP[3], (0, 71, 1), STEP[0]], 8).equal(whole[[4, 2, 0]])


def test_nothing_is_read_back(monkeypatch):
    """The interpreter reads; the launching code does not, which is what runs where a kernel is not interpreted."""
    queries, keys = made(STEP, 2, 32, torch.float32)
    cache = Cache(keys, "packed")

    def fail(*_):
        raise AssertionError("a number is read back")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    monkeypatch.setattr(triton, "score_into", lambda *_: None)
    monkeypatch.setattr(triton, "choose_into", lambda *_: None)
    select_paged(cache, queries, STEP, 8)
