"""Train and prefill the same small model with dsv4 and with transformers on this CPU, and print the ratios.

Each engine has a process of its own, on the same weights; the two take turns, so that a machine that slows
down slows both. ``make bench-cpu`` runs it; the table and the JSON it writes are the source of every CPU
figure in the documents.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

THREADS = 2
TRAIN_TOKENS = (512, 2048, 4096)
PREFILL_TOKENS = (4096, 8192)
FLAT_TOKENS = (4096, 8192, 16384, 32768)
BOTH_ALLOCATORS = 2048  # tokens; at more, transformers' kept memory does not fit beside the others
TURN_SECONDS = 6  # a turn of a fast case is several steps
SLOW_SECONDS = 20  # a comparison with a step slower than this has one turn each after the warm-up


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement of one engine. pattern: the layers' compression ratios.

    keeps_memory: the process keeps what it frees (``dsv4.cli.process``). Our commands do. transformers is measured
    as it comes, and at the smaller sizes with that setting too: it is then faster, and larger by what it frees.
    """

    engine: str  # dsv4 or transformers
    task: str  # train or prefill
    dtype: str
    tokens: int
    pattern: tuple[int, ...] = (0, 0, 4, 128, 4, 128)
    keeps_memory: bool = True


# ---- the measured process ---------------------------------------------------------------------------------


def bench_config(pattern: tuple[int, ...]):
    """The shape of the comparison: hidden 256, 8 heads of 64, 16 experts of 256 with 4 active, vocabulary 4096."""
    from dsv4.config.model import RATIO
    from dsv4.config.presets import nano

    small = nano()
    kinds = {ratio: kind for kind, ratio in RATIO.items()}
    return replace(
        small,
        vocab_size=4096,
        layer_kinds=tuple(kinds[ratio] for ratio in pattern),
        mtp_kinds=(),
        attention=replace(small.attention, num_heads=8, head_dim=64, rotary_dims=16, o_groups=4, o_rank=64),
        indexer=replace(small.indexer, num_heads=8, head_dim=32),
        rope=replace(small.rope, factor=16, original_context=4096),
        moe=replace(small.moe, num_experts=16, experts_per_token=4, expert_dim=256, num_hash_layers=0),
        max_context=65536,
        initializer_range=0.06,
        storage="float32",
    )


def make_step(case: Case, directory: str) -> tuple[Callable[[], None], float]:
    """Return a function that does the case's work once, and its useful FLOPs."""
    import torch

    config = bench_config(case.pattern)
    token_ids = torch.randint(0, config.vocab_size, (1, case.tokens), generator=torch.Generator().manual_seed(1))
    if case.engine == "dsv4":
        return dsv4_step(case, directory, token_ids), flops(case)
    return transformers_step(case, directory, token_ids), flops(case)


def flops(case: Case) -> float:
    """Useful FLOPs of one step by the accounting: matrix products, 2 a multiply-add.

    The indexer counts forward only, since nothing here trains it.
    """
    from dsv4.accounting.cost import total_flops
    from dsv4.accounting.flops import prefill, training

    config = bench_config(case.pattern)
    forward = prefill(config, case.tokens)
    if case.task == "prefill":
        return total_flops(forward)
    costs = [cost for cost in training(config, case.tokens) if cost.kind != "indexer"]
    return total_flops([*costs, *(cost for cost in forward if cost.kind == "indexer")])


def dsv4_step(case: Case, directory: str, token_ids) -> Callable[[], None]:
    import torch

    import dsv4
    from dsv4.ops.cross_entropy import cross_entropy

    model = dsv4.load_model(directory, "bfloat16" if case.dtype == "bfloat16" else "float32")
    token_weights = torch.full((case.tokens - 1,), 1 / (case.tokens - 1))

    def train() -> None:
        streams, _ = model.run(token_ids)
        hidden = model.hidden(streams)[0, :-1]
        loss, _ = cross_entropy(hidden, model.head.weight, token_ids[0, 1:], token_weights)
        loss.backward()
        model.zero_grad(set_to_none=True)

    def prefill() -> None:
        with torch.no_grad():
            streams, _ = model.run(token_ids, state=model.new_state(1))
            model.logits(model.hidden(streams[:, -1:]))

    return train if case.task == "train" else prefill


