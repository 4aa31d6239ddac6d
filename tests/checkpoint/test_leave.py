"""Models whose weights, or experts alone, stay in the files: the same bits, no copies, no gradient, clear errors."""

import gc
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsv4
from dsv4.checkpoint.leave import FileExperts
from dsv4.checkpoint.names import released_tensors
from dsv4.config.engine import Limits
from dsv4.engine.build import build_cache, model_key
from dsv4.model.expert_pool import ExpertPool
from dsv4.model.expert_store import MemoryExperts, StoredExperts
from dsv4.model.transformer import Transformer
from dsv4.ops.experts import portable
from dsv4.testing.toys import flash_like, toy_model, toy_token_ids

CONFIG = flash_like()
NUM_EXPERTS = 7 * CONFIG.moe.num_experts  # of six layers and the MTP block
FLOATS = 3 * CONFIG.hidden_size * CONFIG.moe.expert_dim  # of an expert
SLOTS = [1, 2, 5, 20, NUM_EXPERTS + 3]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The toy, stored in float32 and in bfloat16."""
    root, model = tmp_path_factory.mktemp("saved"), toy_model(CONFIG)
    rounded = Transformer(CONFIG, weight_dtype=torch.bfloat16, activation_dtype=torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    dsv4.save_model(model, root / "float32")
    dsv4.save_model(rounded, root / "bfloat16")
    return {"float32": root / "float32", "bfloat16": root / "bfloat16"}


@pytest.fixture
def directory(directories, tmp_path):
    """A copy of the float32 one, to spoil."""
    return shutil.copytree(directories["float32"], tmp_path / "toy")


def stored(model):
    return [module for module in model.modules() if isinstance(module, StoredExperts)]


def everything(model):
    """Every tensor by its released name."""
    return dict(released_tensors(model))


def logits(model, T=70):
    with torch.no_grad():
        return model(toy_token_ids(CONFIG, 2, T)).logits


# ---- the same model ----


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [None, *SLOTS])
def test_the_logits_of_a_model_in_memory(directories, storage, precision, slots):
    directory, slot = directories[storage], {"float32": 10560, "bfloat16": 5376}[storage]
    wanted = logits(dsv4.load_model(directory, precision))
    pool = None if slots is None else slots * slot
    for weights in ("mapped",) if slots is None else ("mapped", "memory"):
        model = dsv4.load_model(directory, precision, weights=weights, expert_bytes=pool)
        assert torch.equal(logits(model), wanted)
        assert model.experts_move == (slots is not None)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_the_logits_with_other_backends(directories, backend):
    wanted = logits(dsv4.load_model(directories["float32"], backend=backend), T=20)
    for pool in (None, 8 * FLOATS):
        model = dsv4.load_model(directories["float32"], weights="mapped", expert_bytes=pool, backend=backend)
        torch.testing.assert_close(logits(model, T=20), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"expert_bytes": 30000}, {"expert_bytes": 30000, "weights": "memory"}])
def test_every_tensor_is_there_under_its_name(directories, options):
    model = dsv4.load_model(directories["float32"], **{"weights": "mapped"} | options)
    wanted = everything(dsv4.load_model(directories["float32"]))
    found = everything(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert not model.training
    assert len(stored(model)) == 7


def test_a_mapped_model_is_saved_again(directories, tmp_path):
    for options in ({}, {"expert_bytes": 30000}):
        model = dsv4.load_model(directories["bfloat16"], "bfloat16", weights="mapped", **options)
        dsv4.save_model(model, tmp_path / "again")
        for file in directories["bfloat16"].iterdir():
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
        shutil.rmtree(tmp_path / "again")


def test_a_folder_of_prefixes_is_for_the_model_wherever_its_weights_are(directories):
    def key(**options):
        model = dsv4.load_model(directories["float32"], "bfloat16", **options)
        return model_key(model, None, build_cache(model, Limits(max_requests=1, cache_bytes=10**6), 256))

    assert key() == key(weights="mapped") == key(weights="mapped", expert_bytes=30000)


def test_the_key_depends_on_the_experts(directories, directory):
    def key(path):
        model = dsv4.load_model(path, weights="mapped", expert_bytes=30000)
        return model_key(model, None, build_cache(model, Limits(max_requests=1, cache_bytes=10**6), 256))

    file = directory / "model-00004-of-00009.safetensors"
    tensors = load_file(file)
    tensors["layers.2.ffn.experts.8.w2.weight"][3, 4] += 1
    save_file(tensors, file)
    assert key(directory) != key(directories["float32"])


# ---- nothing is copied that need not be ----


def mapped_ranges(directory):
    """Where in this process's memory the files of a directory are mapped."""
    with open("/proc/self/maps") as maps:
        fields = [line.split() for line in maps if str(directory) in line]
    return [tuple(int(end, 16) for end in field[0].split("-")) for field in fields]


