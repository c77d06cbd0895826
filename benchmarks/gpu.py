"""Whether what runs on a GPU is right, and how fast it is beside a device copy and a plain matrix product.

    python benchmarks/gpu.py [--cpu] [--small] [--only merge,score] [--json FILE] [--scratch FOLDER]

Models and items are generated; nothing is downloaded. Parts, each by its name in --only:

methods   every merge method on the device against the CPU, number by number, and its GB/s (base + experts read + model
          written) beside a device copy
agreement log-likelihoods of the tree and of plain batches against a float64 pass, per token, in bf16 and float32
score     a Llama of 8.0 B numbers in bf16 and items of 120,000 distinct tokens: seconds of a merge and of scoring,
          candidates an hour, the share of a plain bf16 matrix product, and the peer's time in the same process: HFLM
          where lm-eval is installed, else padded batches of transformers, at the better of two batch sizes, on
          a fifth of the items
          Then what else the score could be made with: attention over the tree by blocks or by FlexAttention, layers
          under `torch.compile`, a CUDA graph; on this model and on one of 1.1 B
homes     a merge with base and expert on the device, in pinned memory, and mapped from their files
workers   candidates an hour of one worker on the device and of two
learning  one step of a learned anchor: seconds and peak memory

A part that fails says so and the others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from evals import batches
from evals.engine import Engine, budget_for
from evals.packing import build_trie
from evals.tokens import Pair
from optimizer.checkpoints.resident import resident_model, tensor_places
from optimizer.checkpoints.tensor_file import write_sharded
from optimizer.demo.models import byte_tokenizer
from optimizer.merging import merge as merging
from optimizer.merging.gradients import weight_gradients
from optimizer.merging.merge import DEVICE_ROOM, MergeCache, Sources, free_bytes, merge_into, merged_tensor
from search_spaces import METHODS, Recipe, Setting

NAMES = ("one", "two")
COMMON: dict[str, Any] = {
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "dtype": "bfloat16",
}
TINY = LlamaConfig(
    vocab_size=259, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, **COMMON,
)  # fmt: skip
MIDDLE = LlamaConfig(
    vocab_size=32768, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, **COMMON,
)  # fmt: skip
LARGE = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, **COMMON,
)  # fmt: skip


@dataclass(slots=True)
class Bench:
    """What the parts share: device, sizes, models made so far, and what was found, by part."""

    device: torch.device
    small: bool
    scratch: Path
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    made: dict[str, tuple[Path, dict[str, str]]] = field(default_factory=dict)

    def row(self, part: str, **values: Any) -> None:
        """Keep a row of a part's table, and print it."""
        rows = self.found.setdefault(part, [])
        if not rows or rows[-1].keys() != values.keys():
            print("\n| " + " | ".join(values) + " |\n|" + "---|" * len(values))
        rows.append(values)
        print("| " + " | ".join(map(_shown, values.values())) + " |", flush=True)

    def models(self, config: LlamaConfig, experts: int = 1) -> tuple[Path, dict[str, str]]:
        """Write a base and its experts, or give those that an earlier part has written."""
        key = f"{config.hidden_size}"
        base, known = self.made.get(key, (self.scratch / key / "base", {}))
        if not known:
            start = time.perf_counter()
            write_model(base, config, self.device, moved=0)
            print(f"wrote a model in {time.perf_counter() - start:.0f} s", flush=True)
        for i in range(len(known) + 1, experts + 1):
            folder = self.scratch / key / NAMES[i - 1]
            write_model(folder, config, self.device, moved=i)
            known[NAMES[i - 1]] = str(folder)
        self.made[key] = base, known
        return base, dict(list(known.items())[:experts])

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], repeats: int = 3) -> float:
        """Time an action: the median of some runs."""
        times = []
        for _ in range(repeats):
            self.sync()
            start = time.perf_counter()
            action()
            self.sync()
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    def copy_rate(self) -> float:
        """Bytes a second of a copy on the device, read and written."""
        size = 1 << (22 if self.small else 30)
        one, other = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        other.copy_(one)
        return 2 * size / self.seconds(lambda: other.copy_(one), 9)

    def product_rate(self) -> float:
        """Operations a second of a plain bf16 matrix product."""
        n = 512 if self.small else 8192
        a, b = (torch.randn(n, n, device=self.device).bfloat16() for _ in range(2))
        for _ in range(3):
            a @ b
        return 2 * n**3 / (self.seconds(lambda: [a @ b for _ in range(10)], 5) / 10)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# Models and items


