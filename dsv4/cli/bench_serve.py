"""``dsv4 bench serve``: what the server adds to the engine's own times, with some streams at once."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, product
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
    save,
)
from dsv4.cli.serve import require_packages
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.config.serve import ServeOptions
from dsv4.train.words import plural

if TYPE_CHECKING:
    import uvicorn
    from tokenizers import Tokenizer

    from dsv4.accounting.cache import CacheFormat
    from dsv4.serve.load import Client, Measured, Timing
    from dsv4.serve.service import Service

NAME, PATH = "bench", "/v1/chat/completions"
LEAST_PROMPT = 16  # tokens: what stands around a text, and some letters
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Load(NamedTuple):
    """What the clients ask for."""

    prompt_tokens: int
    output_tokens: int
    requests: int


def bench_serve(
    model: ModelName = "bench-engine",
    concurrency: tuple[int, ...] = (1, 8, 64),
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    requests: int = 2,
    rounds: int = 5,
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS,
) -> None:
    """Measure chat streams of the server beside the same requests of the bare engine, in turn.

    Every client asks again as soon as it has its answer. It has a process of its own, on the same cores. Prompts are
    random, and no answer ends before its length, which lies between half and one and a half of what is said. What the
    server adds to a request is also measured by itself: from the client to the engine, and with the first token back.

    Args:
        model: a preset, which gets random weights, or the folder of a run or checkpoint.
        concurrency: clients at once.
        prompt_tokens: tokens of each prompt.
        output_tokens: tokens of an answer, on average.
        requests: of each client, one after the other.
        rounds: how often each is measured; medians count, and of the ratio of rates the mean.
    """
    require_packages()
    config = model_config(model)
    values = {"rounds": rounds, "requests": requests, "concurrency": min(concurrency, default=0)}
    for name, value, least in (("prompt", prompt_tokens, LEAST_PROMPT), ("output", output_tokens, 4)):
        if value < least:
            raise ValueError(f"--{name}-tokens is {value}; expected at least {least}")
    longest = prompt_tokens + 3 * output_tokens // 2
    check_options(options, at_least_one=values, config=config, longest=longest)
    console = notes()
    with console.status("preparing"):
        from dsv4.accounting.cache import page_bytes
        from dsv4.engine.pages import pages_of
        from dsv4.serve.app import create_app
        from dsv4.serve.listen import settings

        transformer = open_model(model, options)
        results = heading("serve", model, transformer, options)
        most = max(concurrency)
        limits = Limits(
            max_requests=most, step_tokens=max(options.step_tokens, most), cache_format=options.cache_format,
            cache_bytes=most * pages_of(longest) * page_bytes(config, _row_format(options)),
        )  # fmt: skip
        service = _service(transformer, limits)
    load = Load(prompt_tokens, output_tokens, requests)
    results |= {**load._asdict(), "rounds": rounds}
    web = settings(create_app(service), service.options)
    with asyncio.Runner(loop_factory=web.get_loop_factory()) as runner:  # the loop that dsv4 serve runs in
        found = runner.run(_run(service, web, concurrency, load, rounds, options.seed, console))
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
    web: uvicorn.Config,
    concurrency: Sequence[int],
    load: Load,
    rounds: int,
    seed: int,
    console: Console,
) -> list[dict[str, Any]]:
    from dsv4.serve.listen import Server, bind
    from dsv4.serve.load import Client

    listening = bind("127.0.0.1", 0)
    server = Server(web)
    running = asyncio.create_task(server.serve(sockets=[listening]))
    client = Client(f"http://127.0.0.1:{listening.getsockname()[1]}")
    try:
        found = []
        for streams in concurrency:
            with console.status(f"measuring {streams} streams"):
                found.append(await _case(service, client, streams, load, rounds, seed))
        return found
    finally:
        client.close()
        server.should_exit = True
        await running


async def _case(service: Service, client: Client, streams: int, load: Load, rounds: int, seed: int) -> dict[str, Any]:
    """Measure the engine and the server in turn, after a round that warms both up."""
    from dsv4.serve.load import measure

    pairs, ways = [], []
    for turn in range(rounds + 1):
        asked = [_plan(service, load, seed + turn, index) for index in range(streams)]
        prompts = [[service.prompts.ids(_encoded(service, text)) for text, _ in plan] for plan in asked]
        works = [
            [_stream(service, ids, count) for ids, (_, count) in zip(one, plan, strict=True)]
            for one, plan in zip(prompts, asked, strict=True)
        ]
        bodies = [[_body(text, count) for text, count in plan] for plan in asked]
        counts = [count for plan in asked for _, count in plan]
        engine, _ = await _side(measure(works), counts)
        with _watched(service) as seen:
            server, timings = await _side(client.measure(PATH, bodies), counts)
        pairs.append((engine, server))
        way = [seen[tuple(ids)].way(timing) for ids, timing in zip(chain(*prompts), timings, strict=True)]
        # All clients' first requests come at once, and wait for one another; the later ones do not.
        ways.append([one for i, one in enumerate(way) if load.requests == 1 or i % load.requests])
    return _summary(streams, pairs[1:], [way for found in ways[1:] for way in found])


@dataclass
class _Seen:
    """When the engine was asked, and when it gave the first token, by ``time.perf_counter``."""

    asked: float
    first: float = 0.0

    def way(self, timing: Timing) -> tuple[float, float]:
        """Seconds from the client to the engine, and with the first token back."""
        return self.asked - timing.begun, timing.begun + timing.first_s - self.first


@contextmanager
def _watched(service: Service) -> Iterator[dict[tuple[int, ...], _Seen]]:
    """Note when requests reach the engine and when it has their first tokens, by prompt."""
    seen: dict[tuple[int, ...], _Seen] = {}
    stream = service.engine.stream

    async def watched(prompt: Any, *given: Any, **named: Any) -> AsyncGenerator[Any, None]:
        mine = seen[tuple(prompt)] = _Seen(time.perf_counter())
        async with aclosing(stream(prompt, *given, **named)) as pieces:
            async for piece in pieces:
                mine.first = mine.first or time.perf_counter()
                yield piece

    service.engine.stream = watched
    try:
        yield seen
    finally:
        del service.engine.stream


def _plan(service: Service, load: Load, seed: int, index: int) -> list[tuple[str, int]]:
    """What one client asks for, in turn: texts of letters, each a token, and the tokens of the answers."""
    drawn = random.Random(f"{seed} {index}")
    room = load.prompt_tokens - len(service.prompts.ids(_encoded(service, "")))
    half = load.output_tokens // 2
    return [
        ("".join(drawn.choices(LETTERS, k=room)), load.output_tokens + drawn.randint(-half, half))
        for _ in range(load.requests)
    ]


def _stream(service: Service, prompt_ids: list[int], output_tokens: int) -> Callable[[], AsyncIterator[object]]:
    sampling = Sampling(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    return partial(service.engine.stream, prompt_ids, sampling, salt=b"bare")


def _encoded(service: Service, text: str) -> Any:
    from dsv4.text.encode import encode
    from dsv4.text.message import Message

    return encode([Message(role="user", content=text)], thinking=False, passages=service.passages)


def _body(text: str, output_tokens: int) -> bytes:
    return json.dumps({
        "model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": output_tokens, "temperature": 0,
        "thinking": {"type": "disabled"}, "ignore_eos": True, "stream": True,
    }).encode()  # fmt: skip


async def _side(work: Awaitable[Measured], counts: Sequence[int]) -> tuple[dict[str, float], list[Timing]]:
    """What one side took. loop_token_us, client_token_us: processor time of the event loop's thread and the client."""
    begun = time.thread_time()
    measured = await work
    loop = time.thread_time() - begun
    timed = list(zip(measured.timings, counts, strict=True))
    found = {
        "first_token_ms": 1000 * mean(one.first_s for one, _ in timed),
        "token_ms": 1000 * mean((one.last_s - one.first_s) / (count - 1) for one, count in timed),
        "tokens_per_second": sum(counts) / measured.seconds,
        "loop_token_us": 1e6 * loop / sum(counts),
        "client_token_us": 1e6 * measured.processor_s / sum(counts),
    }
    return found, measured.timings


