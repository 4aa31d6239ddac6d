"""What the plots of a run show, in one sentence of numbers each. None stands for a plot that the run does not have."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from dsv4.train.history import History
from dsv4.train.words import count, duration, gibibytes, plural

LAST_SHARE = 10  # ends are averages over this part of the steps, at the end


def headline(history: History) -> str:
    """Say what was trained on what, how long, and how well it did."""
    start, tokens = history.starts[-1], count(history.tokens)
    source = history.recipe.data.source
    text = (
        f"{start['model']}, {start['parameters_total']:,} parameters ({count(start['parameters_activated'])} used by a "
        f"token), trained on {tokens} tokens of {source} in {duration(history.seconds)}"
    )
    if history.bits_per_byte is None:
        return f"{text}; no validation was made."
    return f"{text}: {history.bits_per_byte:.3f} bits per byte of validation text{_beside_baseline(history)}."


def loss(history: History) -> str:
    first, last = history.steps[0]["loss"], history.steps[-1]["loss"]
    text = f"Training loss went from {first:.3f} to {last:.3f} nats"
    if history.bits_per_byte is None:
        text += "; no validation was made"
    else:
        text += f", validation ended at {history.bits_per_byte:.3f} bits per byte{_beside_baseline(history)}"
    return f"{text}. {_taught(history)}{_events(history)}"


def switches(history: History) -> str | None:
    if not history.switches:
        return None
    known = [switch for switch in history.switches if switch.scatter]
    inside = sum(abs(switch.jump) <= 2 * (switch.scatter or 0) for switch in known)
    largest = max(history.switches, key=lambda switch: abs(switch.jump))
    scatter = "" if largest.scatter is None else f", where one step scatters by {largest.scatter:.3f}"
    return (
        f"{inside} of {len(known)} switches within twice the scatter of one "
        f"step; the largest, to {largest.after.phase.name}, is {largest.jump:+.3f} nats{scatter}."
    )


def schedule(history: History) -> str:
    main = [step for span in history.spans if span.phase.train == "all" for step in span.steps]
    rates, weights = [step["lr"] for step in main], [step["mtp_weight"] for step in main]
    batches = [step["batch_tokens"] for step in history.steps]
    text = f"Batches of {count(min(batches))} to {count(max(batches))} tokens"
    if not main:
        return f"{text}; only the indexer was trained, at {history.steps[-1]['lr']:.3g}."
    return (
        f"The learning rate rose to {max(rates):.3g} and ended at {rates[-1]:.3g}; {text[0].lower()}{text[1:]}; "
        f"the MTP loss counted {weights[0]:g} at first and {weights[-1]:g} at last."
    )


def gradients(history: History) -> str:
    norms = [step["grad_norm"] for step in history.steps if step["grad_norm"]]
    clip = history.recipe.optimizer.clip_norm
    texts = []
    if norms:
        clipped = sum(norm > clip for norm in norms)
        texts.append(
            f"Median {statistics.median(norms):.3g}, largest {max(norms):.3g}; clipped in {clipped:,} of "
            f"{plural(len(norms), 'step')}."
        )
    indexer = [step["indexer_grad_norm"] for step in history.steps if step["indexer_grad_norm"]]
    if indexer:
        texts.append(f"The indexer's: median {statistics.median(indexer):.3g}, largest {max(indexer):.3g}.")
    return " ".join(texts)


def experts(history: History) -> str | None:
    if not history.expert_loads:
        return None
    ends = [_at_end(load for load in loads if load is not None) for loads in history.expert_loads]
    worst = max(range(len(ends)), key=ends.__getitem__)
    return (
        f"Over the last steps the most loaded expert had {statistics.fmean(ends):.2f} times the mean, averaged over "
        f"layers; {ends[worst]:.2f} in layer {worst}, the least balanced."
    )


def indexer(history: History) -> str | None:
    known = [step for step in history.steps if step["indexer_captured"] is not None]
    if not known:
        return None
    first, last = known[0], known[-1]
    recalls = [step["indexer_recall"] for step in known if step["indexer_recall"] is not None]
    text = f"Captured: {first['indexer_captured']:z.2f} at first, {last['indexer_captured']:z.2f} at last"
    return f"{text}; recall {recalls[0]:.2f} and {recalls[-1]:.2f}." if recalls else f"{text}."


def speed(history: History) -> str:
    start = history.starts[-1]
    rates = [step["tokens_per_second"] for step in history.steps]
    shares = [step["flops_utilisation"] for step in history.steps]
    full = statistics.fmean(step["packing_utilisation"] for step in history.steps)
    peak = max(step["memory_bytes"] for step in history.steps)
    return (
        f"Median {statistics.median(rates):,.0f} tokens a second, {statistics.median(shares):.0%} of the "
        f"{start['matmul_flops'] / 1e9:,.0f} GFLOP/s that a plain matrix product reached here with "
        f"{plural(start['threads'], 'thread')}; {gibibytes(peak)} of memory at most. Rows were {full:.1%} full."
    )


def _beside_baseline(history: History) -> str:
    if not history.baselines or history.bits_per_byte is None:
        return ""
    best = min(history.baselines, key=lambda record: record["bits_per_byte"])
    difference = best["bits_per_byte"] - history.bits_per_byte
    side = "below" if difference >= 0 else "above"
    return f", {abs(difference):.3f} {side} the {best['name']} ({best['bits_per_byte']:.3f})"


def _taught(history: History) -> str:
    found = history.divergences
    return f"The KL to the teacher went from {found[0]:.3f} to {found[-1]:.3f} nats. " if found else ""


def _events(history: History) -> str:
    if not history.spikes and not history.anticipatory:
        return "No spike."
    routed = sum(step["anticipatory"] for step in history.steps)
    undone = sum(len(stretch) for stretch in history.undone)
    parts = [plural(len(history.spikes), "spike")]
    if history.rollbacks:
        parts.append(f"{plural(len(history.rollbacks), 'rollback')} that took back {plural(undone, 'step')}")
    if routed:
        parts.append(f"anticipatory routing for {plural(routed, 'step')}")
    return f"{', '.join(parts)}."


def _at_end(values: Iterable[float]) -> float:
    """Mean of the last tenth, at least one."""
    known = list(values)
    return statistics.fmean(known[-max(1, len(known) // LAST_SHARE) :])
