"""Checkpoints in codes: into a model that keeps them, into numbers, and back to the same bytes."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import dsv4
from dsv4.accounting.tensors import inventory
from dsv4.checkpoint.convert import convert
from dsv4.checkpoint.save import stored_tensors
from dsv4.checkpoint.synth import synthesise
from dsv4.config.engine import Limits
from dsv4.config.presets import flash, pro, smoke
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.model.init import new_model
from dsv4.model.moe import PackedExperts
from dsv4.model.precision import is_packed, pack, replace_maps, set_rounding
from dsv4.model.transformer import Transformer
from dsv4.ops.lowbit import Packed


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


def on_meta(weight, kind, scale_dtype=torch.uint8):
    """Codes of a weight's shape, and nothing in them."""
    *stack, rows, columns = weight.shape
    codes, scales = (rows, columns // 2), (rows, columns // 32)
    if kind == "fp8":
        codes, scales = (rows, columns), (-(-rows // 128), -(-columns // 128))
    held = (torch.empty(*stack, *codes, dtype=torch.uint8), torch.empty(*stack, *scales, dtype=scale_dtype))
    return Packed(*(tensor.to("meta") if not tensor.is_meta else tensor for tensor in held), kind)


@pytest.mark.parametrize(("make", "num_bytes"), [(flash, 159_609_485_896), (pro, 864_704_792_696)])
def test_a_released_model_is_its_inventory_at_full_size(make, num_bytes):
    """On the meta device: every name, shape, dtype and byte."""
    config = make()
    with torch.device("meta"):
        held = Transformer(config, weight_dtype=torch.bfloat16, activation_dtype=torch.bfloat16)
        replace_maps(
            held, "fp4", lambda name, module: on_meta(module.weight, "fp8"),
            lambda name, module: PackedExperts(*(on_meta(w, "fp4") for w in (module.w1, module.w2, module.w3))),
        )  # fmt: skip
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored_tensors(held, config)}
    dtypes = {
        "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "BF16": torch.bfloat16,
        "F32": torch.float32, "I64": torch.int64,
    }  # fmt: skip
    assert found == {spec.name: (spec.shape, dtypes[spec.dtype]) for spec in inventory(config)}
    assert sum(tensor.nbytes for _, tensor in stored_tensors(held, config)) == num_bytes


def test_a_cut_of_flash_loads_and_runs(tmp_path):
    """A CSA and an HCA layer, smaller: what bench/flash_layers.py does at the true size."""
    large = flash()
    config = replace(
        large, hidden_size=192, vocab_size=300, max_context=1024,
        attention=replace(large.attention, num_heads=4, head_dim=96, rotary_dims=32, q_rank=64, o_groups=2, o_rank=48),
        indexer=replace(large.indexer, num_heads=16, head_dim=32, top_k=8),
        moe=replace(large.moe, num_experts=6, experts_per_token=2, expert_dim=160),
    )  # fmt: skip
    synthesise(config, tmp_path / "cut", layers=(2, 3))
    model = dsv4.load_model(tmp_path / "cut", "released")
    assert model.config.layer_kinds == ("csa", "hca")
    prompt = torch.randint(0, 300, (280,), generator=torch.Generator().manual_seed(3)).tolist()
    engine = Engine(model, Limits(max_requests=1, cache_bytes=2**22, step_tokens=100))
    (answer,) = engine.generate([prompt], Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
    assert len(answer.token_ids) == 12
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        found = model(ids).logits[0, len(prompt) - 1 :]
    # Sums in another order round bfloat16 the other way: the greedy choice is among the best few everywhere.
    best = found.topk(3).indices
    assert all(token in best[i] for i, token in enumerate(answer.token_ids))