def _summary(
    streams: int, pairs: Sequence[tuple[dict[str, float], dict[str, float]]], ways: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    engines, servers = zip(*pairs, strict=True)
    found: dict[str, Any] = {"streams": streams}
    for name, sides in (("engine", engines), ("server", servers)):
        found[name] = {figure: median(side[figure] for side in sides) for figure in sides[0]}
    there, back = ([1000 * way[i] for way in ways] for i in (0, 1))
    found["to_engine_ms"], found["first_token_back_ms"] = median(there), median(back)
    found["added_to_request_ms"] = median(a + b for a, b in zip(there, back, strict=True))
    ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in pairs]
    error = stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else None  # of the mean
    return found | {"throughput_ratio": mean(ratios), "throughput_ratio_error": error, "throughput_ratios": ratios}


def _print(results: dict[str, Any], found: list[dict[str, Any]]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(describe(results))
    console.print(
        f"prompts of {results['prompt_tokens']} tokens, answers of about {results['output_tokens']}, "
        f"{plural(results['requests'], 'request')} a client; medians of {plural(results['rounds'], 'round')}"
    )
    for case in found:
        engine, server = case["engine"], case["server"]
        console.print(
            f"{plural(case['streams'], 'stream')}: a request takes {case['to_engine_ms']:.2f} ms to the engine and its "
            f"first token {case['first_token_back_ms']:.2f} ms back; first token {server['first_token_ms']:.1f} ms, "
            f"the engine's {engine['first_token_ms']:.1f}; a token {server['token_ms']:.2f} ms, "
            f"the engine's {engine['token_ms']:.2f}; {server['tokens_per_second']:,.1f} tokens/s, "
            f"{case['throughput_ratio']:.3f}{_plus_minus(case['throughput_ratio_error'])} of the engine's; "
            f"{server['loop_token_us']:.0f} us of the event loop a token, the engine's {engine['loop_token_us']:.0f}, "
            f"and {server['client_token_us']:.0f} of the client"
        )


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" +- {error:.3f}"
