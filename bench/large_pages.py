"""How fast a matrix of a head's size is read for one token, in small and in large pages."""

import time

import torch

from dsv4.native.large_pages import prefer_large_pages
from dsv4.ops.linear import linear

SHAPE = (129280, 512)  # the head of preset bench-engine, 132 MB
ROUNDS = 40


def matrix(*, large: bool) -> torch.Tensor:
    made = torch.empty(SHAPE, dtype=torch.bfloat16)
    if large and not prefer_large_pages([made]):
        raise SystemExit("this system grants no large pages")
    return made.normal_()


def main() -> None:
    x = torch.randn(1, SHAPE[1]).bfloat16()
    matrices = {"small": matrix(large=False), "large": matrix(large=True)}
    with torch.inference_mode():
        for threads in (1, torch.get_num_threads()):
            torch.set_num_threads(threads)
            seconds = {name: [] for name in matrices}
            for _ in range(ROUNDS):
                for name, weight in matrices.items():
                    begin = time.perf_counter()
                    linear(x, weight, backend="native")
                    seconds[name].append(time.perf_counter() - begin)
            rates = {
                name: weight.nbytes / sorted(seconds[name])[ROUNDS // 2] / 1e9 for name, weight in matrices.items()
            }
            print(
                f"{threads} threads: " + ", ".join(f"{rate:.1f} GB/s in {name} pages" for name, rate in rates.items())
            )


if __name__ == "__main__":
    main()
