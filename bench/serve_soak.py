"""A server under streams that come and go: does it give back everything, and does its memory stay as it is?

    python bench/serve_soak.py --minutes 10 --json bench/results/serve_soak.json

A toy model behind the whole server, in a process of its own; 200 clients at a time in this one, of all protocols, each
of which reads its answer to the end or leaves somewhere in it. Exit code 1 if at the end a page, a place or a file is
not given back, or if after the first third memory grew by more than a few MiB an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
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
SLOPE_MIB_AN_HOUR = 8.0
WARM_UP = 1 / 3  # of the time, in which memory may grow
SETTLE_S = 30.0  # for what is left at the end
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """A look at the server's process."""

    seconds: float
    rss_bytes: int
    num_files: int


@dataclass
class Found:
    """What came of it."""

    done: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    files_before: int = 0
    pages: tuple[int, int] = (0, 0)
    requests_now: int = 0

    @property
    def warm(self) -> list[Sample]:
        return [one for one in self.samples if one.seconds >= WARM_UP * self.samples[-1].seconds]

    @property
    def slope_mib_an_hour(self) -> float:
        """How fast memory grew after the warm-up: the line through the samples."""
        xs, ys = [one.seconds / 3600 for one in self.warm], [one.rss_bytes / MIB for one in self.warm]
        mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
        spread = sum((x - mean_x) ** 2 for x in xs)
        return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0

    def problems(self, least_hours: float) -> list[str]:
        """What is wrong; memory must have grown by as much as half an hour at the limit, or it is noise."""
        grown = self.slope_mib_an_hour * (self.warm[-1].seconds - self.warm[0].seconds) / 3600
        found = []
        if self.pages[0] != self.pages[1]:
            found.append(f"{self.pages[1] - self.pages[0]} of {self.pages[1]} pages are not free")
        if self.requests_now:
            found.append(f"{self.requests_now} requests are still counted")
        if self.samples[-1].num_files > self.files_before:
            found.append(f"{self.samples[-1].num_files} files are open, {self.files_before} were")
        if self.done["error"]:
            found.append(f"{self.done['error']} requests failed")
        if self.slope_mib_an_hour > SLOPE_MIB_AN_HOUR and grown > SLOPE_MIB_AN_HOUR * least_hours:
            found.append(f"memory grows by {self.slope_mib_an_hour:.1f} MiB an hour")
        return found


# ---- the server ----


def serve(told: Connection) -> None:
    """Run a server with a toy model; tell its port and its pages."""
    from dsv4.cli.process import keep_freed_memory
    from dsv4.config.engine import Limits
    from dsv4.config.serve import ServeOptions
    from dsv4.data.tokenizer import num_ids, train_tokenizer
    from dsv4.engine.engine import Engine
    from dsv4.serve.app import create_app
    from dsv4.serve.listen import Server, bind, settings
    from dsv4.serve.service import Service
    from dsv4.testing.toys import tiny_model
    from dsv4.text.passages import OWN

    keep_freed_memory()
    tokenizer = train_tokenizer(iter([WORDS] * 4), 300)
    model = tiny_model(num_ids(tokenizer), max_context=2048)
    engine = Engine(model, Limits(max_requests=32, step_tokens=512, cache_bytes=2 * MIB), tokenizer=tokenizer)
    options = ServeOptions(max_waiting=400)
    service = Service(engine, tokenizer, OWN, options, name="toy", created=0)
    listener = bind(options.host, 0)
    told.send((listener.getsockname()[1], engine.pool.num_free))
    Server(settings(create_app(service), options)).run(sockets=[listener])


# ---- clients ----


async def clients(port: int, num: int, seconds: float, found: Found) -> None:
    """Keep so many clients coming and going for so long."""
    end = time.monotonic() + seconds

    async def one(index: int) -> None:
        generator = random.Random(index)
        while time.monotonic() < end:
            try:
                found.done[await visit(port, generator)] += 1
            except (OSError, asyncio.IncompleteReadError):
                found.done["error"] += 1

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
            return "read" if answer.startswith(b"HTTP/1.1 200 ") else "error"
        async with asyncio.timeout(2 * generator.random()):
            await reader.readexactly(generator.randint(1, 20_000))
        return "left"
    except (TimeoutError, asyncio.IncompleteReadError):
        return "left" if not stays else "error"
    finally:
        writer.close() if generator.random() < 0.5 else writer.transport.abort()


async def health(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read(-1)
    writer.close()
    return answer.decode()


# ---- what is measured ----


def look(pid: int, begun: float) -> Sample:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    num_files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(time.monotonic() - begun, pages * os.sysconf("SC_PAGE_SIZE"), num_files)


async def soak(pid: int, port: int, num_pages: int, num_clients: int, seconds: float) -> Found:
    """Let clients come and go; look at the process every second."""
    await health(port, "/health")
    begun, found = time.monotonic(), Found()
    found.files_before = look(pid, begun).num_files
    work = asyncio.create_task(clients(port, num_clients, seconds, found))
    while not work.done():
        await asyncio.wait({work}, timeout=1.0)
        found.samples.append(look(pid, begun))
        if len(found.samples) % 10 == 0:
            print(_line(found), file=sys.stderr)
    await work
    warm = found.samples.copy()
    end = time.monotonic() + SETTLE_S
    while time.monotonic() < end:
        metrics = await health(port, "/metrics")
        found.requests_now, free = (_metric(metrics, name) for name in ("dsv4_requests_now", "dsv4_free_pages"))
        found.pages = (free, num_pages)
        found.samples = [*warm, look(pid, begun)]
        if not found.requests_now and free == num_pages and found.samples[-1].num_files <= found.files_before:
            break
        await asyncio.sleep(0.2)
    return found


def _metric(text: str, name: str) -> int:
    return int(float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} "))))


def _line(found: Found) -> str:
    last = found.samples[-1]
    return (
        f"{last.seconds:6.0f} s  {last.rss_bytes / MIB:7.1f} MiB  {last.num_files:4d} files  "
        f"{found.done['read']:6d} read  {found.done['left']:6d} left  {found.done['error']:3d} failed"
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
        assert process.pid is not None
        found = asyncio.run(soak(process.pid, port, num_pages, options.clients, 60 * options.minutes))
    finally:
        process.terminate()
        process.join()
    problems = found.problems(least_hours=0.5)
    if process.exitcode:
        problems.append(f"the server ended with {process.exitcode}")
    print(_line(found))
    print(
        f"{found.slope_mib_an_hour:+.1f} MiB an hour; {found.pages[0]} of {found.pages[1]} pages free, "
        f"{found.requests_now} requests, {found.samples[-1].num_files - found.files_before} files left"
    )
    for problem in problems:
        print(f"leak: {problem}")
    if options.json is not None:
        options.json.write_text(json.dumps(report(found, problems, options), indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0


def report(found: Found, problems: list[str], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(), "machine": machine(), "minutes": options.minutes, "clients": options.clients,
        "requests": dict(found.done), "slope_mib_an_hour": round(found.slope_mib_an_hour, 2),
        "pages_free": found.pages[0], "pages": found.pages[1], "requests_now": found.requests_now,
        "files_before": found.files_before, "problems": problems,
        "samples": [asdict(one) for one in found.samples[:: max(1, len(found.samples) // 120)]],
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
