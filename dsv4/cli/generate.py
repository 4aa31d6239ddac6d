"""``dsv4 generate``: go on from one prompt, printed as it comes, or from many in one batch, as JSON lines."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsv4.cli.models import RESIDENCE, Precision, Residence, find_model, find_tokenizer, open_model
from dsv4.cli.prompts import Prompt, read_prompts
from dsv4.cli.results import Result, Results, partial_of, read_partial
from dsv4.config.engine import EngineCacheFormat, Limits, Numerics, PrefixLimits
from dsv4.config.model import ModelConfig
from dsv4.config.sampling import Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dsv4.engine.engine import Engine
    from dsv4.engine.log import LoggedRequest
    from dsv4.engine.outputs import Completion, Piece

INTERRUPTED = 130  # exit code
REPLACEMENT = "\ufffd"  # what bytes that are no text decode to, those of half a character too
PROMPT = "prompt"  # id of the request of --prompt


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How tokens are chosen. A line of --prompts that is JSON may say otherwise for itself."""

    tokens: int = 200
    """The most tokens to add; fewer where the document ends or the model's context does."""
    temperature: float = 0.8
    """Below 1 the likely tokens become likelier; 0 takes the likeliest."""
    top_p: float = 0.95
    """Draw from the fewest likeliest tokens that have this probability together."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken off once for each time that the answer holds the token."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of prompt and answer become less likely."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    seed: int = 0
    """Of the draws; line n of --prompts has this one plus n - 1."""
    logprobs: int | None = None
    """With --prompts: also give the log-probabilities of the tokens, and of so many of the likeliest."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How the engine runs."""

    precision: Precision = "float32"
    """Of weights and activations; released: codes of FP8 and FP4, and what the released code rounds."""
    numerics: Numerics = "fast"
    """invariant: the same bits, and so the same answer, whatever else is in the batch."""
    draft_tokens: int = 0
    """Tokens that the MTP block drafts ahead, for the model to verify."""
    concurrency: int = 8
    """Prompts that run at once."""
    cache_format: EngineCacheFormat = "auto"
    """How cached rows are stored; auto: in the precision of activations, released ones packed (FP4 keys)."""
    cache_bytes: int = 2**30
    """Memory for compressed entries at most."""
    prefix_folder: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Keep beginnings of prompts here, and take from here those that an earlier run left."""
    log: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write each token into this file before it is shown, so that --resume can go on after a crash."""


CHOICE, SERVING = Choice(), Serving()


def generate(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")],
    prompt: str | None = None,
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    resume: bool = False,
    choice: Annotated[Choice, tyro.conf.arg(name="")] = CHOICE,
    serving: Annotated[Serving, tyro.conf.arg(name="")] = SERVING,
    residence: Annotated[Residence, tyro.conf.arg(name="")] = RESIDENCE,
) -> None:
    """Print a prompt and what a model goes on with; or, for a file of prompts, a line of JSON for each.

    Args:
        path: the folder of a run (its finished model, or else its newest checkpoint) or a checkpoint directory.
        prompt: the text to go on from.
        prompts: a file with a text to go on from on each line; if its name ends in .jsonl, a JSON object on each, with
            "prompt" and what differs of the sampling: "max_tokens", "temperature", "seed" and so on.
        output: write the lines of JSON into this file, when all are there, not to stdout.
        resume: finish what --log says was unfinished, as if it had never stopped, and give what had ended unseen.
    """
    found = _check(prompt, prompts, output, resume, choice, serving)
    sampling = Sampling(
        max_tokens=choice.tokens,
        **{field.name: getattr(choice, field.name) for field in fields(choice) if field.name != "tokens"},
    )
    wanted = [Prompt(0, prompt, sampling)] if prompt is not None else []
    wanted = wanted if prompts is None else read_prompts(prompts, sampling)
    if resume and not found:
        _note(f"{serving.log} holds nothing that is unfinished")
        if output is not None and read_partial(output):
            Results(output, [], goes_on=True).finish()
        return
    with _engine(path, serving, residence, max(1, len(wanted) or len(found))) as engine:
        ids = engine.resume() if resume else _add(engine, wanted, prompts)
        try:
            if ids == [PROMPT] and output is None:
                _stream(engine)
                return
            results = Results(output, ids, goes_on=resume)
            _batch(engine, ids, results)
        except KeyboardInterrupt:
            _note(_stopped(output, serving.log))
            raise SystemExit(INTERRUPTED) from None
    results.finish()  # with the engine closed its log holds none of them: they cannot be gone on with in a file anew


