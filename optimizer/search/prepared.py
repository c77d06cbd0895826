"""The anchors that a worker prepares: derived experts, and weights learned by gradients.

Their recipes are not known before: a worker makes a derived expert's checkpoint, or learns weights from the best anchor
at hand. Then they are scored like any other trial. What a lesson starts from is written down when it is given, so that
a search that was killed gives the same lesson again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args

from evals.item_losses import mean_losses
from evals.outcomes import HOLDOUT, SEARCH
from optimizer.runs.trial import Role, TrialKind
from optimizer.search.ledger import Ledger
from optimizer.workers.orders import BOUNDS, STEPS, By, Derivation, Form, Learned, Lesson, Loss, counts, loss_unit
from optimizer.workers.pool import DeriveJob, Job, LearnJob, SensitivityJob
from search_spaces.choice import Choice
from search_spaces.parameters import METHODS
from search_spaces.recipe import Recipe, Setting
from search_spaces.space import Space

SHARES = (0.2, 0.4, 0.6)  # of the way from base to expert
PREFERENCES = (0.25, 0.95)  # of the domain; learned anchors divide what lies between
LEAN = 0.6  # with several experts: the part of a domain's preference that one of them may have
DERIVATIONS: dict[TrialKind, tuple[Form, float]] = {
    TrialKind(f"derived {form} {share:g}"): (form, share) for form in get_args(Form) for share in SHARES
}  # the kinds of derived anchors
FIRST_SHARES = (0.4, 0.6, 0.2)  # the order in which a small budget has them
REQUEST, LESSON = "request", "lesson"  # user attributes of a learned trial: a lesson as it is given, what it gave


@dataclass(frozen=True, slots=True)
class Preparation:
    """Which anchors a worker prepares for a study.

    Args:
        base: source of the base checkpoint.
        experts: (name, source) of each expert.
        folder: where derived experts are made.
        derived: the derived anchors.
        learned: learned anchors.
        by: whether every tensor or every layer group has a learned weight of its own.
        loss: what is learned from (`Lesson`).
        steps: of a lesson.
        seed: of a lesson's items.
    """

    base: str
    experts: tuple[tuple[str, str], ...]
    folder: Path
    derived: tuple[TrialKind, ...] = ()
    learned: int = 0
    by: By = "tensor"
    loss: Loss = "labels"
    steps: int = STEPS
    seed: int = 0

    def preferences(self) -> dict[TrialKind, tuple[tuple[str, float], ...]]:
        """Give the preference of each learned anchor: of each expert's domain, the general tasks having the rest.

        They divide `PREFERENCES` evenly. With several experts they go round: all alike, then each of them in turn with
        `LEAN` of the domains' part.
        """
        names, (low, high) = [name for name, _ in self.experts], PREFERENCES
        found = {}
        for i in range(self.learned):
            share = low + (high - low) * (i + 0.5) / self.learned
            parts = _parts(names, i)
            leans = "" if len(set(parts.values())) == 1 else f" {max(parts, key=lambda name: parts[name])}"
            kind = TrialKind(f"learned p={share:.2f}{leans}")
            found[kind] = tuple((name, share * part) for name, part in parts.items())
        return found


def derivations(forms: Sequence[Form], shares: Sequence[float] = SHARES) -> tuple[TrialKind, ...]:
    """Give the kinds of derived anchors of some forms, each form's at the shares in their order."""
    at = {derivation: kind for kind, derivation in DERIVATIONS.items()}
    return tuple(at[form, share] for form in forms for share in shares)


def _parts(names: Sequence[str], turn: int) -> dict[str, float]:
    if (leaning := turn % (len(names) + 1)) == 0 or len(names) == 1:
        return dict.fromkeys(names, 1 / len(names))
    rest = (1 - LEAN) / (len(names) - 1)
    return {name: LEAN if i + 1 == leaning else rest for i, name in enumerate(names)}


