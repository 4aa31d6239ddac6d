"""Small comparisons with seeds: what each idea of the report does to a tiny model in a fixed number of tokens.

    base            Muon, mHC, CSA and HCA
    adamw           AdamW for every parameter, at half of the base's learning rate
    adamw-low, -high   the same at a sixth of the base's, and at the base's
    residual        one stream, added to: hyper-connections held where they start, at a plain residual
    unconstrained   hyper-connections whose mix of the streams is a free matrix, not brought near doubly stochastic ones
    dense           no compression: every layer attends to all raw tokens

Every variant trains on the same rows of the same text, at the demo's learning rates; AdamW, whose right rate is
another, at three. So what is shown is a direction, not a verdict. ``make ablations`` runs it, two runs at a time with a
thread each, and writes ``bench/results/ablations.json``; ``--table`` prints the table of docs/ablations.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from model_cpu import machine

from dsv4.cli.process import keep_freed_memory
from dsv4.config.load import save_config
from dsv4.config.presets import nano
from dsv4.config.recipes import load_recipe
from dsv4.config.train import BatchConfig, Phase
from dsv4.eval.bits import bits_per_byte
from dsv4.ops import mhc
from dsv4.optim.optimizer import Optimizer
from dsv4.train.anticipatory import Work
from dsv4.train.schedule import Position, after, plan
from dsv4.train.setup import set_up
from dsv4.train.step import train_step

VARIANTS = ("base", "adamw", "adamw-low", "adamw-high", "residual", "unconstrained", "dense")
SEEDS = (0, 1, 2)
AT_ONCE = 2
SEQUENCE = 512
ADAMW_LR = {"adamw-low": 1e-3, "adamw": 3e-3, "adamw-high": 6e-3}  # at its peak; the base's is 6e-3


def model_config(variant: str):
    """A model of 3M parameters; the variant's own changes."""
    small = nano()
    small = replace(
        small,
        vocab_size=1024,
        hidden_size=128,
        attention=replace(
            small.attention, num_heads=4, head_dim=64, rotary_dims=32, q_rank=64, o_groups=2, o_rank=64, window=64
        ),
        indexer=replace(small.indexer, num_heads=8, head_dim=32, top_k=32),
        moe=replace(small.moe, expert_dim=96),
    )
    if variant == "residual":
        return replace(small, hyper_connections=replace(small.hyper_connections, streams=1))
    if variant == "dense":
        kinds = ("window",) * small.num_layers
        return replace(small, layer_kinds=kinds, attention=replace(small.attention, window=SEQUENCE - 1))
    return small


def recipe(variant: str, seed: int, model: Path):
    demo = load_recipe("demo")
    lengths = {"dense": 120_000, "indexer": 20_000, "sparse": 120_000}
    phases = [Phase(name="dense", tokens=lengths["dense"], sequence=SEQUENCE, attention="dense")]
    if variant == "dense":
        phases = [replace(phases[0], tokens=lengths["dense"] + lengths["sparse"])]
    else:
        phases += [
            Phase(name="indexer", tokens=lengths["indexer"], sequence=SEQUENCE, attention="dense", train="indexer"),
            Phase(name="sparse", tokens=lengths["sparse"], sequence=SEQUENCE, attention="sparse"),
        ]
    return replace(
        demo,
        model=str(model),
        seed=seed,
        batch=BatchConfig(start_tokens=2048, tokens=2048, ramp_tokens=0, micro_tokens=2048),
        run=replace(demo.run, validation_tokens=64 * 1024, baseline_order=0, sample_prompt=""),
        phases=tuple(phases),
    )


# ---- one run, in a process of its own ---------------------------------------------------------------------


