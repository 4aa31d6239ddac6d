"""What is formed again instead of being kept."""

import torch

from dsv4.ops.recompute import Recomputed


def test_views_of_what_is_formed_again_are_the_same_views():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    formed = []

    def again():
        formed.append(x.detach() * 2)
        return formed[-1]

    def products(y):
        return (w @ y).sum() + (w[:, 1:] @ y[1:, ::2]).square().sum() + (y[2] * w[0, 0]).sum()

    y = x * 2
    with Recomputed(again).instead_of(y):
        loss = products(y)
    found = torch.autograd.grad(loss, (x, w))
    wanted = torch.autograd.grad(products(x * 2), (x, w))
    assert len(formed) == 1
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_nothing_is_formed_where_nothing_is_kept():
    def again():
        raise AssertionError("formed again")

    y = torch.randn(3)
    with Recomputed(again).instead_of(y):
        w = torch.randn(3, requires_grad=True)
        torch.autograd.grad((y * w).sum(), w)
