"""Weights in codes against weights in bfloat16: python bench/released_cpu.py

The shape of ``dsv4 bench engine`` (preset bench-engine) with random weights, once in bfloat16 and once in the codes
that these round to. Both engines decode in turns, so that what the machine does meanwhile meets both.
"""

import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from dsv4.accounting.tensors import inventory, total_bytes
from dsv4.cli.bench_setup import Options, machine, random_model, random_prompts
from dsv4.config.engine import Limits
from dsv4.config.presets import preset
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine

ROUNDS, TOKENS, PROMPT, WARM_UP = 9, 48, 512, 8
PRECISIONS = ("bfloat16", "released")
RESULTS = Path(__file__).parent / "results" / "released_cpu.json"


def held_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def decode_rate(engine: Engine, prompts: list[list[int]]) -> float:
    """Return tokens of output per second while all prompts decode, the first few steps left out."""
    sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    ids = [engine.add(prompt, sampling) for prompt in prompts]
    seconds = []
    while not engine.is_idle:
        begin = time.perf_counter()
        if len(engine.step()) == len(prompts):
            seconds.append(time.perf_counter() - begin)
    for id in ids:
        engine.take(id)
    steps = seconds[WARM_UP:-1]
    return len(prompts) * len(steps) / sum(steps)


def main() -> None:
    config = preset("bench-engine")
    rates: dict[str, dict[int, list[float]]] = {name: {1: [], 8: []} for name in PRECISIONS}
    engines, held = {}, {}
    for name in PRECISIONS:
        model = random_model(config, Options(precision=name))
        engines[name], held[name] = Engine(model, Limits(max_requests=8, cache_bytes=2**26)), held_bytes(model)
        stored = total_bytes(inventory(model.config))
        print(f"{name}: {held[name]:,} bytes in memory, {stored:,} in files ({held[name] / stored:.3f})")
    for count in (1, 8):
        prompts = random_prompts(config, count, PROMPT, 1)
        for turn in range(1 + ROUNDS):  # the first records the shapes of steps
            for name, engine in engines.items():
                rate = decode_rate(engine, prompts)
                if turn:
                    rates[name][count].append(rate)
    ratios = {}
    for count in (1, 8):
        plain, coded = (rates[name][count] for name in PRECISIONS)
        ratios[count] = statistics.median(b / a for a, b in zip(plain, coded, strict=True))
        print(
            f"{count} at once: {statistics.median(plain):,.1f} tokens/s in bfloat16, "
            f"{statistics.median(coded):,.1f} in codes; {ratios[count]:.2f} times, median of {ROUNDS} turns"
        )
    result = {
        "machine": machine(), "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "prompt_tokens": PROMPT, "held_bytes": held, "rates": rates,
        "ratios": ratios,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
