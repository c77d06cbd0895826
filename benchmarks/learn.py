"""What learning depends on: one choice changed at a time, judged on holdout items.

    python benchmarks/learn.py --study STUDY [--start kfac 0.4] [--out runs/learn] [--only steps] [--rows 2]

STUDY is a study file with one expert; the default is the one that `make demo` leaves in runs/demo-inputs. Each row
learns weights on search items, scores the recipe on holdout items, and is kept in OUT/rows.json as soon as it is done:
started again, the script goes on with what is missing. Printed, and drawn as OUT/learn.png: gain and forgetting as a
search measures them, each with its 95 % interval, what a row is worth more than the first, with its paired interval,
the cost in candidates and the seconds (with what else the machine does). Worth is 0.6 of the gain less 0.4 of the
forgetting, both in shares of the expert's. Beside them stand the base, the expert and the starts as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from evals.objectives import Scale, draw_objectives, objectives
from evals.outcomes import HOLDOUT
from optimizer.run_study import worker_spec
from optimizer.runs.atomic_file import write_atomically
from optimizer.runs.outcome_files import outcomes_path, read_outcomes, write_outcomes
from optimizer.study.schema import Study
from optimizer.study.study_file import read_study
from optimizer.workers.learner import Learner
from optimizer.workers.orders import QUESTIONS, STEPS, TEXTS, By, Derivation, Form, Lesson, Loss
from optimizer.workers.sensitivity import some_of_each
from optimizer.workers.worker import Worker
from search_spaces import Recipe, Setting

DEFAULT_STUDY = Path(__file__).parent.parent / "runs" / "demo-inputs" / "study.yaml"
BASE, EXPERT, UNIFORM, KFAC = "base", "expert", "uniform", "kfac"
MODELS = {BASE: (UNIFORM, 0.0), EXPERT: (UNIFORM, 1.0)}
STARTS = {
    f"start {form} {share:g}": (form, share)
    for form, shares in ((UNIFORM, (0.25, 0.5)), *((form, (0.2, 0.4, 0.6)) for form in get_args(Form)))
    for share in shares
}
AS_IT_IS = "as it is"
PREFERENCE = 0.6  # of the domain, in what a row is worth


@dataclass(frozen=True, slots=True)
class Row:
    """One way to learn; the defaults are the product's.

    Args:
        start: uniform weights or a form of derived experts, and how far to the expert.
        items: of each task, at most; 0 is all.
        pulled: whether weights may be pulled towards their mean.
    """

    loss: Loss = "labels"
    by: By = "tensor"
    steps: int = STEPS
    questions: int = QUESTIONS
    texts: int = TEXTS
    pulled: bool = True
    start: tuple[str, float] = (KFAC, 0.4)
    items: int = 0
    preference: float = PREFERENCE
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a row: its recipe, and the cost of learning it (0 where nothing was learned)."""

    recipe: str
    candidates: float
    seconds: float
    steps: int
    pull: float
    kept_before: float
    kept: float