def lies_in(tensor, ranges):
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return any(first <= begin and end <= last for first, last in ranges)


class Copies(TorchDispatchMode):
    """Collects the memory, on the CPU, of all that is computed while it is entered."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = storage.nbytes()
        return result

    def num_bytes(self, ranges):
        return sum(size for at, size in self.made.items() if not any(first <= at < last for first, last in ranges))


@pytest.mark.parametrize("expert_bytes", [None, 5 * 4 * FLOATS + 100])
def test_mapped_tensors_are_views_of_the_files(directory, expert_bytes):
    with Copies() as copies:
        model = dsv4.load_model(directory, weights="mapped", expert_bytes=expert_bytes)
    ranges = mapped_ranges(directory)
    tensors = everything(model)
    assert all(lies_in(tensor, ranges) for tensor in tensors.values())
    assert copies.num_bytes(mapped_ranges(directory)) == (0 if expert_bytes is None else 5 * 4 * FLOATS)
    logits(model)
    assert expert_bytes is None or model.expert_pool.memory.nbytes == 5 * 4 * FLOATS <= expert_bytes


def test_only_what_is_cast_is_copied(directory):
    model = dsv4.load_model(directory, "bfloat16", weights="mapped")
    own = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    found, ranges = everything(model), mapped_ranges(directory)
    for name, tensor in found.items():
        stays = name not in own or own[name] != torch.bfloat16  # experts, and what is float32 or integers anyway
        assert lies_in(tensor, ranges) == stays, name
        assert tensor.dtype == own.get(name, torch.float32)


def test_weights_in_memory_map_nothing(directory):
    for options in ({}, {"expert_bytes": 30000}):
        model = dsv4.load_model(directory, **options)
        assert not mapped_ranges(directory)
        logits(model)
    assert all(isinstance(module.source, MemoryExperts) for module in stored(model))


def test_a_pool_reads_the_files_and_maps_no_experts_for_it(directory):
    model = dsv4.load_model(directory, weights="mapped", expert_bytes=30000)
    assert all(isinstance(module.source, FileExperts) and module.whole is None for module in stored(model))


def test_loading_into_memory_holds_one_tensor_more(directory):
    """Beyond the model itself, whose memory is made in one go."""
    with Copies() as copies:
        model = dsv4.load_model(directory, "bfloat16")
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    largest = max(tensor.nbytes for file in directory.glob("*.safetensors") for tensor in load_file(file).values())
    assert max(size for at, size in copies.made.items() if at not in own) <= largest


def test_files_are_closed_with_the_model(directory):
    def count():
        found = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(str(directory) in os.readlink(link) for link in found)

    model = dsv4.load_model(directory)
    assert count() == 0
    model = dsv4.load_model(directory, weights="mapped", expert_bytes=30000)
    assert count() > 0
    del model
    gc.collect()
    assert count() == 0


# ---- experts are read once a chunk ----


def test_each_expert_is_read_once_a_chunk(directories, monkeypatch):
    model = dsv4.load_model(directories["float32"], weights="mapped", expert_bytes=2 * 4 * FLOATS)
    read = Counter()
    whole = FileExperts.read_

    def counted(source, expert, out):
        read[source.names[expert]] += 1
        whole(source, expert, out)

    monkeypatch.setattr(FileExperts, "read_", counted)
    logits(model, T=90)
    assert set(read.values()) == {1}
    assert len(read) > 6 * 5  # more than a token chooses
    assert model.expert_pool.counts == (0, len(read), len(read) * 4 * FLOATS)
    logits(model, T=90)
    assert max(read.values()) == 2


def test_what_is_in_the_pool_is_not_read_again(directories):
    model = dsv4.load_model(directories["float32"], weights="mapped", expert_bytes=10**9)
    logits(model)
    before = model.expert_pool.counts
    logits(model)
    counts = model.expert_pool.counts.since(before)
    assert (counts.misses, counts.bytes_read) == (0, 0)
    assert counts.hits == before.misses


def test_the_pool_moves_with_the_model(directories):
    model = dsv4.load_model(directories["float32"], weights="mapped", expert_bytes=10**9)
    wanted = logits(model)
    old = model.expert_pool.memory
    model._apply(torch.clone)  # what .to(device) does on another device
    old.fill_(255)
    assert model.expert_pool.memory.data_ptr() != old.data_ptr()
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("weights", ["mapped", "memory"])
def test_on_the_way_to_an_accelerator_experts_pass_through_pinned_memory(directories, weights, monkeypatch):
    """The device that holds no numbers stands in for one."""
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: hasattr(tensor, "pinned"))

    def pin(tensor):
        tensor.pinned = True
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    copied, copy = [], torch.Tensor.copy_

    def note(to, tensor, **options):
        copied.append((to.shape, tensor.clone(), options))
        return copy(to, tensor, **options)

    model = dsv4.load_model(directories["float32"], weights=weights, expert_bytes=5 * 4 * FLOATS)
    module = stored(model)[2]
    wanted = module.source.tensors(7)
    model.expert_pool.to("meta")
    monkeypatch.setattr(torch.Tensor, "copy_", note)
    (table,) = module.tables({7: 1}, 1)
    assert [matrix.device.type for matrix in table.matrices[7].parts] == ["meta"] * 3
    assert module.device.type == "meta"
    assert [shape for shape, _, _ in copied] == [matrix.shape for matrix in wanted]
    assert all(torch.equal(tensor, matrix) for (_, tensor, _), matrix in zip(copied, wanted, strict=True))
    does_not_wait = {"memory": {"non_blocking": True}, "mapped": {}}[weights]
    assert [options for _, _, options in copied] == [does_not_wait] * 3
    assert weights == "mapped" or module.source.memory.is_pinned()


# ---- for inference only, and errors ----


@pytest.mark.parametrize("options", [{"weights": "mapped"}, {"expert_bytes": 30000}])
def test_there_is_no_gradient(directories, options):
    model = dsv4.load_model(directories["float32"], **options)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(toy_token_ids(CONFIG, 1, 5)).logits.requires_grad
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="asks for a gradient; expected none: experts of a store give none"):
        model(toy_token_ids(CONFIG, 1, 5))


def test_what_is_written_to_a_parameter_stays_here(directory):
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    model = dsv4.load_model(directory, weights="mapped")
    with torch.no_grad():
        for tensor in everything(model).values():
            tensor.zero_()
    assert not logits(model).any()
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "disk"}, "weights is 'disk'; expected one of memory, mapped"),
        ({"expert_bytes": 0}, "expert_bytes is 0; expected at least 1, or None for no pool"),
        ({"expert_bytes": -5, "weights": "mapped"}, "expert_bytes is -5; expected at least 1, or None for no pool"),
        ({"expert_bytes": 10559}, "expert_bytes is 10559; expected at least the 10560 of one expert"),
    ],
)
def test_what_cannot_be_is_an_error(directories, options, message):
    with pytest.raises(ValueError) as error:
        dsv4.load_model(directories["float32"], **options)
    assert str(error.value) == message


def test_experts_of_two_dtypes_are_an_error(directory):
    file = directory / "model-00004-of-00009.safetensors"
    tensors = load_file(file)
    name = "layers.2.ffn.experts.8.w2.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, file)
    dsv4.load_model(directory)
    for options in ({"weights": "mapped"}, {"expert_bytes": 30000}):
        with pytest.raises(
            ValueError, match="experts have weights stored as BF16 and F32; expected one dtype for all experts"
        ):
            dsv4.load_model(directory, **options)


@pytest.mark.parametrize("options", [{"weights": "mapped"}, {"weights": "mapped", "expert_bytes": 30000}])
def test_a_truncated_file_is_an_error_before_a_model_is_built(directory, options, monkeypatch):
    monkeypatch.setattr("dsv4.checkpoint.leave.Transformer", lambda *_, **__: pytest.fail("a model was built"))
    file = directory / "model-00004-of-00009.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"file {file} cannot be read as safetensors"):
        dsv4.load_model(directory, **options)


def test_a_file_that_changes_later_is_an_error_of_the_pool(directory):
    model = dsv4.load_model(directory, expert_bytes=4 * FLOATS, weights="mapped")
    logits(model, T=5)
    file = directory / "model-00004-of-00009.safetensors"
    os.utime(file, ns=(0, 0))
    with pytest.raises(OSError, match=f"file {file} has changed since it was opened"):
        logits(model, T=5)
    assert isinstance(model.expert_pool, ExpertPool)


def test_the_kernel_computes_with_mapped_experts(directories, monkeypatch):
    model = dsv4.load_model(directories["float32"], weights="mapped")
    tables = [id(module.whole) for module in stored(model)]
    with dsv4.Engine(model, Limits(max_requests=1)) as engine:
        monkeypatch.setattr(portable, "run_stored", lambda *_: pytest.fail("the portable path ran"))
        engine.generate([[5, 6, 7]], dsv4.Sampling(max_tokens=3, temperature=0, ignore_eos=True))
    assert [id(module.whole) for module in stored(model)] == tables
    assert all(len(module.whole._addresses) == 1 for module in stored(model)[:-1])


def test_a_model_without_an_mtp_block(tmp_path):
    dsv4.save_model(toy_model(replace(CONFIG, mtp_kinds=())), tmp_path / "toy")
    model = dsv4.load_model(tmp_path / "toy", weights="mapped", expert_bytes=10**9)
    assert model.expert_pool.memory.shape[0] == 6 * CONFIG.moe.num_experts
    assert torch.equal(logits(model), logits(dsv4.load_model(tmp_path / "toy")))
