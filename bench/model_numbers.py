"""Print docs/numbers.md: parameters, bytes, FLOPs and cache of every preset, with the conventions behind them.

Run ``make numbers``. A test compares the committed file with a fresh run. Presets that only tests and benchmarks use
are left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsv4.accounting import v32
from dsv4.accounting.activations import layer_bytes_per_token
from dsv4.accounting.cache import CACHE_FORMATS, gqa_bytes_per_token, index_row_bytes, row_bytes, tail_bytes
from dsv4.accounting.cost import RATE, total_fp8_equivalent
from dsv4.accounting.efficiency import rows
from dsv4.accounting.flops import decode
from dsv4.accounting.summary import Summary, summarize
from dsv4.cli.format import gibibytes, tokens
from dsv4.config.model import ModelConfig
from dsv4.config.presets import PRESETS

CONTEXTS = (4096, 65536, 1048576)
MILLION = 1048576
TOOLS = ("smoke", "nano-1m", "bench-engine")


def main() -> None:
    """Print the whole document."""
    print(document(), end="")


def document() -> str:
    """Build the whole document."""
    configs = {name: make() for name, make in PRESETS.items() if name not in TOOLS}
    summaries = {name: summarize(config, _reached(config)) for name, config in configs.items()}
    parts = [
        INTRODUCTION,
        _sizes(configs, summaries),
        _parameters(summaries),
        _checkpoints(summaries),
        _flops(configs, summaries),
        _cache(configs, summaries),
        _training(configs, summaries),
        _comparison(configs),
    ]
    return "\n".join(parts)


INTRODUCTION = """# Numbers

How large is each model, and what does a token cost? Everything here follows from a config alone: `make numbers`
writes this file, and a test keeps it current. `dsv4 inspect MODEL` prints the same for any config.

Presets `flash`, `pro`, `flash-base` and `pro-base` are the released models; `mini` and `nano` are small ones to train.
K, M in a length are 1024 and 1024 x 1024 tokens; G and T before FLOP are 1e9 and 1e12; GiB is 2**30 bytes.
"""


def _reached(config: ModelConfig) -> tuple[int, ...]:
    return tuple(context for context in CONTEXTS if context <= config.max_context)


def _table(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *(list(row) for row in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _sizes(configs: dict[str, ModelConfig], summaries: dict[str, Summary]) -> str:
    body = [
        [
            name,
            f"{config.num_layers}",
            summaries[name].pattern,
            f"{config.hidden_size:,}",
            f"{config.attention.num_heads} x {config.attention.head_dim}",
            f"{config.moe.experts_per_token} of {config.moe.num_experts}",
            f"{config.indexer.top_k:,}",
            tokens(config.max_context),
            config.storage,
        ]
        for name, config in configs.items()
    ]
    header = ("preset", "layers", "pattern", "width", "heads", "experts", "CSA top-k", "context", "storage")
    return f"## Sizes\n\n{_table(header, body)}"


def _parameters(summaries: dict[str, Summary]) -> str:
    shown = {name: summary.parameters for name, summary in summaries.items() if not name.endswith("-base")}
    header = ["kind"]
    for name in shown:
        header += [f"{name}, total", f"{name}, used"]
    body = []
    for kind in shown["flash"].by_kind:
        counts = [parameters.by_kind[kind] for parameters in shown.values()]
        body.append([kind.replace("_", " "), *(f"{n:,}" for count in counts for n in (count.total, count.activated))])
    for label, pick in (("main model", "main"), ("MTP block", "mtp"), ("with MTP", "with_mtp")):
        counts = [getattr(parameters, pick) for parameters in shown.values()]
        body.append([label, *(f"{n:,}" for count in counts for n in (count.total, count.activated))])
    flash = shown["flash"]
    experts = flash.by_kind["routed_experts"]
    return f"""## Parameters

A parameter is a learned number. Scales are not (they are part of how a number is stored), nor are the tables of
expert ids of the hash layers. A packed FP4 byte holds two. A token uses every parameter except the embedding, of
which it looks up one row, and the experts it is not routed to. Worked: Flash routes to 6 of 256 experts, so it uses
{experts.total:,} x 6 / 256 = {experts.activated:,} of its routed parameters, {flash.main.activated:,} in all. The
report's 284B, 13B, 1.6T and 49B are the main model, without the MTP block. A base model has the same counts.

{_table(header, body)}"""


def _checkpoints(summaries: dict[str, Summary]) -> str:
    body = [
        [
            name,
            f"{summary.checkpoint.tensors:,}",
            f"{summary.checkpoint.total_bytes:,}",
            f"{summary.checkpoint.shards}",
            ", ".join(f"{count:,} {dtype}" for dtype, count in summary.checkpoint.tensors_by_dtype.items()),
        ]
        for name, summary in summaries.items()
    ]
    return f"""## Checkpoints

