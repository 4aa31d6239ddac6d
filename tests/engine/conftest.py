"""Toy models and random prompts: one in which every idea matters, and some so small that thousands of requests run.

Their engines get no more memory than they need: the default is a GiB, which takes a second to make.
"""

from dataclasses import replace

import pytest
import torch

import dsv4
from dsv4.checkpoint.convert import convert
from dsv4.config.engine import Limits
from dsv4.data.tokenizer import num_ids, train_tokenizer
from dsv4.testing.toys import flash_like, tiny_model, toy_model


@pytest.fixture(scope="session")
def model():
    return toy_model(flash_like()).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def prompts(model):
    """Shorter and longer than the window, a page, and two pages; two of them begin alike."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(2, model.config.vocab_size, (5, 320), generator=generator).tolist()
    return [ids[0][:5], ids[1][:129], ids[2][:300], ids[3][:40], ids[2][:260] + ids[4][:9]]


@pytest.fixture(scope="session")
def tiny():
    """A window layer, a CSA layer and an MTP block over 11 tokens, of which 1 ends a text; likelihoods differ."""
    return tiny_model(11)


@pytest.fixture(scope="session")
def writer(tokenizer):
    """The same over the tokens of a tokenizer."""
    return tiny_model(num_ids(tokenizer))


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes, and a few pairs of them."""
    return train_tokenizer(iter(["for word in words:\n    print(word)\n", "caf\u00e9 \u4f60\u597d\n"] * 4), 290)


@pytest.fixture(scope="session")
def tiny_saved(tiny, tmp_path_factory):
    """The small one as a directory, for other processes."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    dsv4.save_model(tiny, directory)
    return directory


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A toy as the release is stored, whose widths are whole groups of codes."""
    root, config = tmp_path_factory.mktemp("released"), flash_like()
    config = replace(config, hidden_size=96, moe=replace(config.moe, expert_dim=64))
    dsv4.save_model(toy_model(config), root / "float32")
    convert(root / "float32", root / "instruct", "instruct")
    return root / "instruct"


@pytest.fixture(scope="session")
def small():
    """Limits with memory for a toy."""

    def limits(**options):
        return Limits(**{"cache_bytes": 2**21, **options})

    return limits
