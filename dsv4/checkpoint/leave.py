"""A model whose weights, or routed experts alone, stay in its checkpoint's files: mapped, or read when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dsv4.checkpoint.names import expert_names
from dsv4.checkpoint.tensor_file import DTYPES, TensorFile
from dsv4.config.model import ModelConfig
from dsv4.model.expert_pool import ExpertPool, ExpertSource, Layout, Tensors
from dsv4.model.expert_store import MemoryExperts, StoredExperts
from dsv4.model.moe import Experts
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import BackendChoice

Files = Mapping[str, TensorFile]  # which file holds each tensor


class FileExperts:
    """The experts of a layer in files. names: of the tensors of each expert, in the order of the layout."""

    def __init__(self, layout: Layout, files: Files, names: Sequence[tuple[str, ...]]) -> None:
        self.layout, self.files, self.names = layout, files, names
        self._staged: Tensors | None = None

    def tensors(self, expert: int) -> Tensors:
        """See ``ExpertSource``."""
        return tuple(self.files[name].view(name) for name in self.names[expert])

    def read_(self, expert: int, out: Tensors) -> None:
        """See ``ExpertSource``. On the way to an accelerator they pass through pinned memory."""
        tensors = out
        if out[0].device.type != "cpu":
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
    config: ModelConfig,
    opened: Sequence[TensorFile],
    dtype: torch.dtype,
    *,
    is_mapped: bool,
    expert_bytes: int | None,
    backend: BackendChoice,
) -> Transformer:
    """Return a model as ``load_model`` describes it. opened: files that hold all of the config's tensors."""
    files = {name: file for file in opened for name in file.tensors}
    with torch.device("meta"):
        model = Transformer(config, weight_dtype=dtype, activation_dtype=dtype, backend=backend)
    _replace_experts(model, files, is_mapped, expert_bytes)
    tensors = {}
    for name, wanted in model.state_dict().items():
        if is_mapped:
            tensors[name] = files[name].view(name).to(wanted.dtype)
        else:
            tensors[name] = torch.empty_like(wanted, device="cpu")
            files[name].load_(name, tensors[name])
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def _replace_experts(model: Transformer, files: Files, is_mapped: bool, expert_bytes: int | None) -> None:
    """Put stored experts in the place of those that are parameters, with one pool for all if there are bytes for it."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    names = {layer: [expert_names(layer, e) for e in range(len(module.w1))] for layer, module in layers.items()}
    layout = _layout(files, [each for of_layer in names.values() for each in of_layer])
    num_experts = sum(map(len, names.values()))
    pool = None if expert_bytes is None else ExpertPool(layout, expert_bytes, num_experts)
    for number, (layer, module) in enumerate(layers.items()):
        source: ExpertSource = FileExperts(layout, files, names[layer])
        if not is_mapped:
            source = _in_memory(source, len(module.w1))
        E, F, D = module.w1.shape
        model.set_submodule(layer, StoredExperts(source, (E, F, D), layer=number, pool=pool))
    model.expert_pool = pool


def _layout(files: Files, names: Sequence[tuple[str, ...]]) -> Layout:
    """The layout of experts as they are stored, which is the same for all."""
    found = {tuple((files[n].tensors[n].shape, files[n].tensors[n].dtype) for n in each) for each in names}
    dtypes = sorted({dtype for each in found for _, dtype in each})
    if len(dtypes) > 1:
        raise ValueError(
            f"{names[0][0]} and other experts are stored as {' and '.join(dtypes)}; expected one dtype for all experts "
            "that stay outside the model: load them with weights='memory' and without expert_bytes"
        )
    (tensors,) = found
    return Layout(tuple((shape, DTYPES[dtype]) for shape, dtype in tensors))


def _in_memory(source: ExpertSource, num_experts: int) -> MemoryExperts:
    """Read all experts of a layer."""
    memory = torch.empty(num_experts, source.layout.num_bytes, dtype=torch.uint8)
    for expert in range(num_experts):
        source.read_(expert, source.layout.views(memory[expert]))
    return MemoryExperts(source.layout, memory)
