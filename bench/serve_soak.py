"""A server under streams that come and go: does it give back everything, and does its memory stay as it is?

    python bench/serve_soak.py --minutes 10 --json bench/results/serve_soak.json

A toy model behind the whole server, in a process of its own; 200 clients at a time in this one, of all protocols, each
of which reads its answer to the end or leaves somewhere in it. They come in rounds, between which the server is looked
at without any; the first third of the rounds warms up. Exit code 1 if a page, a place or a file is not given back, or
if memory grew by more than a few MiB an hour after that: what the process holds, what of its C heap is in use (with
glibc; holes do not blur that), and what Python's allocator has given out.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dsv4.cli.bench_setup import machine

WORDS = "the weather in Berlin is fine and the weather in Oslo is not so def add a b return a + b again "
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "max_tokens": 400}
BODIES: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "toy", "prompt": "x", "ignore_eos": True, "max_tokens": 400},
    "/v1/messages": {"model": "toy", "messages": CHAT["messages"], "max_tokens": 400},
    "/v1/responses": {"model": "toy", "input": "x", "max_output_tokens": 400},
}
STAYS = 0.3  # of the clients read their answer to the end
MIB_AN_HOUR = 8.0  # that memory may grow by
NOISE_MIB = {"rss_bytes": 4.0, "heap_bytes": 0.5}  # that it may grow by in a run of minutes: the heap tears slowly
BLOCKS_A_REQUEST = 0.5  # of Python's allocator
ROUNDS, WARM_UP_ROUNDS = 24, 8  # batches of every size have been met then, for each of which the engine keeps something
SETTLE_S = 30.0  # for what is left at the end
METRICS = ("dsv4_requests_now", "dsv4_free_pages")
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """A look at the server's process."""

    seconds: float
    rss_bytes: int
    num_files: int
    heap_bytes: int
    num_blocks: int


@dataclass(frozen=True)
class Server:
    """The process of a server. told: answers with its memory."""

    pid: int
    port: int
    num_pages: int
    told: Connection


@dataclass
class Found:
    """What came of it. warm, end: the server without requests, after the warm-up and at the end."""

    done: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    files_before: int = 0
    warm: Sample | None = None
    end: Sample | None = None
    num_warm: int = 0
    free_pages: int = 0
    requests_now: int = 0

    def grown(self, name: str) -> float:
        """By how much this grew from the warm-up to the end."""
        return getattr(self.end, name) - getattr(self.warm, name)

    def mib_an_hour(self, name: str) -> float:
        return self.grown(name) / MIB / (self.grown("seconds") / 3600)

    @property
    def blocks_a_request(self) -> float:
        return self.grown("num_blocks") / max(1, self.done.total() - self.num_warm)

    def problems(self, num_pages: int) -> list[str]:
        """What is wrong."""
        found = []
        if self.free_pages != num_pages:
            found.append(f"{num_pages - self.free_pages} of {num_pages} pages are not free")
        if self.requests_now:
            found.append(f"{self.requests_now} requests are still counted")
        if self.grown("num_files") > 0:
            found.append(f"{self.grown('num_files'):.0f} files more are open than after the warm-up")
        if self.done["error"]:
            found.append(f"{self.done['error']} requests failed")
        for name, noise_mib in NOISE_MIB.items():
            if self.mib_an_hour(name) > MIB_AN_HOUR and self.grown(name) > noise_mib * MIB:
                found.append(f"{name} grew by {self.mib_an_hour(name):.1f} MiB an hour")
        if self.blocks_a_request > BLOCKS_A_REQUEST:
            found.append(f"{self.blocks_a_request:.2f} blocks of Python's are left of each request")
        return found


# ---- the server ----


