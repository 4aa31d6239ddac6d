"""Documents packed into rows do not see each other: values, gradients, and the tables that keep them apart."""

import pytest
import torch

from dsv4.model import rows
from dsv4.testing.toys import flash_like, pro_like, toy_model, toy_token_ids

# Packing changes the sizes of matrix products and so the order of float32 sums: see test_parity.
TOLERANCE = 6e-5
# Relative norm: 2e-5 is seen, but for the scale of the first mix, three numbers. The streams are equal there, so
# that its gradient nearly cancels, and 2e-4 is seen. A document that leaks into its neighbour gives 0.1 and more.
GRADIENT_TOLERANCE = 5e-4
TOYS = {"flash_like": flash_like, "pro_like": pro_like}
LENGTHS = [  # a row each: below, at and above the window's, a CSA block's and an HCA block's length
    [5, 128, 1, 130, 3, 129, 4, 127],
    [127, 1, 1, 4, 264, 4, 3, 123],
]
IDS = [[0, 1, 2, 3, 4, 5, 6, 7], [9, 2, 9, 2, 9, 2, 9, 2]]  # ids come back: only a change of id counts


def documents():
    """Row, first token and length of every document."""
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            yield row, start, length
            start += length


@pytest.fixture(scope="module", params=TOYS)
def packed(request):
    config = TOYS[request.param]()
    model = toy_model(config)
    segment_ids = torch.stack(
        [torch.tensor(ids).repeat_interleave(torch.tensor(lengths)) for ids, lengths in zip(IDS, LENGTHS, strict=True)]
    )
    token_ids = toy_token_ids(config, *segment_ids.shape)
    return model, token_ids, segment_ids


@pytest.fixture(scope="module")
def apart(packed):
    """Packed logits, every document's own, and both gradients of one random combination of all of them."""
    model, token_ids, segment_ids = packed
    output = model(token_ids, segment_ids=segment_ids, mtp=True)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(output.logits.shape, generator=generator)
    mtp_weights = torch.randn(output.logits.shape, generator=generator)
    separate, loss, packed_loss = [], 0, 0
    for row, start, length in documents():
        here = (slice(row, row + 1), slice(start, start + length))
        alone = model(token_ids[here], mtp=length > 1)
        separate.append(alone)
        loss = loss + (alone.logits * weights[here]).sum()
        packed_loss = packed_loss + (output.logits[here] * weights[here]).sum()
        if length > 1:
            inside = (here[0], slice(start, start + length - 1))
            loss = loss + (alone.mtp_logits * mtp_weights[inside]).sum()
            packed_loss = packed_loss + (output.mtp_logits[inside] * mtp_weights[inside]).sum()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and ".indexer." not in name}
    gradients = [torch.autograd.grad(total, parameters.values()) for total in (packed_loss, loss)]
    return output, separate, dict(zip(parameters, zip(*gradients, strict=True), strict=True))


def test_logits_are_those_of_separate_documents(apart):
    output, separate, _ = apart
    for (row, start, length), alone in zip(documents(), separate, strict=True):
        difference = output.logits[row, start : start + length] - alone.logits[0]
        assert difference.abs().max() < TOLERANCE, (row, start, length)


def test_mtp_logits_inside_a_document_are_its_own(apart):
    output, separate, _ = apart
    for (row, start, length), alone in zip(documents(), separate, strict=True):
        if length > 1:
            difference = output.mtp_logits[row, start : start + length - 1] - alone.mtp_logits[0]
            assert difference.abs().max() < TOLERANCE, (row, start, length)


def test_gradients_are_the_sum_of_those_of_separate_documents(apart):
    errors = {name: float((ours - sums).norm() / sums.norm()) for name, (ours, sums) in apart[2].items()}
    assert {name: error for name, error in errors.items() if not error < GRADIENT_TOLERANCE} == {}


def test_dense_logits_are_those_of_separate_documents_too(packed):
    model, token_ids, segment_ids = packed
    with torch.no_grad():
        together = model(token_ids, segment_ids=segment_ids, dense=True).logits
        for row, start, length in documents():
            alone = model(token_ids[row : row + 1, start : start + length], dense=True).logits[0]
            assert (together[row, start : start + length] - alone).abs().max() < TOLERANCE, (row, start, length)


