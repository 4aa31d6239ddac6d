"""Prefixes: content hashes, known pages, states, and the way back to a state."""

from __future__ import annotations

import random
import sys
from array import array
from hashlib import blake2b

import pytest

from dsv4.config.sampling import Sampling
from dsv4.engine.pages import PagePool
from dsv4.engine.prefix import OVERLAP_TOKENS, PrefixIndex, Restore, fresh_start, page_digest, restore_plan, root_digest
from dsv4.engine.request import Request


def request(prompt_ids: list[int], output_ids: list[int] | None = None, salt: bytes = b"") -> Request:
    return Request(
        id="r", prompt_ids=prompt_ids, sampling=Sampling(), seed=0, salt=salt, output_ids=list(output_ids or [])
    )


def make(num_pages: int, state_bytes: int = 100) -> tuple[PagePool, PrefixIndex]:
    pool = PagePool(num_pages)
    return pool, PrefixIndex(pool, state_bytes=state_bytes)


def digests(name: str, n: int, begin: list[bytes] | None = None) -> list[bytes]:
    """A chain of n made-up digests after ``begin``."""
    begin = begin or []
    return begin + [f"{name}{i}".encode() for i in range(len(begin), n)]


def known(pool: PagePool, index: PrefixIndex, chain: list[bytes]) -> list[int]:
    """Run a sequence of this chain to its end: share what is known, remember the rest, release all."""
    pages = index.longest(chain, 128 * len(chain) + 1)
    for page in pages:
        pool.share(page)
    for i in range(len(pages), len(chain)):
        taken = pool.take(1)
        assert taken is not None
        pages += taken
        assert index.remember(taken[0], chain[i], chain[i - 1] if i else None)
        index.assert_consistent()
    pool.release_all(pages)
    pool.assert_consistent()
    return pages


# Content hashes


