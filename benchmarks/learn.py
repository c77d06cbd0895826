"""What learning depends on: one choice changed at a time, judged on holdout items.

    python benchmarks/learn.py --study STUDY [--out runs/learn] [--only steps] [--rows 2]

STUDY is a study file with one expert; the default is the one that `make demo` leaves in runs/demo-inputs. Each row
learns weights on search items, scores the recipe on holdout items, and is kept in OUT/rows.json as soon as it is done:
started again, the script goes on with what is missing. Printed, and drawn as OUT/learn.html: gain and forgetting as a
search measures them, each with its 95 % interval, the cost in candidates and the seconds (with what else the machine
does). Beside them stand the base, the expert and the starts as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import pandas as pd
import plotly.graph_objects as go

from evals.objectives import Scale, draw_objectives, objectives
from evals.outcomes import HOLDOUT
from optimizer.run_study import worker_spec
from optimizer.runs.atomic_file import write_atomically
from optimizer.runs.outcome_files import outcomes_path, read_outcomes, write_outcomes
from optimizer.study.schema import Study
from optimizer.study.study_file import read_study
from optimizer.workers.learner import Learner
from optimizer.workers.orders import By, Derivation, Form, Lesson, Loss
from optimizer.workers.sensitivity import some_of_each
from optimizer.workers.worker import Worker
from search_spaces import Recipe, Setting

DEFAULT_STUDY = Path(__file__).parent.parent / "runs" / "demo-inputs" / "study.yaml"
BASE, EXPERT, UNIFORM, REGMEAN, FISHER = "base", "expert", "uniform", "regmean", "fisher"
MODELS = {BASE: (UNIFORM, 0.0), EXPERT: (UNIFORM, 1.0)}
STARTS = {
    "start uniform 0.25": (UNIFORM, 0.25),
    "start uniform 0.5": (UNIFORM, 0.5),
    "start regmean": (REGMEAN, 0.4),
    "start fisher 0.2": (FISHER, 0.2),
    "start fisher 0.4": (FISHER, 0.4),
    "start fisher 0.6": (FISHER, 0.6),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One way to learn; the defaults are the product's.

    Args:
        start: uniform weights, RegMean or Fisher, and how far to the expert.
        items: of each task, at most; 0 is all.
        pulled: whether weights may be pulled towards their mean.
    """

    loss: Loss = "labels"
    by: By = "tensor"
    steps: int = 24
    questions: int = 10
    texts: int = 2
    pulled: bool = True
    start: tuple[str, float] = (UNIFORM, 0.5)
    items: int = 0
    preference: float = 0.6
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


def rows() -> dict[str, Row]:
    """Name every row; each differs from the first in what its name says."""
    plain = Row()
    return {
        "as it is": plain,
        "steps 6": replace(plain, steps=6),
        "steps 12": replace(plain, steps=12),
        "steps 48": replace(plain, steps=48),
        "teachers": replace(plain, loss="teachers"),
        "teachers, by group": replace(plain, loss="teachers", by="group"),
        "by group": replace(plain, by="group"),
        "minibatch halved": replace(plain, questions=5, texts=1),
        "minibatch doubled": replace(plain, questions=20, texts=4),
        "no pull": replace(plain, pulled=False),
        "from uniform 0.25": replace(plain, start=(UNIFORM, 0.25)),
        "from regmean 0.4": replace(plain, start=(REGMEAN, 0.4)),
        "from regmean 0.4, for 0.35": replace(plain, start=(REGMEAN, 0.4), preference=0.35),
        "from regmean 0.4, for 0.8": replace(plain, start=(REGMEAN, 0.4), preference=0.8),
        "from fisher 0.4": replace(plain, start=(FISHER, 0.4)),
        "from fisher 0.4, for 0.35": replace(plain, start=(FISHER, 0.4), preference=0.35),
        "from fisher 0.4, for 0.8": replace(plain, start=(FISHER, 0.4), preference=0.8),
        "from fisher 0.4, teachers": replace(plain, start=(FISHER, 0.4), loss="teachers"),
        "from fisher 0.2": replace(plain, start=(FISHER, 0.2)),
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
        chosen = some_of_each(examples, row.items, row.seed) if row.items else examples
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
        found = objectives(draw_objectives(scale)).set_axis(names)
        return found.join(pd.DataFrame({name: asdict(row) for name, row in self.done.items()}).T)


def models() -> Mapping[str, tuple[str, float]]:
    """Name what is scored without learning, base and expert first: all gains are measured by them."""
    return MODELS | STARTS


def missing(bench: Bench, only: str) -> Iterator[tuple[str, Row | None]]:
    """List what is to be done: the models, then the rows whose name has the words."""
    for name in models():
        if name not in bench.done and (name in MODELS or not only or only in name):
            yield name, None
    for name, row in rows().items():
        if name not in bench.done and only in name:
            yield name, row


def show(table: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"{'':<22}{'gain %':>8}{'95 %':>16}{'forgets %':>11}{'95 %':>16}{'candidates':>12}{'seconds':>9}"
    for name, row in table.iterrows():
        gain, loss = (
            f"{100 * row[what]:.1f}".rjust(width)
            + f"[{100 * row[f'{what}_low']:.0f}, {100 * row[f'{what}_high']:.0f}]".rjust(16)
            for what, width in (("domain", 8), ("forgetting", 11))
        )
        yield f"{name:<22}{gain}{loss}{row['candidates']:>12.1f}{row['seconds']:>9.0f}"


def drawn(table: pd.DataFrame) -> go.Figure:
    """Draw gain against forgetting; what was learned in blue, models as they are in grey."""
    figure = go.Figure()
    for learned, colour in ((False, "#6b7785"), (True, "#0072b2")):
        part = table[(table["candidates"] > 0) == learned]
        figure.add_scatter(
            x=100 * part["forgetting"], y=100 * part["domain"], mode="markers+text", text=list(part.index),
            textposition="middle right", marker={"color": colour, "size": 10},
            name="learned" if learned else "as it is",
        )  # fmt: skip
    figure.update_layout(
        title="Learned weights, one choice changed at a time, on holdout items", width=980, height=700,
        xaxis_title="forgetting, % of the base's general ability", yaxis_title="domain gain, % of the expert's gain",
        template="simple_white",
    )  # fmt: skip
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=DEFAULT_STUDY)
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
    learned = 0
    for name, row in missing(bench, arguments.only):
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
    drawn(table).write_html(arguments.out / "learn.html", include_plotlyjs=True)


def _require_same_study(folder: Path, study: Study) -> None:
    """Write down which study the rows are of, or refuse to mix two."""
    told, path = study.model_dump_json(), folder / "study.json"
    if path.exists() and path.read_text(encoding="utf-8") != told:
        raise SystemExit(f"{folder} holds rows of another study; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(told, encoding="utf-8")


if __name__ == "__main__":
    main()