@pytest.mark.parametrize("lengths", [[1] * 6, [3, 3], [2, 1, 3], [4, 2]], ids=str)
def test_documents_too_short_for_an_entry(packed, lengths):
    model, token_ids, _ = packed
    segment_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    output = model(token_ids[:, :6], segment_ids=segment_ids, mtp=True)
    start = 0
    for length in lengths:
        alone = model(token_ids[:, start : start + length]).logits
        assert (output.logits[:, start : start + length] - alone).abs().max() < TOLERANCE
        start += length
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(output.logits.sum() + output.mtp_logits.sum(), parameters, allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)


def test_one_document_a_row_is_no_packing(packed):
    model, token_ids, _ = packed
    with torch.no_grad():
        one = model(token_ids, segment_ids=torch.full_like(token_ids, 5), mtp=True)
        none = model(token_ids, mtp=True)
    assert (one.logits - none.logits).abs().max() < TOLERANCE
    assert (one.mtp_logits - none.mtp_logits).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "changed", [0, 1, 3, 6, 8, 12], ids=lambda i: "row_{}_from_{}_of_{}".format(*list(documents())[i])
)
def test_changing_a_document_changes_no_bit_of_another(packed, changed):
    model, token_ids, segment_ids = packed
    row, start, length = list(documents())[changed]
    others = torch.ones_like(token_ids, dtype=torch.bool)
    others[row, start : start + length] = False
    other_ids = token_ids.clone()
    other_ids[row, start : start + length] = (other_ids[row, start : start + length] + 1) % model.config.vocab_size
    with torch.no_grad():
        before = model(token_ids, segment_ids=segment_ids).logits
        after = model(other_ids, segment_ids=segment_ids).logits
    assert torch.equal(before[others], after[others])
    assert (before != after)[~others].any(dim=-1).all()


def lists(blocks):
    return {name: None if value is None else value.tolist() for name, value in vars(blocks).items()}


def test_tables_of_packed_rows():
    segment_ids = torch.tensor(
        [
            [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2],
            [4, 4, 4, 4, 4, 4, 4, 4, 3, 4, 4, 4],
            [1, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 2],
        ]
    )
    places = rows.packed(segment_ids, [4])
    assert places.positions.tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 1, 2],
        [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2],
    ]
    assert places.raw_begin.tolist() == [
        [0, 0, 0, 0, 0, 5, 5, 5, 5, 9, 9, 9],
        [0, 0, 0, 0, 0, 0, 0, 0, 8, 9, 9, 9],
        [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9],
    ]
    assert lists(places.blocks[4]) == {
        "begin": [
            [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2],
            [0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ],
        "end": [
            [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2],
            [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ],
        "entry_positions": [[0, 0], [0, 4], [0, 0]],
        "tokens": [[[0, 1, 2, 3], [5, 6, 7, 8]], [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 0, 0, 0], [0, 0, 0, 0]]],
        "is_first": [[True, True], [True, False], [True, True]],
    }


def test_packed_rows_without_a_whole_block_have_no_entries():
    places = rows.packed(torch.tensor([[0, 0, 0, 1, 1, 1]]), [4, 128])
    for ratio in (4, 128):
        assert places.blocks[ratio].tokens.shape == (1, 0, ratio)
        assert not places.blocks[ratio].end.any()


@pytest.mark.parametrize(
    ("length", "num_tokens", "positions", "end", "entry_positions"),
    [
        (0, 3, [0, 1, 2], [0, 0, 0], []),
        (0, 4, [0, 1, 2, 3], [0, 0, 0, 1], [0]),
        (3, 1, [3], [1], [0]),
        (3, 6, [3, 4, 5, 6, 7, 8], [1, 1, 1, 1, 2, 2], [0, 4]),
        (6, 3, [6, 7, 8], [1, 2, 2], [4]),
        (8, 2, [8, 9], [2, 2], []),
    ],
)
def test_tables_of_continued_rows(length, num_tokens, positions, end, entry_positions):
    places = rows.continued(2, num_tokens, length, [4], torch.device("cpu"))
    assert places.positions.tolist() == [positions] * 2
    assert places.raw_begin.tolist() == [[0] * num_tokens] * 2
    assert lists(places.blocks[4]) == {
        "begin": [[0] * num_tokens] * 2,
        "end": [end] * 2,
        "entry_positions": [entry_positions] * 2,
        "tokens": None,
        "is_first": None,
    }
