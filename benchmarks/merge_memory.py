"""How much memory `mergefront merge` takes on a sharded model larger than what it may take.

    python benchmarks/merge_memory.py [--shards 8] [--shard-mb 512] [--methods task_arithmetic ties] [--folder /tmp]

Writes a random Llama and an expert of that size (three times the disk space, the merge included), merges them by the
command line in a process of its own, and prints the peak of its resident memory as the kernel counted it, mapped pages
included (VmHWM, which is what `/usr/bin/time -v` shows). The promise: two shards and 500 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from optimizer.checkpoints.tensor_file import Kind, write_sharded

ALLOWED = 500e6  # bytes beside two shards
HIDDEN, INNER, VOCABULARY = 2048, 8192, 32_000
PERIOD = 1 << 20
LAUNCH = """
import sys
from optimizer.cli import app
sys.argv[0] = "mergefront"
try:
    app()
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def write_model(folder: Path, *, shards: int, shard_bytes: int, seed: int, hidden: int = HIDDEN) -> int:
    """Write a random bf16 Llama with an index into a new folder, shards all but full; return its bytes."""
    folder.mkdir(parents=True)
    inner, vocabulary = hidden * INNER // HIDDEN, VOCABULARY * hidden // HIDDEN
    layer = _layer(hidden, inner)
    bytes_of = {name: 2 * torch.Size(shape).numel() for name, (_, shape) in layer.items()}
    outer = {f"{name}.weight": ("BF16", (vocabulary, hidden)) for name in ("model.embed_tokens", "lm_head")}
    room = shards * shard_bytes - 2 * 2 * vocabulary * hidden
    layers = max(1, room // sum(bytes_of.values()))
    kinds: dict[str, Kind] = {**outer, "model.norm.weight": ("BF16", (hidden,))}
    kinds |= {f"model.layers.{i}.{name}": kind for i in range(layers) for name, kind in layer.items()}
    noise = _noise(max(torch.Size(shape).numel() for _, shape in kinds.values()), seed)
    write_sharded(folder, kinds, partial(_tensor, kinds, noise), shard_bytes=shard_bytes)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 16, "vocab_size": vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return 2 * sum(torch.Size(shape).numel() for _, shape in kinds.values())


def _layer(hidden: int, inner: int) -> dict[str, Kind]:
    square, norm = ("BF16", (hidden, hidden)), ("BF16", (hidden,))
    return {
        **{f"self_attn.{name}_proj.weight": square for name in "qkvo"},
        "mlp.gate_proj.weight": ("BF16", (inner, hidden)),
        "mlp.up_proj.weight": ("BF16", (inner, hidden)),
        "mlp.down_proj.weight": ("BF16", (hidden, inner)),
        "input_layernorm.weight": norm,
        "post_attention_layernorm.weight": norm,
    }


def _noise(count: int, seed: int) -> torch.Tensor:
    """A million normal numbers over and over: drawing billions would take minutes."""
    drawn = torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()
    return drawn.repeat(count // PERIOD + 2)


def _tensor(kinds: dict[str, Kind], noise: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor's numbers: from a place in the noise that its name says."""
    shape, start = kinds[name][1], sum(name.encode()) * 7919 % PERIOD
    return noise[start : start + torch.Size(shape).numel()].reshape(shape)


def write_recipe(path: Path, base: Path, expert: Path, method: str) -> Path:
    """Write a mergekit document whose numbers no shortcut serves."""
    density = {"density": 0.5} if method not in ("linear", "task_arithmetic", "slerp") else {}
    parameters = {"t": 0.4} if method == "slerp" else {"weight": 0.4, **density}
    document: dict[str, Any] = {"merge_method": method, "base_model": str(base)}
    document |= {"dtype": "float32", "out_dtype": "bfloat16"}
    if method == "slerp":
        document |= {"models": [{"model": str(base)}, {"model": str(expert)}], "parameters": parameters}
    else:
        document["models"] = [{"model": str(expert), "parameters": parameters}]
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def peak_bytes(recipe: Path, out: Path) -> int:
    """Run `mergefront merge` and return the most memory it held at once."""
    command = [sys.executable, "-c", LAUNCH, "merge", str(recipe), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return 1024 * int(done.stderr.rpartition("VmHWM:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--shard-mb", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--folder", help="where there is room; default: the system's temporary folder")
    arguments = parser.parse_args()
    shard = arguments.shard_mb * 1_000_000
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        for seed, name in enumerate(("base", "expert")):
            total = write_model(root / name, shards=arguments.shards, shard_bytes=shard, seed=seed)
        print(f"base and expert: {total / 1e9:.2f} GB each, shards of {shard / 1e6:.0f} MB\n")
        print("| method | peak MB | shards | promised MB | s |\n|---|---:|---:|---:|---:|")
        for method in arguments.methods:
            recipe = write_recipe(root / f"{method}.yaml", root / "base", root / "expert", method)
            out = root / "out"
            start = time.perf_counter()
            peak = peak_bytes(recipe, out)
            seconds = time.perf_counter() - start
            promised = 2 * shard + ALLOWED
            row = f"{peak / 1e6:.0f} | {peak / shard:.2f} | {promised / 1e6:.0f} | {seconds:.0f}"
            print(f"| {method} | {row} |", flush=True)
            subprocess.run(["rm", "-r", str(out)], check=True)


if __name__ == "__main__":
    main()