def _check(
    prompt: str | None, prompts: Path | None, output: Path | None, resume: bool, choice: Choice, serving: Serving
) -> list[LoggedRequest]:
    """Refuse options that do not go together; return what a log holds that was not given to anyone."""
    given = [
        name for name, has in (("--prompt", prompt is not None), ("--prompts", prompts), ("--resume", resume)) if has
    ]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"of --prompt, --prompts and --resume, {found} are given; expected exactly one")
    if prompt is not None and output is not None:
        raise ValueError(f"--output is {output} with --prompt; expected --prompts: one prompt is printed as it comes")
    if prompt is not None and choice.logprobs is not None:
        raise ValueError(f"--logprobs is {choice.logprobs} with --prompt; expected --prompts: text has no place for it")
    for name, file in (("--output", output), ("--log", serving.log)):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{name} is {file}; expected its directory to exist")
    if prompts is not None and not prompts.is_file():
        raise ValueError(f"--prompts is {prompts}; expected a file that exists")
    if resume and serving.log is None:
        raise ValueError("--resume is given without --log; expected the log that is to be resumed")
    if resume and serving.log is not None and not serving.log.is_file():
        raise ValueError(f"--log is {serving.log}; expected a file that exists, to resume from")
    changed = [f.name for f in fields(choice) if getattr(choice, f.name) != getattr(CHOICE, f.name)]
    if resume and changed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(
            f"{names} and --resume are given; expected none of the first: the log has how tokens are chosen"
        )
    return [] if serving.log is None else _found(serving.log, resume)


def _found(log: Path, resume: bool) -> list[LoggedRequest]:
    from dsv4.engine.log import recover

    found = recover(log)
    if found and not resume:
        unfinished = sum(one.finish is None for one in found)
        parts = [f"{unfinished} unfinished"] if unfinished else []
        parts += [f"{len(found) - unfinished} finished and not given to anyone"] if len(found) > unfinished else []
        raise ValueError(
            f"--log is {log}, which holds {' and '.join(parts)}; expected --resume to finish them, or another file"
        )
    return found


def _engine(path: Path, serving: Serving, residence: Residence, num_prompts: int) -> Engine:
    from dsv4.cli.process import keep_freed_memory
    from dsv4.config.load import load_config
    from dsv4.data.tokenizer import check_tokenizer, load_tokenizer
    from dsv4.engine.engine import Engine

    directory = find_model(path)
    tokenizer = load_tokenizer(str(find_tokenizer(directory)))
    config = load_config(directory)
    check_tokenizer(tokenizer, config)
    limits = engine_limits(config, serving, num_prompts)
    keep_freed_memory()
    return Engine(open_model(directory, serving.precision, residence), limits, tokenizer=tokenizer)


def engine_limits(config: ModelConfig, serving: Serving, num_prompts: int) -> Limits:
    """The engine's limits: no more memory for pages than so many prompts can fill."""
    from dsv4.accounting.cache import page_bytes
    from dsv4.engine.pages import pages_of

    slots = min(serving.concurrency, num_prompts)
    row_format = serving.cache_format
    if row_format == "auto":
        row_format = "packed" if serving.precision == "released" else serving.precision
    most = slots * pages_of(config.max_context) * page_bytes(config, row_format)
    return Limits(
        max_requests=slots, cache_bytes=min(serving.cache_bytes, max(1, most)), cache_format=serving.cache_format,
        numerics=serving.numerics, draft_tokens=serving.draft_tokens,
        prefix=PrefixLimits(folder=None if serving.prefix_folder is None else str(serving.prefix_folder)),
        log=None if serving.log is None else str(serving.log),
    )  # fmt: skip


