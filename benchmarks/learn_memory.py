"""How much memory and time a lesson and a derived expert take on a generated model, as multiples of the model.

    python benchmarks/learn_memory.py [--gb 2.2] [--steps 1] [--folder /tmp]

Writes a random bf16 Llama of that size with a byte tokenizer, an expert of the same size, and two small tasks. Then
`mergefront learn` and `mergefront derive` run on it, each in a process of its own. Printed is the most anonymous
memory (`RssAnon`): the worker's own copy of the model, gradients, statistics and activations. Base and expert are
mapped: their pages belong to the system's cache, and all workers of a machine share them. The aim is 1.3 models beside
activations: what the largest forward pass left in memory for the way back, as measured. RegMean has no way back, and
K-FAC's peak is not in it: their activations and Gram matrices count with the models, as the first of both columns does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.merge_memory import write_model
from optimizer.demo.models import byte_tokenizer
from optimizer.demo.tasks import write_choice_task, write_text_task
from optimizer.search.cost import cost_of
from optimizer.search.plan import count_tokens, make_plan
from optimizer.strict_yaml import dump_yaml
from optimizer.study.study_file import read_study
from optimizer.workers.memory import HUGE_PAGES

WORDS = [
    "a",
    "merge",
    "of",
    "base",
    "and",
    "expert",
    "has",
    "most",
    "of",
    "both",
    "where",
    "the",
    "weights",
    "are",
    "right",
    "layer",
    "by",
    "layer",
]
POLL = 0.05  # seconds
LAUNCH = "import sys\nfrom optimizer.cli import app\nsys.argv[0] = 'mergefront'\napp()"
STORED = "activations"  # what a line of a forward pass begins with, before its bytes
WATCH = f"""
from pathlib import Path
from evals.engine import Engine

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

plain = Engine.backward

def backward(self, pairs, loss, beliefs=None):
    before = anonymous()

    def told(values):
        print("{STORED}", anonymous() - before, flush=True)
        return loss(values)

    return plain(self, pairs, told, beliefs)

Engine.backward = backward
"""  # of a process that learns: how much each forward pass leaves in memory for the way back


def write_study(root: Path, size: int) -> int:
    """Write models, tasks and a study file; return a model's bytes."""
    for seed, name in enumerate(("base", "expert")):
        model_bytes = write_model(root / name, shards=4, shard_bytes=size // 4, seed=seed)
        byte_tokenizer().save_pretrained(root / name)
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    texts = [words(40) for _ in range(12)]
    asked = [{"text": words(8), "choices": draw.sample(sorted(set(WORDS)), 4), "gold": 0} for _ in range(24)]
    write_text_task(root / "domain", texts)
    write_choice_task(root / "general", asked)
    study = {
        "name": "memory",
        "models": {"base": str(root / "base"), "experts": {"expert": str(root / "expert")}},
        "space": {"shape": "uniform"},
        "evals": {
            "domain": [{"task": str(root / "domain"), "items": 6, "holdout_items": 2}],
            "general": [{"task": str(root / "general"), "items": 12, "holdout_items": 4}],
            "dtype": "bf16",
        },
        "workers": {"count": 0},
    }
    (root / "study.yaml").write_text(dump_yaml(study), encoding="utf-8")
    return model_bytes


def activations(study_path: Path) -> int:
    """Return the bytes that a step's forward pass stores, as `mergefront check` forecasts them."""
    plan = make_plan(read_study(study_path, []))
    count_tokens(plan)
    cost = cost_of(plan)
    assert cost is not None, plan.problems
    return cost.learning_bytes


def run(*words: str, watched: bool = True) -> tuple[float, float, float, float]:
    """Run a command line; return its most anonymous bytes, activations, its most resident bytes, and its seconds."""
    begun = time.perf_counter()
    code = (WATCH if watched else "") + LAUNCH
    command, environment = [sys.executable, "-c", code, *words], os.environ | dict([HUGE_PAGES])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    peaks = {"RssAnon": 0, "VmHWM": 0}

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
            except OSError:
                return
            told = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
            for key in peaks:
                peaks[key] = max(peaks[key], 1024 * int(told.get(key, 0)))
            time.sleep(POLL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(said.decode())
    stored = [int(line.split()[1]) for line in said.decode().splitlines() if line.startswith(f"{STORED} ")]
    return peaks["RssAnon"], max(stored, default=0), peaks["VmHWM"], time.perf_counter() - begun


def main() -> None:
    """Write the models, run each command, print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gb", type=float, default=2.2, help="bytes of a model, in 10^9")
    options.add_argument("--steps", type=int, default=1)
    options.add_argument("--folder", help="where there is room; default: the system's temporary folder")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        size = write_study(root, int(given.gb * 1e9))
        config = json.loads((root / "base" / "config.json").read_text())
        print(f"base and expert: {size / 1e9:.2f} GB each, bf16, {config['num_hidden_layers']} layers")
        study = str(root / "study.yaml")
        bare, *_ = run("check", study, watched=False)
        forecast = activations(root / "study.yaml")
        print(f"without a model: {bare / 1e9:.2f} GB; activations of a step, by formula: {forecast / 1e9:.2f} GB\n")
        titles = ["anonymous GB", "beside the process, models", "activations GB", "beside both, models", "resident GB"]
        print(f"| command | {' | '.join(titles)} | s |")
        print("|---|" + "---:|" * 6)
        commands = {
            f"learn --steps {given.steps}": ("learn", study, str(root / "w.json"), "--steps", str(given.steps)),
            "derive --form kfac": ("derive", study, str(root / "derived"), "--form", "kfac"),
            "derive --form regmean": ("derive", study, str(root / "derived"), "--form", "regmean"),
            "derive --form fisher": ("derive", study, str(root / "derived"), "--form", "fisher"),
        }
        for name, words in commands.items():
            own, stored, whole, seconds = run(*words)
            models = [(own - bare) / size, (own - bare - stored) / size]
            cells = [own / 1e9, models[0], stored / 1e9, models[1], whole / 1e9]
            print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
