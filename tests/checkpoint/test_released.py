"""Checkpoints in codes: into a model that keeps them, into numbers, and back to the same bytes."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import dsv4
from dsv4.checkpoint.convert import convert
from dsv4.config.presets import smoke
from dsv4.model.init import new_model
from dsv4.model.precision import is_packed, pack, set_rounding


@pytest.fixture(scope="module")
def model():
    """As training holds it: float32 weights, bfloat16 activations."""
    config = replace(smoke(), hidden_size=96, moe=replace(smoke().moe, expert_dim=64))
    made = new_model(config, seed=5)
    made.activation_dtype = torch.bfloat16
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return made


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """The model in every storage."""
    root = tmp_path_factory.mktemp("released")
    dsv4.save_model(model, root / "float32")
    for form in ("instruct", "base", "bfloat16"):
        convert(root / "float32", root / form, form)
    return root


def stored(folder):
    """Every tensor's bytes and dtype."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                tensors[name] = tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return tensors


def logits(model, *, count=140):
    ids = torch.randint(0, model.config.vocab_size, (2, count), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def test_our_weights_stored_as_the_release_compute_what_training_computed(model, folders):
    """To the bit: FP4 and FP8 codes, bfloat16 and float32 islands."""
    trained = copy.deepcopy(model)
    set_rounding(trained, "fp4")
    loaded = dsv4.load_model(folders / "instruct", "released")
    assert is_packed(loaded)
    assert torch.equal(logits(trained), logits(loaded))
    assert torch.equal(logits(loaded), logits(pack(copy.deepcopy(model))))


@pytest.mark.parametrize("form", ["instruct", "base"])
def test_loading_and_saving_gives_the_same_bytes(folders, form, tmp_path):
    dsv4.save_model(dsv4.load_model(folders / form, "released"), tmp_path / "again")
    assert stored(tmp_path / "again") == stored(folders / form)
    assert (tmp_path / "again" / "config.json").read_bytes() == (folders / form / "config.json").read_bytes()


@pytest.mark.parametrize("form", ["instruct", "base"])
def test_numbers_are_those_of_the_codes(folders, form, tmp_path):
    convert(folders / form, tmp_path / "numbers", "bfloat16")
    wanted = dict(dsv4.load_model(tmp_path / "numbers", "bfloat16").named_parameters())
    found = dict(dsv4.load_model(folders / form, "bfloat16").named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_numbers_in_float32_round_nothing(folders):
    exact = dsv4.load_model(folders / "instruct", "float32")
    assert not exact.rounds
    assert all(parameter.dtype == torch.float32 for parameter in exact.parameters())
    released = logits(dsv4.load_model(folders / "instruct", "released"))
    assert 0 < (logits(exact) - released).abs().max() < 0.5 * released.abs().max()


@pytest.mark.parametrize("form", ["instruct", "base"])
def test_codes_stay_packed_in_memory(folders, form):
    held = dsv4.load_model(folders / form, "released")
    tensors = {**dict(held.named_parameters()), **dict(held.named_buffers())}
    extra = sum(t.nbytes for name, t in tensors.items() if name.endswith("wo_a.values"))
    in_files = sum(len(data) for _, data in stored(folders / form).values())
    assert sum(t.nbytes for t in tensors.values()) - extra == in_files


@pytest.mark.parametrize("precision", ["released", "bfloat16"])
def test_progress_is_told_to_the_last_byte(folders, precision):
    told = []
    dsv4.load_model(folders / "instruct", precision, tell=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == sum(len(data) for _, data in stored(folders / "instruct").values())


def test_what_has_no_codes_cannot_be_kept_in_them(folders):
    with pytest.raises(
        ValueError, match=r"precision is 'released' for .*whose weights are no codes; expected 'bfloat16'"
    ):
        dsv4.load_model(folders / "bfloat16", "released")


@pytest.mark.parametrize("options", [{"weights": "mapped"}, {"expert_bytes": 2**20}])
def test_codes_do_not_stay_in_files(folders, options):
    with pytest.raises(ValueError, match=r"weights are in codes; expected them in memory"):
        dsv4.load_model(folders / "instruct", "released", **options)
