"""How long one candidate's merge takes, beside the memory speed of the same machine in the same run.

    python benchmarks/merge.py BASE EXPERT [EXPERT] [--threads 1] [--repeats 5]

Each method merges into a resident model, the finiteness check included. GB/s counts the bytes that must move: base and
experts read once, the model written once. The ratio is to a float32 triad (a = b + s * c) counted the same way and
timed anew beside each line, so that other work on the machine weighs on both. One expert
alone stands in for the second too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from optimizer.checkpoints import require_finite
from optimizer.merge import Sources, merge_into
from search_spaces import METHODS, Recipe, Setting

TRIAD_NUMBERS = 1 << 26  # 256 MiB an array, beyond any cache that matters


def best_seconds(action: Callable[[], object], repeats: int) -> float:
    """Run once to warm up, then return the fastest of `repeats` runs."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


class Triad:
    """The memory speed within reach: a = b + s * c on three arrays of float32."""

    def __init__(self) -> None:
        self._a, self._b, self._c = (torch.ones(TRIAD_NUMBERS) for _ in range(3))

    def bytes_per_second(self, repeats: int) -> float:
        seconds = best_seconds(lambda: torch.add(self._b, self._c, alpha=0.5, out=self._a), repeats)
        return 3 * self._a.nbytes / seconds


def recipe(method: str, experts: tuple[str, ...], density: float) -> Recipe:
    """Weights that no shortcut serves: neither 0 nor 1."""
    values = {"weight": 0.4, "t": 0.4, "density": density, "normalize": 0.0}
    known = [parameter.name for parameter in METHODS[method].parameters]
    settings = tuple(Setting(name, "", "", value) for name, value in values.items() if name in known)
    return Recipe(method, "base", tuple((name, name) for name in experts), settings)


def cases(method: str) -> list[tuple[int, float]]:
    """Numbers of experts and densities to time a method with."""
    densities = (1.0, 0.5) if METHODS[method].parameter("density") else (1.0,)
    counts = (1,) if METHODS[method].max_experts == 1 else (1, 2)
    return [(count, density) for density in densities for count in counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("experts", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    paths = (arguments.experts * 2)[:2]
    sources = Sources.open(arguments.base, {"one": paths[0], "two": paths[1]})
    base = sources.base
    resident = {name: torch.zeros(base.shape(name), dtype=base.dtype(name)) for name in base.names}
    numbers = sum(tensor.numel() for tensor in resident.values())
    triad = Triad()
    scan = best_seconds(lambda: require_finite(base), arguments.repeats)
    print(f"{numbers / 1e6:.1f} M numbers, {base.bytes / 1e6:.0f} MB, {arguments.threads} thread(s)")
    print(f"require_finite of the base {scan * 1e3:.0f} ms\n")
    print("| method | experts | density | ms per candidate | GB/s | triad GB/s | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for method in METHODS:
        for count, density in cases(method):
            chosen = recipe(method, ("one", "two")[:count], density)
            seconds = best_seconds(lambda chosen=chosen: merge_into(resident, sources, chosen), arguments.repeats)  # type: ignore[misc]
            moved = base.bytes * (count + 2) / seconds
            reach = triad.bytes_per_second(arguments.repeats)
            row = f"{seconds * 1e3:.0f} | {moved / 1e9:.2f} | {reach / 1e9:.1f} | {moved / reach:.2f}"
            print(
                f"| {method} | {count} | {density if METHODS[method].parameter('density') else ''} | {row} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
