"""One thread, a seed from the test's own name, so that no test depends on another, and Triton on the CPU if need be."""

import os
import zlib

import pytest
import torch

from dsv4.device import accelerator
from tests.triton_interpreter import correct_interpreter

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as the operations set it; tests import kernels themselves
if accelerator() is None:  # before anything imports triton: without a GPU its kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
    correct_interpreter()


@pytest.fixture(autouse=True)
def _seeded_by_name(request):
    torch.set_num_threads(1)
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