def test_a_digest_is_that_of_the_one_before_and_the_tokens_as_little_endian_int32():
    ids = [0, 1, 255, 256, 129_279, 2**31 - 1, *range(122)]
    numbers = array("i", ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    expected = blake2b(b"before" + numbers.tobytes(), digest_size=32).digest()
    assert page_digest(b"before", ids) == expected


def test_digests_cover_whole_pages_and_all_tokens_before_them():
    _, index = make(1)
    ids = random.Random(0).choices(range(1000), k=128 * 4 + 127)
    chain = index.digests(request(ids))
    assert len(chain) == 4
    previous = root_digest(b"", b"")
    for i, digest in enumerate(chain):
        assert digest == page_digest(previous, ids[128 * i : 128 * (i + 1)])
        previous = digest
    for changed in (0, 128, 255, 511):
        other = index.digests(request([*ids[:changed], ids[changed] + 1, *ids[changed + 1 :]]))
        first = changed // 128
        assert other[:first] == chain[:first]
        assert not set(other[first:]) & set(chain)


def test_digests_grow_with_the_output_and_are_made_once():
    _, index = make(1)
    ids = random.Random(1).choices(range(1000), k=500)
    whole = index.digests(request(ids))
    assert len(whole) == 3
    for prompt in (1, 127, 128, 129, 300):
        growing = request(ids[:prompt])
        for token in ids[prompt:]:
            growing.output_ids.append(token)
            chain = index.digests(growing)
            assert len(chain) == growing.num_tokens // 128
        assert chain == whole
        assert growing.digests is chain


def test_users_and_models_are_kept_apart():
    ids = list(range(128))
    chains = []
    for model in (b"", b"a", b"ab"):
        index = PrefixIndex(PagePool(1), state_bytes=1, model_key=model)
        chains += [index.digests(request(ids, salt=salt))[0] for salt in (b"", b"a", b"b", b"ab")]
    assert len(set(chains)) == 12


# Known pages


def test_the_longest_known_prefix_leaves_a_token_to_compute():
    pool, index = make(8)
    chain = digests("a", 3)
    pages = known(pool, index, chain)
    for num_tokens, expected in ((1, 0), (128, 0), (129, 1), (256, 1), (257, 2), (384, 2), (385, 3), (1000, 3)):
        whole = digests("b", num_tokens // 128, chain[: num_tokens // 128])
        assert index.longest(whole, num_tokens) == pages[:expected]
    assert index.longest(digests("b", 4, chain[:2]), 1000) == pages[:2]
    assert index.longest(digests("b", 4), 1000) == []
    assert index.longest([], 1) == []


def test_a_page_is_known_once_and_only_after_the_one_before():
    pool, index = make(4)
    first, second, third = pool.take(3) or []
    a, b = digests("a", 2)
    assert not index.remember(second, b, a)
    assert index.remember(first, a, None)
    assert not index.remember(second, a, None)
    assert index.remember(third, b, a)
    index.assert_consistent()
    pool.release_all([first, second, third])
    assert (pool.num_free, pool.num_kept, index.num_pages) == (4, 2, 2)
    with pytest.raises(AssertionError, match="has no user"):
        index.remember(second, digests("c", 1)[0], None)


def test_the_longest_unused_prefix_is_given_away_from_its_end():
    pool, index = make(6)
    a, b = digests("a", 3), digests("b", 3)
    known(pool, index, a)
    known(pool, index, b)
    for left_a, left_b in ((2, 3), (1, 3), (0, 3), (0, 2), (0, 1), (0, 0)):
        assert pool.take(1)
        index.assert_consistent()
        assert len(index.longest(a, 1000)) == left_a
        assert len(index.longest(b, 1000)) == left_b


def test_a_use_of_the_beginning_keeps_the_beginning():
    pool, index = make(7)
    a, b = digests("a", 4), digests("b", 3)
    known(pool, index, a)
    known(pool, index, b)
    known(pool, index, a[:2])
    pool.take(5)
    index.assert_consistent()
    assert (len(index.longest(a, 1000)), len(index.longest(b, 1000))) == (2, 0)


def test_a_shared_beginning_outlives_its_branches():
    pool, index = make(6)
    trunk = digests("t", 2)
    left, right = digests("l", 4, trunk), digests("r", 4, trunk)
    known(pool, index, left)
    known(pool, index, right)
    assert index.num_pages == 6
    pool.take(3)
    assert (len(index.longest(left, 1000)), len(index.longest(right, 1000))) == (2, 3)
    pool.take(1)
    assert index.num_pages == 2
    index.assert_consistent()


def test_what_follows_a_page_that_is_gone_is_forgotten_though_it_is_used():
    """A second sequence of the same beginning, computed apart, goes on where the first one has ended."""
    pool, index = make(3)
    a = digests("a", 2)
    first, own, last = (pool.take(1) or [-1] for _ in range(3))
    assert index.remember(first[0], a[0], None)
    assert not index.remember(own[0], a[0], None)  # computed twice
    assert index.remember(last[0], a[1], a[0])
    assert index.keep_state(a[1], "state", 1)
    pool.release(first[0])
    assert pool.take(1) == first
    index.assert_consistent()
    assert (index.num_pages, index.num_states) == (0, 0)
    pool.release_all([own[0], last[0]])
    assert (pool.num_free, pool.num_kept) == (2, 0)


def test_a_used_page_is_never_given_away():
    pool, index = make(4)
    a = digests("a", 3)
    pages = known(pool, index, a)
    pool.share(pages[0])
    assert sorted([*(pool.take(3) or []), pages[0]]) == [0, 1, 2, 3]
    assert pool.take(1) is None
    assert index.longest(a, 1000) == pages[:1]


# What is known elsewhere


def bring(index: PrefixIndex, chain: list[bytes], until: int = 1000) -> tuple[int, list[tuple[int, int]]]:
    filled = []

    def fill(i: int, page: int) -> bool:
        filled.append((i, page))
        return i < until

    return index.bring(chain, fill), filled


def test_pages_are_brought_after_those_known_and_kept():
    pool, index = make(6)
    chain = digests("a", 5)
    pages = known(pool, index, chain[:2])
    count, filled = bring(index, chain, until=4)
    assert count == 4
    assert [i for i, _ in filled] == [2, 3, 4]
    assert index.longest(chain, 1000) == pages + [page for _, page in filled[:2]]
    assert (pool.num_free, pool.num_kept) == (6, 4)
    assert bring(index, chain[:4]) == (4, [])


def test_bringing_gives_away_others_and_never_its_own():
    pool, index = make(4)
    mine, other = digests("a", 5), digests("b", 2)
    known(pool, index, mine[:2])
    known(pool, index, other)  # used later: were it not for the rule, this one's own would go first
    count, filled = bring(index, mine)
    assert (count, len(filled)) == (4, 2)
    assert index.longest(other, 1000) == []
    pool.assert_consistent()
    index.assert_consistent()


def test_bringing_that_fails_leaks_nothing():
    pool, index = make(4)

    def fill(i: int, page: int) -> bool:
        if i == 2:
            raise OSError("gone")
        return True

    with pytest.raises(OSError, match="gone"):
        index.bring(digests("a", 3), fill)
    pool.assert_consistent()
    index.assert_consistent()
    assert (pool.num_free, index.num_pages) == (4, 2)


# States


def test_states_are_held_within_the_budget_and_the_unused_go_first():
    pool, index = make(5, state_bytes=10)
    chain = digests("a", 5)
    known(pool, index, chain)
    for i in range(3):
        assert index.keep_state(chain[i], f"state {i}", 3)
    assert index.state(chain[0]) == "state 0"
    assert index.keep_state(chain[3], "state 3", 4)
    index.assert_consistent()
    assert [index.state(digest) for digest in chain] == ["state 0", None, "state 2", "state 3", None]
    assert (index.state_bytes, index.num_states) == (10, 3)
    assert index.boundaries(chain) == [128, 384, 512]
    assert index.boundaries(chain[:3]) == [128, 384]


def test_a_state_is_replaced_and_one_too_large_is_not_kept():
    pool, index = make(2, state_bytes=10)
    a, b = digests("a", 2)
    known(pool, index, [a, b])
    assert index.keep_state(a, "old", 6)
    assert index.keep_state(a, "new", 9)
    assert (index.state(a), index.state_bytes) == ("new", 9)
    assert not index.keep_state(b, "large", 11)
    assert (index.state(a), index.state(b)) == ("new", None)
    assert index.keep_state(b, "all", 10)
    assert (index.state(a), index.state(b)) == (None, "all")
    index.assert_consistent()


def test_a_state_goes_with_its_page():
    pool, index = make(2)
    a, b = digests("a", 2)
    assert not index.keep_state(a, "early", 1)
    known(pool, index, [a, b])
    assert index.keep_state(a, "a", 1)
    assert index.keep_state(b, "b", 1)
    pool.take(1)
    assert (index.state(a), index.state(b), index.state_bytes) == ("a", None, 1)
    pool.take(1)
    assert (index.num_states, index.state_bytes) == (0, 0)


# The way back to a state


def is_right(start: int, hit: int, window: int, depth: int) -> bool:
    """Follow right and wrong through the layers, from empty rings at ``start``: are the last rows at ``hit`` right?

    A row is right if what the layer before puts out is; that is right if all rows of its window are.
    """
    rows = dict.fromkeys(range(start, hit), True)  # layer 0: of the token alone
    for _ in range(depth):
        last = range(max(0, hit - max(window - 1, OVERLAP_TOKENS)), hit)
        if not all(rows.get(p, False) for p in last):
            return False
        rows = {p: all(rows.get(q, False) for q in range(max(0, p - window + 1), p + 1)) for p in range(start, hit)}
    return True


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9, 10, 20, 64, 128])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_the_fresh_start_is_right_and_a_page_later_is_not(window, depth):
    for hit in (128, 256, 384, 512, 768):
        start = fresh_start(hit, window=window, depth=depth)
        assert start % 128 == 0
        assert is_right(start, hit, window, depth)
        assert not is_right(start + 128, hit, window, depth)


