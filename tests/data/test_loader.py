"""The loader delivers every document once an epoch, as it is, and goes on after a stop as if there had been none."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.data.loader import Loader, check_corpus, order, validation_batches
from dsv4.data.special import SpecialTokens
from dsv4.data.store import TokenStore
from dsv4.data.writer import TokenWriter

SPECIAL = SpecialTokens(bos=0, eos=1, fim_hole=3, fim_begin=4, fim_end=5)
FIRST = 10  # the first id that is text
LENGTHS = [5, 40, 1, 17, 230, 3, 9, 66, 2, 28, 12]
VOCAB = FIRST + sum(LENGTHS)
TOKEN_BYTES = np.where(np.arange(VOCAB) < FIRST, 0, 1 + np.arange(VOCAB) % 7)
SPLITS = {token: (token - 1, token - 2, token - 3) for token in range(FIRST + 5, VOCAB, 4)}
PLAIN = {"fim_rate": 0.0, "split_rate": 0.0}
AUGMENTED = {"fim_rate": 0.5, "split_rate": 0.5}


@dataclass
class Documents:
    """A store in memory."""

    documents: list

    @property
    def num_documents(self):
        return len(self.documents)

    @property
    def num_tokens(self):
        return sum(map(len, self.documents))

    def document(self, index, /):
        return self.documents[index]


def unlike(lengths):
    """A store in which no token comes twice."""
    tokens = np.arange(FIRST, FIRST + sum(lengths), dtype=np.uint16)
    return Documents(np.split(tokens, np.cumsum(lengths)[:-1]))


STORE = unlike(LENGTHS)


def new_loader(store=STORE, *, seed=3, pack_buffer=4, rates=PLAIN, splits=SPLITS, **options):
    return Loader(store, SPECIAL, TOKEN_BYTES, splits, seed=seed, pack_buffer=pack_buffer, **rates, **options)


def same(one, other):
    return (
        (one.token_ids == other.token_ids).all()
        and (one.segment_ids == other.segment_ids).all()
        and (one.targets == other.targets).all()
        and one.num_bytes == other.num_bytes
    )


def segments(batch):
    """The token ids of every run of equal ids, padding left out."""
    for ids, tokens in zip(batch.segment_ids.tolist(), batch.token_ids.tolist(), strict=True):
        borders = [0, *[i for i in range(1, len(ids)) if ids[i] != ids[i - 1]], len(ids)]
        for begin, end in pairwise(borders):
            if ids[begin] != -1:
                yield tokens[begin:end]


def delimited(document):
    return [SPECIAL.bos, *document.tolist(), SPECIAL.eos]


def counted(documents):
    return Counter(token for document in documents for token in delimited(document))


STEPS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([6, 33, 64, 150])), min_size=1, max_size=8)


@given(steps=STEPS, seed=st.integers(0, 99), pack_buffer=st.integers(1, 15))
@settings(max_examples=60, deadline=None)
def test_every_document_once_an_epoch(steps, seed, pack_buffer):
    """At any time, what was delivered and what waits is all of the epochs gone by, and of this one its beginning."""
    loader = new_loader(seed=seed, pack_buffer=pack_buffer)
    seen = Counter()
    for num_rows, sequence in steps:
        for tokens in segments(loader.next_batch(num_rows, sequence)):
            seen.update(tokens)
        state = loader.state()
        for _, document, begin, end in state["buffer"]:
            seen.update(delimited(STORE.document(document))[begin:end])
        begun = order(STORE.num_documents, seed, state["epoch"])[: state["position"]]
        expected = Counter({token: state["epoch"] * n for token, n in counted(STORE.documents).items()})
        assert seen == expected + counted(STORE.document(document) for document in begun)
        for _, document, begin, end in state["buffer"]:
            seen.subtract(delimited(STORE.document(document))[begin:end])


@given(steps=STEPS, pack_buffer=st.integers(1, 15))
@settings(max_examples=60, deadline=None)
def test_targets_are_the_next_token_of_the_same_document(steps, pack_buffer):
    follows = {pair for document in STORE.documents for pair in pairwise(delimited(document))}
    loader = new_loader(pack_buffer=pack_buffer)
    for num_rows, sequence in steps:
        batch = loader.next_batch(num_rows, sequence)
        assert batch.token_ids.shape == (num_rows, sequence)
        has_target = batch.targets >= 0
        pairs = set(zip(batch.token_ids[has_target].tolist(), batch.targets[has_target].tolist(), strict=True))
        assert pairs <= follows
        for tokens in segments(batch):
            assert set(pairwise(tokens)) <= follows  # so no id joins two documents
        assert batch.num_targets == sum(len(tokens) - 1 for tokens in segments(batch))
        assert batch.num_bytes == sum(TOKEN_BYTES[tokens[1:]].sum() for tokens in segments(batch))


def test_the_order_of_the_store_is_kept_where_it_is_meant():
    loader = new_loader(pack_buffer=1, is_shuffled=False)
    begun = [tokens[1] for _ in range(9) for tokens in segments(loader.next_batch(1, 100)) if tokens[0] == SPECIAL.bos]
    firsts = [int(document[0]) for document in STORE.documents]
    assert begun[: 2 * len(firsts)] == (firsts * 2)[: len(begun)]
    assert len(begun) > len(firsts)  # the second epoch in the same order
    other = new_loader(pack_buffer=1, is_shuffled=False)
    other.next_batch(2, 64)
    other.load_state(new_loader(pack_buffer=1, is_shuffled=False, seed=8).state())
    assert same(other.next_batch(9, 100), new_loader(pack_buffer=1, is_shuffled=False).next_batch(9, 100))


def test_what_is_predicted_is_asked_of_each_piece():
    loader = new_loader(is_target=lambda tokens: tokens % 2 == 0)
    batch = loader.next_batch(4, 64)
    targets = batch.targets[batch.targets >= 0]
    assert (targets % 2 == 0).all()
    assert len(targets) > 50
    (first,) = validation_batches(
        STORE, SPECIAL, TOKEN_BYTES, num_rows=9, sequence=150, num_tokens=200, is_target=lambda tokens: tokens < 0
    )
    assert first.num_targets == 0


@pytest.mark.parametrize("rates", [PLAIN, AUGMENTED])
@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_the_next_token_follows_a_stop(rates, stop):
    steps = [(2, 33), (1, 33), (3, 33), (2, 64), (1, 150), (5, 150), (2, 6), (7, 64), (4, 64), (2, 33), (3, 150)]
    loader = new_loader(rates=rates)
    for num_rows, sequence in steps[:stop]:
        loader.next_batch(num_rows, sequence)
    state = json.loads(json.dumps(loader.state()))
    resumed = new_loader(rates=rates)
    resumed.next_batch(3, 40)  # something else went before
    resumed.load_state(state)
    assert resumed.state() == state
    for num_rows, sequence in steps[stop:]:
        assert same(loader.next_batch(num_rows, sequence), resumed.next_batch(num_rows, sequence))
    assert loader.state() == resumed.state()
    assert loader.state()["epoch"] >= 2


def test_a_state_from_before_is_untouched_by_what_comes_after():
    loader = new_loader(rates=AUGMENTED)
    loader.next_batch(3, 64)
    before = loader.state()
    ahead = [loader.next_batch(2, 64) for _ in range(5)]
    loader.load_state(before)
    assert all(same(batch, loader.next_batch(2, 64)) for batch in ahead)


def test_the_state_names_pieces_and_holds_no_tokens():
    loader = new_loader(pack_buffer=6)
    for _ in range(10):
        state = loader.state()
        assert state.keys() == {"epoch", "position", "buffer"}
        assert len(state["buffer"]) <= 6
        assert all(len(piece) == 4 and piece[2] < piece[3] for piece in state["buffer"])
        loader.next_batch(4, 64)


def test_a_state_of_other_data_is_refused_and_changes_nothing():
    loader = new_loader()
    loader.next_batch(2, 33)
    before = loader.state()
    other = new_loader(unlike([LENGTHS[0] + 1, *LENGTHS[1:]]), pack_buffer=11)
    other.next_batch(1, 2)
    with pytest.raises(ValueError, match="document 0 has 8 tokens, and it has 7; expected the corpus, seed and rates"):
        loader.load_state(other.state())
    more = new_loader(unlike([*LENGTHS, 3, 3, 3]), pack_buffer=14)
    more.next_batch(1, 2)
    with pytest.raises(ValueError, match=r"waits for document 1[123]; expected one of the store's 11"):
        loader.load_state(more.state())
    assert loader.state() == before


def test_each_epoch_has_an_order_of_its_own():
    orders = [order(50, 3, 0), order(50, 3, 1), order(50, 4, 0)]
    assert all(sorted(documents) == [*range(50)] for documents in orders)
    assert len({tuple(documents) for documents in orders}) == 3
    assert (order(50, 3, 1) == orders[1]).all()


def test_an_order_stays_as_it_is():
    """Another order would give a resumed run other documents. Computed once, with numpy 2.4.6."""
    assert order(7, 3, 2).tolist() == [0, 1, 2, 6, 3, 5, 4]


def test_another_epoch_augments_a_document_in_another_way():
    loader = new_loader(unlike([60]), pack_buffer=1, rates={"fim_rate": 1.0, "split_rate": 0.0})
    shown = [loader.next_batch(1, 65).token_ids[0].tolist() for _ in range(3)]
    assert all(tokens[:2] == [SPECIAL.bos, SPECIAL.fim_begin] and tokens[-1] == SPECIAL.eos for tokens in shown)
    assert len({tuple(tokens) for tokens in shown}) == 3
    assert len({tuple(sorted(tokens)) for tokens in shown}) == 1


def test_a_cut_document_goes_on_without_bos():
    loader = new_loader(unlike([10]), pack_buffer=1)
    batch = loader.next_batch(2, 8)
    text = [*range(FIRST, FIRST + 10)]
    assert batch.token_ids.tolist() == [[0, *text[:7]], [*text[7:], 1, 0, *text[:3]]]
    assert batch.segment_ids.tolist() == [[0] * 8, [0] * 4 + [1] * 4]
    assert batch.targets.tolist() == [[*text[:7], -1], [*text[8:], 1, -1, *text[:3], -1]]


def validate(store=STORE, *, num_rows=3, sequence=33, num_tokens=150):
    return [
        *validation_batches(
            store, SPECIAL, TOKEN_BYTES, num_rows=num_rows, sequence=sequence, num_tokens=num_tokens
        )
    ]  # fmt: skip


def test_validation_is_always_the_same():
    first, second = validate(), validate()
    assert len(first) == len(second) == 2
    assert all(same(one, other) for one, other in zip(first, second, strict=True))
    assert [batch.token_ids.shape for batch in first] == [(3, 33), (2, 33)]


@pytest.mark.parametrize("num_tokens", [1, 61, 150])
def test_validation_text_is_the_same_whatever_the_rows(num_tokens):
    shapes = [(3, 33), (1, 33), (2, 150), (5, 8)]
    texts = []
    for num_rows, sequence in shapes:
        batches = validate(num_rows=num_rows, sequence=sequence, num_tokens=num_tokens)
        texts.append(sorted(token for batch in batches for tokens in segments(batch) for token in tokens))
    assert len(texts[0]) == num_tokens
    assert all(text == texts[0] for text in texts)


def test_validation_gives_all_there_is_and_no_more():
    batches = validate(num_tokens=10**6)
    seen = Counter(token for batch in batches for tokens in segments(batch) for token in tokens)
    assert seen == counted(STORE.documents)


def test_an_empty_store_is_refused():
    with pytest.raises(ValueError, match="the store has 0 documents; expected at least 1"):
        new_loader(Documents([]))
    with pytest.raises(ValueError, match="the store has 0 documents; expected at least 1"):
        validate(Documents([]))


def test_a_corpus_smaller_than_a_batch_is_refused():
    available = sum(LENGTHS) + 2 * len(LENGTHS)
    check_corpus(STORE, 5, available)
    message = (
        rf"the corpus has {available} tokens in 11 documents; expected at least one batch: 436 tokens, 87 rows of 5"
    )
    with pytest.raises(ValueError, match=message):
        check_corpus(STORE, 5, available + 1)
    with pytest.raises(ValueError, match="500 tokens, 1 rows of 500"):
        check_corpus(STORE, 500, 100)


def test_batches_from_a_store_on_disk(tmp_path):
    directory = tmp_path / "train"
    directory.mkdir()
    with TokenWriter(directory, vocab_size=VOCAB, tokenizer_sha256="0" * 64, shard_tokens=100) as writer:
        for document in STORE.documents:
            writer.append(document, num_bytes=int(TOKEN_BYTES[document].sum()))
        writer.finish()
    stored = TokenStore.open(tmp_path, "train")
    from_disk, from_memory = new_loader(stored, rates=AUGMENTED), new_loader(rates=AUGMENTED)
    assert all(same(from_disk.next_batch(3, 64), from_memory.next_batch(3, 64)) for _ in range(6))
