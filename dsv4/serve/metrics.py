"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dsv4_http_requests", "Answers given, by path and status.", ["path", "status"], registry=registry
        )
        self.finished = Counter("dsv4_finished", "Turns that ended, by how.", ["reason"], registry=registry)
        self.prompt_tokens = Counter("dsv4_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter("dsv4_cached_tokens", "Tokens of prompts that were found.", registry=registry)
        self.output_tokens = Counter("dsv4_output_tokens", "Tokens of answers.", registry=registry)
        self.first_token_s = Histogram(
            "dsv4_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.token_s = Histogram(
            "dsv4_token_seconds",
            "Of a token after the first, the mean of an answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self.running = Gauge("dsv4_requests_now", "Requests that run or wait.", registry=registry)
        self.free_pages = Gauge("dsv4_free_pages", "Pages of the cache that hold nothing in use.", registry=registry)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
