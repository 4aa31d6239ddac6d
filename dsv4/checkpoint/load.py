"""Read a directory in the released layout into a model. Everything is checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, get_args

import torch

from dsv4.checkpoint.leave import leave_in_files
from dsv4.checkpoint.names import expert_names, released_tensors
from dsv4.checkpoint.source import Source, open_source, scale_name
from dsv4.model.linear import Linear
from dsv4.model.moe import Experts, PackedExperts, Router
from dsv4.model.precision import replace_maps
from dsv4.model.transformer import Transformer
from dsv4.native.large_pages import prefer_large_pages
from dsv4.ops.backend import BackendChoice, resolve
from dsv4.ops.lowbit import Packed, dequantise

Precision = Literal["released", "float32", "bfloat16"]
Weights = Literal["memory", "mapped"]
Tell = Callable[[int, int], None]
"""Is told how many bytes are read, and how many there will be."""


def load_model(
    directory: str | os.PathLike[str],
    precision: Precision = "float32",
    *,
    weights: Weights = "memory",
    expert_bytes: int | None = None,
    backend: BackendChoice = "auto",
    tell: Tell = lambda done, total: None,
) -> Transformer:
    """Load a checkpoint directory and return the model in eval mode.

    precision: ``released`` keeps FP8 and FP4 weights in their codes, and rounds activations, cache rows and the
    indexer's queries and keys as the released code does. ``float32`` computes in float32 throughout; ``bfloat16`` holds
    matrices and activations in bfloat16, with the float32 islands of the released code: both turn codes into numbers
    and round nothing else. The directory holds ``config.json`` and safetensors files, with or without an index, of any
    storage; a tensor that is missing, unknown, misshapen, of another dtype or truncated is a ``ValueError`` that lists
    every such tensor. tell: is called as tensors are read, for a progress bar.

    weights: ``mapped`` leaves them in the files, which must stay as they are: a page is read when it is used,
    and given up when memory is short. Only what is stored in another dtype than asked for is copied; routed
    experts are cast where they are used. Of codes the scales are read once, to be checked, and nothing is copied but
    ``wo_a``, whose values are kept in bfloat16. expert_bytes: routed experts are read into a pool of at most so many
    bytes, from the files or, with ``memory``, from CPU memory into a pool that an accelerator computes from.
    Either is for inference only, and for codes with the precision ``released`` alone.
    """
    for name, value, known in (("precision", precision, Precision), ("weights", weights, Weights)):
        if value not in get_args(known):
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(known))}")
    if expert_bytes is not None and expert_bytes < 1:
        raise ValueError(f"expert_bytes is {expert_bytes}; expected at least 1, or None for no pool")
    source = open_source(directory)
    has_codes = source.config.storage in ("fp4", "fp8")
    if precision == "released" and not has_codes:
        raise ValueError(
            f"precision is 'released' for {source.root}, whose weights are no codes; expected 'bfloat16' or 'float32', "
            "or a checkpoint in FP8 or FP4 (dsv4 convert --format instruct writes one)"
        )
    stays, in_codes = weights == "mapped" or expert_bytes is not None, precision == "released"
    if stays and has_codes and not in_codes:
        what = "weights is 'mapped'" if weights == "mapped" else f"expert_bytes is {expert_bytes}"
        raise ValueError(
            f"{what} for {source.root}, whose weights are codes, with precision {precision!r}; expected 'released', "
            "or numbers in memory"
        )
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    if stays:
        model = leave_in_files(
            source, dtype, in_codes=in_codes, is_mapped=weights == "mapped", expert_bytes=expert_bytes, backend=backend
        )
    elif in_codes:
        model = _in_codes(source, backend, _Counted(source, tell))
    else:
        model = _in_numbers(source, dtype, backend, _Counted(source, tell))
    _check_tables(source, model)
    return model.eval()


class _Counted:
    """Counts the bytes that are read."""

    def __init__(self, source: Source, tell: Tell) -> None:
        self._tell, self._done = tell, 0
        self._sizes = {name: file.tensors[name].end - file.tensors[name].begin for name, file in source.files.items()}
        self._total = sum(self._sizes.values())

    def add(self, *names: str) -> None:
        self._done += sum(self._sizes.get(name, 0) for name in names)
        self._tell(self._done, self._total)


def _in_numbers(source: Source, dtype: torch.dtype, backend: BackendChoice, read: _Counted) -> Transformer:
    """A model of numbers; codes are turned into them one matrix at a time."""
    model = Transformer(source.config, weight_dtype=dtype, activation_dtype=dtype, backend=backend)
    where = resolve("auto", torch.device("cpu"))
    for name, target in released_tensors(model):
        scale = scale_name(name)
        if name.endswith(".weight") and scale in source.files:
            packed = source.matrix(name)
            assert isinstance(packed, Packed), f"{name} has scales and no codes"
            target.copy_(dequantise(packed, dtype, backend=where))
            read.add(name, scale)
        else:
            source.files[name].load_(name, target)
            read.add(name)
    return model


def _in_codes(source: Source, backend: BackendChoice, read: _Counted) -> Transformer:
    """A model of codes, each read to where it stays; what is no code in the dtype that the release stores it in."""
    with torch.device("meta"):
        model = Transformer(
            source.config, weight_dtype=torch.bfloat16, activation_dtype=torch.bfloat16, backend=backend
        )

    def matrix(name: str, module: Linear) -> Packed:
        packed = source.matrix(f"{name}.weight")
        assert isinstance(packed, Packed), f"{name} has no scales"
        read.add(f"{name}.weight", f"{name}.scale")
        return packed

    def experts(name: str, module: Experts) -> PackedExperts:
        return PackedExperts(*(_stack(source, name, which, len(module.w1), read) for which in range(3)))

    replace_maps(model, source.config.storage, matrix, experts)
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors[name] = tensor
        if tensor.is_meta:
            tensors[name] = torch.empty_like(tensor, device="cpu", requires_grad=False)
            prefer_large_pages([tensors[name]])
            source.files[name].load_(name, tensors[name])
            read.add(name)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


def _stack(source: Source, experts: str, which: int, count: int, read: _Counted) -> Packed:
    """w1, w2 or w3 of all experts of a layer, read one after another."""
    made: Packed | None = None
    for expert in range(count):
        weight = expert_names(experts, expert)[which]
        one = source.matrix(weight)
        assert isinstance(one, Packed), f"{weight} has no scales"
        if made is None:
            made = _empty_stack(count, one)
        if one.scales.dtype != made.scales.dtype:
            raise ValueError(
                f"{scale_name(weight)} is read as {one.scales.dtype}; expected {made.scales.dtype}, as of expert 0"
            )
        made.codes[expert], made.scales[expert] = one.codes, one.scales
        read.add(weight, scale_name(weight))
    assert made is not None, f"{experts} has no experts"
    return made


def _empty_stack(count: int, like: Packed) -> Packed:
    codes, scales = (like_.new_empty(count, *like_.shape) for like_ in (like.codes, like.scales))
    prefer_large_pages([codes])
    return Packed(codes, scales, like.kind)


def _check_tables(source: Source, model: Transformer) -> None:
    """Refuse a hash layer's table that names an expert which is not there: nothing looks at it again."""
    count = model.config.moe.num_experts
    for name, module in model.named_modules():
        table = module.tid2eid if isinstance(module, Router) else None
        if table is None:
            continue
        lowest, highest = int(table.numpy().min()), int(table.numpy().max())  # no tensor is made for it
        if lowest < 0 or highest >= count:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"checkpoint {source.root}: {name}.tid2eid holds expert {wrong}; expected 0 to {count - 1}"
            )
