"""``dsv4 bench cache``: what the policies of the prefix cache on disk write, read and compute again (report 3.6)."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from dsv4.cli.bench_setup import (
    DEFAULTS,
    ModelName,
    Options,
    check_options,
    describe,
    heading,
    model_config,
    notes,
    open_model,
    random_prompts,
    save,
)
from dsv4.cli.format import gigabytes
from dsv4.config.engine import Limits, PrefixLimits, WindowPolicy
from dsv4.config.sampling import Sampling

if TYPE_CHECKING:
    from dsv4.engine.engine import Engine
    from dsv4.engine.measure import Answer
    from dsv4.model.transformer import Transformer

FOLDER_BYTES = 2**40  # nothing is to be evicted


def bench_cache(
    model: ModelName = "bench-engine",
    prompt_tokens: int = 16384,
    suffix_tokens: int = 64,
    output_tokens: int = 8,
    period: int = 8192,
    folder: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS,
) -> None:
    """Run a prompt, start again, and run it with more at its end: with each policy of the disk, and without a disk.

    Both runs are in the invariant mode, and what the second one puts out is compared bit for bit. Files are read soon
    after they were written, so most likely from the system's memory.

    Args:
        model: a preset, which gets random weights, or the folder of a run or checkpoint.
        prompt_tokens: tokens of the prompt that is run first.
        suffix_tokens: tokens after it in the second run.
        output_tokens: tokens that the second run puts out.
        period: tokens between the states that the policy periodic keeps.
        folder: where the temporary folders are made; where the system makes its own if not given.
    """
    values = {"prompt-tokens": prompt_tokens, "suffix-tokens": suffix_tokens, "output-tokens": output_tokens}
    config, longest = model_config(model), prompt_tokens + suffix_tokens + output_tokens
    check_options(options, at_least_one=values, config=config, longest=longest)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--folder is {folder}; expected a directory that exists")
    policies: dict[WindowPolicy, PrefixLimits] = {
        policy: PrefixLimits(
            folder="unnamed", folder_bytes=FOLDER_BYTES, policy=policy,
            period=period if policy == "periodic" else PrefixLimits.period,
        )
        for policy in get_args(WindowPolicy)
    }  # fmt: skip
    console = notes()
    with console.status("preparing"):
        transformer = open_model(model, options)
    prompt = random_prompts(config, 1, prompt_tokens + suffix_tokens, options.seed)[0]
    bench = _Bench(transformer, options, prompt, prompt_tokens, output_tokens)
    with console.status("measuring without the cache"):
        plain = bench.plain()
    found: list[dict[str, Any]] = []
    results = heading("cache", model, transformer, options)
    results |= {
        "prompt_tokens": prompt_tokens, "suffix_tokens": suffix_tokens, "output_tokens": output_tokens,
        "period": period, "policies": found,
    }  # fmt: skip
    for policy, prefix in policies.items():
        with console.status(f"measuring {policy}"), tempfile.TemporaryDirectory(dir=folder) as place:
            found.append({"policy": policy} | bench.policy(replace(prefix, folder=place), plain))
        save(options.json, results)
    _print(results)


class _Bench:
    """The two runs, of one model and prompt."""

    def __init__(
        self, transformer: Transformer, options: Options, prompt: list[int], prompt_tokens: int, output_tokens: int
    ) -> None:
        self.transformer, self.options = transformer, options
        self.first, self.second = prompt[:prompt_tokens], prompt
        self.output_tokens = output_tokens

    def plain(self) -> Answer:
        """The second prompt, without a cache; once before it, a short one to warm up."""
        with self._engine(PrefixLimits()) as engine:
            self._run(engine, random_prompts(self.transformer.config, 1, 16, self.options.seed + 1)[0], 2)
            return self._run(engine, self.second, self.output_tokens)

    def policy(self, prefix: PrefixLimits, plain: Answer) -> dict[str, Any]:
        """The first prompt in one engine, the second in another one that finds its folder."""
        from dsv4.engine.measure import same_bits

        with self._engine(prefix) as engine:
            self._run(engine, self.first, 1)
            assert engine.folder is not None
            written = engine.folder.store.statistics()
        with self._engine(prefix) as engine:
            answer = self._run(engine, self.second, self.output_tokens)
            assert engine.folder is not None
            read = engine.folder.store.statistics()
        return {
            "bytes_written": written.bytes_written,
            "files": written.num_files,
            "bytes_read": read.bytes_read,
            "tokens_found": answer.num_found,
            "tokens_recomputed": answer.num_repeated,
            "first_token_s": answer.first_token_s,
            "first_token_without_s": plain.first_token_s,
            "same_bits": same_bits(answer, plain),
        }

    def _engine(self, prefix: PrefixLimits) -> Engine:
        from dsv4.accounting.cache import page_bytes
        from dsv4.engine.build import cache_format
        from dsv4.engine.engine import Engine
        from dsv4.engine.pages import pages_of

        context = len(self.second) + self.output_tokens
        limits = Limits(
            max_requests=1, step_tokens=self.options.step_tokens, max_context=context,
            cache_format=self.options.cache_format, numerics="invariant", prefix=prefix,
        )  # fmt: skip
        size = page_bytes(self.transformer.config, cache_format(self.transformer, limits))
        return Engine(self.transformer, replace(limits, cache_bytes=max(1, pages_of(context) * size)))

    def _run(self, engine: Engine, prompt: list[int], output_tokens: int) -> Answer:
        from dsv4.engine.measure import Meter, run_one

        sampling = Sampling(max_tokens=output_tokens, temperature=0.0, ignore_eos=True, seed=0)
        return run_one(Meter(engine, time.perf_counter, keeps_logits=True), prompt, sampling)


def _print(results: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    names = ("written", "read", "tokens\nfound", "run\nagain", "first\ntoken, s", "without\na disk, s", "same\nbits")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["policies"]:
        table.add_row(
            row["policy"],
            gigabytes(row["bytes_written"]),
            gigabytes(row["bytes_read"]),
            f"{row['tokens_found']:,}",
            f"{row['tokens_recomputed']:,}",
            f"{row['first_token_s']:.3f}",
            f"{row['first_token_without_s']:.3f}",
            "yes" if row["same_bits"] else "NO",
        )
    console = Console(highlight=False)
    console.print(describe(results), soft_wrap=True, markup=False)
    console.print(
        f"a prompt of {results['prompt_tokens']:,} tokens, then in a new engine the same and "
        f"{results['suffix_tokens']:,} more; periodic keeps a state every {results['period']:,} tokens",
        soft_wrap=True,
    )
    console.print(table)
