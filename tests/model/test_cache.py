"""A step over an engine's cache gives the model's logits, to the same bits however sequences are cut and batched."""

from dataclasses import replace

import pytest
import torch

from dsv4 import native
from dsv4.accounting.cache import engine_bytes, page_bytes
from dsv4.model.cache import Cache
from dsv4.testing.toys import flash_like, pro_like, toy_model

LENGTH = 300  # more than two pages and the window many times over
PAGES = [[5, 1, 2], [0, 4, 3]]
SLOTS = [2, 0]
FORMATS = ["float32", "bfloat16", "packed", "packed-fp8"]
needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")


def packable(config):
    """Rows and keys whose channels the packed format can group as it likes."""
    return replace(config, attention=replace(config.attention, head_dim=78))


def run(model, token_ids, cuts, *, row_format="float32", sequences=(0, 1), spare=0):
    """Logits [sequence, T, V] of steps of these many tokens of each sequence."""
    cache = Cache(model.config, num_slots=3, num_pages=6, row_format=row_format, spare=spare)
    for part in [part for layer in cache.layers for part in (layer.ring, *(c.pages for c in layer.compressors()))]:
        part.fill_(255)  # NaN in every format: nothing unwritten is read
    for slot, pages in zip(SLOTS, PAGES, strict=True):
        cache.table[slot, :3] = torch.tensor(pages, dtype=torch.int32)
    parts, begin = [], 0
    for count in cuts:
        places = cache.places([(SLOTS[s], begin, count, 0) for s in sequences])
        flat = torch.cat([token_ids[s, begin : begin + count] for s in sequences])
        logits = model.step_logits(model.hidden(model.step(flat, cache, places))[0])
        parts.append(logits.unflatten(0, (len(sequences), count)))
        begin += count
    return torch.cat(parts, dim=1)


@pytest.fixture(params=[flash_like, pro_like])
def config(request):
    return request.param()


def tokens(config):
    return torch.randint(0, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("backend", ["reference", "portable", pytest.param("native", marks=needs_kernels)])
@torch.no_grad()
def test_logits_are_those_of_the_model(config, backend):
    model = toy_model(config, backend=backend)
    token_ids = tokens(config)[:, :150]
    wanted = model(token_ids).logits
    got = run(model, token_ids, [150] if backend == "reference" else [131, 1, 18])
    # Sums in another order: float32 rounding through six layers.
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@needs_kernels
@pytest.mark.parametrize("row_format", FORMATS)
@torch.no_grad()
def test_bits_do_not_depend_on_cuts_batch_and_threads(config, row_format):
    model = toy_model(packable(config))
    token_ids = tokens(config)
    whole = run(model, token_ids, [LENGTH], row_format=row_format)
    assert whole.isfinite().all()
    assert torch.equal(run(model, token_ids, [7, 1, 1, 120, 1, 170], row_format=row_format, spare=3), whole)
    torch.set_num_threads(2)
    for s in range(2):
        alone = run(model, token_ids, [129, 3, LENGTH - 132], row_format=row_format, sequences=(s,))
        assert torch.equal(alone[0], whole[s])


@needs_kernels
@torch.no_grad()
def test_going_back_leaves_no_trace():
    """Tokens that are written and then taken back, as rejected drafts are, change no later bit."""
    config, spare = flash_like(), 3
    model, token_ids = toy_model(config), tokens(flash_like())[:1]
    wanted = run(model, token_ids, [LENGTH], sequences=(0,))
    cache = Cache(config, num_slots=1, num_pages=3, row_format="float32", spare=spare)
    cache.table[0] = torch.arange(cache.table.shape[1]) % 3
    wrong = (token_ids + 7) % config.vocab_size
    begin = 0
    while begin < LENGTH:
        count = min(1 + begin % 5, LENGTH - begin)
        drafts = min(spare, LENGTH - begin - count)
        step = torch.cat([token_ids[0, begin : begin + count], wrong[0, begin + count : begin + count + drafts]])
        streams = model.step(step, cache, cache.places([(0, begin, len(step), 0)]))
        logits = model.step_logits(model.hidden(streams)[0, :count])
        assert torch.equal(logits, wanted[0, begin : begin + count])
        begin += count


@needs_kernels
@torch.no_grad()
def test_a_state_goes_on_in_another_slot():
    config = flash_like()
    model, token_ids = toy_model(config), tokens(flash_like())
    wanted = run(model, token_ids, [LENGTH], sequences=(0,))[0]
    cache = Cache(config, num_slots=2, num_pages=4, row_format="float32")
    cache.table[0, :3] = cache.table[1, :3] = torch.tensor([3, 0, 2], dtype=torch.int32)
    model.step(token_ids[0, :256], cache, cache.places([(0, 0, 256, 0)]))
    state = cache.state(0)
    assert sum(part.nbytes for part in state) == cache.state_bytes()
    cache.load_state(0, None)
    assert not any(part[0].any() for layer in cache.layers for part in (layer.ring,))
    cache.load_state(1, state)
    streams = model.step(token_ids[0, 256:], cache, cache.places([(1, 256, LENGTH - 256, 256)]))
    assert torch.equal(model.step_logits(model.hidden(streams)[0]), wanted[256:])


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("spare", [0, 3])
def test_bytes_are_those_predicted(config, row_format, spare):
    config = packable(config)
    cache = Cache(config, num_slots=3, num_pages=5, row_format=row_format, spare=spare)
    assert cache.num_bytes() == engine_bytes(config, row_format, num_slots=3, num_pages=5, spare=spare)
    assert cache.page_bytes() == page_bytes(config, row_format)


@pytest.mark.parametrize(("name", "value"), [("num_slots", 0), ("num_pages", 0), ("spare", -1)])
def test_bad_counts_are_refused(name, value):
    sizes = {"num_slots": 1, "num_pages": 1, "spare": 0} | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}; expected at least"):
        Cache(flash_like(), **sizes, row_format="float32")