Bytes are `metadata.total_size`: data without the files' headers. `fp4` stores a routed expert's matrix as half a
byte per element and one E8M0 scale per 32, other matrices as one byte per element and one E8M0 scale per 128 x 128.
Worked: a Flash expert's w1, 2,048 x 4,096, takes 4,194,304 bytes and its scales 2,048 x 128 = 262,144. `fp8` stores
every such matrix in blocks of 128 x 128 with F32 scales, `bfloat16` in BF16 without.

{_table(("preset", "tensors", "bytes", "files", "tensors by dtype"), body)}"""


def _flops(configs: dict[str, ModelConfig], summaries: dict[str, Summary]) -> str:
    body = []
    for name, summary in summaries.items():
        works = [(f"decode at {tokens(at.context)}", at.decode) for at in summary.at_context]
        works += [(f"prefill of {tokens(at.context)}", at.prefill) for at in summary.at_context]
        works.append((f"train on {tokens(summary.training_tokens)}", summary.training))
        for label, work in works:
            kinds = work.by_kind
            attention, indexer = kinds["attention"], kinds["indexer"]
            values = (work.flops, work.fp8_equivalent, work.flops - attention - indexer, attention, indexer)
            body.append([f"{name}, {label}", *(f"{value / 1e9:,.3f}" for value in values)])
    config = configs["flash"]
    a, i = config.attention, config.indexer
    hca = 4 * a.num_heads * a.head_dim * (a.window + MILLION // 128)
    scan = 2 * i.num_heads * i.head_dim * (MILLION // 4)
    header = ("GFLOP per token", "all", "FP8-equivalent", "matrices", "attention", "indexer")
    return f"""## FLOPs

Only matrix products count, 2 FLOPs a multiply-add; norms, rotations, softmaxes, the pooling inside compressors,
Hadamard transforms, Sinkhorn iterations, top-k and conversions do not. In FP8-equivalents a FLOP of an FP4 product
counts {RATE["fp4"]}, of an FP8 product {RATE["fp8"]:g}, of a BF16 product {RATE["bf16"]:g}.

| product | FLOPs | precision |
|---|---|---|
| matrix stored in FP4 or FP8 | 2 per parameter and token | FP8, the precision of its activations |
| `wo_a` | the same | BF16: the released code widens it first |
| matrix stored in BF16 or F32 | the same | BF16 |
| core attention | 4 x heads x head dim per attended key | BF16 |
| indexer scores | 2 x heads x head dim per scored entry | FP4 (`fp4` storage), FP8 (`fp8`), BF16 (`bfloat16`) |
| sum over indexer heads | 2 x heads per scored entry | BF16 |
| stream mixes, per sub-layer | 2 x (2 N + N x N) x width | BF16 |

The token at position n, counted from 1, attends to min(n, 128) window entries, in an HCA layer to floor(n / 128)
more, in a CSA layer to min(top-k, floor(n / 4)) of the floor(n / 4) it scores. Worked, Flash at 1M: an HCA layer
attends to 128 + 8,192 keys, 4 x 64 x 512 x 8,320 = {hca:,} FLOPs; a CSA layer scores 262,144 entries,
2 x 64 x 128 x 262,144 = {scan:,} FLOPs.

- **Decode**: one token at that length, without MTP, head included.
- **Prefill**: average over the prompt's tokens; the head runs once. Without MTP.
- **Training**: average over one sequence, MTP block and its pass through the head included. Forward and backward
  are 3 times the forward, recomputation and the optimizer excluded. The indexer learns from a loss of its own with
  detached inputs: its matrices count 2 times their forward (no input gradient), its scores once over all visible
  entries for the forward and twice over the picked ones for the backward.

{_table(header, body)}"""


def _cache(configs: dict[str, ModelConfig], summaries: dict[str, Summary]) -> str:
    body = []
    for name, summary in summaries.items():
        if name.endswith("-base"):
            continue
        for form in CACHE_FORMATS:
            held = {at.context: gibibytes(at.cache_bytes[form]) for at in summary.at_context}
            body.append(
                [
                    f"{name}, {form}",
                    f"{row_bytes(configs[name], form)}",
                    f"{index_row_bytes(configs[name], form)}",
                    f"{summary.cache_bytes_per_token[form]:,.2f}",
                    f"{summary.cache_state_bytes[form]:,}",
                    *(held.get(context, "") for context in CONTEXTS),
                ]
            )
    header = ["preset, format", "row, B", "index key, B", "B per token", "fixed, B"]
    header += [f"at {tokens(context)}" for context in CONTEXTS]
    flash, pro = configs["flash"], configs["pro"]
    ratio = summaries["pro"].cache_bytes_per_token["packed"] / gqa_bytes_per_token(pro.num_layers)
    return f"""## Key-value cache

A CSA layer stores one row and one indexer key per 4 tokens, an HCA layer one row per 128. A row of the released
models, packed, is 448 FP8 bytes, 64 BF16 rotary channels, 7 E8M0 scales and 1 byte of padding: 584. An indexer key
is 64 bytes of FP4 and 4 E8M0 scales (`packed`: 68), or 128 FP8 bytes and as many scales (`packed-fp8`: 132).
Worked, Flash `packed`: 21 x (584 + 68) / 4 + 20 x 584 / 128 = 3,514.25 bytes per token. Base models: the same.