@pytest.mark.parametrize("window", [1, 4, 9, 10, 17])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_reach_is_exact(window, depth):
    """Before it is rounded to a page: one token later is too late."""
    hit = 200
    reach = (depth - 1) * (window - 1) + max(window - 1, OVERLAP_TOKENS)
    assert is_right(hit - reach, hit, window, depth)
    assert not is_right(hit - reach + 1, hit, window, depth)
    for pages in (1, 2, 3):
        expected = max(0, 128 * pages - reach) // 128 * 128
        assert fresh_start(128 * pages, window=window, depth=depth) == expected


def test_released_models_run_a_few_thousand_tokens_again():
    """Flash: 43 layers and the MTP block, so 44 x 127 = 5588 tokens; Pro: 62 x 127 = 7874."""
    million = 2**20
    assert million - fresh_start(million, window=128, depth=44) == 5632
    assert million - fresh_start(million, window=128, depth=62) == 7936


def test_the_way_back_that_runs_fewer_tokens_is_taken():
    def plan(boundaries: list[int], hit: int = 4096) -> Restore:
        return restore_plan(hit, boundaries, window=128, depth=5)  # 635 tokens: fresh from 3456

    assert plan([]) == Restore(0, 3456, 4096)
    assert plan([1024, 3328]) == Restore(0, 3456, 4096)
    assert plan([1024, 3456]) == Restore(3456, 3456, 4096)
    assert plan([3584, 1024]) == Restore(3584, 3584, 4096)
    assert plan([4096, 1024, 4224]) == Restore(4096, 4096, 4096)
    assert plan([1024], hit=0) == Restore(0, 0, 0)
    assert plan([], hit=512) == Restore(0, 0, 512)
    assert plan([128], hit=512) == Restore(128, 128, 512)
