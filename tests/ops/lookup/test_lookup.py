"""Rows by number, on every path, and the gradient of the table."""

import pytest
import torch

from dsv4 import native
from dsv4.ops.lookup import lookup

BACKENDS = ["reference", "portable", *(["native"] if native.available() else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("ids", [[[4, 0, 6], [6, 6, 1]], [[]]])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_rows(backend, dtype, ids, id_dtype):
    table, ids = torch.arange(35).view(7, 5).to(dtype), torch.tensor(ids).to(id_dtype)
    assert torch.equal(lookup(table, ids, backend=backend), table[ids.long()])
    copied = lookup(table, ids, 3, backend=backend)
    assert torch.equal(copied, torch.stack([table[ids.long()]] * 3, dim=-2))
    assert copied.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_adds_up_over_copies(backend):
    table = torch.randn(5, 3, dtype=torch.float32, requires_grad=True)
    out = lookup(table, torch.tensor([2, 2, 4]), 2, backend=backend)
    out.backward(torch.arange(18.0).view(3, 2, 3))
    wanted = torch.zeros(5, 3)
    wanted[2] = torch.tensor([0.0 + 3 + 6 + 9, 1.0 + 4 + 7 + 10, 2.0 + 5 + 8 + 11])
    wanted[4] = torch.tensor([12.0 + 15, 13.0 + 16, 14.0 + 17])
    assert torch.equal(table.grad, wanted)


def test_bad_input():
    with pytest.raises(ValueError, match="copies is 0; expected at least 1, or None"):
        lookup(torch.zeros(2, 2), torch.zeros(1, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"ids has dtype torch.float32; expected"):
        lookup(torch.zeros(2, 2), torch.zeros(1))
