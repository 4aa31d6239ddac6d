"""What a server may do: where it listens, whom it lets in, and how much it takes at once. No torch."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from dsv4.config.checks import below, is_number, not_flag, not_path, outside_whole, refuse

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of a server, beside those of its engine."""

    host: str = "127.0.0.1"
    """Address to listen at; any other than this machine's own needs a key_file."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    key_file: str | None = None
    """File with the API keys that clients may show, one on each line; without it everyone on this machine is let in."""
    max_waiting: int = 64
    """Requests that may wait for a place in the engine; one more is refused with 429."""
    max_per_key: int = 0
    """Requests of one key at once, running or waiting; 0: no limit."""
    max_body_bytes: int = 2**25
    """Bytes of a request's body at most."""
    body_timeout_s: float = 30.0
    """Seconds within which a request's body must have come."""
    request_timeout_s: float = 3600.0
    """Seconds after which a request is given up, however much of it has been answered."""
    keep_alive_s: float = 5.0
    """Seconds of silence after which a client is told that its answer is still being made."""
    shutdown_s: float = 30.0
    """Seconds that running answers have to end in when the server is stopped."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may use the server from a browser; ``*`` for all."""
    state: str | None = None
    """Folder for background responses and the engine's log, which make them survive a crash; None: none of either."""
    logs_prompts: bool = False
    """Write prompts and answers into the log of the server."""

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.host, str) or not self.host:
            problems.append(f"serve.host is {self.host!r}; expected an address")
        problems += outside_whole("serve.port", self.port, 0, 65535)
        for name, least in (("max_waiting", 0), ("max_per_key", 0), ("max_body_bytes", 1)):
            problems += below(f"serve.{name}", getattr(self, name), least)
        for name in ("body_timeout_s", "request_timeout_s", "keep_alive_s", "shutdown_s"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                problems.append(f"serve.{name} is {value!r}; expected a positive number of seconds")
        problems += not_path("serve.key_file", self.key_file)
        problems += not_path("serve.state", self.state)
        problems += not_flag("serve.logs_prompts", self.logs_prompts)
        problems += _not_origins(self.cors_origins)
        refuse(problems or self._open_to_all())

    def _open_to_all(self) -> list[str]:
        if self.key_file is not None or is_loopback(self.host):
            return []
        return [
            f"serve.host is {self.host!r} without a key_file; expected one with API keys, or an address of this "
            "machine alone such as 127.0.0.1"
        ]


def _not_origins(value: object) -> list[str]:
    if not isinstance(value, tuple):
        return [f"serve.cors_origins is {value!r}; expected a tuple of origins"]
    return [
        f"serve.cors_origins holds {one!r}; expected an origin as browsers send it, such as https://example.com, or *"
        for one in value
        if not isinstance(one, str) or (one != "*" and ORIGIN.fullmatch(one) is None)
    ]


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be anyone's
        return False