def write_model(folder: Path, config: LlamaConfig, device: torch.device, *, moved: int) -> None:
    """Write a random model; one with `moved` over 0 is the first one plus a little noise of its own."""
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}

    def tensor(name: str) -> Tensor:
        seed = list(shapes).index(name)
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(shapes[name], generator=generator, device=device).mul_(0.02)
        values = values.add_(1.0) if len(shapes[name]) == 1 else values
        if moved:
            values = values.bfloat16().float()
            generator.manual_seed(1000 * moved + seed)
            values.add_(torch.randn(shapes[name], generator=generator, device=device), alpha=0.002)
        return values.bfloat16().cpu()

    folder.mkdir(parents=True)
    write_sharded(folder, {n: ("BF16", s) for n, s in shapes.items()}, tensor, shard_bytes=4_000_000_000)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def items(vocabulary: int, distinct: int, seed: int = 0) -> list[Pair]:
    """Make items of about so many distinct tokens: a third choices, a third choices after five shots, a third texts."""
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist())

    def question(shots: tuple[int, ...]) -> list[Pair]:
        context = shots + some(96)
        return [Pair(context, some(16)) for _ in range(4)]

    third = distinct // 3
    per_question = 96 + 4 * 15
    shots = some(min(800, third // 2))
    pairs = [pair for _ in range(max(1, third // per_question)) for pair in question(())]
    pairs += [pair for _ in range(max(1, (third - len(shots)) // per_question)) for pair in question(shots)]
    length = min(1024, third)
    return pairs + [Pair((0,), some(length), asks_greedy=False) for _ in range(max(1, third // length))]


def operations(model: PreTrainedModel, pairs: Sequence[Pair]) -> int:
    """Count the matrix products' operations on distinct tokens; attention's own are left out."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    predicted = len({p.context + p.continuation[:i] for p in pairs for i in range(len(p.continuation))})
    return 2 * (len(build_trie(dict(enumerate(pairs)))) * body + predicted * head)


def recipe(method: str, base: Path, experts: Mapping[str, str], weight: float = 0.4, density: float = 0.5) -> Recipe:
    """Numbers that no shortcut serves."""
    spec = METHODS[method]
    given = {
        "weight": weight / len(experts) if method == "karcher" else weight,
        "t": weight if method == "slerp" else 1e-3,
    }
    given |= {"density": density, "select_topk": density, "normalize": 0.0, "scale": 0.9}
    known = {p.name for p in spec.parameters} - ({"lambda"} if method == "nearswap" else set())
    settings = tuple(Setting(name, "", "", value) for name, value in given.items() if name in known)
    return Recipe(method, str(base), tuple(experts.items()), settings)


@dataclass(slots=True)
class Resident:
    """A model on the device, and what its merges need."""

    model: PreTrainedModel
    places: dict[str, Tensor]
    sources: Sources
    cache: MergeCache
    engine: Engine

    @classmethod
    def of(cls, bench: Bench, base: Path, experts: Mapping[str, str]) -> Resident:
        sources = Sources.open(base, experts)
        model = resident_model(sources.base, dtype="auto", device=bench.device.type)
        room = min(DEVICE_ROOM, free_bytes(model.device))
        engine = Engine(model, byte_tokenizer(), token_budget=budget_for(model, room))
        return cls(model, tensor_places(model, sources.base), sources, MergeCache(), engine)

    def merge(self, chosen: Recipe) -> None:
        merge_into(self.places, self.sources, chosen, self.cache)


# Parts


def methods(bench: Bench) -> None:
    """Every method, against the CPU and beside a device copy."""
    base, experts = bench.models(TINY, 2)
    sources = Sources.open(base, experts)
    large_base, large_experts = (base, experts) if bench.small else bench.models(MIDDLE, 2)
    large = Sources.open(large_base, large_experts)
    places = {n: torch.empty(large.base.shape(n), dtype=torch.bfloat16, device=bench.device) for n in large.base.names}
    cache, copy = MergeCache(), bench.copy_rate()
    for method, spec in METHODS.items():
        count = 2 if (spec.max_experts or 2) > 1 else 1
        chosen = recipe(method, base, dict(list(experts.items())[:count]))
        parameters = {name: sources.base.tensor(name).to(bench.device, copy=True) for name in sources.base.names}
        merge_into(parameters, sources, chosen, MergeCache())
        apart, steps = 0, 0.0
        for name, tensor in parameters.items():
            wanted, got = merged_tensor(name, sources, chosen).float(), tensor.cpu().float()
            apart += int((wanted != got).sum())
            size = torch.stack([sources.base.tensor(name).float(), wanted, got]).abs().amax(0).clamp(min=1e-30)
            steps = max(steps, float(((wanted - got).abs() / size.log2().floor().sub(7).exp2()).max()))
        chosen = recipe(method, large_base, dict(list(large_experts.items())[:count]))
        first = bench.seconds(partial(merge_into, places, large, chosen, cache), 1)
        later = bench.seconds(partial(merge_into, places, large, chosen, cache))
        rate = (count + 2) * large.base.bytes / later
        numbers = sum(t.numel() for t in parameters.values())
        bench.row(
            "methods", method=method, experts=count, other_than_cpu=f"{apart} of {numbers}", largest_in_roundings=steps,
            first_ms=1e3 * first, ms=1e3 * later, GB_s=rate / 1e9, of_copy=rate / copy,
        )  # fmt: skip


def agreement(bench: Bench) -> None:
    """The tree's and plain batches' log-likelihoods against float64, in root mean squares of nats a token."""
    base, experts = bench.models(TINY if bench.small else MIDDLE, 1)
    pairs = items(TINY.vocab_size if bench.small else MIDDLE.vocab_size, 1500 if bench.small else 6000)
    sources = Sources.open(base, experts)
    model = resident_model(sources.base, dtype="auto", device=bench.device.type).double()
    exact = torch.tensor([_exactly(model, pair) for pair in pairs])
    for dtype in (torch.bfloat16, torch.float32):
        model = resident_model(sources.base, dtype="auto", device=bench.device.type)
        torch.nn.Module.to(model, dtype)
        engine = Engine(model, byte_tokenizer(), token_budget=2048)
        again = torch.tensor([x for x, _ in engine.loglikelihoods(pairs)])
        tree = torch.tensor([x for x, _ in engine.loglikelihoods(pairs)])
        packs, engine.packs, engine._planned = engine.packs, False, {}
        plain = torch.tensor([x for x, _ in engine.loglikelihoods(pairs)])
        tokens = torch.tensor([len(pair.continuation) for pair in pairs]) ** 0.5
        far = {k: float(((v - exact) / tokens).square().mean().sqrt()) for k, v in (("tree", tree), ("plain", plain))}
        bench.row(
            "agreement", dtype=str(dtype).removeprefix("torch."), packs=packs, gathers=engine.gathers, tree=far["tree"],
            plain=far["plain"], repeats=bool((tree == again).all()), nats=float(exact.mean()),
        )  # fmt: skip


def _exactly(model: PreTrainedModel, pair: Pair) -> float:
    tokens = torch.tensor([pair.context + pair.continuation], device=model.device)
    with torch.inference_mode():
        logprobs = model(input_ids=tokens[:, :-1], use_cache=False).logits[0].log_softmax(-1)
    first = len(pair.context) - 1
    return float(logprobs[first:].gather(-1, tokens[0, first + 1 :, None]).sum())


def score(bench: Bench) -> None:
    """A whole candidate, and the peer on the same requests."""
    config = TINY if bench.small else LARGE
    base, experts = bench.models(config, 1)
    pairs = items(config.vocab_size, 3000 if bench.small else 120_000)
    resident = Resident.of(bench, base, experts)
    resident.merge(recipe("task_arithmetic", base, experts, 0.3))
    merge = bench.seconds(lambda: resident.merge(recipe("task_arithmetic", base, experts, 0.4)))
    plan = bench.seconds(lambda: resident.engine.batches(pairs), 1)
    resident.engine.loglikelihoods(pairs)
    scoring = bench.seconds(lambda: resident.engine.loglikelihoods(pairs))
    work, product = operations(resident.model, pairs), bench.product_rate()
    bench.row(
        "score", model=f"{sum(t.numel() for t in resident.places.values()) / 1e9:.2f} B", pairs=len(pairs),
        distinct_tokens=len(build_trie(dict(enumerate(pairs)))), tokens_a_pass=resident.engine.token_budget,
        packs=resident.engine.packs, flexes=resident.engine.flexes, plan_s=plan, merge_s=merge, score_s=scoring,
        candidates_an_hour=3600 / (merge + scoring), limit_an_hour=3600 * product / work,
        of_product=work / product / scoring, product_TFLOPs=product / 1e12,
    )  # fmt: skip
    peak = _peak(bench)
    name, ask = _peer(resident.model, config)
    fifth = [pair for i, pair in enumerate(pairs) if i // 4 % 5 == 0]  # whole items
    tried = {size: _or_infinite(partial(bench.seconds, partial(ask, fifth, size), 1)) for size in (32, 128)}
    size = min(tried, key=lambda size: tried[size])
    theirs = tried[size] * _tokens(pairs) / _tokens(fifth)
    bench.row("score", peer=name, batch_size=size, peer_s=theirs, times_ours=theirs / scoring, our_peak_GB=peak / 1e9)
    ways(bench, resident, pairs)
    if not bench.small:
        del resident
        base, experts = bench.models(MIDDLE, 1)
        ways(bench, Resident.of(bench, base, experts), items(MIDDLE.vocab_size, 120_000))


def _tokens(pairs: Sequence[Pair]) -> int:
    return sum(len(pair.context) + len(pair.continuation) for pair in pairs)


def _or_infinite(action: Callable[[], float]) -> float:
    try:
        return action()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.inf


def _peer(model: PreTrainedModel, config: LlamaConfig) -> tuple[str, Callable[[Sequence[Pair], int], object]]:
    """Return what scores requests elsewhere, by name."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return f"transformers {transformers.__version__}, padded batches", lambda pairs, size: _padded(
            model, pairs, size
        )
    lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), max_length=config.max_position_embeddings)

    def ask(pairs: Sequence[Pair], size: int) -> object:
        requests = [((str(i), ""), list(p.context), list(p.continuation)) for i, p in enumerate(pairs)]
        return lm._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=size)

    return "lm-eval's HFLM", ask


def _padded(model: PreTrainedModel, pairs: Sequence[Pair], size: int) -> list[float]:
    found = []
    longest_first = sorted(pairs, key=lambda pair: -len(pair.context + pair.continuation))
    with torch.inference_mode():
        for start in range(0, len(longest_first), size):
            batch = longest_first[start : start + size]
            rows = [pair.context + pair.continuation[:-1] for pair in batch]
            width = len(rows[0])
            tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
            logprobs = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
            for row, pair in zip(logprobs, batch, strict=True):
                first, wanted = len(pair.context) - 1, torch.tensor(pair.continuation, device=model.device)
                part = row[first : first + len(wanted)]
                found.append(float(part.gather(-1, wanted[:, None]).sum()))
    return found


def ways(bench: Bench, resident: Resident, pairs: Sequence[Pair]) -> None:
    """Score with attention over the tree in other ways, and run one pass compiled and as a graph."""
    engine = resident.engine
    kept = engine.flexes, batches.DEVICE_BLOCK
    exact = engine.loglikelihoods(pairs)

    def row(way: str) -> None:
        engine._planned = {}
        start = time.perf_counter()
        found = engine.loglikelihoods(pairs)
        first = time.perf_counter() - start
        apart = max(abs(x - y) / len(p.continuation) for (x, _), (y, _), p in zip(found, exact, pairs, strict=True))
        again = bench.seconds(lambda: engine.loglikelihoods(pairs), 2)
        bench.row("ways", width=resident.model.config.hidden_size, way=way, first_s=first, score_s=again, apart=apart)

    engine.flexes = False
    for batches.DEVICE_BLOCK in (64, kept[1]):
        row(f"blocks of {batches.DEVICE_BLOCK}")
    engine.flexes, batches.DEVICE_BLOCK = kept
    row("as it is")
    model, width = resident.model.base_model, 64 if bench.small else 1024
    tokens = torch.randint(3, 200, (max(1, engine.token_budget // width), width), device=bench.device)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(input_ids=tokens, use_cache=False).last_hidden_state

    def passing(way: str) -> None:
        run()
        bench.row(
            "ways",
            width=resident.model.config.hidden_size,
            forward_pass=way,
            tokens=tokens.numel(),
            ms=1e3 * bench.seconds(run, 5),
        )

    passing("eager")
    if bench.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            model(input_ids=tokens, use_cache=False)
        bench.row(
            "ways",
            width=resident.model.config.hidden_size,
            forward_pass="CUDA graph",
            tokens=tokens.numel(),
            ms=1e3 * bench.seconds(graph.replay, 5),
        )
        del graph
    if bench.device.type == "cpu":
        return  # a compiler's minute, for nothing that is wanted on a CPU
    assert isinstance(model.layers, torch.nn.ModuleList)
    with compiled(model.layers):
        passing("compiled layers")


@contextmanager
def compiled(layers: torch.nn.ModuleList) -> Iterator[None]:
    """Have each layer's forward compiled, all by the same code."""
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def homes(bench: Bench) -> None:
    """Where base and experts lie while they are merged."""
    base, experts = bench.models(TINY if bench.small else MIDDLE, 1)
    resident = Resident.of(bench, base, experts)
    chosen = recipe("task_arithmetic", base, experts)
    total = 3 * resident.sources.base.bytes
    held = resident.cache
    resident.merge(chosen)
    kept = bench.seconds(lambda: resident.merge(chosen))
    bench.row("homes", sources="on the device", ms=1e3 * kept, GB_s=total / kept / 1e9)

    class Streaming(MergeCache):
        def tensor(self, sources: Sources, expert: str, name: str, device: torch.device) -> Tensor:
            source = sources.experts[expert] if expert else sources.base
            return source.tensor(name).to(device)

    resident.cache = Streaming(facts=held.facts)
    resident.merge(chosen)
    mapped = bench.seconds(lambda: resident.merge(chosen))
    bench.row("homes", sources="mapped files", ms=1e3 * mapped, GB_s=total / mapped / 1e9)
    if bench.device.type == "cuda":
        with full_device():
            resident.cache = MergeCache(facts=held.facts)
            resident.merge(chosen)
            streamed = bench.seconds(lambda: resident.merge(chosen))
        assert all(copy.is_pinned() for copy in resident.cache.copies.values())
        bench.row("homes", sources="pinned memory", ms=1e3 * streamed, GB_s=total / streamed / 1e9)


@contextmanager
def full_device() -> Iterator[None]:
    """Have merges find no room on the device."""
    free, merging.free_bytes = merging.free_bytes, lambda device: 0
    try:
        yield
    finally:
        merging.free_bytes = free


def workers(bench: Bench) -> None:
    """One and two workers on the device."""
    config = TINY if bench.small else MIDDLE
    base, experts = bench.models(config, 1)
    distinct = 1500 if bench.small else 60_000
    context = get_context("spawn")
    rates = []
    for count in (1, 2):
        ready, results = context.Barrier(count), context.Queue()
        running = [
            context.Process(
                target=_work, args=(bench.device.type, bench.small, str(base), experts, distinct, ready, results)
            )
            for _ in range(count)
        ]
        for process in running:
            process.start()
        spans = [results.get(timeout=240) for _ in running]
        for process in running:
            process.join()
        done = sum(n for n, _, _ in spans)
        rates.append(3600 * done / (max(end for _, _, end in spans) - min(start for _, start, _ in spans)))
        bench.row("workers", workers=count, candidates_an_hour=rates[-1], of_one=rates[-1] / rates[0])


def _work(
    device: str, small: bool, base: str, experts: dict[str, str], distinct: int, ready: Any, results: Any
) -> None:
    bench = Bench(torch.device(device), small, Path())
    if device == "cpu":
        torch.set_num_threads(1)
    resident = Resident.of(bench, Path(base), experts)
    pairs = items(TINY.vocab_size if small else MIDDLE.vocab_size, distinct)
    candidates = 4 if small else 8

    def candidate(weight: float) -> None:
        resident.merge(recipe("task_arithmetic", Path(base), experts, weight))
        resident.engine.loglikelihoods(pairs)

    candidate(0.5)
    ready.wait(200)
    start = time.monotonic()
    for i in range(candidates):
        candidate(0.1 + 0.05 * i)
    results.put((candidates, start, time.monotonic()))


def learning(bench: Bench) -> None:
    """One step of a learned anchor: the gradient by every tensor's weight."""
    config = TINY if bench.small else LARGE
    base, experts = bench.models(config, 1)
    resident = Resident.of(bench, base, experts)
    chosen = recipe("task_arithmetic", base, experts)
    resident.merge(chosen)
    size = sum(t.nbytes for t in resident.places.values())

    def step(pairs: Sequence[Pair]) -> None:
        resident.merge(chosen)
        with weight_gradients(resident.model, resident.places, resident.sources, chosen, resident.cache) as found:
            resident.engine.backward(pairs, lambda x: -x.mean())
        assert all(map(math.isfinite, found.values()))

    for distinct in (300, 600) if bench.small else (1000, 2000):
        pairs = items(config.vocab_size, distinct)
        held = _peak(bench, reset=True)
        step(pairs)
        took = bench.seconds(partial(step, pairs))
        peak = _peak(bench)
        forward = bench.seconds(partial(resident.engine.loglikelihoods, pairs))
        bench.row(
            "learning", distinct_tokens=len(build_trie(dict(enumerate(pairs)))), step_s=took, of_forward=took / forward,
            peak_GB=peak / 1e9, held_GB=held / 1e9, model_GB=size / 1e9,
        )  # fmt: skip


def _peak(bench: Bench, *, reset: bool = False) -> float:
    """Most memory of the device in use so far; what is in use now, where the count starts anew."""
    if bench.device.type != "cuda":
        return math.nan
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


PARTS = {part.__name__: part for part in (methods, agreement, homes, workers, score, learning)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, to see that all parts run")
    parser.add_argument("--small", action="store_true", help="tiny models and few items")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    parser.add_argument("--scratch", type=Path, help="where the models are written; 37 GB unless --small")
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --cpu runs on the CPU")
    logging.disable_progress_bar()
    device = torch.device("cpu" if arguments.cpu else "cuda")
    shared = Path("/dev/shm")
    scratch = arguments.scratch or (shared if not arguments.small and shared.is_dir() else Path(tempfile.gettempdir()))
    name = platform.processor() or platform.machine() if arguments.cpu else torch.cuda.get_device_name()
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    failed, begun = [], time.perf_counter()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        bench = Bench(device, arguments.small, Path(folder))
        bench.found["machine"] = [
            {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
        ]
        for part in arguments.only.split(","):
            start = time.perf_counter()
            try:
                PARTS[part](bench)
            except Exception:
                traceback.print_exc()
                failed.append(part)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            print(f"\n{part}: {time.perf_counter() - start:.0f} s of {time.perf_counter() - begun:.0f} s", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(bench.found, indent=1) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
