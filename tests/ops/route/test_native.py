"""The router's C kernel against the portable path, to the bit over neighbours and threads."""

import pytest
import torch

from dsv4 import native
from dsv4.ops.route import route

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")

SCALE = 1.5


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_choices"), [(1, 1, 1), (7, 5, 3), (33, 19, 6), (0, 4, 2)])
def test_as_the_portable_path(num_tokens, num_experts, num_choices):
    logits, bias = 8 * torch.randn(num_tokens, num_experts), torch.randn(num_experts)
    chosen, weights = route(logits, bias, None, num_choices, SCALE, backend="native")
    wanted_chosen, wanted_weights = route(logits, bias, None, num_choices, SCALE)
    assert torch.equal(chosen, wanted_chosen)
    torch.testing.assert_close(weights, wanted_weights, rtol=3e-6, atol=0)  # a few roundings of float32


def test_a_table_gives_the_choice():
    logits, chosen = torch.randn(5, 9), torch.tensor([[0, 8], [3, 1], [2, 7], [8, 0], [4, 5]])
    got, weights = route(logits, None, chosen, 2, SCALE, backend="native")
    assert torch.equal(got, chosen)
    torch.testing.assert_close(weights, route(logits, None, chosen, 2, SCALE)[1], rtol=3e-6, atol=0)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[-1e30, -80.0, 0.0, 20.0, 21.0, 3e38]])
    chosen, weights = route(logits, torch.zeros(6), None, 6, SCALE, backend="native")
    assert chosen.tolist() == [[5, 4, 3, 2, 0, 1]]
    assert weights.isfinite().all()


def test_equal_scores_go_to_the_smaller_expert():
    chosen, _ = route(torch.zeros(1, 5), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), None, 4, SCALE, backend="native")
    assert chosen.tolist() == [[1, 2, 4, 0]]


def test_a_token_is_the_same_alone():
    logits, bias = torch.randn(23, 17), torch.randn(17)
    together = route(logits, bias, None, 4, SCALE, backend="native")
    torch.set_num_threads(2)
    assert all(
        torch.equal(a, b) for a, b in zip(route(logits, bias, None, 4, SCALE, backend="native"), together, strict=True)
    )
    alone = [route(row[None], bias, None, 4, SCALE, backend="native") for row in logits]
    for part in range(2):
        assert torch.equal(torch.cat([a[part] for a in alone]), together[part])


@pytest.mark.parametrize("both", [True, False])
def test_bias_and_table_exclude_each_other(both):
    bias, chosen = (torch.zeros(4), torch.zeros(2, 1, dtype=torch.int64)) if both else (None, None)
    with pytest.raises(ValueError, match="bias and chosen are both given or both None; expected one of them"):
        route(torch.zeros(2, 4), bias, chosen, 1, SCALE)
