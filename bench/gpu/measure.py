"""What a device can do, how long a case takes on it, and whether the case computes what its portable twin does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from bench.gpu.case import Case, Run, compiled
from dsv4.device import empty_cache, wait

WARM_UPS = 3
GROUPS = 5  # of calls; their median counts
GROUP_S = 0.1  # a group has as many calls as take so long
COPY_BYTES, PRODUCT = 2**32, 8192  # large enough to be bound by one thing alone


class Ceilings(NamedTuple):
    """What a device was seen to do: bytes moved a second by a copy, operations a second of a bfloat16 product."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, case: Case) -> float:
        """The least time in which a case can be done."""
        return max(case.num_bytes / self.bytes_per_s, case.flops / self.flops_per_s)


def seconds(run: Run, device: torch.device, *, group_s: float = GROUP_S) -> float:
    """Return how long one call takes, many being given to the device at once."""
    for _ in range(WARM_UPS):
        run()
    calls = max(1, round(group_s / max(_of_calls(run, 1, device), 1e-6)))
    return median(_of_calls(run, calls, device) / calls for _ in range(GROUPS))


def _of_calls(run: Run, calls: int, device: torch.device) -> float:
    wait(device)
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    wait(device)
    return time.perf_counter() - begun


def ceilings(device: torch.device, *, copy_bytes: int = COPY_BYTES, product: int = PRODUCT) -> Ceilings:
    """Measure them."""
    source = torch.empty(copy_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(partial(target.copy_, source), device)
    a, b = (torch.randn(product, product, device=device).to(torch.bfloat16) for _ in range(2))
    return Ceilings(copied, 2 * product**3 / seconds(lambda: a @ b, device))


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """Compare a case with its portable twin on the same numbers: the largest error, as a share of the largest value.

    error: None without such a twin, or memory for it. same_bits: whether a second call gave the same bits.
    """
    run = _made(case.make)
    found = [x.detach().clone() for x in _tensors(run())]
    same = all(torch.equal(a.view(-1), b.view(-1)) for a, b in zip(found, _tensors(run()), strict=True))
    del run
    free()
    error = None
    if "portable" in case.twins:
        try:
            wanted = [*_tensors(_made(case.twins["portable"])())]
            error = max(_error(a, b) for a, b in zip(found, wanted, strict=True))
        except torch.OutOfMemoryError:
            free()
    wait(device)
    return {"error": error, "same_bits": same}


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if not found.is_floating_point():  # choices: the share of them that differ
        return (found != wanted).double().mean().item()
    largest = wanted.abs().max().double().clamp(min=1e-30)
    return ((found.double() - wanted.double()).abs().max() / largest).item()


def measure(case: Case, limits: Ceilings, device: torch.device, *, group_s: float = GROUP_S) -> dict[str, Any]:
    """Time a case and its twins. A twin that the device has no memory for has no time, and says so."""
    taken = seconds(_made(case.make), device, group_s=group_s)
    found = {
        "kernel": case.kernel, "shape": case.shape, "seconds": taken, "num_bytes": case.num_bytes, "flops": case.flops,
        "share": limits.floor_s(case) / taken, "mark": case.mark,
        "bound": "bytes" if case.num_bytes / limits.bytes_per_s > case.flops / limits.flops_per_s else "flops",
        "twins": {},
    }  # fmt: skip
    for name, make in _twins(case):
        free()
        try:
            found["twins"][name] = seconds(_made(make), device, group_s=group_s)
        except torch.OutOfMemoryError:
            found["twins"][name] = "out of memory"
    free()
    return found


def _twins(case: Case) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Those of the case, and the portable one compiled."""
    yield from case.twins.items()
    if "portable" in case.twins and "compiled" not in case.twins:
        yield "compiled", compiled(case.twins["portable"])


def free() -> None:
    """Give back the memory of what was measured last."""
    gc.collect()
    empty_cache()


def _made(make: Callable[[], Run]) -> Run:
    torch.manual_seed(0)
    return make()


def _tensors(result: object) -> Iterable[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [x for part in result for x in _tensors(part)]
    return []
