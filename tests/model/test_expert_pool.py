"""The pool of experts: what it holds, what it gives up, and that what it gives is what was asked for."""

import random
from collections import Counter
from itertools import chain

import pytest
import torch

from dsv4.model.expert_pool import ALIGNMENT, HALF_LIFE, ExpertPool, Layout, PoolCounts

# As packed experts have them: codes, scales, and a matrix; none is a whole number of ALIGNMENT bytes.
LAYOUT = Layout((((3, 5), torch.int8), ((3, 1), torch.float8_e8m0fnu), ((7, 5), torch.bfloat16)))
SLOT = 3 * ALIGNMENT + ALIGNMENT  # 15, 3 and 70 bytes


class Source:
    """The experts of a layer, each with numbers of its own; ``said`` lists what was announced and read."""

    def __init__(self, layer=0):
        self.layout, self.layer, self.said = LAYOUT, layer, []

    def tensors(self, expert):
        memory = torch.full((LAYOUT.num_bytes,), 16 * self.layer + expert, dtype=torch.uint8)
        return LAYOUT.views(memory)

    def read_(self, expert, out):
        self.said.append(("read", expert))
        for to, tensor in zip(out, self.tensors(expert), strict=True):
            to.copy_(tensor)

    def announce(self, experts):
        self.said += [("announced", expert) for expert in experts]

    @property
    def read(self):
        return [expert for what, expert in self.said if what == "read"]


def pool_of(slots, num_experts=100):
    return ExpertPool(LAYOUT, slots * SLOT + SLOT - 1, num_experts)


def groups(pool, source, counts, num_tokens=1):
    """The experts of each group; each is what was asked for while the group is there."""
    counts, found = dict.fromkeys(counts, 1) if not isinstance(counts, dict) else counts, []
    for group in pool.hold(source.layer, source, counts, num_tokens):
        for expert, tensors in group.items():
            for tensor, wanted in zip(tensors, source.tensors(expert), strict=True):
                assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8))
        found.append(sorted(group))
    return found


def holds(pool, layer=0):
    return sorted(pool._held.get(layer, {}))


# ---- layout ----


def test_tensors_of_any_dtype_lie_on_boundaries():
    assert LAYOUT.num_bytes == SLOT
    memory = torch.arange(SLOT, dtype=torch.uint8)
    codes, scales, matrix = LAYOUT.views(memory)
    assert [(x.shape, x.dtype) for x in (codes, scales, matrix)] == list(LAYOUT.tensors)
    assert codes.flatten().tolist() == list(range(15))
    assert scales.view(torch.uint8).flatten().tolist() == [64, 65, 66]
    assert matrix.view(torch.uint8).flatten().tolist() == list(range(128, 198))


def test_the_pool_takes_no_more_bytes_than_it_is_given():
    assert pool_of(3).memory.nbytes == 3 * SLOT
    assert pool_of(50, num_experts=8).memory.nbytes == 8 * SLOT  # all there are


@pytest.mark.parametrize("num_bytes", [1, SLOT - 1])
def test_a_pool_smaller_than_an_expert_is_an_error(num_bytes):
    with pytest.raises(ValueError, match=f"expert_bytes is {num_bytes}; expected at least the {SLOT} of one expert"):
        ExpertPool(LAYOUT, num_bytes, 8)


# ---- groups ----


def test_all_at_once_where_there_is_room():
    pool, source = pool_of(4), Source()
    assert groups(pool, source, [5, 1, 2]) == [[1, 2, 5]]
    assert groups(pool, source, [1, 2, 3]) == [[1, 2, 3]]
    assert source.read == [5, 1, 2, 3]
    assert pool.counts == PoolCounts(hits=2, misses=4, bytes_read=4 * (15 + 3 + 70))


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_each_is_read_once_where_there_is_not(slots):
    pool, source = pool_of(slots), Source()
    found = groups(pool, source, range(8), num_tokens=20)
    assert sorted(chain(*found)) == sorted(source.read) == list(range(8))
    assert max(map(len, found)) == slots


def test_what_is_there_comes_first_so_that_a_second_pass_reads_only_the_rest():
    pool, source = pool_of(3), Source()
    groups(pool, source, range(8))
    kept = holds(pool)
    source.said.clear()
    found = groups(pool, source, range(8))
    assert found[0] == kept
    assert sorted(source.read) == sorted(set(range(8)) - set(kept))


def test_what_the_group_still_uses_stays():
    pool, source = pool_of(3), Source()
    groups(pool, source, {0: 9, 1: 9, 2: 9}, num_tokens=9)
    assert groups(pool, source, {0: 1, 5: 1, 1: 1}) == [[0, 1, 5]]  # 2 went
    assert holds(pool) == [0, 1, 5]


def test_experts_are_announced_before_they_are_read():
    pool, source = pool_of(2), Source()
    groups(pool, source, range(12))
    assert [e for what, e in source.said if what == "announced"] == source.read == list(range(12))
    for expert in range(12):
        assert source.said.index(("announced", expert)) < source.said.index(("read", expert))
    assert source.said.index(("read", 0)) < source.said.index(("announced", 11))  # not all at once


def test_no_tokens_need_no_experts():
    assert groups(pool_of(1), Source(), [], num_tokens=0) == []


# ---- what is given up ----