def serve(told: Connection) -> None:
    """Run a server with a toy model; tell its port and its pages."""
    from dsv4.cli.process import keep_freed_memory
    from dsv4.config.engine import Limits
    from dsv4.config.serve import ServeOptions
    from dsv4.data.tokenizer import num_ids, train_tokenizer
    from dsv4.engine.engine import Engine
    from dsv4.serve import listen
    from dsv4.serve.app import create_app
    from dsv4.serve.service import Service
    from dsv4.testing.toys import tiny_model
    from dsv4.text.passages import OWN

    keep_freed_memory()
    tokenizer = train_tokenizer(iter([WORDS] * 4), 300)
    model = tiny_model(num_ids(tokenizer), max_context=2048)
    engine = Engine(model, Limits(max_requests=32, step_tokens=512, cache_bytes=2 * MIB), tokenizer=tokenizer)
    options = ServeOptions(max_waiting=400)
    service = Service(engine, tokenizer, OWN, options, name="toy", created=0)
    listener = listen.bind(options.host, 0)
    told.send((listener.getsockname()[1], engine.pool.num_free))
    threading.Thread(target=tell_memory, args=(told,), daemon=True).start()
    listen.Server(listen.settings(create_app(service), options)).run(sockets=[listener])


def tell_memory(told: Connection) -> None:
    """Say, as often as it is asked, how much of the C heap is in use, and how many blocks of Python's."""
    names = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    found = type("MallInfo", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is not None:
        ask.restype = found
    while True:
        try:
            if told.recv():
                gc.collect()  # cycles wait for that until they are a quarter of all there is
        except EOFError:  # who asks has gone, and the server goes too
            signal.raise_signal(signal.SIGTERM)
            return
        heap = ask() if ask is not None else found()
        told.send((heap.uordblks + heap.hblkhd, sys.getallocatedblocks()))


# ---- clients ----


async def clients(port: int, num: int, seconds: float, found: Found) -> None:
    """Keep so many clients coming and going for so long."""
    end = time.monotonic() + seconds

    async def one(index: int) -> None:
        generator = random.Random(index)
        while time.monotonic() < end:
            try:
                found.done[await visit(port, generator)] += 1
            except OSError as error:
                found.done["error"] += 1
                print(f"a request failed: {error!r}", file=sys.stderr)

    await asyncio.gather(*[one(i) for i in range(num)])


async def visit(port: int, generator: random.Random) -> str:
    """Ask for something, and read all of it or leave; what came of it."""
    path = generator.choice(list(BODIES))
    stays, stream = generator.random() < STAYS, generator.random() < 0.8
    words = WORDS.split()
    text = " ".join(generator.choice(words) for _ in range(generator.randint(1, 60)))
    body = json.loads(json.dumps({**BODIES[path], "stream": stream}).replace('"x"', json.dumps(text)))
    if stays:
        body = {name: generator.randint(1, 40) if name.startswith("max_") else value for name, value in body.items()}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        if stays:
            answer = await reader.read(-1)
            if answer.startswith(b"HTTP/1.1 200 "):
                return "read"
            if answer.startswith(b"HTTP/1.1 429 "):  # of clients that have gone some wait for the step that runs
                return "refused"
            raise OSError(f"the server said {answer[:300]!r}")
        async with asyncio.timeout(2 * generator.random()):
            await reader.readexactly(generator.randint(1, 20_000))
        return "left"
    except (TimeoutError, asyncio.IncompleteReadError):
        return "left" if not stays else "error"
    finally:
        writer.close() if generator.random() < 0.5 else writer.transport.abort()


async def ask(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read(-1)
    writer.close()
    return answer.decode()


# ---- what is measured ----


def look(server: Server, begun: float, *, collects: bool = False) -> Sample:
    """A look at the server, from outside and, for its heap, from inside. collects: without its garbage."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text(encoding="ascii").split()[1])
    num_files = len(os.listdir(f"/proc/{server.pid}/fd"))
    server.told.send(collects)
    return Sample(time.monotonic() - begun, pages * os.sysconf("SC_PAGE_SIZE"), num_files, *server.told.recv())


async def soak(server: Server, num_clients: int, seconds: float) -> Found:
    """Let clients come and go, in rounds after each of which all leave."""
    begun, found = time.monotonic(), Found()
    await ask(server.port, "/health")
    found.files_before = look(server, begun).num_files
    for index in range(ROUNDS):
        await visits(server, num_clients, seconds / ROUNDS, found, begun)
        found.end = await settled(server, found, begun)
        print(_line(found.end, found), file=sys.stderr)
        if index < WARM_UP_ROUNDS:
            found.warm, found.num_warm = found.end, found.done.total()
    return found


async def visits(server: Server, num_clients: int, seconds: float, found: Found, begun: float) -> None:
    """Let clients come and go; look at the process every second."""
    work = asyncio.create_task(clients(server.port, num_clients, seconds, found))
    while not work.done():
        await asyncio.wait({work}, timeout=1.0)
        found.samples.append(look(server, begun))
    await work


async def settled(server: Server, found: Found, begun: float) -> Sample:
    """Wait until the server has given back everything, or for a time; look at it then."""
    end, sample = time.monotonic() + SETTLE_S, look(server, begun)
    while time.monotonic() < end:
        metrics = await ask(server.port, "/metrics")
        found.requests_now, found.free_pages = (_metric(metrics, name) for name in METRICS)
        await asyncio.sleep(0.5)
        sample = look(server, begun, collects=True)
        if (found.requests_now, found.free_pages, sample.num_files) == (0, server.num_pages, found.files_before):
            break
    return sample


def _metric(text: str, name: str) -> int:
    return int(float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} "))))


def _line(sample: Sample, found: Found) -> str:
    return (
        f"{sample.seconds:6.0f} s  {sample.rss_bytes / MIB:7.1f} MiB held  {sample.heap_bytes / MIB:6.1f} MiB in use  "
        f"{sample.num_blocks:7d} blocks  {sample.num_files:4d} files  "
        f"{found.done['read']:6d} read  {found.done['left']:6d} left  {found.done['refused']:4d} refused  "
        f"{found.done['error']:3d} failed"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    process.start()
    try:
        port, num_pages = ours.recv()
        assert process.pid is not None, "the server's process has no number; expected one that was started"
        server = Server(process.pid, port, num_pages, ours)
        found = asyncio.run(soak(server, options.clients, 60 * options.minutes))
    finally:
        process.terminate()
        process.join()
    problems = found.problems(num_pages)
    if process.exitcode:
        problems.append(f"the server ended with {process.exitcode}")
    for sample in (found.warm, found.end):
        assert sample is not None, "the server was not looked at; expected two looks"
        print(_line(sample, found))
    print(
        f"{found.mib_an_hour('rss_bytes'):+.1f} MiB an hour held, {found.mib_an_hour('heap_bytes'):+.1f} in use, "
        f"{found.blocks_a_request:+.3f} blocks a request; {found.free_pages} of {num_pages} pages free, "
        f"{found.requests_now} requests"
    )
    for problem in problems:
        print(f"leak: {problem}")
    if options.json is not None:
        options.json.write_text(json.dumps(report(found, problems, options), indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0


def report(found: Found, problems: list[str], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(), "machine": machine(), "minutes": options.minutes, "clients": options.clients,
        "requests": dict(found.done), "rss_mib_an_hour": round(found.mib_an_hour("rss_bytes"), 2),
        "heap_mib_an_hour": round(found.mib_an_hour("heap_bytes"), 2),
        "blocks_a_request": round(found.blocks_a_request, 4),
        "free_pages": found.free_pages, "requests_now": found.requests_now, "files_before": found.files_before,
        "problems": problems, "warm": asdict(found.warm) if found.warm else None,
        "end": asdict(found.end) if found.end else None,
        "samples": [asdict(one) for one in found.samples[:: max(1, len(found.samples) // 60)]],
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
