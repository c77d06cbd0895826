"""Time of one candidate's merge into a resident model, method by method, beside the memory's speed and mergekit.

`python benchmarks/merge.py BASE EXPERT [EXPERT]`; without folders, the demo's models. A second expert is turned from
the first where only one is given. Columns: milliseconds of a candidate when an earlier one has left its facts; GB/s
counted as base + experts read + model written; the share of a triad (a = b + s * c) timed beside the line; seconds of
mergekit's `run_merge` of the same document in the same dtype, and how many times ours that is.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from optimizer.checkpoints.tensor_file import INDEX_FILE
from optimizer.errors import MergefrontError
from optimizer.merging.merge import MergeCache, Sources, merge_into
from search_spaces import METHODS, Recipe, Setting, SpaceError
from search_spaces.mergekit.writer import to_mergekit

TRIAD_NUMBERS = 1 << 26  # 256 MiB an array, beyond any cache that matters
DEMO = Path(__file__).parents[1] / "runs/demo-inputs"
NAMES = ("one", "two")


def best_seconds(action: Callable[[], object], repeats: int) -> float:
    """Return the fastest of `repeats` runs."""
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


def recipe(method: str, paths: dict[str, str], base: str, density: float) -> Recipe:
    """Numbers that no shortcut serves, and that mergekit has words for."""
    count, spec = len(paths), METHODS[method]
    weight = 1 / (count + 1) if method == "karcher" else 0.4
    values = {"weight": weight, "t": 0.4 if method == "slerp" else 1e-3, "density": density, "select_topk": density}
    values |= {"normalize": 0.0, "scale": 0.9}
    ours = {p.name for p in spec.parameters if p.ours} - ({"weight"} if method == "karcher" else set())
    known = {p.name for p in spec.parameters} - ours
    settings = tuple(Setting(name, "", "", value) for name, value in values.items() if name in known)
    return Recipe(method, base, tuple(paths.items()), settings)


def turned(base: Path, expert: Path, out: Path) -> Path:
    """Write a second expert: the base plus the first one's deltas, each row turned by seven places."""
    shutil.copytree(expert, out)
    tensors, moved = load_file(base / "model.safetensors"), load_file(expert / "model.safetensors")
    for name, tensor in tensors.items():
        moved[name] = (tensor.float() + (moved[name].float() - tensor.float()).roll(7, -1)).to(tensor.dtype)
    save_file(moved, out / "model.safetensors", metadata={"format": "pt"})
    return out


def peer_seconds(recipe: Recipe, sources: Sources, repeats: int) -> float:
    """Time mergekit's run_merge of the same recipe, from files to files, warm."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    dtype = str(sources.base.dtype(sources.base.names[0])).removeprefix("torch.")
    document = to_mergekit(recipe, sources.base.names, out_dtype=dtype)

    def run() -> None:
        with tempfile.TemporaryDirectory() as out:
            configuration = MergeConfiguration.model_validate(document)
            run_merge(configuration, out, MergeOptions(quiet=True, copy_tokenizer=False))

    return best_seconds(run, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", type=Path, default=DEMO / "base")
    parser.add_argument("experts", nargs="*", type=Path, default=[DEMO / "expert"])
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; all by default")
    parser.add_argument("--density", type=float, default=0.5, help="also of select_topk")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="do not run mergekit")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        paths = [path.resolve() for path in arguments.experts][:2]
        if len(paths) == 1:
            if (paths[0] / INDEX_FILE).exists():
                parser.error("a sharded expert is not turned into a second one; name two experts")
            paths.append(turned(arguments.base.resolve(), paths[0], Path(folder) / "two"))
        sources = Sources.open(arguments.base, dict(zip(NAMES, map(str, paths), strict=True)))
        measure(sources, methods, arguments)


def measure(sources: Sources, methods: list[str], arguments: argparse.Namespace) -> None:
    """Print a line for each method with as few experts as it takes, and with two."""
    base = sources.base
    resident = {name: torch.zeros(base.shape(name), dtype=base.dtype(name)) for name in base.names}
    numbers = sum(tensor.numel() for tensor in resident.values())
    triad = Triad()
    print(f"{numbers / 1e6:.1f} M numbers, {base.bytes / 1e6:.0f} MB, {arguments.threads} thread(s), ", end="")
    print(f"density and select_topk {arguments.density:g}\n")
    print("| method           | experts |    ms | GB/s | of triad | first ms | facts MB | mergekit s | times |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    total = MergeCache()
    for method in methods:
        spec = METHODS[method]
        for count in range(max(1, spec.min_experts), min(2, spec.max_experts or 2) + 1):
            chosen = recipe(
                method, {n: sources.experts[n].source for n in NAMES[:count]}, base.source, arguments.density
            )
            cache = MergeCache()
            candidate = partial(merge_into, resident, sources, chosen, cache)
            first = best_seconds(candidate, 1)
            seconds = best_seconds(candidate, arguments.repeats)
            merge_into(resident, sources, chosen, total)
            read = base.bytes * (count + 2) / seconds
            reach = triad.bytes_per_second(2)
            peer = "           |      "
            if not arguments.no_peer:
                try:
                    theirs = peer_seconds(chosen, sources, 1)
                    peer = f"{theirs:10.2f} | {theirs / seconds:5.0f}"
                except (SpaceError, MergefrontError) as error:
                    print(f"{method}: {error}", file=sys.stderr)
            print(
                f"| {method:16s} | {count:7d} | {seconds * 1e3:5.0f} | {read / 1e9:4.1f} | {read / reach:8.2f} "
                f"| {first * 1e3:8.0f} | {cache.facts.bytes / 1e6:8.1f} | {peer} |",
                flush=True,
            )
    share = total.facts.bytes / base.bytes
    print(f"\nfacts of all these together: {total.facts.bytes / 1e6:.1f} MB, {share:.1%} of a checkpoint")


if __name__ == "__main__":
    main()
