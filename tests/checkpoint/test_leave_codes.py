"""Codes that stay in the files, or in a pool of experts: the bits of codes in memory, and nothing copied but wo_a."""

import os
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.checkpoint.convert import convert
from dsv4.checkpoint.leave import FileExperts
from dsv4.checkpoint.names import released_tensors
from dsv4.checkpoint.source import open_source
from dsv4.checkpoint.tensor_file import DTYPES
from dsv4.config.engine import Limits
from dsv4.config.presets import smoke
from dsv4.engine.build import build_cache, model_key
from dsv4.model.expert_store import StoredExperts
from dsv4.model.init import new_model
from dsv4.ops.experts import coded

CONFIG = replace(smoke(), hidden_size=96, moe=replace(smoke().moe, expert_dim=64))
LAYERS, E = CONFIG.num_layers + len(CONFIG.mtp_kinds), CONFIG.moe.num_experts
# Bytes of an expert: three matrices of 96 x 64 in codes, and a scale for 32 of a row, or one of float32 for all
SLOT = {"instruct": 3 * (96 * 64 // 2 + 96 * 64 // 32), "base": 3 * (96 * 64 + 64)}
READ = {"instruct": SLOT["instruct"], "base": 3 * (96 * 64 + 4)}  # without what fills up to whole 64
SLOTS = [None, 1, 2, 5, LAYERS * E + 3]
FORMS = ["instruct", "base"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model as Flash and as its base are stored."""
    root, model = tmp_path_factory.mktemp("saved"), new_model(CONFIG, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    dsv4.save_model(model, root / "float32")
    for form in FORMS:
        convert(root / "float32", root / form, form)
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """A copy, to spoil."""
    return shutil.copytree(folders / "base", tmp_path / "base")


def load(folder, slots=None, weights="mapped", **options):
    pool = None if slots is None else slots * SLOT[folder.name]
    return dsv4.load_model(folder, "released", weights=weights, expert_bytes=pool, **options)


def logits(model, T=60):
    ids = torch.randint(0, CONFIG.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def spoil(folder, name, change):
    """Write one tensor of a checkpoint anew."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, file)
            return file
    raise AssertionError(f"{name} is in no file of {folder}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slots", SLOTS)
def test_the_logits_of_codes_in_memory(folders, form, slots):
    wanted = logits(dsv4.load_model(folders / form, "released"))
    for weights in ("mapped",) if slots is None else ("mapped", "memory"):
        model = load(folders / form, slots, weights)
        assert torch.equal(logits(model), wanted)
        assert model.rounds
        assert sum(isinstance(module, StoredExperts) for module in model.modules()) == LAYERS


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_the_logits_with_other_backends(folders, backend):
    wanted = logits(dsv4.load_model(folders / "instruct", "released", backend=backend), T=6)
    for slots in (None, 2):
        assert torch.equal(logits(load(folders / "instruct", slots, backend=backend), T=6), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("slots", "weights"), [(None, "mapped"), (2, "mapped"), (2, "memory")])
def test_every_tensor_is_there_and_saved_again(folders, form, slots, weights, tmp_path):
    in_memory = dsv4.load_model(folders / form, "released")
    wanted = dict(released_tensors(in_memory))
    model = load(folders / form, slots, weights)
    found = dict(released_tensors(model))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    dsv4.save_model(in_memory, tmp_path / "wanted")
    dsv4.save_model(model, tmp_path / "again")
    assert len(list((tmp_path / "wanted").iterdir())) > 3
    for file in (tmp_path / "wanted").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_of_prefixes_is_for_the_model_wherever_its_codes_are(folders):
    def key(model):
        return model_key(model, None, build_cache(model, Limits(max_requests=1, cache_bytes=10**6), 256))

    wanted = key(dsv4.load_model(folders / "instruct", "released"))
    assert key(load(folders / "instruct")) == key(load(folders / "instruct", 3)) == wanted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slots", [None, 3])
def test_nothing_is_copied_but_the_values_of_wo_a(folders, form, slots):
    """And what begins between two numbers of its dtype, as in a file of this toy some do after codes."""
    model = load(folders / form, slots)
    with open("/proc/self/maps") as maps:
        fields = [line.split()[0] for line in maps if str(folders / form) in line]
    ranges = [tuple(int(end, 16) for end in field.split("-")) for field in fields]

    def is_mapped(tensor):
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(first <= begin and end <= last for first, last in ranges)

    found, files = dict(released_tensors(model)), open_source(folders / form).files
    begins_between = {n for n in found if files[n].tensors[n].begin % DTYPES[files[n].tensors[n].dtype].itemsize}
    assert {name for name, tensor in found.items() if not is_mapped(tensor)} == begins_between
    assert not any(found[name].dtype == torch.uint8 for name in begins_between)
    buffers = {name: tensor for name, tensor in model.named_buffers() if not is_mapped(tensor)}
    wo_a = {name for name in buffers if name.endswith("wo_a.values")}
    assert len(wo_a) == LAYERS
    pool = {name for name in buffers if name.endswith("pool.memory")}
    assert sum(buffers[name].nbytes for name in pool) == (0 if slots is None else slots * SLOT[form])
    assert buffers.keys() - wo_a - pool - begins_between == set()


@pytest.mark.parametrize("form", FORMS)
def test_each_expert_is_read_once_a_chunk(folders, form, monkeypatch):
    model, read, whole = load(folders / form, 2), Counter(), FileExperts.read_

    def counted(source, expert, out):
        read[source.names[expert]] += 1
        whole(source, expert, out)

    monkeypatch.setattr(FileExperts, "read_", counted)
    logits(model)
    assert set(read.values()) == {1}
    assert len(read) > CONFIG.num_layers * CONFIG.moe.experts_per_token  # more than a token chooses
    assert all(len(names) == 6 for names in read)
    assert model.expert_pool.counts == (0, len(read), len(read) * READ[form])


@pytest.mark.parametrize("slots", [None, 2])
def test_the_kernel_computes_with_codes_of_the_files(folders, slots, monkeypatch):
    model = load(folders / "instruct", slots)
    monkeypatch.setattr(coded, "stored_experts", lambda *_: pytest.fail("plain maps of codes ran"))
    logits(model)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"weights": "mapped"}, {"expert_bytes": 2**20}])
