"""Read a directory in the released layout, of any storage, tensor by tensor. Its headers are checked on opening.

What the tensors are counts, not what ``config.json`` says of them: widened copies often keep its quantisation.

    routed experts  I8                    fp4: two codes a byte, E8M0 scales; other matrices FP8
    matrices        F8_E4M3               fp8
    nothing in codes                      float32 if the embedding is, else bfloat16; each tensor may be either

An FP8 matrix has E8M0 or F32 scales, whatever the others have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsv4.accounting.tensors import TensorSpec, inventory
from dsv4.checkpoint.save import INDEX
from dsv4.checkpoint.tensor_file import DTYPES, StoredTensor, TensorFile
from dsv4.config.load import load_config
from dsv4.config.model import ModelConfig, Storage
from dsv4.ops.lowbit import Packed

SINGLE = "model.safetensors"  # the one file of a checkpoint without an index
PROBLEMS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open checkpoint. config: with the storage that the tensors have; files: which one holds each tensor."""

    root: Path
    config: ModelConfig
    files: Mapping[str, TensorFile]

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor as it is stored, into memory of its own."""
        stored = self.files[name].tensors[name]
        result = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        self.files[name].read_(name, result)
        return result

    def view(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored, where its file is mapped."""
        return self.files[name].view(name)

    def matrix(self, name: str, *, is_mapped: bool = False) -> Packed | torch.Tensor:
        """Read a matrix [O, I] by the name of its weight: in codes with its scales, or as it is stored.

        is_mapped: as views; to be checked, scales are read once more. One that is not finite and positive is a
        ``ValueError`` that names tensor and file.
        """
        scale, get = scale_name(name), self.view if is_mapped else self.tensor
        if scale not in self.files:
            return get(name)
        codes = get(name)
        packed = Packed(as_bytes(codes), as_bytes(get(scale)), "fp4" if codes.dtype == torch.int8 else "fp8")
        read = replace(packed, scales=as_bytes(self.tensor(scale))) if is_mapped else packed  # in no page of a view
        try:
            read.check_scales()
            _check_positive(read.scales)
        except ValueError as error:
            raise ValueError(f"{scale} in {self.files[scale].path}: {error}") from error
        return packed


def as_bytes(stored: torch.Tensor) -> torch.Tensor:
    """Return codes, and scales of a byte, as uint8, which is what ``Packed`` has; others as they are."""
    return stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored


def scale_name(weight: str) -> str:
    """Return the name of the scales beside a matrix in codes."""
    return weight.removesuffix(".weight") + ".scale"


def open_source(directory: str | os.PathLike[str]) -> Source:
    """Open a checkpoint, with or without an index, and hold the header of each file against its ``config.json``.

    A tensor that is missing, unknown, misshapen, of another dtype, in another file than the index says, and a file
    that is damaged or cut short is a ``ValueError`` that lists them all.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"directory is {root}; expected a directory with config.json and safetensors files")
    config = load_config(root)
    placed = _placed(root)
    files: dict[str, TensorFile] = {}
    problems: list[str] = []
    unread: set[str] = set()
    for name in sorted(set(placed.values())):
        try:
            file = TensorFile(root / name)
        except ValueError as error:
            problems.append(str(error))
            unread.add(name)
            continue
        for tensor in file.tensors:
            if placed.get(tensor) != name:
                problems.append(f"{tensor}: in {name}; the index puts it in {placed.get(tensor, 'no file')}")
            files[tensor] = file
    found = {name: file.tensors[name] for name, file in files.items()}
    try:
        config = replace(config, storage=_implied_storage(found))
    except ValueError as error:
        raise ValueError(f"checkpoint {root} does not fit its config.json: {error}") from error
    expected = {spec.name: spec for spec in inventory(config)}
    problems += [
        f"{name}: missing" for name in expected if name not in files and placed.get(name) not in unread
    ]  # what is in a damaged file is not said twice
    problems += [f"{name}: unknown tensor" for name in files if name not in expected]
    known = files.keys() | expected.keys()
    problems += [f"{name}: in the index, but in no file" for name in placed if name not in known]
    for name, file in files.items():
        if name in expected:
            problems += _differences(found[name], expected[name], config.storage, file.path.name)
    if problems:
        shown = problems[:PROBLEMS_SHOWN]
        more = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise ValueError(f"checkpoint {root} does not fit its config.json:\n  " + "\n  ".join(shown + more))
    return Source(root=root, config=config, files=files)


def _placed(root: Path) -> dict[str, str]:
    """Which file holds each tensor, by the index or, without one, by the single file's header."""
    index = root / INDEX
    if not index.is_file():
        if not (root / SINGLE).is_file():
            raise ValueError(f"checkpoint {root} has neither {INDEX} nor {SINGLE}; expected one of them")
        return dict.fromkeys(TensorFile(root / SINGLE).tensors, SINGLE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        placed = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"index {index} is not readable ({error!r}); expected JSON with a weight_map") from error
    for file in set(placed.values()):
        if Path(file).name != file or file in ("..", "."):
            raise ValueError(f"index {index} names the file {file!r}; expected a plain name inside {root}")
    return placed


def _implied_storage(found: Mapping[str, StoredTensor]) -> Storage:
    """What the matrices with scales beside them are; one without is no code, whatever its dtype."""
    in_codes = [(name, stored.dtype) for name, stored in found.items() if scale_name(name) in found]
    if any(dtype == "I8" and ".ffn.experts." in name for name, dtype in in_codes):
        return "fp4"
    if any(dtype == "F8_E4M3" for _, dtype in in_codes):
        return "fp8"
    embedding = found.get("embed.weight")
    return "float32" if embedding is not None and embedding.dtype == "F32" else "bfloat16"


def _differences(stored: StoredTensor, spec: TensorSpec, storage: Storage, file: str) -> list[str]:
    """Say how a tensor differs from what it must be."""
    result = []
    if stored.shape != spec.shape:
        result.append(f"{spec.name}: has shape {list(stored.shape)}; expected {list(spec.shape)}, in {file}")
    allowed = _allowed(spec, storage)
    if stored.dtype not in allowed:
        result.append(f"{spec.name}: has dtype {stored.dtype}; expected {' or '.join(allowed)}, in {file}")
    return result


def _allowed(spec: TensorSpec, storage: Storage) -> tuple[str, ...]:
    """The dtypes a tensor may have."""
    if spec.role == "scale":
        return ("F8_E8M0",) if storage == "fp4" and spec.kind == "routed_experts" else ("F8_E8M0", "F32")
    if storage in ("fp4", "fp8") or spec.dtype == "I64":
        return (spec.dtype,)
    return ("BF16", "F32")


def _check_positive(scales: torch.Tensor) -> None:
    if scales.dtype == torch.float32 and not bool((scales > 0).all()):
        is_bad = scales <= 0
        first = is_bad.nonzero()[0].tolist()
        held = f"{scales[tuple(first)].item()} at {first}, and {int(is_bad.sum())} such of {is_bad.numel()}"
        raise ValueError(f"scales holds {held}; expected positive numbers")