def _add(engine: Engine, wanted: list[Prompt], prompts: Path | None) -> list[str]:
    """Add all prompts, or none: what cannot run is told before anything does."""
    ids: list[str] = []
    for one in wanted:
        try:
            ids.append(engine.add(one.text, one.sampling, id=f"line-{one.line}" if prompts else PROMPT))
        except ValueError as error:
            for id in ids:
                engine.drop(id)
            raise ValueError(f"{prompts}, line {one.line}: {error}" if prompts else str(error)) from error
    return ids


def _stream(engine: Engine) -> None:
    """Print the prompt and what comes, as it comes. A character that was begun and not finished is left out."""
    answer = engine.completion(PROMPT)
    print(_text(engine, answer.prompt_ids) + _shown(answer), end="", flush=True)
    while not engine.is_idle:
        for piece in engine.step():
            print(_shown(piece), end="", flush=True)
    print(flush=True)
    engine.take(PROMPT)
    if answer.error is not None:
        raise answer.error


def _shown(part: Completion | Piece) -> str:
    return part.text if part.finish is None else part.text.rstrip(REPLACEMENT)


def _batch(engine: Engine, ids: list[str], results: Results) -> None:
    """Run all to their ends, with a bar on stderr, and write what came out."""
    lines_are_seen = results.path is None and sys.stdout.isatty()
    progress = Progress(
        TextColumn("{task.completed} of {task.total} prompts"), BarColumn(bar_width=20),
        TextColumn("{task.fields[tokens]:,} tokens"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=Console(stderr=True), redirect_stdout=False, disable=lines_are_seen,
    )  # fmt: skip
    so_far = [engine.completion(id) for id in ids]
    num_tokens = sum(len(completion.token_ids) for completion in so_far)
    ended = [completion.id for completion in so_far if completion.finish is not None]
    try:
        with progress:
            task = progress.add_task("", total=len(ids), completed=len(ended), tokens=num_tokens)
            _write(engine, ended, results)
            while not engine.is_idle:
                pieces = engine.step()
                ended = [piece.id for piece in pieces if piece.finish is not None]
                _write(engine, ended, results)
                num_tokens += sum(len(piece.token_ids) for piece in pieces)
                progress.update(task, advance=len(ended), tokens=num_tokens)
    finally:
        results.close()


def _write(engine: Engine, ids: list[str], results: Results) -> None:
    """Write the lines of those that have ended; what is written, the engine and its log may forget."""
    for id in ids:
        for written in results.add(_result(engine, engine.completion(id))):
            engine.take(written)


def _result(engine: Engine, completion: Completion) -> Result:
    result: Result = {
        "id": completion.id,
        "prompt": _text(engine, completion.prompt_ids),
        "text": completion.text,
        "finish": completion.finish,
        "token_ids": completion.token_ids,
        "num_prompt_tokens": len(completion.prompt_ids),
        "num_cached": completion.num_cached,
    }
    if completion.error is not None:
        result["error"] = str(completion.error)
    if engine.limits.draft_tokens:
        result |= {"num_drafted": completion.num_drafted, "num_accepted": completion.num_accepted}
    if completion.logprobs:
        result["logprobs"] = [{"chosen": one.chosen, "top": one.top} for one in completion.logprobs]
    return result


def _text(engine: Engine, prompt_ids: list[int]) -> str:
    """The text of a prompt, which comes after the token that begins a document."""
    tokenizer: Tokenizer | None = engine.tokenizer
    assert tokenizer is not None
    return tokenizer.decode(prompt_ids[1:], skip_special_tokens=False)


def _stopped(output: Path | None, log: Path | None) -> str:
    parts = ["stopped"]
    if output is not None and partial_of(output).is_file():
        parts.append(f"what was finished is in {partial_of(output)}")
    if log is not None:
        parts.append(f"--log {log} --resume goes on{'' if output is None else f', with --output {output}'}")
    return "; ".join(parts)


def _note(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)
