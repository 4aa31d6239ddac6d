"""What every benchmark of the engine begins and ends with: a model by name, this machine, and a file of results."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from dsv4.accounting.parameters import parameters
from dsv4.cli import models
from dsv4.cli.models import RESIDENCE, Precision, Residence, find_model, on_device
from dsv4.config.backend import BackendChoice
from dsv4.config.engine import EngineCacheFormat
from dsv4.config.files import write_then_rename
from dsv4.config.model import ModelConfig
from dsv4.config.presets import PRESETS, preset

if TYPE_CHECKING:
    from dsv4.model.transformer import Transformer

ModelName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
"""A preset, which gets random weights, or the folder of a run or checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark of the engine takes."""

    precision: Precision = "bfloat16"
    """Of weights and activations; released: codes of FP8 and FP4, and what the released code rounds."""
    cache_format: EngineCacheFormat = "auto"
    """How cached rows are stored; auto: in the precision of activations, released ones packed (FP4 keys)."""
    step_tokens: int = 2048
    """Tokens of a step at most."""
    threads: int | None = None
    """Threads to compute with; as many as torch takes if not given."""
    seed: int = 0
    """Of random weights and prompts."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the results into this file."""


DEFAULTS = Options()


def check_options(options: Options, *, at_least_one: dict[str, int], config: ModelConfig, longest: int) -> None:
    """Raise one ``ValueError`` for whatever cannot be measured, before a model is made.

    at_least_one: values by the names of their options. longest: tokens of the longest sequence.
    """
    values = at_least_one | {"step-tokens": options.step_tokens}
    values |= {} if options.threads is None else {"threads": options.threads}
    problems = [f"--{name} is {value}; expected at least 1" for name, value in values.items() if value < 1]
    if options.seed < 0:
        problems.append(f"--seed is {options.seed}; expected at least 0")
    if longest > config.max_context:
        problems.append(
            f"the longest sequence has {longest} tokens; expected at most {config.max_context}, the model's context"
        )
    if options.json is not None and not options.json.parent.is_dir():
        problems.append(f"--json is {options.json}; expected its directory to exist")
    if problems:
        raise ValueError("\n".join(problems))


def is_preset(model: str) -> bool:
    """Whether a name is a preset's; a folder of that name is reached as ./nano."""
    return model in PRESETS


def model_config(model: str) -> ModelConfig:
    """Return the config of a preset, or of the model in a folder."""
    from dsv4.config.load import load_config

    return preset(model) if is_preset(model) else load_config(find_model(Path(model)))


def open_model(model: str, options: Options, residence: Residence = RESIDENCE) -> Transformer:
    """Return a preset with random weights, or the model in a folder, on this machine's accelerator if it has one."""
    import torch

    from dsv4.cli.process import keep_freed_memory

    if is_preset(model) and replace(residence, backend=RESIDENCE.backend) != RESIDENCE:
        raise ValueError(
            f"--weights is {residence.weights} and --expert-bytes {residence.expert_bytes} with the preset {model}; "
            "expected the folder of a run or checkpoint: a preset is in no file"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    if is_preset(model):
        return random_model(preset(model), options, residence.backend)
    return models.open_model(find_model(Path(model)), options.precision, residence)


def random_model(config: ModelConfig, options: Options, backend: BackendChoice = "auto") -> Transformer:
    """Return a model with random weights in the precision asked for. No second copy of it is ever held."""
    import torch

    from dsv4.device import best
    from dsv4.model.init import initialize_
    from dsv4.model.precision import pack
    from dsv4.model.transformer import Transformer
    from dsv4.ops.backend import resolve

    dtype = torch.float32 if options.precision == "float32" else torch.bfloat16
    resolve(backend, best())
    model = Transformer(config, weight_dtype=dtype, activation_dtype=dtype, backend=backend)
    initialize_(model, options.seed)
    return on_device(pack(model) if options.precision == "released" else model.eval())


def random_prompts(config: ModelConfig, count: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Return prompts of token ids, no two alike."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, config.vocab_size, (count, num_tokens)).tolist()


def heading(benchmark: str, model: str, transformer: Transformer, options: Options) -> dict[str, object]:
    """Say what was measured, where and when: the beginning of a file of results."""
    import torch

    return {
        "benchmark": benchmark,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "model": model,
        "weights": "random" if is_preset(model) else "trained",
        "parameters": parameters(transformer.config).with_mtp.total,
        "precision": options.precision,
        "cache_format": options.cache_format,
        "step_tokens": options.step_tokens,
        "seed": options.seed,
    }


def describe(results: dict[str, object]) -> str:
    """Say the same in a line."""
    return (
        f"{results['model']}, {results['weights']} weights, {results['parameters']:,} parameters in "
        f"{results['precision']}; {results['threads']} threads of {results['machine']}"
    )


def machine() -> str:
    """The processor's name, and how many cores there are."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def resident_bytes() -> int:
    """Return the memory this process holds now; where the system does not say, the most it ever held."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def save(path: Path | None, results: dict[str, object]) -> None:
    """Write results as JSON, beside and renamed, if there is a file for them."""
    if path is not None:
        text = json.dumps(results, indent=2) + "\n"
        write_then_rename(path, lambda partial: _write(partial, text))


def notes() -> Console:
    """Where a benchmark says how far it is: not among its results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