def test_an_expert_that_many_tokens_chose_outlives_one_that_was_used_last():
    pool, source = pool_of(2), Source()
    for _ in range(5):
        groups(pool, source, [0])
    groups(pool, source, [1])
    groups(pool, source, [2])
    assert holds(pool) == [0, 2]


def test_a_long_prompt_says_which_are_hot():
    pool, source = pool_of(2), Source()
    groups(pool, source, {0: 3, 1: 50, 2: 1, 3: 46}, num_tokens=50)
    assert source.read == [2, 0, 3, 1]
    assert holds(pool) == [1, 3]
    groups(pool, source, [2])
    groups(pool, source, [3])
    assert holds(pool) == [1, 3]


def test_passing_through_leaves_the_hottest():
    pool, source = pool_of(3), Source()
    for _ in range(9):
        groups(pool, source, [6, 7, 0])
    source.said.clear()
    found = groups(pool, source, {e: 8 if e > 5 else 1 for e in range(8)}, num_tokens=8)
    assert holds(pool)[1:] == [6, 7]
    assert found[0] == [0, 6, 7]
    assert sorted(source.read) == [1, 2, 3, 4, 5]


def test_old_tokens_fade():
    pool, source = pool_of(2), Source()
    for _ in range(5):
        groups(pool, source, [0])
    for _ in range(4 * HALF_LIFE):
        groups(pool, source, [1])
    groups(pool, source, [2])
    groups(pool, source, [3])  # 0 and 2 are as few as 3 now; 1 is not
    assert holds(pool) == [1, 3]


def test_heat_is_the_number_of_tokens_that_faded():
    pool, source = pool_of(1), Source()
    uses = {2: 1, 5: 1, 9: 1}  # token and how many, of expert 0
    for token in range(1, 12):
        groups(pool, source, [0] if token in uses else [1])
    wanted = sum(2 ** ((token - 11) / HALF_LIFE) for token in uses)
    assert 2 ** (pool._heat[0][0] - 11 / HALF_LIFE) == pytest.approx(wanted)
    one, many = pool_of(1), pool_of(1)
    for _ in range(6):
        groups(one, source, [0])
    groups(many, source, {0: 6}, num_tokens=6)
    assert many._heat[0][0] == pytest.approx(one._heat[0][0])


def test_layers_come_to_share_the_room():
    pool, sources = pool_of(7), [Source(layer) for layer in range(3)]
    for _ in range(3):
        for source in sources:
            groups(pool, source, range(8))
    assert sorted(len(holds(pool, layer)) for layer in range(3)) == [2, 2, 3]


def test_a_layer_with_its_share_gives_up_its_own():
    pool, first, second = pool_of(4), Source(0), Source(1)
    groups(pool, first, [0, 1])
    groups(pool, second, [0, 1])
    groups(pool, second, [0, 2])
    assert (holds(pool, 0), holds(pool, 1)) == ([0, 1], [0, 2])


def test_a_layer_that_never_runs_takes_no_room():
    pool, source = pool_of(8), Source(5)
    groups(pool, source, range(8))
    assert len(holds(pool, 5)) == 8


def test_more_layers_than_slots():
    pool, sources = pool_of(1), [Source(layer) for layer in range(3)]
    for _ in range(2):
        for source in sources:
            assert groups(pool, source, [3, 4]) == [[3], [4]]
    assert sum(len(holds(pool, layer)) for layer in range(3)) == 1


def test_any_sequence_of_calls():
    rng = random.Random(7)
    for slots in (1, 2, 5, 11, 40):
        pool, sources = pool_of(slots, 24), [Source(layer) for layer in range(3)]
        for _ in range(60):
            source, num_tokens = rng.choice(sources), rng.choice([1, 1, 1, 8, 100])
            wanted = {e: rng.randint(1, num_tokens) for e in rng.sample(range(8), rng.randint(0, 8))}
            before = pool.counts
            found = groups(pool, source, wanted, num_tokens)
            assert sorted(chain(*found)) == sorted(wanted)
            counts = pool.counts.since(before)
            assert counts.hits + counts.misses == len(wanted)
            slots_used = [slot for held in pool._held.values() for slot in held.values()] + pool._free
            assert Counter(slots_used) == Counter(range(len(pool.memory)))


# ---- errors and moves ----


def test_an_error_while_reading_leaves_the_pool_whole():
    pool, source = pool_of(2), Source()
    groups(pool, source, [0, 1])

    class Broken(Source):
        def read_(self, expert, out):
            out[0].fill_(99)  # half read
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        groups(pool, Broken(), [3])
    assert len(holds(pool)) == 1
    assert groups(pool, source, [0, 1]) == [[0, 1]]
    assert groups(pool, source, [3]) == [[3]]


def test_another_dtype_of_the_model_leaves_the_experts_alone():
    pool, source = pool_of(2), Source()
    groups(pool, source, [0, 1])
    pool.to(torch.float64)
    assert pool.memory.dtype == torch.uint8
    assert groups(pool, source, [0, 1]) == [[0, 1]]
    assert source.read == [0, 1]


def test_moved_elsewhere_it_is_used_there():
    pool, source = pool_of(2), Source()
    groups(pool, source, [0, 1])
    old = pool.memory
    pool._apply(torch.clone)  # what .to(device) does on another device
    old.fill_(77)
    assert groups(pool, source, [0, 1]) == [[0, 1]]
    groups(pool, source, [4])
    assert (old == 77).all()


def test_it_is_no_part_of_a_checkpoint():
    assert not pool_of(2).state_dict()
