"""A whole training step of the nano recipe on this CPU: where its time goes, and transformers beside it.

Ours is the step of ``dsv4 train demo`` in its sparse phase: loader, forward, backward, clipping, Newton-Schulz, AdamW
and routing biases. transformers trains the same shape on the same rows, with torch's own Muon for its 2-D matrices
and AdamW for the rest, its experts among them, since torch's Muon takes no stacks. Each has a process of its own; they
take turns. ``make bench-train`` runs it and writes ``bench/results/train_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

from model_cpu import THREADS, machine, matmul_rate

STEPS_A_TURN = 2
WARM_STEPS, FLAT_STEPS = 15, 30  # memory must not grow over the second, after the first
SEED = 0


def pieces(directory: Path):
    """The recipe, trained nothing yet: parts of a run, and the plan of a step of its first sparse phase."""
    import torch

    from dsv4.cli.process import keep_freed_memory
    from dsv4.config.recipes import load_recipe
    from dsv4.train.schedule import Position, after, plan
    from dsv4.train.setup import set_up

    torch.set_num_threads(THREADS)
    keep_freed_memory()
    config = load_recipe("demo")
    config = replace(config, batch=replace(config.batch, start_tokens=config.batch.tokens, ramp_tokens=0))
    parts = set_up(config, directory, device=torch.device("cpu"))
    position = Position()
    while (now := plan(config, position)) is not None and now.phase.attention == "dense":
        position = after(position, now)
    assert now is not None
    return config, parts, now, position


class Ours:
    """Our step, its parts timed apart."""

    def __init__(self, directory: Path) -> None:
        from dsv4.optim.optimizer import Optimizer

        self.config, self.parts, self.plan, self.position = pieces(directory)
        self.optimizer = Optimizer(self.parts.model, self.config.optimizer)

    def step(self) -> dict[str, float]:
        from dsv4.train.anticipatory import Work
        from dsv4.train.flops import step_flops
        from dsv4.train.step import train_step

        loader = self.parts.loader
        begin = time.perf_counter()
        batches = [loader.next_batch(rows, self.plan.phase.sequence) for rows in self.plan.micro_batches()]
        loaded = time.perf_counter()
        work = Work(plan=self.plan, position=self.position, loader_state={}, batches=batches)
        result = train_step(self.parts.model, self.optimizer, self.config, work)
        passed = time.perf_counter()
        result.apply()
        end = time.perf_counter()
        return {
            "seconds": end - begin,
            "loader": loaded - begin,
            "passes": passed - loaded,
            "optimizer": end - passed,
            "flops": step_flops(self.parts.model.config, batches, self.plan),
            "tokens": self.plan.tokens,
        }


class Theirs:
    """The same shape in transformers, on the same rows."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from dsv4.checkpoint.save import save_model

        _, self.parts, self.plan, _ = pieces(directory)
        save_model(self.parts.model, directory / "checkpoint")
        self.model = AutoModelForCausalLM.from_pretrained(
            directory / "checkpoint", dtype=torch.bfloat16, attn_implementation="eager"
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [
            p for n, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in n and "head" not in n
        ]
        known = {id(p) for p in matrices}
        self.optimizers = [
            torch.optim.Muon(matrices, lr=1e-4),
            torch.optim.AdamW([p for p in trained if id(p) not in known], lr=1e-4),
        ]

    def step(self) -> dict[str, float]:
        begin = time.perf_counter()
        for rows in self.plan.micro_batches():
            token_ids = self.parts.loader.next_batch(rows, self.plan.phase.sequence).token_ids
            self.model(token_ids, labels=token_ids, use_cache=False).loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - begin, "tokens": self.plan.tokens}


def newton_schulz_seconds(ours: Ours) -> float:
    """The time of one step's Newton-Schulz alone: the optimiser's, less the optimiser's with the iteration left out."""
    import torch

    from dsv4.optim import muon

    def timed() -> float:
        for parameter in ours.parts.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        begin = time.perf_counter()
        ours.optimizer.step(0.0)
        return time.perf_counter() - begin

    timed()
    whole = median(timed() for _ in range(5))
    iteration = muon.orthogonalize
    try:
        muon.orthogonalize = lambda matrices, **_: matrices
        return whole - median(timed() for _ in range(5))
    finally:
        muon.orthogonalize = iteration


def work(engine: str, directory: Path) -> None:
    """Answer each line of standard input with a turn, or with what it asks for."""
    import resource

    import torch

    run = {"ours": Ours, "theirs": Theirs}[engine](directory)
    run.step()
    for line in sys.stdin:
        if line.strip() == "newton-schulz":
            assert isinstance(run, Ours)
            answer: dict[str, object] = {"seconds": newton_schulz_seconds(run)}
        elif line.strip() == "flat":
            sizes = []
            for _ in range(WARM_STEPS + FLAT_STEPS):
                run.step()
                sizes.append(resident_bytes())
            answer = {"before": sizes[WARM_STEPS - 1], "after": sizes[-1]}
        else:
            rate = matmul_rate(torch.bfloat16)
            steps = [run.step() for _ in range(STEPS_A_TURN)]
            answer = {name: median(step[name] for step in steps) for name in steps[0]}
            answer |= {"matmul_flops": max(rate, matmul_rate(torch.bfloat16))}
            answer |= {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
        print(json.dumps(answer), flush=True)


def resident_bytes() -> int:
    """Memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Worker:
    """A process that holds one engine ready."""

    def __init__(self, engine: str, directory: Path) -> None:
        command = [sys.executable, __file__, "--worker", engine, str(directory)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str = "turn") -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a measured process ended; its error is above")
        return json.loads(line)


def compare(rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        workers = {}
        for engine in ("ours", "theirs"):
            (Path(directory) / engine).mkdir()
            workers[engine] = Worker(engine, Path(directory) / engine)
            workers[engine].ask()  # ready before the next one starts
        turns: dict[str, list[dict]] = {engine: [] for engine in workers}
        for _ in range(rounds):
            for engine, worker in workers.items():
                turns[engine].append(worker.ask())
        iteration = workers["ours"].ask("newton-schulz")["seconds"]
        flat = workers["ours"].ask("flat")
    middle = {
        engine: {name: median(turn[name] for turn in found) for name in found[0]} for engine, found in turns.items()
    }
    ours, theirs = middle["ours"], middle["theirs"]
    return {
        "machine": machine(),
        "date": date.today().isoformat(),
        "seed": SEED,
        "rounds": rounds,
        "tokens": ours["tokens"],
        "tokens_per_s": ours["tokens"] / ours["seconds"],
        "utilisation": ours["flops"] / ours["seconds"] / ours["matmul_flops"],
        "matmul_gflops": ours["matmul_flops"] / 1e9,
        "loader_share": ours["loader"] / ours["seconds"],
        "optimizer_share": ours["optimizer"] / ours["seconds"],
        "newton_schulz_share": iteration / ours["seconds"],
        "peak_gb": ours["peak_gb"],
        "memory_growth": flat["after"] / flat["before"] - 1,
        "transformers_tokens_per_s": theirs["tokens"] / theirs["seconds"],
        "transformers_peak_gb": theirs["peak_gb"],
        "ratio": theirs["seconds"] / ours["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="counted turns of each engine")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker[0], Path(arguments.worker[1]))
        return
    result = compare(arguments.rounds)
    for name, value in result.items():
        print(f"{name:26} {value:,.4g}" if isinstance(value, float) else f"{name:26} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
