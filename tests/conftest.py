"""One thread, and a seed from the test's own name, so that no test depends on another."""

import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded_by_name(request):
    torch.set_num_threads(1)
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
