"""From a model and limits to a cache of the right size, and the key by which prefixes of other runs are found."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import blake2b
from operator import itemgetter

import torch
from tokenizers import Tokenizer

from dsv4.accounting.cache import page_bytes
from dsv4.checkpoint.names import released_tensors
from dsv4.config.engine import Limits
from dsv4.model.cache import Cache
from dsv4.model.precision import rounds_weights
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import resolve
from dsv4.ops.places import PAGE_TOKENS
from dsv4.ops.rows import RowFormat

FORMAT = b"dsv4 prefix 2"  # changes with what states and pages hold
_EXPERT = ".ffn.experts."


def build_cache(model: Transformer, limits: Limits, max_context: int) -> Cache:
    """Return the cache that ``limits`` ask for. Raises ``ValueError`` for what this model or machine cannot do."""
    device = model.embed.weight.device
    if limits.numerics == "invariant" and resolve(model.backend, device) != "native":
        raise ValueError(
            f"limits.numerics is 'invariant' with the backend {resolve(model.backend, device)!r}; expected 'fast', or "
            "a CPU with a C compiler: results that do not depend on the batch come from its kernels"
        )
    if rounds_weights(model):
        raise ValueError("the model rounds its weights as they are used; expected plain ones, or codes: precision.pack")
    if limits.draft_tokens and not len(model.mtp):
        raise ValueError(f"limits.draft_tokens is {limits.draft_tokens}; expected 0: this model has no MTP block")
    row_format = cache_format(model, limits)
    size = page_bytes(model.config, row_format)
    needed = limits.max_requests * -(-max_context // PAGE_TOKENS)
    num_pages = limits.cache_bytes // size if size else needed  # pages of window layers alone hold nothing
    if num_pages < 1:
        raise ValueError(f"limits.cache_bytes is {limits.cache_bytes}; expected at least the {size} of one page")
    return Cache(
        model.config, num_slots=limits.max_requests, num_pages=num_pages, row_format=row_format,
        spare=limits.draft_tokens, max_context=max_context, device=device,
    )  # fmt: skip


def cache_format(model: Transformer, limits: Limits) -> RowFormat:
    """Return the row format that ``limits.cache_format`` stands for: packed where that loses nothing."""
    if limits.cache_format != "auto":
        return limits.cache_format
    if model.rounds:
        return "packed"
    return "bfloat16" if model.activation_dtype == torch.bfloat16 else "float32"


def model_key(model: Transformer, tokenizer: Tokenizer | None, cache: Cache) -> bytes:
    """Return a digest of all that decides what a page and a state hold: weights, config, tokenizer, format.

    Reads every weight once. The tokenizer decides no entry, but a folder is for one tokenizer, so that a name in it
    stands for one text.
    """
    digest = blake2b(FORMAT, digest_size=32)
    digest.update(json.dumps(asdict(model.config), sort_keys=True).encode())
    digest.update(f"{cache.row_format} {cache.spare} {model.activation_dtype}".encode())
    if tokenizer is not None:
        digest.update(tokenizer.to_str().encode())
    for name, tensor in sorted(released_tensors(model), key=itemgetter(0)):
        is_number = _EXPERT in name and tensor.is_floating_point()  # experts may be left in a file's dtype
        stored = tensor.to(model.embed.weight.dtype) if is_number else tensor
        digest.update(name.encode())
        digest.update(stored.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
