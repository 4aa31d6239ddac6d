"""A model whose weights, or routed experts alone, stay in its checkpoint's files: mapped, or read when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dsv4.checkpoint.names import expert_names
from dsv4.checkpoint.source import Source, as_bytes
from dsv4.checkpoint.tensor_file import DTYPES, TensorFile
from dsv4.device import is_accelerator
from dsv4.model.expert_pool import ExpertPool, ExpertSource, Layout, Tensors
from dsv4.model.expert_store import MemoryExperts, StoredExperts
from dsv4.model.linear import Linear
from dsv4.model.moe import Experts
from dsv4.model.precision import replace_maps
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import BackendChoice
from dsv4.ops.lowbit import Kind, Packed

Files = Mapping[str, TensorFile]  # which file holds each tensor


class FileExperts:
    """The experts of a layer in files. names: of the tensors of each expert, in the order of the layout."""

    def __init__(self, layout: Layout, files: Files, names: Sequence[tuple[str, ...]]) -> None:
        self.layout, self.files, self.names = layout, files, names
        self._staged: Tensors | None = None

    def tensors(self, expert: int) -> Tensors:
        """See ``ExpertSource``."""
        return tuple(as_bytes(self.files[name].view(name)) for name in self.names[expert])

    def read_(self, expert: int, out: Tensors) -> None:
        """See ``ExpertSource``. On the way to an accelerator they pass through pinned memory."""
        tensors = out
        if is_accelerator(out[0].device):
            if self._staged is None:
                memory = torch.empty(self.layout.num_bytes, dtype=torch.uint8)
                self._staged = self.layout.views(memory.pin_memory())
            tensors = self._staged
        for name, tensor in zip(self.names[expert], tensors, strict=True):
            self.files[name].read_(name, tensor)
        if tensors is not out:
            for to, tensor in zip(out, tensors, strict=True):
                to.copy_(tensor)  # waits: the next one passes through the same memory

    def announce(self, experts: Sequence[int]) -> None:
        """See ``ExpertSource``. The system reads ahead while others are computed."""
        for expert in experts:
            for name in self.names[expert]:
                self.files[name].announce(name)


def leave_in_files(
    source: Source,
    dtype: torch.dtype,
    *,
    in_codes: bool,
    is_mapped: bool,
    expert_bytes: int | None,
    backend: BackendChoice,
) -> Transformer:
    """Return a model as ``load_model`` describes it. dtype: of its numbers and activations."""
    with torch.device("meta"):
        model = Transformer(source.config, weight_dtype=dtype, activation_dtype=dtype, backend=backend)
    stored = _stored_experts(model, source, in_codes, is_mapped, expert_bytes)
    if in_codes:

        def matrix(name: str, module: Linear) -> Packed:
            packed = source.matrix(f"{name}.weight", is_mapped=is_mapped)
            assert isinstance(packed, Packed), f"{name} has no scales"
            return packed

        replace_maps(model, source.config.storage, matrix, lambda name, _: stored[name])
    else:
        for name, experts in stored.items():
            model.set_submodule(name, experts)
    tensors = {}
    for name, held in model.state_dict().items():
        if not held.is_meta:
            tensors[name] = held
        elif is_mapped:
            tensors[name] = source.view(name).to(held.dtype)
        else:
            tensors[name] = torch.empty_like(held, device="cpu")
            source.files[name].load_(name, tensors[name])
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def _stored_experts(
    model: Transformer, source: Source, in_codes: bool, is_mapped: bool, expert_bytes: int | None
) -> dict[str, StoredExperts]:
    """Make what stands in the place of experts that are parameters, with one pool for all if there are bytes for it."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    names = {
        layer: [expert_names(layer, e, has_scales=in_codes) for e in range(len(module.w1))]
        for layer, module in layers.items()
    }
    layout = _layout(source.files, [each for of_layer in names.values() for each in of_layer])
    if expert_bytes is not None:
        model.expert_pool = ExpertPool(layout, expert_bytes, sum(map(len, names.values())))
    kind = _kind(source, in_codes)
    result = {}
    for number, (layer, module) in enumerate(layers.items()):
        if in_codes:
            _check_scales(source, names[layer])
        experts: ExpertSource = FileExperts(layout, source.files, names[layer])
        if not is_mapped:
            experts = _in_memory(experts, len(module.w1))
        E, F, D = module.w1.shape
        result[layer] = StoredExperts(experts, (E, F, D), kind=kind, layer=number, pool=model.expert_pool)
    return result


def _kind(source: Source, in_codes: bool) -> Kind | None:
    """Of the codes of routed experts."""
    if not in_codes:
        return None
    assert source.config.storage in ("fp4", "fp8"), f"{source.root} has no codes"
    return source.config.storage


def _check_scales(source: Source, names: Sequence[tuple[str, ...]]) -> None:
    """Refuse a scale that is no number, here and not in the middle of a step."""
    for expert in names:
        for weight in expert[:3]:
            source.matrix(weight, is_mapped=True)


def _layout(files: Files, names: Sequence[tuple[str, ...]]) -> Layout:
    """The layout of experts as they are stored, codes and scales as bytes, which is the same for all."""
    for last in ("weight", "scale"):
        dtypes = sorted({files[n].tensors[n].dtype for each in names for n in each if n.endswith(last)})
        if len(dtypes) > 1:
            raise ValueError(
                f"{names[0][0]} and other experts have {last}s stored as {' and '.join(dtypes)}; expected one dtype "
                "for all experts that stay outside the model: load them with weights='memory' and without expert_bytes"
            )
    (tensors,) = {tuple((files[n].tensors[n].shape, files[n].tensors[n].dtype) for n in each) for each in names}
    return Layout(tuple((shape, as_bytes(torch.empty(0, dtype=DTYPES[dtype])).dtype) for shape, dtype in tensors))


def _in_memory(source: ExpertSource, num_experts: int) -> MemoryExperts:
    """Read all experts of a layer."""
    memory = torch.empty(num_experts, source.layout.num_bytes, dtype=torch.uint8)
    for expert in range(num_experts):
        source.read_(expert, source.layout.views(memory[expert]))
    return MemoryExperts(source.layout, memory)
