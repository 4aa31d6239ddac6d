"""``dsv4 bench serve``: what the server adds to the engine's own times, with some streams at once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from itertools import chain, islice, product
from statistics import mean, median
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
    from dsv4.serve.load import Client, Measured
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
    random, and no answer ends before its length, which lies between half and one and a half of what is said.

    Args:
        model: a preset, which gets random weights, or the folder of a run or checkpoint.
        concurrency: clients at once.
        prompt_tokens: tokens of each prompt.
        output_tokens: tokens of an answer, on average.
        requests: of each client, one after the other.
        rounds: how often each is measured; the median counts.
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

    pairs = []
    for turn in range(rounds + 1):
        asked = [_plan(service, load, seed + turn, index) for index in range(streams)]
        works = [[_stream(service, text, count) for text, count in plan] for plan in asked]
        bodies = [[_body(text, count) for text, count in plan] for plan in asked]
        counts = [count for plan in asked for _, count in plan]
        engine = await _side(measure(works), counts)
        pairs.append((engine, await _side(client.measure(PATH, bodies), counts)))
    return _summary(streams, pairs[1:])


def _plan(service: Service, load: Load, seed: int, index: int) -> list[tuple[str, int]]:
    """What one client asks for, in turn: texts of letters, each a token, and the tokens of the answers."""
    drawn = random.Random(f"{seed} {index}")
    room = load.prompt_tokens - len(service.prompts.ids(_encoded(service, "")))
    half = load.output_tokens // 2
    return [
        ("".join(drawn.choices(LETTERS, k=room)), load.output_tokens + drawn.randint(-half, half))
        for _ in range(load.requests)
    ]


def _stream(service: Service, text: str, output_tokens: int) -> Callable[[], AsyncIterator[object]]:
    prompt_ids = service.prompts.ids(_encoded(service, text))
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


async def _side(work: Awaitable[Measured], counts: Sequence[int]) -> dict[str, float]:
    """What one side took. loop_token_us: processor time of the event loop's thread."""
    begun = time.thread_time()
    measured = await work
    loop = time.thread_time() - begun
    timed = list(zip(measured.timings, counts, strict=True))
    return {
        "first_token_ms": 1000 * mean(one.first_s for one, _ in timed),
        "token_ms": 1000 * mean((one.last_s - one.first_s) / (count - 1) for one, count in timed),
        "tokens_per_second": sum(counts) / measured.seconds,
        "loop_token_us": 1e6 * loop / sum(counts),
    }


def _summary(streams: int, pairs: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    engines, servers = zip(*pairs, strict=True)
    found: dict[str, Any] = {"streams": streams}
    for name, sides in (("engine", engines), ("server", servers)):
        found[name] = {figure: median(side[figure] for side in sides) for figure in sides[0]}
    found["added_to_first_token_ms"] = median(b["first_token_ms"] - a["first_token_ms"] for a, b in pairs)
    ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in pairs]
    return found | {"throughput_ratio": median(ratios), "throughput_ratios": ratios}


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
            f"{plural(case['streams'], 'stream')}: first token {server['first_token_ms']:.1f} ms, "
            f"{case['added_to_first_token_ms']:+.1f} to the engine's; a token {server['token_ms']:.2f} ms, "
            f"the engine's {engine['token_ms']:.2f}; {server['tokens_per_second']:,.1f} tokens/s, "
            f"{case['throughput_ratio']:.3f} of the engine's; {server['loop_token_us']:.0f} us of the event loop "
            f"a token, the engine's {engine['loop_token_us']:.0f}"
        )