def run(variant: str, seed: int, directory: Path) -> dict:
    """Train one variant from one seed; return its validation loss, bits per byte, seconds and gain through depth."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if variant == "unconstrained":
        free_the_mix()
    directory.mkdir(parents=True, exist_ok=True)
    save_config(model_config(variant), directory / "model.json")
    config = recipe(variant, seed, directory / "model.json")
    parts = set_up(config, directory, device=torch.device("cpu"))
    if variant == "unconstrained":
        start_from_identity(parts.model)
    optimizer = OPTIMIZERS.get(variant, Optimizer)(parts.model, config.optimizer)
    position, begin = Position(), time.perf_counter()
    while (now := plan(config, position)) is not None:
        batches = [parts.loader.next_batch(rows, SEQUENCE) for rows in now.micro_batches()]
        work = Work(plan=now, position=position, loader_state={}, batches=batches)
        train_step(parts.model, optimizer, config, work).apply()
        position = after(position, now)
    seconds = time.perf_counter() - begin
    loss, bits = bits_per_byte(parts.model, parts.validation(SEQUENCE), dense=variant == "dense")
    return {
        "variant": variant, "seed": seed, "loss": loss, "bits_per_byte": bits, "seconds": seconds,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "gain": gain_through_depth(parts.model, parts.validation(SEQUENCE)[0]),
    }  # fmt: skip


class AdamWOnly(Optimizer):
    """AdamW for every parameter; ours clips and forgets gradients."""

    def __init__(self, model, config, peak_lr: float) -> None:
        super().__init__(model, config)
        trained = [p for n, p in model.named_parameters() if not n.endswith("gate.bias")]
        self.adamw = torch.optim.AdamW(
            trained, betas=config.adam_betas, eps=config.adam_eps, weight_decay=config.weight_decay
        )
        self.share = peak_lr / config.peak_lr

    def step(self, learning_rate: float, *, train: str = "all") -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * (self.share if train == "all" else 1.0)
        self.adamw.step()


class WithoutMixes(Optimizer):
    """Leaves hyper-connections where they start."""

    def clip(self, max_norm: float):
        for name, parameter in self._parameters.items():
            if "hc_" in name:
                parameter.grad = None
        return super().clip(max_norm)


OPTIMIZERS = {name: partial(AdamWOnly, peak_lr=lr) for name, lr in ADAMW_LR.items()} | {"residual": WithoutMixes}


def free_the_mix() -> None:
    """Let the mix of the streams be its logits themselves, in plain torch with autograd's own backward."""

    def pre(streams, mix, norm_weight, *, norm_eps, eps, iterations, backend):
        del iterations, backend
        N = streams.shape[2]
        wide = streams.flatten(2).float()  # [B, T, N D]
        mixes = torch.nn.functional.rms_norm(wide, wide.shape[-1:], eps=norm_eps) @ mix.fn.T
        scale = torch.cat([mix.scale[i].expand(n) for i, n in enumerate((N, N, N * N))])
        logits = mixes * scale + mix.base
        read, write, comb = logits.split([N, N, N * N], dim=-1)
        u = torch.einsum("btn,btnd->btd", torch.sigmoid(read) + eps, streams.float())
        x = torch.nn.functional.rms_norm(u, u.shape[-1:], norm_weight.float(), norm_eps).to(streams.dtype)
        return mhc.Reading(x, 2 * torch.sigmoid(write), comb.unflatten(-1, (N, N)), streams)

    mhc.pre = pre


def start_from_identity(model) -> None:
    N = model.config.hyper_connections.streams
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_base") and "head" not in name:
                parameter[2 * N :] = torch.eye(N).flatten()


def gain_through_depth(model, batch) -> float:
    """The largest absolute row or column sum of all layers' mixes multiplied together, averaged over tokens.

    1 means that no signal through the streams grows or fades; the mHC paper plots the same product.
    """
    combs: list[torch.Tensor] = []
    original = mhc.post

    def post(reading, y, *, backend):
        combs.append(reading.comb.detach())
        return original(reading, y, backend=backend)

    mhc.post = post
    try:
        with torch.no_grad():
            model.run(batch.token_ids, segment_ids=batch.segment_ids)
    finally:
        mhc.post = original
    product = combs[0]
    for comb in combs[1:]:
        product = product @ comb
    sums = torch.cat([product.abs().sum(-1), product.abs().sum(-2)], dim=-1)  # [B, T, 2 N]
    return float(sums.amax(dim=-1).mean())


# ---- all of them ------------------------------------------------------------------------------------------


def compare(directory: Path, variants: tuple[str, ...], seeds: tuple[int, ...]) -> list[dict]:
    """Run every variant from every seed, ``AT_ONCE`` processes at a time."""
    waiting = [(variant, seed) for seed in seeds for variant in variants]
    running: list[subprocess.Popen] = []
    results = []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            variant, seed = waiting.pop(0)
            command = [sys.executable, __file__, "--run", variant, str(seed), str(directory / f"{variant}-{seed}")]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            assert process.stdout is not None
            if process.returncode:
                raise RuntimeError("a run ended; its error is above")
            results.append(json.loads(process.stdout.read().splitlines()[-1]))
            print(
                "{variant:14} seed {seed}: {bits_per_byte:.4f} bits per byte, {seconds:.0f} s".format(**results[-1]),
                flush=True,
            )
        time.sleep(0.5)
    return results


def table(report: dict) -> str:
    """The results as Markdown: mean and standard deviation over seeds."""
    lines = [
        "| variant | parameters | bits per byte | nats a token | seconds | gain through depth |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for variant in VARIANTS:
        runs = [r for r in report["runs"] if r["variant"] == variant]
        if runs:
            columns = [
                spread([r[name] for r in runs], digits)
                for name, digits in (("bits_per_byte", 3), ("loss", 3), ("seconds", 0), ("gain", 2))
            ]
            lines.append(f"| {variant} | {runs[0]['parameters']:,} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, or read them with --table")
    parser.add_argument("--table", action="store_true", help="print the table of results that are there")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--directory", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--run", nargs=3, metavar=("VARIANT", "SEED", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        variant, seed, directory = arguments.run
        print(json.dumps(run(variant, int(seed), Path(directory))))
        return
    if arguments.table:
        print(table(json.loads(arguments.json.read_text())))
        return
    runs = compare(arguments.directory, tuple(arguments.variants), tuple(arguments.seeds))
    report = {"machine": machine(), "date": date.today().isoformat(), "runs": runs}
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
