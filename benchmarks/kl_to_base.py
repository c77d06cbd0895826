"""Does the distance to the base, which needs no labels, order merges as measured forgetting does?

    python benchmarks/kl_to_base.py RUN [--items 16] [--trials 14] [--moved OLD=NEW ...]

Scores trials of a finished run that were judged on holdout items, in equal steps of what they forgot, on one more text:
docstrings of packages on this machine. Prints the distance beside the forgetting that the run measured, their rank
correlation (Spearman), and what the compact form of the base's predictions leaves out of the divergence.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import kl_div

from evals.outcomes import HOLDOUT, KL_TO_BASE, SEARCH, Chat, Outcome, TaskSpec
from evals.teachers import Beliefs
from evals.tokens import Pair
from optimizer.run import open_run
from optimizer.workers.worker import Worker, WorkerSpec
from search_spaces import Recipe, Setting

PACKAGES = ("numpy", "pandas")
SHORTEST = 250  # characters of a docstring's paragraph
CHECKED = 8  # windows whose full divergences are computed


def docstrings(packages: Sequence[str]) -> list[str]:
    """Return long paragraphs of packages' docstrings, each once, in an order that is always the same."""
    found = {paragraph for package in packages for paragraph in _paragraphs(package)}
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def _paragraphs(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                        line = " ".join(paragraph.split())
                        if len(line) >= SHORTEST and not set(">|`*=_") & set(line):
                            yield line


def moved(recipe: Recipe, places: Mapping[str, str]) -> Recipe:
    """Return a recipe with its models where they are now."""

    def now(source: str) -> str:
        return next((new + source[len(old) :] for old, new in places.items() if source.startswith(old)), source)

    return replace(recipe, base=now(recipe.base), experts=tuple((name, now(source)) for name, source in recipe.experts))


def share(outcomes: Sequence[Outcome], base: Sequence[Outcome]) -> float:
    """Compute what a merge forgets of a text: what it loses of the base's score, as a share of it."""
    mine, of_base = (math.fsum(o.value for o in rows) / math.fsum(o.weight for o in rows) for rows in (outcomes, base))
    return (mine - of_base) / of_base


def left_out(worker: Worker, base: Recipe, other: Recipe, pairs: Sequence[Pair]) -> float:
    """Compute the share of the full divergence of a merge from the base that the compact form leaves out."""
    worker.merge(base)
    logits = [_logits(worker, pair) for pair in pairs]
    worker.merge(other)
    full = compact = 0.0
    for pair, of_base in zip(pairs, logits, strict=True):
        of_other = _logits(worker, pair)
        full += float(kl_div(of_other.log_softmax(-1), of_base.log_softmax(-1), reduction="sum", log_target=True))
        compact += float(Beliefs.of(of_base).divergences(of_other).sum())
    return 1 - compact / full


def _logits(worker: Worker, pair: Pair) -> torch.Tensor:
    tokens = torch.tensor([pair.context + pair.continuation])
    with torch.inference_mode():
        return (
            worker.engine.model(input_ids=tokens[:, :-1], use_cache=False).logits[0, -len(pair.continuation) :].float()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--trials", type=int, default=14)
    parser.add_argument("--moved", nargs="*", default=[], metavar="OLD=NEW", help="folders that lie elsewhere now")
    given = parser.parse_args()
    run = open_run(given.run)
    places = dict(entry.split("=", 1) for entry in given.moved)
    judged = run.points(HOLDOUT)["forgetting"].dropna().sort_values()
    places_of = np.unique(np.linspace(0, len(judged) - 1, given.trials).round().astype(int))
    first = [trial for trial, kind in run.kinds.items() if kind.stored == "base"]
    judged = judged.loc[list(dict.fromkeys([*first, *judged.index[places_of]]))]
    recipes = {int(trial): moved(run.recipe(int(trial)), places) for trial in judged.index}
    base = next(recipes[trial] for trial, kind in run.kinds.items() if kind.stored == "base" and trial in recipes)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "docstrings.txt"
        text.write_text("\n\n".join(docstrings(PACKAGES)[: 4 * given.items]), encoding="utf-8")
        task = TaskSpec(str(text), "general", search_items=given.items, holdout_items=1, kind=KL_TO_BASE)
        worker = Worker(WorkerSpec(base.base, base.experts, (task,), Chat(), False, 0, "float32", "auto", 2, 0))
        rows, of_base = [], tuple[Outcome, ...]()
        for trial, recipe in recipes.items():
            begun = time.perf_counter()
            found = worker.evaluate(recipe.to_json(), SEARCH).outcomes
            of_base = of_base or found  # the base is the first
            figures = {"forgetting": judged[trial], KL_TO_BASE: share(found, of_base)}
            rows.append({"trial": trial, "kind": run.kinds[trial].label, **figures})
            print(f"trial {trial}: {time.perf_counter() - begun:.0f} s", flush=True)
        table = pd.DataFrame(rows).set_index("trial")
        print(table.to_string(float_format=lambda value: f"{value:7.4f}"))
        tokens = math.fsum(o.weight for o in of_base)
        entropy = math.fsum(o.value for o in of_base) / tokens
        print(f"the base's entropy: {entropy:.3f} bits a token, {tokens:.0f} tokens")
        ranks = table[["forgetting", KL_TO_BASE]].rank()
        print(f"Spearman of {len(table)} trials: {ranks['forgetting'].corr(ranks[KL_TO_BASE]):.2f}", flush=True)
        windows = [pair for pair in worker.examples() if pair.to_base][:CHECKED]
        for name, weight in (("expert", 1.0), ("half of it", 0.5)):
            (expert, _), *_ = base.experts
            other = replace(base, settings=(Setting("weight", expert, "", weight),))
            out = left_out(worker, base, other, [pair for example in windows for pair in example.pairs])
            print(f"of the divergence of {name} the compact form leaves out {out:.2%}")


if __name__ == "__main__":
    main()
