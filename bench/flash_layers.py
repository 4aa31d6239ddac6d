"""A CSA and an HCA layer of Flash at their true size, in the released precision: python bench/flash_layers.py FOLDER

Writes the layers with seeded random weights to FOLDER first (9.3 GB; ``dsv4 synth flash FOLDER --layers 2,3``), if it
is not there. Then loads them, runs a prompt and decodes, and says what that took.
"""

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from dsv4.accounting.tensors import inventory, total_bytes
from dsv4.checkpoint.load import load_model
from dsv4.cli.bench_setup import machine, random_prompts
from dsv4.cli.synth import synth
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.device import CPU, peak_memory_bytes
from dsv4.engine.engine import Engine

LAYERS = (2, 3)  # CSA with a table of experts, and HCA
PROMPT, TOKENS, CONTEXT = 2048, 32, 4096
RESULTS = Path(__file__).parent / "results" / "flash_layers.json"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    if not folder.exists():
        synth("flash", folder, ",".join(map(str, LAYERS)))
    begin = time.perf_counter()
    model = load_model(folder, "released")
    load_seconds = time.perf_counter() - begin
    stored = total_bytes(inventory(model.config))
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    loaded_peak = peak_memory_bytes(CPU)
    engine = Engine(model, Limits(max_requests=1, max_context=CONTEXT, cache_bytes=2**27))
    (prompt,) = random_prompts(model.config, 1, PROMPT, 1)
    id = engine.add(prompt, Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True))
    prefill, decode = 0.0, []
    while not engine.is_idle:
        begin = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - begin
        if engine.last_step.entries[0].begin < PROMPT:
            prefill += seconds
        else:
            decode.append(seconds)
    steady = sorted(decode)[len(decode) // 2]
    peak = peak_memory_bytes(CPU)
    print(
        f"{stored:,} bytes in files, {held:,} in memory, loaded in {load_seconds:.0f} s with a peak of {loaded_peak:,}"
    )
    print(f"prompt of {PROMPT}: {PROMPT / prefill:.1f} tokens/s; decoding: {1 / steady:.1f}; peak {peak:,} bytes")
    result = {
        "machine": machine(), "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "layers": LAYERS, "file_bytes": stored, "held_bytes": held,
        "load_seconds": load_seconds, "load_peak_bytes": loaded_peak, "peak_bytes": peak, "prompt_tokens": PROMPT,
        "prefill_tokens_per_s": PROMPT / prefill, "decode_tokens_per_s": 1 / steady,
    }  # fmt: skip
    assert len(engine.take(id).token_ids) == TOKENS, "the engine stopped early"
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