def transformers_step(case: Case, directory: str, token_ids) -> Callable[[], None]:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, case.dtype)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")

    def train() -> None:
        model(token_ids, labels=token_ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def prefill() -> None:
        with torch.no_grad():
            model(token_ids, use_cache=True, logits_to_keep=1)

    return train if case.task == "train" else prefill


def matmul_rate(dtype) -> float:
    """FLOP/s of a 1024-cubed product, best of a few: the rate that utilisation is measured against."""
    import torch

    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    torch.mm(a, b)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def work(case: Case, directory: str) -> None:
    """Answer each line of standard input with the median time of a turn's steps, as a line of JSON."""
    import torch

    from dsv4.cli.process import keep_freed_memory

    torch.set_num_threads(THREADS)
    if case.keeps_memory:
        keep_freed_memory()
    step, useful = make_step(case, directory)
    dtype = getattr(torch, case.dtype)
    for line in sys.stdin:
        if line.strip() == "shares":
            answer: dict[str, object] = {"shares": shares(step)}
        else:
            rate = matmul_rate(dtype)
            seconds = median(turn(step))
            answer = {
                "seconds": seconds,
                "utilisation": useful / seconds / max(rate, matmul_rate(dtype)),
                "matmul_gflops": rate / 1e9,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            }
        print(json.dumps(answer), flush=True)


def turn(step: Callable[[], None]) -> list[float]:
    """The times of one turn's steps: as many as fit into ``TURN_SECONDS``, at least one."""
    times: list[float] = []
    while not times or sum(times) + times[-1] < TURN_SECONDS:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


SHARES = (
    ("matrix products", ("mm", "bmm", "addmm", "addmm_", "baddbmm")),
    ("copies, casts, fills", ("copy_", "cat", "fill_", "zero_", "clone")),
    ("gather, scatter, sort", ("index", "index_select", "index_add_", "gather", "scatter_add_", "topk", "sort")),
)


def shares(step: Callable[[], None]) -> dict[str, float]:
    """Where the time of a step goes, as fractions of it."""
    from torch.profiler import profile

    step()
    with profile() as trace:
        start = time.perf_counter()
        step()
        total_us = (time.perf_counter() - start) * 1e6
    groups = {name: 0.0 for name, _ in SHARES} | {"elementwise and reductions": 0.0, "our kernels": 0.0}
    for event in trace.key_averages():
        if event.key.startswith("aten::"):
            name = event.key.removeprefix("aten::")
            group = next((group for group, names in SHARES if name in names), "elementwise and reductions")
            groups[group] += event.self_cpu_time_total
        elif event.key.startswith("dsv4_"):
            groups["our kernels"] += event.self_cpu_time_total
    groups["Python and autograd"] = max(0.0, total_us - sum(groups.values()))
    return {name: us / total_us for name, us in groups.items()}


# ---- the process that compares ----------------------------------------------------------------------------


class Worker:
    """A process that holds one engine ready for one case."""

    def __init__(self, case: Case, directory: str) -> None:
        self.case = case
        command = [sys.executable, __file__, "--worker", json.dumps(case.__dict__), directory]
        environment = os.environ | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, question: str = "step") -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.case} ended without an answer (exit code {self.process.wait()})")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_turns(cases: list[Case], directory: str, rounds: int) -> list[dict]:
    """Let the cases take turns: one to warm up, then ``rounds`` that count."""
    workers = [Worker(case, directory) for case in cases]
    try:
        slowest = max(worker.ask()["seconds"] for worker in workers)
        rounds = rounds if slowest < SLOW_SECONDS else 1
        answers = [[worker.ask() for worker in workers] for _ in range(rounds)]
    finally:
        for worker in workers:
            worker.close()
    results = []
    for i, case in enumerate(cases):
        mine = [answer[i] for answer in answers]
        seconds = median(answer["seconds"] for answer in mine)
        results.append(
            case.__dict__
            | {
                "seconds": seconds,
                "tokens_per_s": case.tokens / seconds,
                "utilisation": median(answer["utilisation"] for answer in mine),
                "matmul_gflops": median(answer["matmul_gflops"] for answer in mine),
                "peak_gb": mine[-1]["peak_gb"],
                "rounds": rounds,
            }
        )
    for result in results:
        ratios = [answer[-1]["seconds"] / answer[results.index(result)]["seconds"] for answer in answers]
        result["times_the_last"] = median(ratios)
    return results


