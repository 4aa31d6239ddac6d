"""``dsv4 bench serve``: what the server adds to the engine's own times, with some streams at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import chain, islice, product
from statistics import mean, median
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

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
from dsv4.cli.serve import require_packages
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.config.serve import ServeOptions
from dsv4.train.words import plural

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dsv4.accounting.cache import CacheFormat
    from dsv4.serve.load import Client, Measured
    from dsv4.serve.service import Service

NAME, PATH = "bench", "/v1/chat/completions"
LEAST_PROMPT = 16  # tokens: what stands around a text, and some letters
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def bench_serve(
    model: ModelName = "bench-engine",
    concurrency: tuple[int, ...] = (1, 8, 64),
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    rounds: int = 5,
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS,
) -> None:
    """Measure chat streams of the server beside the same requests of the bare engine, in turn.

    The client has a process of its own, on the same cores. Prompts are random, and no answer ends before its length.

    Args:
        model: a preset, which gets random weights, or the folder of a run or checkpoint.
        concurrency: streams at once.
        prompt_tokens: tokens of each prompt.
        output_tokens: tokens of each answer.
        rounds: how often each is measured; the median counts.
    """
    require_packages()
    config = model_config(model)
    values = {"rounds": rounds, "concurrency": min(concurrency, default=0)}
    for name, value, least in (("prompt", prompt_tokens, LEAST_PROMPT), ("output", output_tokens, 2)):
        if value < least:
            raise ValueError(f"--{name}-tokens is {value}; expected at least {least}")
    check_options(options, at_least_one=values, config=config, longest=prompt_tokens + output_tokens)
    console = notes()
    with console.status("preparing"):
        from dsv4.accounting.cache import page_bytes
        from dsv4.engine.pages import pages_of

        transformer = open_model(model, options)
        results = heading("serve", model, transformer, options)
        most = max(concurrency)
        limits = Limits(
            max_requests=most, step_tokens=max(options.step_tokens, most), cache_format=options.cache_format,
            cache_bytes=most * pages_of(prompt_tokens + output_tokens) * page_bytes(config, _row_format(options)),
        )  # fmt: skip
        service = _service(transformer, limits)
    results |= {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "rounds": rounds}
    found = asyncio.run(_run(service, concurrency, prompt_tokens, output_tokens, rounds, options.seed, console))
    save(options.json, results | {"cases": found})
    _print(results, found)


def _row_format(options: Options) -> CacheFormat:
    if options.cache_format != "auto":
        return options.cache_format
    return "packed" if options.precision == "released" else options.precision


def _service(transformer: Any, limits: Limits) -> Service:
    from dsv4.engine.engine import Engine
    from dsv4.serve.service import Service
    from dsv4.text.passages import OWN

    tokenizer = made_up_tokenizer(transformer.config.vocab_size)
    engine = Engine(transformer, limits, tokenizer=tokenizer)
    return Service(engine, tokenizer, OWN, ServeOptions(), name=NAME, created=0)


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer of this size: special tokens, bytes, and words that no text is split into."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from dsv4.text.tokens import SPECIAL_TOKENS

    known = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = ("".join(letters) for letters in product(LETTERS, repeat=4))
    names = islice(dict.fromkeys(chain(known, words)), vocab_size)
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


async def _run(
    service: Service,
    concurrency: Sequence[int],
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    seed: int,
    console: Console,
) -> list[dict[str, Any]]:
    import uvicorn

    from dsv4.serve.app import create_app
    from dsv4.serve.listen import bind, settings
    from dsv4.serve.load import Client

    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(settings(create_app(service), service.options))
    running = asyncio.create_task(server.serve(sockets=[listening]))
    client = Client(f"http://127.0.0.1:{listening.getsockname()[1]}")
    try:
        found = []
        for streams in concurrency:
            with console.status(f"measuring {streams} streams"):
                found.append(await _case(service, client, streams, prompt_tokens, output_tokens, rounds, seed))
        return found
    finally:
        client.close()
        server.should_exit = True
        await running


async def _case(
    service: Service, client: Client, streams: int, prompt_tokens: int, output_tokens: int, rounds: int, seed: int
) -> dict[str, Any]:
    """Measure the engine and the server in turn, after a round that warms both up."""
    from dsv4.serve.load import measure

    bare, served = [], []
    sampling = Sampling(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    for turn in range(rounds + 1):
        texts = _texts(service, streams, prompt_tokens, seed + turn)
        prompts = [service.prompts.ids(_encoded(service, text)) for text in texts]
        bodies = [_body(text, output_tokens) for text in texts]
        works = [lambda ids=ids: service.engine.stream(ids, sampling, salt=b"bare") for ids in prompts]
        bare.append(await measure(works))
        served.append(await client.measure(PATH, bodies))
    return _summary(streams, output_tokens, bare[1:], served[1:])


def _texts(service: Service, count: int, num_tokens: int, seed: int) -> list[str]:
    """Texts of letters, each a token, that make prompts of so many tokens."""
    room = num_tokens - len(service.prompts.ids(_encoded(service, "")))
    drawn = random_prompts(service.engine.model.config, count, room, seed)
    return ["".join(LETTERS[i % 26] for i in one) for one in drawn]


def _encoded(service: Service, text: str) -> Any:
    from dsv4.text.encode import encode
    from dsv4.text.message import Message

    return encode([Message(role="user", content=text)], thinking=False, passages=service.passages)


def _body(text: str, output_tokens: int) -> bytes:
    return json.dumps({
        "model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": output_tokens, "temperature": 0,
        "thinking": {"type": "disabled"}, "ignore_eos": True, "stream": True,
    }).encode()  # fmt: skip


def _summary(streams: int, output_tokens: int, bare: list[Measured], served: list[Measured]) -> dict[str, Any]:
    found: dict[str, Any] = {"streams": streams}
    for name, runs in (("engine", bare), ("server", served)):
        firsts = [1000 * mean(t.first_s for t in run.timings) for run in runs]
        others = [1000 * mean((t.last_s - t.first_s) / (output_tokens - 1) for t in run.timings) for run in runs]
        found[name] = {
            "first_token_ms": median(firsts), "token_ms": median(others),
            "tokens_per_second": median(streams * output_tokens / run.seconds for run in runs),
        }  # fmt: skip
    pairs = list(zip(bare, served, strict=True))
    found["added_to_first_token_ms"] = median(
        1000 * (mean(t.first_s for t in b.timings) - mean(t.first_s for t in a.timings)) for a, b in pairs
    )
    found["throughput_ratio"] = median(a.seconds / b.seconds for a, b in pairs)
    return found


def _print(results: dict[str, Any], found: list[dict[str, Any]]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(describe(results))
    console.print(
        f"prompts of {results['prompt_tokens']} tokens, answers of {results['output_tokens']}; medians of rounds"
    )
    for case in found:
        engine, server = case["engine"], case["server"]
        console.print(
            f"{plural(case['streams'], 'stream')}: first token {server['first_token_ms']:.1f} ms, "
            f"{case['added_to_first_token_ms']:+.1f} to the engine's; a token {server['token_ms']:.2f} ms, "
            f"the engine's {engine['token_ms']:.2f}; {server['tokens_per_second']:,.1f} tokens/s, "
            f"{case['throughput_ratio']:.3f} of the engine's"
        )
