"""Checkpoints of a training run, from which a resumed run goes on bit for bit.

    checkpoints/step-00000120/
        model/                  the model in the released layout: dsv4.load_model reads it, transformers too
        training.safetensors    what else is tensors: the optimiser's moments, queues
        state.json              what else is numbers and text: counters, the place in the data, random states
        manifest.json           size and SHA-256 of the others (dsv4.checkpoint.manifest)

A checkpoint is written beside its place under a hidden name, brought to the disk and renamed, and it is renamed
back before it is removed: whatever has a ``step-`` name was whole when it got it. One run writes to a folder at a
time.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv4.checkpoint.manifest import Manifest, read_manifest, sync, write_manifest, wrong_files, wrong_sizes
from dsv4.checkpoint.names import released_tensors
from dsv4.checkpoint.save import save_model
from dsv4.checkpoint.source import PROBLEMS_SHOWN
from dsv4.config.load import load_config
from dsv4.config.model import ModelConfig
from dsv4.model.transformer import Transformer

MODEL = "model"
TENSORS = "training.safetensors"
STATE = "state.json"

_NAME = re.compile(r"step-(\d{8,})")
_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
_ENTRY_BYTES = 256  # of one tensor in its file's header and in the index, its name not counted
_SPARE_BYTES = 1 << 20  # config, manifest, and the last block of each file


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint by its name: the optimiser step it was written after, and its folder."""

    step: int
    path: Path