def write_checkpoint(pattern: tuple[int, ...], directory: str) -> None:
    import dsv4

    dsv4.save_model(dsv4.new_model(bench_config(pattern), seed=0), directory)


def compare(rounds: int, quick: bool) -> dict:
    train_tokens, prefill_tokens, flat_tokens = TRAIN_TOKENS, PREFILL_TOKENS, FLAT_TOKENS
    if quick:
        train_tokens, prefill_tokens, flat_tokens = (512,), (1024,), (1024, 2048)
    results, flat = [], []
    with tempfile.TemporaryDirectory() as folder:
        whole, sparse = f"{folder}/whole", f"{folder}/sparse"
        write_checkpoint((0, 0, 4, 128, 4, 128), whole)
        write_checkpoint((0, 0, 4, 4), sparse)
        for task, sizes in (("train", train_tokens), ("prefill", prefill_tokens)):
            for tokens in sizes:
                cases = [
                    Case(engine="dsv4", task=task, dtype="float32", tokens=tokens),
                    Case(engine="dsv4", task=task, dtype="bfloat16", tokens=tokens),
                ]
                if tokens <= BOTH_ALLOCATORS:
                    cases.append(Case(engine="transformers", task=task, dtype="float32", tokens=tokens))
                cases.append(Case(engine="transformers", task=task, dtype="float32", tokens=tokens, keeps_memory=False))
                results += take_turns(cases, whole, rounds)
                print_rows(results[-len(cases) :])
        for dtype in ("float32", "bfloat16"):
            cases = [
                Case(engine="dsv4", task="train", dtype=dtype, tokens=tokens, pattern=(0, 0, 4, 4))
                for tokens in flat_tokens
            ]
            flat += take_turns(cases, sparse, rounds)
            print_rows(flat[-len(cases) :])
        where = {}
        for dtype in ("float32", "bfloat16"):
            worker = Worker(Case(engine="dsv4", task="train", dtype=dtype, tokens=train_tokens[-1]), whole)
            worker.ask()
            where[dtype] = worker.ask("shares")["shares"]
            worker.close()
    return {"machine": machine(), "date": date.today().isoformat(), "cases": results, "flat": flat, "shares": where}


def machine() -> str:
    """The processor's name and the number of cores used."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {THREADS} threads of {os.cpu_count()} cores"


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        print(
            f"{row['task']:8} {row['tokens']:6} tokens  {row['engine']:12} {row['dtype']:9} "
            f"{'kept ' if row['keeps_memory'] else 'freed'} "
            f"{row['tokens_per_s']:8.0f} tokens/s  x{row['times_the_last']:6.2f}  "
            f"{row['utilisation']:4.0%} of {row['matmul_gflops']:4.0f} GFLOP/s  {row['peak_gb']:5.2f} GB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="counted turns of each case")
    parser.add_argument("--quick", action="store_true", help="small sizes only, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        fields = json.loads(arguments.worker[0])
        work(Case(**(fields | {"pattern": tuple(fields["pattern"])})), arguments.worker[1])
        return
    print(machine())
    report = compare(arguments.rounds, arguments.quick)
    for dtype, parts in report["shares"].items():
        print(f"a training step in {dtype}: " + ", ".join(f"{name} {part:.0%}" for name, part in parts.items()))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
