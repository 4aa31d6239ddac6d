"""A toy model, random prompts, and a tokenizer with one token for each byte."""

import pytest
import torch

from dsv4.testing.toys import flash_like, toy_model


@pytest.fixture(scope="session")
def model():
    return toy_model(flash_like()).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def prompts(model):
    """Shorter and longer than the window, a page, and two pages; two of them begin alike."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(2, model.config.vocab_size, (5, 320), generator=generator).tolist()
    return [ids[0][:5], ids[1][:129], ids[2][:300], ids[3][:40], ids[2][:260] + ids[4][:9]]