def save_checkpoint(
    directory: Path,
    step: int,
    model: Transformer,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, object],
    *,
    keep: int,
) -> Path:
    """Write ``directory``/step-... and return it; then remove all but the newest ``keep`` whole ones.

    tensors: of any dtype safetensors knows, on any device, none sharing memory. state: what JSON gives back
    unchanged. Raises ``ValueError`` for another state, and for a step that is not later than the newest one there
    (``remove_later`` forgets those that a run has gone back behind). A full disk is an ``OSError`` with the path
    and the bytes needed. After an error the older checkpoints are as they were, and nothing of the new one is left.
    """
    text = _to_json(state)
    _check_order(directory, step, keep)
    directory.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    target = directory / _name(step)
    needed = _predicted_bytes(model, tensors, text)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"the disk has {free} bytes free; expected at least {needed} for checkpoint", str(target)
        )
    partial = _hidden(target)
    try:
        partial.mkdir()
        _write(partial, step, model, tensors, text)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        message = f"the disk is full; expected at least {needed} bytes free for checkpoint"
        raise OSError(errno.ENOSPC, message, str(target)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(directory)  # the new name is on the disk before an old one goes
    _remove_old(directory, keep)
    return target


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """List the folders of ``directory`` that have a checkpoint's name, oldest first; none if it does not exist."""
    if not directory.is_dir():
        return []
    named = [(_step(path.name), path) for path in directory.iterdir() if path.is_dir()]
    found = [Checkpoint(step=step, path=path) for step, path in named if step is not None]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def remove_later(directory: Path, step: int) -> list[int]:
    """Remove the checkpoints after ``step``, newest first, for a run that goes on from there; return their steps."""
    _remove_leftovers(directory)
    later = [checkpoint for checkpoint in reversed(list_checkpoints(directory)) if checkpoint.step > step]
    for checkpoint in later:
        _remove(checkpoint.path)
    return [checkpoint.step for checkpoint in later]


def load_checkpoint(path: Path, model: Transformer) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Fill ``model`` in place from a checkpoint; return its other tensors, on the CPU, and its state.

    Every byte is compared to the manifest first. Raises ``ValueError``, before the model is touched, with all files
    that are missing or damaged and the earlier checkpoint there is; nothing is resumed from by itself. Likewise for
    a model of another config, or with tensors of other names, shapes or dtypes.
    """
    manifest = _verified(path)
    _check_config(load_config(path / MODEL), model.config, path)
    shards = [path / name for name in manifest.files if re.fullmatch(rf"{MODEL}/[^/]+\.safetensors", name)]
    targets = dict(released_tensors(model))
    _check_tensors(shards, targets, path)
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    for shard in shards:
        with safe_open(shard, framework="pt") as content:
            names = content.keys()
            for name in names:
                targets[name].copy_(content.get_tensor(name))
    with safe_open(path / TENSORS, framework="pt") as content:
        names = content.keys()
        # Copies: what safetensors returns may be a view of the file, which would live as long as the run.
        return {name: content.get_tensor(name).clone() for name in names}, state


def _write(folder: Path, step: int, model: Transformer, tensors: Mapping[str, torch.Tensor], state_text: str) -> None:
    save_model(model, folder / MODEL)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / STATE).write_text(state_text, encoding="utf-8")
    write_manifest(folder, step)


def _to_json(state: Mapping[str, object]) -> str:
    """Write the state as JSON; refuse what would come back as something else, such as a tuple or a number as key."""
    problems = []
    for key, value in state.items():
        try:
            is_same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            is_same = False
        if not is_same:
            problems.append(f"state[{key!r}] is {value!r:.100}; expected what JSON gives back unchanged")
    if problems:
        raise ValueError("\n".join(problems))
    return json.dumps(dict(state)) + "\n"


def _check_order(directory: Path, step: int, keep: int) -> None:
    if step < 0:
        raise ValueError(f"step is {step}; expected 0 or more")
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected at least 1")
    existing = list_checkpoints(directory)
    if existing and existing[-1].step >= step:
        # With an abandoned future beside it, the new checkpoint would be the old one that is removed.
        raise ValueError(f"step is {step}; expected a step after {existing[-1].path}")


def _predicted_bytes(model: Transformer, tensors: Mapping[str, torch.Tensor], state_text: str) -> int:
    """How much room a checkpoint takes, at most."""
    held = [*released_tensors(model), *tensors.items()]
    return sum(tensor.nbytes + 2 * len(name) + _ENTRY_BYTES for name, tensor in held) + len(state_text) + _SPARE_BYTES


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether a write failed for want of room. safetensors has only the words of the error."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(name: str) -> int | None:
    """The step in a checkpoint's name; None if the name is not one that ``_name`` gives."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and _name(int(match[1])) == name else None


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _remove_leftovers(directory: Path) -> None:
    """Remove what a writer that was killed left half written or half removed."""
    for leftover in directory.glob(".step-*.partial"):
        shutil.rmtree(leftover)


def _remove_old(directory: Path, keep: int) -> None:
    """Remove what is older than the newest ``keep`` whole checkpoints; a damaged one does not count as kept."""
    num_whole = 0
    for checkpoint in reversed(list_checkpoints(directory)):
        if num_whole == keep:
            _remove(checkpoint.path)
        elif _looks_whole(checkpoint.path):
            num_whole += 1


def _remove(path: Path) -> None:
    path.rename(_hidden(path))
    shutil.rmtree(_hidden(path))


def _looks_whole(path: Path) -> bool:
    """Whether every file is there in its length; the bytes are not read."""
    try:
        return not wrong_sizes(path, read_manifest(path))
    except ValueError:
        return False


def _verified(path: Path) -> Manifest:
    """Read the manifest and hold every file against it."""
    try:
        manifest = read_manifest(path)
        needed = (f"{MODEL}/config.json", TENSORS, STATE)
        problems = [f"the manifest does not list {name}" for name in needed if name not in manifest.files]
        if _name(manifest.step) != path.name:
            problems.append(f"the manifest has step {manifest.step}; expected that of the folder's name")
        _refuse(f"checkpoint {path} is damaged", problems + wrong_files(path, manifest))
    except ValueError as error:
        raise ValueError(f"{error}\n{_advice(path)}") from error
    return manifest


def _advice(path: Path) -> str:
    """Name the newest checkpoint before this one; whether to lose the steps between is the user's decision."""
    step = _step(path.name)
    for earlier in reversed(list_checkpoints(path.parent)):
        if (step is None or earlier.step < step) and _looks_whole(earlier.path):
            return f"use --from {earlier.step} to resume from {earlier.path}"
    return f"there is no earlier checkpoint in {path.parent}"


def _check_config(found: ModelConfig, expected: ModelConfig, path: Path) -> None:
    """Compare field by field. Storage is left out: the dtypes of the tensors are compared instead."""
    theirs = _fields(replace(found, storage=expected.storage))
    ours = _fields(expected)
    problems = [f"{name} is {theirs[name]}; expected {ours[name]}" for name in ours if theirs[name] != ours[name]]
    _refuse(f"checkpoint {path} is of another model", problems)


def _fields(config: ModelConfig) -> dict[str, object]:
    """Every number of a config by its dotted name."""
    result: dict[str, object] = {}
    for name, value in asdict(config).items():
        result |= (
            {f"{name}.{inner}": part for inner, part in value.items()} if isinstance(value, dict) else {name: value}
        )
    return result


def _check_tensors(shards: list[Path], targets: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise one error that lists every difference between the files' headers and the model's tensors."""
    found: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as content:
            names = content.keys()
            parts = {name: content.get_slice(name) for name in names}
            found |= {name: f"{part.get_dtype()} {list(part.get_shape())}" for name, part in parts.items()}
    expected = {name: f"{_DTYPE.get(t.dtype, t.dtype)} {list(t.shape)}" for name, t in targets.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}; expected {what}" for name, what in expected.items() if found.get(name, what) != what
    ]
    _refuse(f"checkpoint {path} does not fit the model", problems)


def _refuse(what: str, problems: list[str]) -> None:
    """Raise one ValueError, a line per problem, a long list cut."""
    if problems:
        more = [f"... and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
        raise ValueError(f"{what}:\n  " + "\n  ".join(problems[:PROBLEMS_SHOWN] + more))
