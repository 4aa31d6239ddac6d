"""What ``torch.compile`` makes of the portable path, operation by operation and in a whole training step of nano.

    python bench/compiled_cpu.py [--only OPERATION ...] [--presets nano mini] [--step] [--rounds N] [--json FILE]

For each operation: its portable function, its C kernel, and what inductor makes of the specification, or where that is
no formula of the portable function; forward and backward, in bfloat16, on the four rows of 1,024 tokens that a step of
the demo has, at the sizes of a preset. They take turns. Times are CPU seconds of one thread, medians: what else runs
on the machine counts little. ``--step`` measures the passes of such a step with the backend ``compiled`` against
``portable``, and tells their losses and gradients.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from model_cpu import machine
from train_cpu import pieces

from dsv4.cli.bench_setup import save
from dsv4.config.model import ModelConfig
from dsv4.config.presets import preset
from dsv4.ops.backend import Backend, check_backend
from dsv4.ops.compiled import compiled
from dsv4.ops.compress import portable as compress
from dsv4.ops.cross_entropy import portable as cross_entropy
from dsv4.ops.cross_entropy import reference as cross_entropy_formula
from dsv4.ops.experts import native as experts_c
from dsv4.ops.experts import portable as experts
from dsv4.ops.experts import reference as experts_formula
from dsv4.ops.lowbit import native as lowbit_c
from dsv4.ops.lowbit import portable as lowbit
from dsv4.ops.mhc import native as mhc_c
from dsv4.ops.mhc import portable as mhc
from dsv4.ops.mhc import reference as mhc_formula
from dsv4.ops.rmsnorm import native as rmsnorm_c
from dsv4.ops.rmsnorm import portable as rmsnorm
from dsv4.ops.rmsnorm import reference as rmsnorm_formula
from dsv4.ops.rope import native as rope_c
from dsv4.ops.rope import portable as rope
from dsv4.ops.rope import reference as rope_formula
from dsv4.ops.route import portable as route
from dsv4.ops.route import reference as route_formula

ROWS, TOKENS = 4, 1024
EPS = 1e-6


class Operation(NamedTuple):
    """Forms of an operation, by name, and what they are given: tensors, of which those that learn say so, and numbers.

    channels: see ``dsv4.ops.compiled``.
    """

    name: str
    given: tuple[Any, ...]
    channels: int
    portable: Callable[..., Any]
    native: Callable[..., Any] | None
    formula: Callable[..., Any] | None


def operations(config: ModelConfig) -> Iterator[Operation]:
    """Those that are many passes over memory, at a config's sizes."""
    D, N, F, V = config.hidden_size, config.hyper_connections.streams, config.moe.expert_dim, config.vocab_size
    H, K, R = config.attention.num_heads, config.attention.head_dim, config.attention.rotary_dims
    B, T, M, iterations = ROWS, TOKENS, N * (2 + N), config.hyper_connections.sinkhorn_iterations

    streams, y = narrow(B, T, N, D), narrow(B, T, D)
    mix, norm_weight = (wide(M, N * D), wide(M), wide(3)), wide(D)
    given = (streams, *mix, norm_weight, EPS, EPS, iterations)
    yield Operation("mhc.pre", given, 2, mhc.pre, mhc_c.pre, mhc_formula.pre)
    given = (streams, y, wide(B, T, N), wide(B, T, N, N))
    yield Operation("mhc.post", given, 2, mhc.post, mhc_c.post, mhc_formula.post)
    given = (streams, wide(N, N * D), wide(N), wide(1), norm_weight, EPS, EPS)
    yield Operation("mhc.head", given, 2, mhc.head, mhc_c.head, mhc_formula.head)
    yield Operation("rmsnorm", (y, norm_weight, EPS), 1, rmsnorm.rmsnorm, rmsnorm_c.rmsnorm, rmsnorm_formula.rmsnorm)
    angle = torch.randn(B, T, 1, R // 2)
    given = (narrow(B, T, H, K), angle.cos(), angle.sin())
    yield Operation("rope.rotate", (*given, False), 2, rope.rotate, rope_c.rotate, rope_formula.rotate)
    yield Operation(
        "rope.rotate_unit", (*given, EPS), 2, rope.rotate_unit, rope_c.rotate_unit, rope_formula.rotate_unit
    )
    given = (narrow(B, T, F), narrow(B, T, F), config.moe.swiglu_limit)
    yield Operation("experts.swiglu", given, 1, experts.swiglu, experts_c.swiglu, experts_formula.swiglu)
    is_first = torch.arange(T // 4).expand(B, -1) == 0
    given = (wide(B, T // 4, 4, 2 * K), wide(B, T // 4, 4, 2 * K), is_first)
    yield Operation("compress.pool_overlapped", given, 2, compress.pool_overlapped, None, None)
    given = (wide(B, T // 128, 128, K), wide(B, T // 128, 128, K))
    yield Operation("compress.pool_plain", given, 2, compress.pool_plain, None, None)
    given = (wide(B * T, config.moe.num_experts),)
    yield Operation("route.affinity", given, 1, route.affinity, None, route_formula.affinity)
    given = (narrow(B * T, D), wide(V, D), torch.randint(0, V, (B * T,)), torch.full((B * T,), 1 / (B * T)))
    yield Operation("cross_entropy", given, 1, cross_entropy.cross_entropy, None, cross_entropy_formula.cross_entropy)
    given = (narrow(B, T, K).detach(), 128, K)
    yield Operation("lowbit.round_rows", given, 1, lowbit.round_rows, lowbit_c.round_rows, None)
    given = (wide(F, D).detach(), torch.bfloat16)
    yield Operation("lowbit.round_fp4", given, 1, lowbit.round_fp4, lowbit_c.round_fp4, None)


def narrow(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16).requires_grad_()


def wide(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul_(0.1).requires_grad_()


def run(function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """Forward, and backward to whatever learns."""
    made = function(*given)
    leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    if leaves:
        parts = [x for x in (made if isinstance(made, tuple) else (made,)) if x.requires_grad]
        torch.autograd.grad(parts, leaves, [torch.ones_like(x) for x in parts], allow_unused=True)


def measure(operation: Operation, rounds: int) -> dict[str, object]:
    """Time all forms of an operation; of the compiled one also its first call."""
    forms = {"portable": operation.portable}
    if operation.native is not None:
        forms["native"] = operation.native
    found: dict[str, object] = {"operation": operation.name}
    function = operation.formula or operation.portable
    made = compiled(function, channels=operation.channels)
    begun = time.perf_counter()
    try:
        run(made, operation.given)
    except RuntimeError as error:  # as all that dynamo and inductor raise
        found["fails"] = next(line for line in str(error).splitlines() if line.strip())
    else:
        found |= {
            "compiled of": "formula" if operation.formula else "portable",
            "first call s": time.perf_counter() - begun,
        }
        forms["compiled"] = made
    turns: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            begun = time.process_time()
            run(form, operation.given)
            turns[name].append(time.process_time() - begun)
    middle = {name: median(taken) for name, taken in turns.items()}
    found["portable ms"] = 1e3 * middle.pop("portable")
    return found | {f"{name} is faster": found["portable ms"] / 1e3 / taken for name, taken in middle.items()}


def measure_step(rounds: int) -> dict[str, object]:
    """A training step of nano with both backends, in turns, on the same rows and weights."""
    from dsv4.optim.optimizer import Optimizer
    from dsv4.train.anticipatory import Work
    from dsv4.train.step import train_step

    backends: tuple[Backend, ...] = ("portable", "compiled", "native")
    with tempfile.TemporaryDirectory() as directory:
        config, parts, plan, position = pieces(Path(directory))
        torch.set_num_threads(1)
        optimizer = Optimizer(parts.model, config.optimizer)
        batches = [parts.loader.next_batch(rows, plan.phase.sequence) for rows in plan.micro_batches()]
        step = partial(
            train_step,
            parts.model,
            optimizer,
            config,
            Work(plan=plan, position=position, loader_state={}, batches=batches),
        )
        turns: dict[str, list[float]] = {backend: [] for backend in backends}
        results: dict[str, tuple[float, float]] = {}
        first: dict[str, float] = {}
        for turn in range(rounds + 1):
            for backend in backends:
                parts.model.backend = backend
                begun, wall = time.process_time(), time.perf_counter()
                result = step()
                if turn:
                    turns[backend].append(time.process_time() - begun)
                else:
                    results[backend], first[backend] = (result.loss, result.norms.main), time.perf_counter() - wall
        result = step()
        begun = time.process_time()
        result.apply()
        update = time.process_time() - begun
    middle = {backend: median(taken) for backend, taken in turns.items()}
    return {
        "tokens": plan.tokens, "passes s": middle, "update s": update,
        "first step s": first, "losses and gradient norms": results,
        "passes are faster": middle["portable"] / middle["compiled"],
        "step is faster": (middle["portable"] + update) / (middle["compiled"] + update),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="operations that are measured; all")
    parser.add_argument("--presets", nargs="*", default=["nano", "mini"], help="whose shapes")
    parser.add_argument("--step", action="store_true", help="measure a training step of nano, too")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each form")
    parser.add_argument("--json", type=Path, help="write the results here; what is not measured now stays")
    arguments = parser.parse_args()
    check_backend("compiled")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kept = arguments.json.read_text(encoding="utf-8") if arguments.json and arguments.json.exists() else "{}"
    results: dict[str, object] = json.loads(kept)
    results |= {"machine": machine(), "date": date.today().isoformat(), "torch": torch.__version__}
    if arguments.step:
        results["step"] = measure_step(3)
        print(results["step"], flush=True)
        save(arguments.json, results)
    for name in arguments.presets:
        rows: list[dict[str, object]] = []
        for operation in operations(preset(name)):
            if arguments.only is None or operation.name in arguments.only:
                rows.append(measure(operation, arguments.rounds))
                print(name, {k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
                results[name] = rows
                save(arguments.json, results)


if __name__ == "__main__":
    main()
