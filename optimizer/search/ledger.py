"""The ledger of a search: what each trial of the study is, and what is owed, held, seen, told and finished.

Everything in it is rebuilt from the study and the run folder by whoever takes the search up (`Ledger.resume`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import optuna
import pandas as pd
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from evals.outcomes import SEARCH, Outcome, TaskInfo
from evals.task_rows import TaskRows, rows_by_task, rows_of
from optimizer.database.stored_trials import digest_of
from optimizer.database.writer_storage import WriterStorage
from optimizer.runs.front import front_without, losses, non_dominated
from optimizer.runs.outcome_files import outcomes_of, outcomes_path, stamp_of
from optimizer.runs.run_folder import RunFolder
from optimizer.runs.trial import BASE, COST, DRIVER_DIED, NOT_COUNTED, STAMP, STDERR, STOPPED, TrialKind
from optimizer.search.answer_watch import AnswerWatch
from optimizer.search.bank import Draw, draw_from
from optimizer.search.fault_point import fault
from optimizer.search.measured import Measured
from optimizer.search.samplers import SampledStudy
from optimizer.workers.pool import ScoreJob
from search_spaces.choice import Choice
from search_spaces.recipe import Recipe
from search_spaces.space import Space

NOTHING = pd.DataFrame({"task": [], "item": []})  # scored yet


@dataclass(frozen=True, slots=True)
class TakenUp:
    """What was there when a search was taken up: trials, those left open, and what is wrong with lost outcomes."""

    trials: int
    left_open: int
    lost: Sequence[str]


class Ledger:
    """What each trial of the study is; the only writer of the study but for new trials."""

    def __init__(
        self,
        storage: RDBStorage,
        study: optuna.Study,
        run: RunFolder,
        space: Space | Choice,
        tasks: Sequence[TaskInfo],
        *,
        seed: int,
    ) -> None:
        self.storage, self.run, self.tasks = WriterStorage(storage, study.study_name), run, tasks
        self._seed = seed  # of the draw from banks
        self._draws: dict[int, Draw] = {}  # by the number of blocks
        self.longer: dict[int, float] = {}  # trials that get another block of items, and the seconds they took so far
        self.stopped: set[int] = set()  # trials that a race stopped: never on the front
        self._watch = AnswerWatch(run, tasks)
        self.study = SampledStudy(study.study_name, self.storage)
        self.study_id = storage.get_study_id_from_name(study.study_name)
        self.anchors = {TrialKind(anchor.name): dict(anchor.params) for anchor in space.anchors()}
        self.reference_kinds = (BASE, *(TrialKind.expert(name) for name, _ in space.experts))
        self.kinds: dict[int, TrialKind] = {}
        self.recipes: dict[int, str] = {}  # as JSON
        self.digests: dict[int, str] = {}
        self.seen: dict[str, int] = {}  # digest to the trial that has it
        self.owed: deque[int] = deque()  # trials of the study that must be scored before any other is asked for
        self.held: dict[int, float] = {}  # trials scored but not told, and the seconds they took
        self.references: dict[TrialKind, int] = {}  # kind to the scored trial
        self.values: dict[int, tuple[float, ...]] = {}  # of the COMPLETE trials
        self.finished = 0
        self.spent = 0.0  # candidates: what a searched trial reads at first is one
        self._waiting: set[TrialKind] = set()  # anchors in Optuna's queue
        self._front: frozenset[int] | None = None  # of those told so far; None: to be found
        self._stamps: dict[int, str] = {}  # of outcome files that were written or found whole, as they were then
        self._rows: dict[int, Mapping[str, TaskRows]] = {}  # outcomes that are at hand

    @property
    def anchors_wait(self) -> bool:
        """Whether anchors of the space wait to be asked for."""
        return bool(self._waiting)

    @property
    def has_references(self) -> bool:
        """Whether the base and every expert are scored."""
        return len(self.references) == len(self.reference_kinds)

    @property
    def owes_longer(self) -> bool:
        """Whether the trial that is owed next gets another block of items."""
        return bool(self.owed) and self.owed[0] in self.longer

    @property
    def owes_told(self) -> bool:
        """Whether the trial that is owed next was told before its outcomes were lost."""
        return bool(self.owed) and self.owed[0] in self.values

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Give the study's trials, of some states or of all."""
        return self.study.all_trials(states or None)

    def attribute(self, number: int, name: str) -> str:
        """Give a text that a trial was made with."""
        return str(self.storage.get_trial(self._id_of(number)).user_attrs[name])

    def job(self, number: int, suite: str) -> ScoreJob:
        """Give the job that scores a trial on a suite; of a bank, on what was drawn, but for anchors."""
        if suite != SEARCH or not self.is_drawn(number):
            return ScoreJob(number, self.recipes[number], suite)
        if number not in self.longer:
            return ScoreJob(number, self.recipes[number], suite, self.draw_of(1).beyond(NOTHING))
        have = self.run.read_outcomes(number, SEARCH)
        wanted = self.draw_of(self._blocks_in(have) + 1).beyond(have)
        return ScoreJob(number, self.recipes[number], suite, wanted)

    def joined(self, number: int, outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
        """Give what was scored together with the blocks before it, each item with the probability of its draw."""
        if not self.is_drawn(number):
            return tuple(outcomes)
        if number not in self.longer:
            return self.draw_of(1).stamped(outcomes)
        have = self.run.read_outcomes(number, SEARCH)
        return self.draw_of(self._blocks_in(have) + 1).stamped([*outcomes_of(have), *outcomes])

    def rows_of(self, number: int) -> Mapping[str, TaskRows]:
        """Give a trial's search outcomes as arrays, by task; what was scored lately or is on the front is at hand."""
        if number not in self._rows:
            outcomes = self.run.read_outcomes(number, SEARCH)
            self._rows[number] = rows_by_task(outcomes, is_bank=self.has_bank)
        return self._rows[number]

    def store(self, number: int, outcomes: Sequence[Outcome]) -> None:
        """Put a trial's search outcomes on the disk."""
        path = self.run.write_outcomes(number, SEARCH, self.digests[number], outcomes)
        self._stamps[number] = stamp_of(path)
        self._rows[number] = rows_of(number, outcomes, is_bank=self.has_bank)

    def forget_rows(self, keep: Container[int] = ()) -> None:
        """Let go of the outcomes that are at hand, but for those of some trials and of what is not told yet."""
        self._rows = {n: rows for n, rows in self._rows.items() if n in keep or n in self.held or n in self.longer}

    def has_whole_bank(self, number: int) -> bool:
        """Tell whether a trial was scored on every item."""
        rows = self.rows_of(number)
        return all(
            len(rows[t.name].items) >= t.search_items if t.name in rows else not t.search_items for t in self.tasks
        )

    def outcomes_lost(self, number: int) -> bool:
        """Tell whether a finished trial's outcomes are lost, and not stored again yet."""
        return number in self.owed or not self.run.has_outcomes(number, SEARCH)

    def _blocks_in(self, outcomes: pd.DataFrame) -> int:
        """Count the blocks that outcomes are of."""
        counts = outcomes["task"].value_counts()
        return max(math.ceil(counts.get(t.name, 0) / t.drawn_items) for t in self.tasks if t.drawn_items)

    @property
    def has_bank(self) -> bool:
        """Whether a task has a bank."""
        return any(task.drawn_items for task in self.tasks)

    def is_drawn(self, number: int) -> bool:
        """Tell whether a trial is scored on items that were drawn from a bank."""
        return self.has_bank and not self.kinds[number].is_anchor

    def draw_of(self, blocks: int) -> Draw:
        """Give the draw of so many blocks, made once base and experts are scored: the same for every driver that finds
        the same outcomes, and each with all of the shorter ones."""
        if blocks not in self._draws:
            assert self.has_references, "base and experts are scored"
            rows = [self.run.read_outcomes(number, SEARCH) for number in self.references.values()]
            outcomes = pd.concat(rows, ignore_index=True)
            self._draws[blocks] = draw_from(outcomes, self.tasks, blocks=blocks, seed=self._seed)
        return self._draws[blocks]

    def outcomes_fault(self, number: int, suite: str) -> str:
        """Say what is wrong with a trial's stored outcomes, in words; empty where nothing is."""
        return self.run.outcomes_fault(number, suite, digest=self.digests[number], tasks=self.tasks)

    def front(self) -> frozenset[int]:
        """Give the finished trials that no other beats, without those that a guard keeps off."""
        if self._watch.is_needed:  # a point that comes off sets free what it beat
            numbers = [number for number in self.values if number not in self.stopped]
            points = losses([self.values[number] for number in numbers])
            mask, _ = front_without(points, lambda place: self.is_kept_off(numbers[place]))
            return frozenset(number for number, on_front in zip(numbers, mask, strict=True) if on_front)
        if self._front is None:
            self._front = _not_beaten({n: told for n, told in self.values.items() if n not in self.stopped})
        return self._front

    def is_kept_off(self, number: int) -> bool:
        """Tell whether a guard of written answers keeps a trial off the front."""
        return self._watch.is_kept_off(number, self.digests.get(number, ""), base=self.references.get(BASE))

    def finished_anchors(self) -> set[int]:
        """Give the anchors that are finished."""
        return {number for number in self.values if self.kinds[number].is_anchor}

    # Taking up what is there ----------------------------------------------------------------------------------------

    def resume(self) -> TakenUp:
        """Account for every trial in the study; those left RUNNING belong to a dead driver, since we hold the lock."""
        trials = self.trials()
        for trial in trials:
            self._recall(trial)
        lost = self._find_lost()
        retried = {trial.user_attrs.get("retry_of") for trial in trials}  # an earlier version gave them new numbers
        left = [trial for trial in trials if trial.state == TrialState.RUNNING]
        for trial in left:
            self._take_up(trial, is_retried=trial.number in retried)
        self._enqueue_anchors()
        self._order_owed()
        return TakenUp(len(trials), len(left), lost)

    def _recall(self, trial: FrozenTrial) -> None:
        kind = TrialKind.of(trial.user_attrs)
        self.kinds[trial.number] = kind
        if "recipe" in trial.user_attrs:
            self.recipes[trial.number] = trial.user_attrs["recipe"]
            self.digests[trial.number] = digest_of(trial.user_attrs["recipe"])
        if trial.state == TrialState.COMPLETE:
            self.values[trial.number] = tuple(trial.values)
            if trial.user_attrs.get(STOPPED):
                self.stopped.add(trial.number)
        elif trial.state != TrialState.FAIL or trial.user_attrs.get("reason", "").startswith(NOT_COUNTED):
            return
        elif kind in self.reference_kinds or kind.is_prepared:
            return  # a failed reference is scored again: the person may have mended what broke it
        self.finished += 1
        self.spent += trial.user_attrs.get(COST, 1.0)
        if trial.number in self.digests:
            self.seen.setdefault(self.digests[trial.number], trial.number)

    def _find_lost(self) -> list[str]:
        """Owe every finished trial whose outcomes are missing or damaged; what is wrong with each file, in words."""
        faults = []
        for number in self.values:
            if not self._is_as_told(number) and (why := self.outcomes_fault(number, SEARCH)):
                self.owed.append(number)
                faults.append(why)
            elif self.kinds[number] in self.reference_kinds:
                self.references[self.kinds[number]] = number
        return faults

    def _is_as_told(self, number: int) -> bool:
        """Tell whether a trial's file has the bytes that it had when it was told, so that it need not be read again."""
        told = self.storage.get_trial(self._id_of(number)).user_attrs.get(STAMP, "")
        return bool(told) and told == stamp_of(outcomes_path(self.run.path, number, SEARCH))

    def _take_up(self, trial: FrozenTrial, *, is_retried: bool) -> None:
        """Hold an open trial whose outcomes are on the disk, to be told; owe any other, under its own number."""
        number = trial.number
        digest = self.digests.get(number)
        if digest is not None and digest not in self.seen and not self.outcomes_fault(number, SEARCH):
            self.seen[digest] = number
            self._stamps[number] = stamp_of(outcomes_path(self.run.path, number, SEARCH))
            self.hold(number, trial.user_attrs.get("seconds", math.nan))
        elif is_retried or not (digest or self.kinds[number] in self.anchors or self.kinds[number].is_prepared):
            self.tell_failed(number, DRIVER_DIED)
        else:
            self.owed.append(number)

    def _enqueue_anchors(self) -> None:
        standing = set()
        for trial in self.trials():
            kind = TrialKind.of(trial.user_attrs)
            if trial.state != TrialState.FAIL or kind not in self.reference_kinds:
                standing.add(kind)
        for kind, params in self.anchors.items():
            if kind not in standing:
                self.study.enqueue_trial(params, user_attrs={"kind": kind.stored})
                fault("enqueue.after")
        self._waiting = {TrialKind.of(trial.user_attrs) for trial in self.trials(TrialState.WAITING)} & set(
            self.anchors
        )

    def _order_owed(self) -> None:
        """Put base and experts first, also those that wait behind others: by them every score is measured.

        What has no parameters is never asked for through Optuna's queue, so it is owed too where it waits.
        """
        for trial in self.trials(TrialState.WAITING):
            kind = TrialKind.of(trial.user_attrs)
            if kind in self.reference_kinds or not kind.has_params:
                self.kinds[trial.number] = kind
                self.owed.append(trial.number)
        self.owed = deque(sorted(self.owed, key=self._place_of))

    def _place_of(self, number: int) -> tuple[int, bool, bool, int]:
        """Say where an owed trial stands: references in their order, what is in the budget already, what has or gets
        its recipe at once, the rest by number."""
        kinds, kind = self.reference_kinds, self.kinds[number]
        place = kinds.index(kind) if kind in kinds else len(kinds)
        return place, number not in self.values, kind.is_prepared and number not in self.recipes, number

    # What becomes of a trial ----------------------------------------------------------------------------------------

    def reopened(self, number: int) -> optuna.Trial:
        """Reopen a trial that waits or was left open; its params stay, and Optuna's own queue is passed by."""
        trial_id = self._id_of(number)
        self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        return optuna.Trial(self.study, trial_id)

    def create(self, kind: TrialKind, attributes: Mapping[str, str] | None = None) -> int:
        """Make a trial without parameters that is in hand at once, and give its number."""
        self.study.enqueue_trial({}, user_attrs={"kind": kind.stored, **(attributes or {})})
        number = self.trials()[-1].number  # no other program writes to the study
        fault("enqueue.after")
        self.kinds[number] = kind
        self.reopened(number)
        return number

    def enter(self, number: int, kind: TrialKind, recipe: Recipe) -> None:
        """Write down a trial's kind and recipe, the recipe also in the study."""
        self.kinds[number] = kind
        self._waiting.discard(kind)
        self.recipes[number], self.digests[number] = recipe.to_json(), recipe.digest
        self.note(number, "recipe", self.recipes[number])

    def twin_of(self, number: int) -> int | None:
        """Give the earlier trial that has the same recipe; None for the first, and for base and experts."""
        twin = self.seen.setdefault(self.digests[number], number)
        return twin if twin != number and self.kinds[number] not in self.reference_kinds else None

    def lengthen(self, number: int, seconds: float) -> None:
        """Owe a trial that is in hand another block of items, before all else."""
        self.longer[number] = seconds
        self.owed.appendleft(number)

    def hold(self, number: int, seconds: float) -> None:
        """Hold a trial that is scored, until the base and every expert are."""
        seconds += self.longer.pop(number, 0.0)
        if number not in self.values:  # else it was told before its outcomes were lost
            self.held[number] = seconds
        if self.kinds[number] in self.reference_kinds:
            self.references[self.kinds[number]] = number

    def mark_stopped(self, number: int, *, is_stopped: bool) -> None:
        """Write down that a race stopped a trial, or that it did not, whatever a driver before said."""
        (self.stopped.add if is_stopped else self.stopped.discard)(number)
        self.storage.set_trial_user_attr(self._id_of(number), STOPPED, is_stopped)  # written as it is told

    def tell(
        self, number: int, measured: Measured, seconds: float, *, cost: float, excesses: Mapping[str, float]
    ) -> None:
        """Tell a trial's objectives, what it cost in candidates, and how far it is beyond the study's limits."""
        trial_id = self._id_of(number)
        attributes: dict[str, object] = {COST: round(cost, 3)}
        attributes |= {"seconds": round(seconds, 3)} if math.isfinite(seconds) else {}
        attributes |= {STAMP: stamp} if (stamp := self._stamps.pop(number, "")) else {}
        attributes |= {STDERR: [float(f"{error:.4g}") for error in measured.stderr]} if measured.stderr else {}
        for key, value in attributes.items():
            self.storage.set_trial_user_attr(trial_id, key, value)
        if excesses:
            self.storage.set_constraints(trial_id, excesses)
        fault("tell.before")
        self.study.tell(number, measured.values)
        fault("tell.after")
        self.values[number] = measured.values
        if self._front is not None and number not in self.stopped:
            self._front = _not_beaten({n: self.values[n] for n in (*self._front, number)})
        self.finished += 1
        self.spent += cost

    def restate(self, number: int, excesses: Mapping[str, float]) -> None:
        """Tell anew how far a trial is beyond the study's limits."""
        self.storage.set_constraints(self._id_of(number), excesses)

    def constraints(self, number: int) -> dict[str, float]:
        """Give how far a trial was told to be beyond the study's limits."""
        return self.storage.get_trial(self._id_of(number)).constraints

    def tell_failed(self, number: int, reason: str) -> None:
        """Tell that a trial failed, and why; whether it counts is the caller's."""
        self.storage.set_trial_user_attr(self._id_of(number), "reason", reason.splitlines()[0])  # a log may follow
        fault("fail.before")
        self.study.tell(number, state=TrialState.FAIL)

    def note(self, number: int, key: str, value: object) -> None:
        """Write a user attribute of a trial into the study, with all else that is known of the trial."""
        self.storage.set_trial_user_attr(self._id_of(number), key, value)
        self.storage.write(self._id_of(number))

    def _id_of(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)


def _not_beaten(values: Mapping[int, tuple[float, ...]]) -> frozenset[int]:
    """Give the trials whose objectives no other's beat."""
    mask = non_dominated(losses(list(values.values()))) if values else ()
    return frozenset(number for number, on_front in zip(values, mask, strict=True) if on_front)
