"""``dsv4 generate``: go on from a prompt with a model trained here, and print the text as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
REPLACEMENT = "\ufffd"  # what bytes that are no text decode to, those of half a character too


def generate(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")],
    prompt: str,
    tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> None:
    """Print a prompt and what a model goes on with.

    Args:
        path: the folder of a run (its finished model, or else its newest checkpoint) or a checkpoint directory.
        prompt: the text to go on from.
        tokens: the most tokens to add; fewer where the document ends or the model's context does.
        temperature: below 1 the likely tokens become likelier; 0 takes the likeliest.
        top_p: draw from the fewest likeliest tokens that have this probability together.
        seed: of the draws.
    """
    import torch

    from dsv4.checkpoint.load import load_model
    from dsv4.data.tokenizer import check_tokenizer, load_tokenizer, plain_text
    from dsv4.eval import generate as decoding

    directory = find_model(path)
    tokenizer = load_tokenizer(str(find_tokenizer(directory)))
    model = load_model(directory)
    check_tokenizer(tokenizer, model.config)
    accelerator = torch.accelerator.current_accelerator()
    token_ids = decoding.generate(
        model if accelerator is None else model.to(accelerator),
        [model.config.bos_token_id, *plain_text(tokenizer).encode(prompt).ids],
        num_tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, stop_ids={model.config.eos_token_id},
    )  # fmt: skip
    print(prompt, end="", flush=True)
    for piece in pieces(tokenizer, token_ids):
        print(piece, end="", flush=True)
    print()


def find_model(path: Path) -> Path:
    """Return the directory of the model that ``path`` stands for; a ValueError says what is missing."""
    from dsv4.checkpoint.training import MODEL, list_checkpoints

    if (path / MODEL / "config.json").is_file():
        return path / MODEL
    checkpoints = list_checkpoints(path / "checkpoints")
    if checkpoints:
        return checkpoints[-1].path / MODEL
    if any(path.glob("*.safetensors")):
        return path
    raise ValueError(
        f"path is {path}, which holds no model; expected a run with {MODEL}/ or checkpoints/step-..., or a directory "
        "with config.json and safetensors files"
    )


def find_tokenizer(model: Path) -> Path:
    """Return the tokenizer.json in a model's directory or, failing that, in the data of the run it is of."""
    model = model.resolve()
    run = model.parents[2] if model.parent.parent.name == "checkpoints" else model.parent
    places = (model, run / "data")
    for place in places:
        if (place / TOKENIZER).is_file():
            return place / TOKENIZER
    raise ValueError(f"{TOKENIZER} is missing; expected it in {' or '.join(map(str, places))}")


def pieces(tokenizer: Tokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of byte-level tokens as it comes, whole characters only.

    A character may span tokens: it is held back until its last byte, and dropped if that never comes.
    """
    held: list[int] = []
    for token_id in token_ids:
        held.append(token_id)
        text = tokenizer.decode(held)
        if not text.endswith(REPLACEMENT):
            yield text
            held = []
    yield tokenizer.decode(held).rstrip(REPLACEMENT)