Fixed is what a sequence holds at any length: a ring of 128 rows per layer (MTP included) and the F32 tails of the
compressors ({tail_bytes(flash):,} bytes for Flash, {tail_bytes(pro):,} for Pro). A BF16 cache of grouped-query
attention with 8 heads of 128 takes 4,096 bytes per token and layer, {gqa_bytes_per_token(pro.num_layers):,} for Pro's
61 layers; Pro `packed` takes {ratio:.1%} of that (report, section 2.3.4: about 2%).

{_table(header, body)}"""


def _training(configs: dict[str, ModelConfig], summaries: dict[str, Summary]) -> str:
    body = []
    for name, summary in summaries.items():
        if name.endswith("-base"):
            continue
        memory = summary.training_memory
        parts = (memory.weights_bytes, memory.master_bytes, memory.gradient_bytes, memory.muon_bytes)
        parts += (memory.adamw_bytes, summary.activation_bytes)
        body.append([name, *(gibibytes(part) for part in parts)])
    header = (
        "preset",
        "weights",
        "master",
        "gradients",
        "Muon",
        "AdamW",
        "activations",
    )
    nano = configs["nano"]
    window, csa, hca = (layer_bytes_per_token(nano, kind) for kind in ("window", "csa", "hca"))
    return f"""## Training memory

Weights in BF16 (F32 where the checkpoint has F32); F32 master weights and F32 gradients, 4 bytes per parameter each;
one F32 momentum per parameter under Muon, two F32 moments under AdamW. AdamW has the embedding, the head, every norm,
the hyper-connections' biases and gating factors, the attention sinks and the compressors' position tables; Muon has
the other matrices; the routers' balance biases have no state.

Activations are what one step over 4K tokens keeps for its backward pass in BF16, MTP included. Matrix products keep
their inputs; scores, Sinkhorn rounds, logits, the streams between a layer's two sub-layers and the shared expert's
activation are formed again. A nano layer keeps {window:,.0f} bytes per token (window), {hca:,.0f} (HCA) or {csa:,.0f}
(CSA), of which {2 * nano.hyper_connections.streams * nano.hidden_size:,} are its streams. A test holds the sum to what
autograd keeps, within 2%.

{_table(header, body)}"""


def _comparison(configs: dict[str, ModelConfig]) -> str:
    old = v32.V32Config()
    total, used = v32.matrix_parameters(old)
    body = []
    table = rows()
    for row in table:
        cells = [tokens(row.context), f"{row.v32.flops / 1e9:,.1f}"]
        for point in (row.pro, row.flash):
            cells += [f"{point.flops / 1e9:,.1f}", f"{row.flops_share(point):.1%}"]
        cells += [gibibytes(row.v32.kv_bytes)]
        for point in (row.pro, row.flash):
            cells += [gibibytes(point.kv_bytes), f"{row.kv_share(point):.1%}"]
        body.append(cells)
    last = table[-1]
    scan = 2 * old.num_layers * old.index_heads * old.index_head_dim * MILLION
    base = total_fp8_equivalent(v32.decode(old, MILLION))
    pro = total_fp8_equivalent(decode(configs["pro"], MILLION))
    header = ["context", "V3.2 GFLOP", "Pro GFLOP", "", "Flash GFLOP", "", "V3.2 KV", "Pro KV", "", "Flash KV", ""]
    return f"""## Against DeepSeek-V3.2

One decoded token in FP8-equivalent FLOPs, and the cache of one sequence (`packed`, entries only). V3.2 is counted by
the same rules: {total / 1e9:.1f}B matrix parameters, {used / 1e9:.1f}B of them used by a token; latent attention with
its up-projections absorbed, {old.index_top_k:,} picked tokens, 576 channels scored and 512 summed for each of
{old.num_heads} heads in BF16; an indexer that scores every token in FP8, {old.index_heads} heads of
{old.index_head_dim}; and a cache of (656 + 132) x {old.num_layers} = {v32.kv_bytes_per_token(old):,} bytes per token.

Worked, 1M tokens: V3.2's indexer alone takes 2 x 61 x 64 x 128 x 1,048,576 = {scan / 1e9:,.0f} of its
{base / 1e9:,.0f} GFLOP. Pro takes {pro / 1e9:,.0f}, {last.flops_share(last.pro):.0%}; Flash
{last.flash.flops / 1e9:,.0f}, {last.flops_share(last.flash):.0%}. Cache: {last.kv_share(last.pro):.0%} and
{last.kv_share(last.flash):.0%}. The report's figure 1 has 27%, 10%, 10% and 7%. `dsv4 efficiency --plot FILE.svg`
draws it.

{_table(header, body)}"""


if __name__ == "__main__":
    main()
