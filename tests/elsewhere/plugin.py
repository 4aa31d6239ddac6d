"""For pytest: tests make their tensors elsewhere. The library is named by the environment.

ELSEWHERE=library.so python -m pytest -p tests.elsewhere.plugin -k "portable and not native and not triton" tests/ops
"""

import os
import sys
from pathlib import Path

import pytest
from torch.utils._device import DeviceContext

import dsv4
from tests.elsewhere.place import NAME, register

register(Path(os.environ["ELSEWHERE"]))

STAYS = {
    "test_stored.py": "stores of experts are files, or memory of the CPU",
    "test_a_gradient_is_the_portable_paths": "compares kernels of the CPU",
    "test_reference_and_fast_paths_agree": "copies a model in a way that torch offers for its own devices only",
    "test_codes_alone_give_the_bits_of_weights_that_are_rounded": "makes its model on the CPU",
    "test_what_does_not_fit_is_an_error": "looks for a device by its name",
    "test_a_matrix_of_rank_one_keeps_its_rank": "computes a rank with numpy",
}
"""Tests of the portable operations that say nothing about another device, and why."""


def pytest_collection_modifyitems(config, items):
    stay = [item for item in items if any(name in item.nodeid for name in STAYS)]
    config.hook.pytest_deselected(items=stay)
    items[:] = [item for item in items if item not in stay]


class MadeElsewhere(DeviceContext):
    """Tensors are made elsewhere, but for those that operations make: these must say themselves where they belong."""

    OPERATIONS = str(Path(dsv4.__file__).parent / "ops")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if sys._getframe(1).f_code.co_filename.startswith(self.OPERATIONS):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture(autouse=True)
def _tensors_are_made_elsewhere():
    with MadeElsewhere(NAME):
        yield