def test_numbers_made_of_codes_are_in_no_file(folders, precision, options):
    with pytest.raises(ValueError, match=f"whose weights are codes, with precision '{precision}'; expected 'released'"):
        dsv4.load_model(folders / "instruct", precision, **options)


@pytest.mark.parametrize("form", FORMS)
def test_a_pool_smaller_than_an_expert_is_an_error(folders, form):
    with pytest.raises(
        ValueError, match=f"expert_bytes is {SLOT[form] - 1}; expected at least the {SLOT[form]} of one"
    ):
        dsv4.load_model(folders / form, "released", expert_bytes=SLOT[form] - 1)


@pytest.mark.parametrize("name", ["layers.1.ffn.experts.3.w2.scale", "layers.1.attn.wq_a.scale"])
@pytest.mark.parametrize(("slots", "weights"), [(None, "mapped"), (2, "mapped"), (2, "memory")])
def test_a_scale_that_is_no_number_is_an_error_before_anything_runs(folder, name, slots, weights):
    file = spoil(folder, name, lambda scales: scales * torch.nan)
    with pytest.raises(ValueError, match=f"{name} in {file}: scales holds nan"):
        load(folder, slots, weights)


def test_scales_of_two_dtypes_are_an_error(folder):
    spoil(folder, "layers.1.ffn.experts.3.w2.scale", lambda scales: scales.to(torch.float8_e8m0fnu))
    with pytest.raises(ValueError, match="experts have scales stored as F32 and F8_E8M0; expected one dtype for all"):
        load(folder)
    with pytest.raises(ValueError, match=r"experts.3.w2.scale is read as torch.uint8; expected torch.float32"):
        dsv4.load_model(folder, "released")


def test_a_file_that_changes_later_is_an_error_of_the_pool(folder):
    model = load(folder, 1)
    for file in folder.glob("*.safetensors"):
        os.utime(file, ns=(0, 0))
    with pytest.raises(OSError, match="has changed since it was opened"):
        logits(model, T=5)