def rows(start: tuple[str, float]) -> dict[str, Row]:
    """Name every row; each differs from the first in what its name says."""
    plain = Row(start=start)
    return {
        AS_IT_IS: plain,
        **{f"steps {steps}": replace(plain, steps=steps) for steps in (6, 12, 24, 48) if steps != STEPS},
        "teachers": replace(plain, loss="teachers"),
        "teachers, by group": replace(plain, loss="teachers", by="group"),
        "by group": replace(plain, by="group"),
        "minibatch halved": replace(plain, questions=QUESTIONS // 2, texts=TEXTS // 2),
        "minibatch doubled": replace(plain, questions=2 * QUESTIONS, texts=2 * TEXTS),
        "no pull": replace(plain, pulled=False),
        **{
            f"from {form} {share:g}": replace(plain, start=(form, share))
            for form, share in STARTS.values()
            if (form, share) != start
        },
        "for 0.35": replace(plain, preference=0.35),
        "for 0.8": replace(plain, preference=0.8),
        "30 items a task": replace(plain, items=30),
        "90 items a task": replace(plain, items=90),
        "another seed": replace(plain, seed=1),
    }


class Bench:
    """One worker, its models by name, and the rows that are done."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.folder, self.worker = folder, Worker(worker_spec(study))
        self.base = study.models.base
        ((self.expert, self.source),) = study.models.experts.items()
        self.path = folder / "rows.json"
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.done = {name: Done(**row) for name, row in found.items()}

    def recipe(self, form: str, share: float) -> Recipe:
        """Make a start: a derived expert is made where it is not there yet."""
        name, source, weight = self.expert, self.source, share
        if form != UNIFORM:
            path = Derivation(cast(Form, form), self.expert, (share,), (self.folder / "derived").absolute())
            name, source, weight = f"{self.expert}_{form}_{100 * share:.0f}", str(self.worker.derive(path)[0]), 1.0
        return Recipe("task_arithmetic", self.base, ((name, source),), (Setting("weight", name, "", weight),))

    def learn(self, row: Row) -> Done:
        """Learn one row's weights in a learner of its own, which has read nothing yet."""
        examples = self.worker.examples()
        chosen = some_of_each(examples, row.items, row.items, seed=row.seed) if row.items else examples
        learner = Learner(
            self.worker, chosen, tasks=self.worker.tasks, base=self.base, experts={self.expert: self.source}
        )
        lesson = Lesson(
            start=self.recipe(*row.start).to_json(),
            preference=((self.expert, row.preference),),
            by=row.by,
            steps=row.steps,
            bounds=(-1.0, 2.0),
            seed=row.seed,
            loss=row.loss,
            questions=row.questions,
            texts=row.texts,
        )
        learned = learner.learn(lesson if row.pulled else replace(lesson, pulls=()))
        return Done(
            recipe=learned.recipe,
            candidates=learned.candidates,
            seconds=learned.seconds,
            steps=learned.steps,
            pull=learned.pull,
            kept_before=learned.kept_before,
            kept=learned.kept,
        )

    def keep(self, name: str, done: Done) -> None:
        """Score a row's recipe on the holdout items, and write it down."""
        recipe = Recipe.from_json(done.recipe)
        outcomes = self.worker.evaluate(done.recipe, HOLDOUT).outcomes
        write_outcomes(self.folder, len(self.done), HOLDOUT, recipe.digest, outcomes)
        self.done[name] = done
        text = json.dumps({name: asdict(row) for name, row in self.done.items()}, indent=1)
        write_atomically(self.path, text.encode())

    def table(self) -> pd.DataFrame:
        """Compute gain and forgetting of all that is done: a row each, by name."""
        frames = [read_outcomes(outcomes_path(self.folder, i, HOLDOUT)) for i in range(len(self.done))]
        names = list(self.done)
        scale = Scale(
            pd.concat(frames), self.worker.tasks, HOLDOUT, names.index(BASE), {self.expert: names.index(EXPERT)}
        )
        draws = draw_objectives(scale)
        found = objectives(draws).set_axis(names)
        found["worth"], found["worth_low"], found["worth_high"] = np.nan, np.nan, np.nan
        if AS_IT_IS in names:
            points, samples = (_worth(of, names.index(EXPERT)) for of in (draws.points, draws.samples))
            plain = names.index(AS_IT_IS)
            found["worth"] = points - points[plain]
            apart = samples - samples[:, [plain]]
            found["worth_low"], found["worth_high"] = np.quantile(apart, (0.025, 0.975), axis=0)
        return found.join(pd.DataFrame({name: asdict(row) for name, row in self.done.items()}).T)


def _worth(of: Mapping[str, np.ndarray], expert: int) -> np.ndarray:
    """Weigh gain against forgetting, both in shares of the expert's: (T,) or (B, T)."""
    lost = np.maximum(of["forgetting"][..., [expert]], 1e-9)
    return np.asarray(PREFERENCE * of["domain"] - (1 - PREFERENCE) * of["forgetting"] / lost)


def models() -> Mapping[str, tuple[str, float]]:
    """Name what is scored without learning, base and expert first: all gains are measured by them."""
    return MODELS | STARTS


def missing(bench: Bench, only: str, start: tuple[str, float]) -> Iterator[tuple[str, Row | None]]:
    """List what is to be done: the models, then the rows whose name has the words."""
    for name in models():
        if name not in bench.done and (name in MODELS or not only or only in name):
            yield name, None
    for name, row in rows(start).items():
        if name not in bench.done and only in name:
            yield name, row


def show(table: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    yield "| | gain % | forgets % | worth, points more | candidates | seconds |"
    yield "|---|---|---|---|---|---|"
    for name, row in table.iterrows():
        gain, loss, worth = (
            f"{100 * row[what]:.1f} [{100 * row[f'{what}_low']:.0f}, {100 * row[f'{what}_high']:.0f}]"
            for what in ("domain", "forgetting", "worth")
        )
        yield f"| {name} | {gain} | {loss} | {worth} | {row['candidates']:.1f} | {row['seconds']:.0f} |"


def drawn(table: pd.DataFrame) -> Figure:
    """Draw what each row is worth more than the first, with its interval; models as they are in grey."""
    shown = table.drop(index=[*MODELS, AS_IT_IS])
    figure = Figure(figsize=(8.4, 0.27 * len(shown) + 1.3), layout="constrained")
    axes = figure.subplots()
    for place, (_, row) in enumerate(shown.iterrows()):
        colour = "#0072b2" if row["candidates"] > 0 else "#6b7785"
        axes.plot([100 * row["worth_low"], 100 * row["worth_high"]], [place, place], color=colour, linewidth=2)
        axes.plot([100 * row["worth"]], [place], "o", color=colour, markersize=5)
    axes.axvline(0, color="#c0c7d0", linewidth=1, zorder=0)
    axes.set_yticks(range(len(shown)), [*shown.index])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("worth more than a lesson as it is: points of 0.6 gain - 0.4 forgetting, in shares of the expert's")
    axes.set_title("Learned weights, one choice changed at a time, on holdout items", loc="left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=DEFAULT_STUDY)
    parser.add_argument("--start", nargs=2, default=(KFAC, "0.4"), metavar=("FORM", "SHARE"))
    parser.add_argument("--out", type=Path, default=Path("runs/learn"))
    parser.add_argument("--only", default="", help="rows whose name has these words")
    parser.add_argument("--rows", type=int, help="stop after so many")
    parser.add_argument("--set", action="append", default=[], help="change the study, as in mergefront search")
    arguments = parser.parse_args()
    if not arguments.study.exists():
        parser.error(f"no study {arguments.study}: give one, or let `make demo` build its own")
    study = read_study(arguments.study, arguments.set)
    if len(study.models.experts) != 1:
        parser.error(f"a study with one expert; {arguments.study} has {len(study.models.experts)}")
    _require_same_study(arguments.out, study)
    bench = Bench(study, arguments.out)
    learned, (form, share) = 0, arguments.start
    for name, row in missing(bench, arguments.only, (form, float(share))):
        if row is not None and arguments.rows is not None and learned >= arguments.rows:
            break
        print(f"{name} ...", flush=True)
        if row is None:
            bench.keep(name, Done(bench.recipe(*models()[name]).to_json(), 0.0, 0.0, 0, 0.0, 0.0, 0.0))
        else:
            bench.keep(name, bench.learn(row))
            learned += 1
    table = bench.table()
    print("\n".join(show(table)))
    if AS_IT_IS in table.index:
        drawn(table).savefig(arguments.out / "learn.png", dpi=110)


def _require_same_study(folder: Path, study: Study) -> None:
    """Write down which study the rows are of, or refuse to mix two."""
    told, path = study.model_dump_json(), folder / "study.json"
    if path.exists() and path.read_text(encoding="utf-8") != told:
        raise SystemExit(f"{folder} holds rows of another study; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(told, encoding="utf-8")


if __name__ == "__main__":
    main()
