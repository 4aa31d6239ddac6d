"""What convert writes is what transformers reads: the quantised formats, turned into numbers there and here."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import dsv4
from dsv4.checkpoint.convert import convert
from dsv4.config.presets import smoke
from dsv4.model.init import new_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("interop")
    config = replace(smoke(), hidden_size=128, moe=replace(smoke().moe, expert_dim=64))
    model = new_model(config, seed=9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    dsv4.save_model(model, root / "float32")
    return root


# With the float32 scales of Base they round scale and product to bfloat16, and choices of experts then differ.
@pytest.mark.parametrize(("form", "most", "mean"), [("instruct", 1e-4, 1e-5), ("base", 0.5, 0.1)])
def test_a_converted_model_gives_the_same_logits_there(source, form, most, mean, tmp_path):
    convert(source / "float32", source / form, form)
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        source / form, output_loading_info=True, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert not [name for name in loading["unexpected_keys"] if not name.startswith("mtp.")]
    convert(source / form, tmp_path / "numbers", "bfloat16")  # the dtype in which they hold what they dequantise
    ours = dsv4.load_model(tmp_path / "numbers", "float32")
    ids = torch.randint(0, 512, (1, 140), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, found = theirs.float()(ids).logits, ours(ids).logits
    assert (found - wanted).abs().max() < most * wanted.abs().max()
    assert (found - wanted).abs().mean() < mean * wanted.abs().mean()