@dataclass(slots=True)
class Preparer:
    """Gives out the jobs by which anchors get their recipes, and reads the recipes from the answers."""

    preparation: Preparation
    ledger: Ledger
    space: Space | Choice
    _derived: Sequence[TrialKind] = field(init=False)
    _preferences: Mapping[TrialKind, tuple[tuple[str, float], ...]] = field(init=False)

    def __post_init__(self) -> None:
        self._derived, self._preferences = self.preparation.derived, self.preparation.preferences()

    def next(self, out: Sequence[Job]) -> Job | None:
        """Make the trial of the anchor that is due, and give its job; None where none is due yet, or any more.

        Args:
            out: the jobs that workers have.
        """
        kind = None if self.ledger.owed or self.ledger.anchors_wait else self._due(out)
        if kind is None:
            return None
        learns = kind.role is Role.LEARNED
        attributes = {REQUEST: json.dumps(asdict(self._lesson(kind)))} if learns else {}
        return self.job(self.ledger.create(kind, attributes))

    def is_ready(self, number: int) -> bool:
        """Tell whether a trial has its recipe, and the derived experts that the recipe names are there."""
        recipe = self.ledger.recipes.get(number)
        known = dict(self.preparation.experts)
        return recipe is not None and all(
            name in known or Path(source).is_dir() for name, source in Recipe.from_json(recipe).experts
        )

    def removed(self) -> list[int]:
        """Give the derived anchors that are finished and not judged, and whose checkpoint was removed since."""
        return [
            number
            for number in self.ledger.values
            if self.ledger.kinds[number].role is Role.DERIVED
            and not self.is_ready(number)
            and self.ledger.outcomes_fault(number, HOLDOUT)
        ]

    def waits(self, out: Sequence[Job]) -> bool:
        """Tell whether an anchor is missing that no worker can be given before another job ends."""
        others = self.ledger.owed or self.ledger.anchors_wait
        return not others and any(self._missing) and self._due(out) is None

    @property
    def _missing(self) -> tuple[list[TrialKind], list[TrialKind]]:
        """Derived and learned anchors that have no trial yet."""
        known = set(self.ledger.kinds.values())
        return [k for k in self._derived if k not in known], [k for k in self._preferences if k not in known]

    def _due(self, out: Sequence[Job]) -> TrialKind | None:
        derived, learned = self._missing
        if derived:  # the first job of a form makes all of its folders, and the others find them
            making = [job.path.form for job in out if isinstance(job, DeriveJob)]
            return next((kind for kind in derived if DERIVATIONS[kind][0] not in making), None)
        return learned[0] if learned and self._can_start(out) else None

    def _can_start(self, out: Sequence[Job]) -> bool:
        """Tell whether every anchor that a lesson may start from is scored."""
        open_kinds = [self.ledger.kinds[job.trial] for job in out if not isinstance(job, SensitivityJob)]
        return self.ledger.has_references and all(k.role is Role.LEARNED or not k.is_anchor for k in open_kinds)

    def job(self, number: int) -> Job:
        """Give the job by which a trial gets its recipe."""
        kind = self.ledger.kinds[number]
        if kind.role is Role.LEARNED:
            return LearnJob(number, _read_lesson(self.ledger.attribute(number, REQUEST)))
        return DeriveJob(number, self._path(kind))

    def recipe(self, job: Job, answer: Learned | Sequence[Path]) -> Recipe:
        """Read a trial's recipe from the answer to its job, and write down what a lesson gave."""
        if isinstance(job, LearnJob):
            assert isinstance(answer, Learned)
            told = {name: value for name, value in asdict(answer).items() if name != "recipe"}
            self.ledger.note(job.trial, LESSON, json.dumps({"preference": dict(job.lesson.preference), **told}))
            return Recipe.from_json(answer.recipe)
        assert not isinstance(answer, Learned)
        form, share = DERIVATIONS[self.ledger.kinds[job.trial]]
        expert = f"{self.preparation.experts[0][0]}_{form}_{100 * share:.0f}"
        source = str(answer[SHARES.index(share)])
        whole = tuple(Setting("weight", expert, group, 1.0) for group in self.space.groups)
        return Recipe("task_arithmetic", self.preparation.base, ((expert, source),), whole, kinds=self.space.kinds)

    def _path(self, kind: TrialKind) -> Derivation:
        form, _ = DERIVATIONS[kind]
        return Derivation(form, self.preparation.experts[0][0], SHARES, self.preparation.folder)

    def _lesson(self, kind: TrialKind) -> Lesson:
        plan, preference = self.preparation, self._preferences[kind]
        return Lesson(
            start=self._start(dict(preference)).to_json(),
            preference=preference,
            by=plan.by,
            steps=plan.steps,
            bounds=BOUNDS,
            seed=plan.seed,
            loss=plan.loss,
        )

    def _start(self, preference: Mapping[str, float]) -> Recipe:
        """Give the anchor that was not learned and loses least, as task arithmetic."""
        anchors = [n for n in self.ledger.finished_anchors() if self.ledger.kinds[n].role is not Role.LEARNED]
        found = best_start(anchors, preference, self.ledger)
        return _as_task_arithmetic(Recipe.from_json(self.ledger.recipes[found]))


def best_start(trials: Sequence[int], preference: Mapping[str, float], ledger: Ledger) -> int:
    """Give the trial whose search outcomes lose least for a preference; the first of equals.

    Losses count in shares of what lies between base and expert. Scores of few items cannot tell anchors that lie a few
    points apart, and which form of derived expert is the better start differs from one pair of models to another.

    Args:
        trials: scored ones, base and experts among them.
        preference: of each expert's domain; the general tasks have what is left of 1.
    """
    lost = {n: mean_losses(ledger.run.read_outcomes(n, SEARCH), ledger.tasks) for n in trials}
    ends = {kind.expert_name: lost[n] for kind, n in ledger.references.items()}
    base = ends.pop("")
    factors: dict[str, float] = {}
    for task, name, share in counts(preference, ledger.tasks):
        between = base[task] - ends[name][task] if name else max(end[task] for end in ends.values()) - base[task]
        factors[task] = factors.get(task, 0.0) + share / loss_unit(between, base[task])
    return min(trials, key=lambda n: (math.fsum(factor * lost[n][task] for task, factor in factors.items()), n))


def _as_task_arithmetic(recipe: Recipe) -> Recipe:
    """Give the same weights without what another method does to them; linear's are the same merge."""
    if recipe.method == "task_arithmetic":
        return recipe
    name = METHODS[recipe.method].scale
    scale = METHODS[recipe.method].parameter(name)
    assert scale is not None, "the scale is one of the method's parameters"
    groups = sorted({setting.group for setting in recipe.settings if setting.parameter == name})
    settings = [
        Setting(
            "weight", expert, group, recipe.value(name, expert=expert if scale.scope == "expert" else "", group=group)
        )
        for expert, _ in recipe.experts
        for group in groups
    ]
    return replace(recipe, method="task_arithmetic", settings=tuple(settings), seed="")


def _read_lesson(text: str) -> Lesson:
    document = json.loads(text)
    preference = tuple((name, share) for name, share in document.pop("preference"))
    return Lesson(**{**document, "preference": preference, "bounds": tuple(document["bounds"])})
