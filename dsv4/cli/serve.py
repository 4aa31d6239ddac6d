"""``dsv4 serve``: a model behind the protocols of DeepSeek, OpenAI and Anthropic, with a chat page."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from dsv4.cli.generate import Serving, engine_limits
from dsv4.cli.models import RESIDENCE, Residence, find_model, find_tokenizer, open_model
from dsv4.config.serve import ServeOptions

if TYPE_CHECKING:
    from dsv4.serve.service import Service

PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "llguidance")
OPTIONS, SERVING = ServeOptions(), Serving(precision="bfloat16")


def serve(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_OR_RUN")],
    name: str | None = None,
    options: Annotated[ServeOptions, tyro.conf.arg(name="")] = OPTIONS,
    serving: Annotated[Serving, tyro.conf.arg(name="")] = SERVING,
    residence: Annotated[Residence, tyro.conf.arg(name="")] = RESIDENCE,
) -> None:
    """Serve a model over HTTP until it is stopped: DeepSeek's, OpenAI's and Anthropic's protocols, and a page at /.

    Args:
        path: the folder of a run (its finished model, or else its newest checkpoint) or a checkpoint directory.
        name: what clients call the model; the folder's name if not given.
    """
    require_packages()
    from dsv4.serve.app import create_app
    from dsv4.serve.guard import read_keys
    from dsv4.serve.listen import Server, bind, settings

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if options.key_file is not None:
        read_keys(Path(options.key_file))  # what is wrong with it is told before a model is loaded
    with bind(options.host, options.port) as listening:
        service = build_service(path, options, serving, residence, name=name)
        address, port = listening.getsockname()[:2]
        place = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        console.print(f"{service.name}: {place} is a chat page, {place}/v1 and {place}/anthropic are for programs")
        Server(settings(create_app(service), options)).run(sockets=[listening])


def require_packages() -> None:
    """Raise ``ValueError`` if packages of the extra are missing."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"the server needs {', '.join(missing)}; expected pip install 'dsv4[serve]'")


def build_service(
    path: Path, options: ServeOptions, serving: Serving, residence: Residence, *, name: str | None
) -> Service:
    """Load a model and put a service around it."""
    from dsv4.cli.process import keep_freed_memory
    from dsv4.config.load import load_config
    from dsv4.data.tokenizer import check_tokenizer, load_tokenizer
    from dsv4.engine.engine import Engine
    from dsv4.serve.service import Service
    from dsv4.text.passages import find_passages

    directory = find_model(path)
    tokenizer = load_tokenizer(str(find_tokenizer(directory)))
    config = load_config(directory)
    check_tokenizer(tokenizer, config)
    limits = engine_limits(config, serving, serving.concurrency)
    if options.state is not None:
        state = Path(options.state)
        state.mkdir(parents=True, exist_ok=True)
        limits = replace(limits, log=str(state / "tokens.log"))
    passages = find_passages(directory)
    keep_freed_memory()
    engine = Engine(open_model(directory, serving.precision, residence), limits, tokenizer=tokenizer)
    created = int((directory / "config.json").stat().st_mtime)
    return Service(engine, tokenizer, passages, options, name=name or path.resolve().name, created=created)
