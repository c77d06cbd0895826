"""The search: ask Optuna for a recipe, have it scored, tell its objectives, and in the end judge the front.

The driver is the only writer of the study and the run folder, and may be killed at any moment. For each trial the order
is: outcomes on the disk, told to the study, shown to the person; so what was shown is never lost, and what was scored
is scored again only where its outcomes were lost. A trial keeps its number whatever happens to drivers and files. Call
it with the run folder's lock held.
"""

from __future__ import annotations

import math
import os
import signal
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import optuna
import pandas as pd
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from evals.errors import TaskError
from evals.objectives import carries, draw_objectives
from evals.outcomes import HOLDOUT, SEARCH, Outcome, TaskInfo
from optimizer.errors import CheckpointError, SearchError
from optimizer.runs.front import non_dominated, widest_gaps
from optimizer.runs.run_folder import RunFolder
from optimizer.runs.study_db import unwritable
from optimizer.runs.study_home import storage_file
from optimizer.runs.trial import BASE, DRIVER_DIED, DUPLICATE, NOT_COUNTED, WORKER_DIED, TrialKind
from optimizer.search.interrupt import Interrupt, interruptible
from optimizer.search.samplers import make_sampler
from optimizer.words import listed
from optimizer.workers.pool import Job, Pool, Result
from search_spaces.choice import Choice
from search_spaces.recipe import Recipe
from search_spaces.space import Space

if TYPE_CHECKING:
    from optimizer.study.schema import Study


POLL_SECONDS = 1.0
FAILURES_IN_A_ROW = 5
FIRST_TRIALS = 20  # of which more than half may not fail
MIDPOINT_EVERY = 2  # trials, in the second half of the budget
REPEATS_BEFORE_RANDOM = 10  # a sampler that insists on known points is helped out with random ones
REPEATS_BEFORE_END = 200  # and where random ones are known too, the space has no more to give


@dataclass(frozen=True, slots=True)
class Event:
    """What a person may want to hear.

    Args:
        kind: "start", "trial", "retry", "failed", "holdout", "done" or "note".
        trial: its number, where it is about one.
        done, total: finished trials and the budget; for "holdout" trials judged and to be judged.
        objectives: of a "trial", in the study's order.
        label: what the trial is: "base", "expert:<name>", another anchor's name, or "search".
        known: of a "start": label and objectives of each trial that was finished before.
    """

    kind: str
    trial: int | None
    text: str
    done: int
    total: int
    objectives: tuple[float, ...] | None = None
    label: str = ""
    known: tuple[tuple[str, tuple[float, ...]], ...] = ()


def objective_names(experts: Sequence[str]) -> tuple[str, ...]:
    """The study's objectives in order: domain (one for each of several experts; maximised), forgetting (minimised)."""
    return (*(["domain"] if len(experts) == 1 else [f"domain_{name}" for name in experts]), "forgetting")


def run_search(
    study: Study,
    run: RunFolder,
    *,
    space: Space | Choice,
    pool: Pool,
    tasks: Sequence[TaskInfo],
    require_unchanged: Callable[[], None],
    events: Callable[[Event], None],
) -> None:
    """Search until the budget is used, then score the front and the anchors on the holdout suite.

    Started again on the same run folder it takes up where it was left, however that was.

    Args:
        run: the caller holds its lock.
        pool: the caller closes it.
        require_unchanged: raises CheckpointError where a checkpoint's file is not as it was when the caller opened it;
            asked before any result is taken.
        events: is told of each step after it is safely stored.

    Raises:
        SearchError: the base or an expert cannot be scored, the tasks give no scale, trials keep failing, or a
            checkpoint's file changed; trials in hand are then run again by the next start.
        RunError: the study's database cannot be used.
        KeyboardInterrupt: the person (or SIGTERM) stopped the search; its state is whole.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with interruptible() as interrupt, opened_storage(study, run) as storage:
            search = _Search(study, run, storage, space, pool, tasks, require_unchanged, events, interrupt)
            search.resume()
            search.spend_budget()
            search.judge_front()
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:  # optuna's text blames the data
        raise unwritable(storage_file(run.path, study.search.storage), error) from error
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextmanager
def opened_storage(study: Study, run: RunFolder) -> Iterator[RDBStorage]:
    """The study's Optuna storage, closed at the end.

    Whoever closes the last connection to a SQLite file in WAL mode must sync it to the disk. A connection of our own
    that stays open spares every commit that wait.
    """
    storage = run.storage(study.search.storage)
    try:
        with storage.engine.connect() as connection:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA schema_version").fetchall()  # only a reader has the file open
                connection.rollback()
            yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@dataclass(slots=True)
class _Open:
    """A job that is out with the pool."""

    job: Job
    started: float  # monotonic seconds
    attempts: int = 1


@dataclass(slots=True)
class _Crew:
    """The pool with second chances: a job whose worker died goes to another worker, up to `max_attempts` times."""

    pool: Pool
    max_attempts: int
    require_unchanged: Callable[[], None]
    retried: Callable[[int, str], None]
    out: dict[int, _Open] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        return len(self.out) < self.pool.size

    def submit(self, job: Job) -> None:
        self.out[job.trial] = _Open(job, time.monotonic())
        self.pool.submit(job)

    def wait(self) -> list[tuple[Result, float]]:
        """Final results and the seconds each took.

        Raises:
            SearchError: a checkpoint's file changed: no result can be trusted, and another attempt would die too.
        """
        final = []
        results = self.pool.wait(POLL_SECONDS)
        self._require_sources(results)
        for result in results:
            entry = self.out[result.job.trial]
            if result.died and entry.attempts < self.max_attempts:
                self.retried(result.job.trial, f"attempt {entry.attempts} of {self.max_attempts}: {result.error}")
                entry.attempts += 1
                self.pool.submit(result.job)
            else:
                del self.out[result.job.trial]
                final.append((result, time.monotonic() - entry.started))
        return final

    def _require_sources(self, results: Sequence[Result]) -> None:
        try:
            if results:
                self.require_unchanged()
            for result in results:  # a worker of another machine may have other files than this one
                if result.sources_changed:
                    raise CheckpointError(result.error)
        except CheckpointError as error:
            raise SearchError(
                f"every trial needs the checkpoints as they were when the search started: {error}\n"
                "The trials in hand are not counted; start the search again and they are run again"
            ) from error


@dataclass(frozen=True, slots=True)
class _Scale:
    """What every trial is measured by: the outcomes of the base and the experts on the search suite."""

    tasks: Sequence[TaskInfo]
    base: int
    experts: Mapping[str, int]
    outcomes: pd.DataFrame

    def objectives(self, trial: int, run: RunFolder | None = None) -> tuple[float, ...]:
        """A trial's objectives, in the study's order; its outcomes are in the run folder, or it is a reference."""
        frame = self.outcomes
        if run is not None and trial not in (self.base, *self.experts.values()):
            frame = pd.concat([frame, run.read_outcomes(trial, SEARCH)], ignore_index=True)
        measured = draw_objectives(
            frame, tasks=self.tasks, suite=SEARCH, base=self.base, experts=self.experts, replicates=0
        )
        place = measured.column(trial)
        return tuple(float(measured.points[name][place]) for name in objective_names(list(self.experts)))

    def findings(self) -> list[str]:
        """What these tasks cannot show, in words."""
        return carries(self.outcomes, tasks=self.tasks, suite=SEARCH, base=self.base, experts=self.experts)


class _Search:
    """The state of one driver; everything in it can be rebuilt from the study and the run folder (`resume`)."""

    def __init__(
        self,
        study: Study,
        run: RunFolder,
        storage: RDBStorage,
        space: Space | Choice,
        pool: Pool,
        tasks: Sequence[TaskInfo],
        require_unchanged: Callable[[], None],
        events: Callable[[Event], None],
        interrupt: Interrupt,
    ) -> None:
        self.settings, self.run, self.space, self.tasks = study.search, run, space, tasks
        self.events, self.interrupt = events, interrupt
        self.crew = _Crew(pool, study.search.max_attempts, require_unchanged, self._retried)
        self.anchors = {TrialKind(anchor.name): dict(anchor.params) for anchor in space.anchors()}
        self.experts = [name for name, _ in space.experts]
        self.names = objective_names(self.experts)
        self.reference_kinds = (BASE, *map(TrialKind.expert, self.experts))
        self.budget = study.search.trials
        if self.budget < len(self.reference_kinds):
            raise SearchError(
                f"search.trials must leave room for the base and each expert; given {self.budget}, "
                f"needed {len(self.reference_kinds)} and some to search with"
            )
        self.storage = storage
        directions = [StudyDirection.MAXIMIZE] * len(self.experts) + [StudyDirection.MINIMIZE]
        self.optuna = run.study(storage, study.search.storage, directions)
        self.study_id = self.storage.get_study_id_from_name(self.optuna.study_name)
        self.samplers: tuple[optuna.samplers.BaseSampler, optuna.samplers.BaseSampler] | None = None
        self.deadline = time.monotonic() + 60 * (self.settings.timeout or math.inf)
        self.kinds: dict[int, TrialKind] = {}
        self.recipes: dict[int, str] = {}  # as JSON
        self.digests: dict[int, str] = {}
        self.seen: dict[str, int] = {}  # digest to the trial that has it
        self.owed: deque[int] = deque()  # trials of the study that must be scored before any other is asked for
        self.held: dict[int, float] = {}  # trials scored but not told, and the seconds they took
        self.references: dict[TrialKind, int] = {}  # kind to the scored trial
        self.scale: _Scale | None = None  # once all references are scored
        self.values: dict[int, tuple[float, ...]] = {}  # of the COMPLETE trials
        self.finished = 0
        self.streak: list[str] = []  # reasons of the latest failures in a row
        self.reasons: list[str] = []  # of all failures since this start
        self.ended = 0  # trials told or failed since this start
        self.repeats = 0  # duplicates asked in a row

    # Taking up what is there ----------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Account for every trial in the study; those left RUNNING belong to a dead driver, since we hold the lock."""
        trials = self.optuna.get_trials(deepcopy=False)
        for trial in trials:
            self._recall(trial)
        lost = self._find_lost()
        retried = {trial.user_attrs.get("retry_of") for trial in trials}  # an earlier version gave them new numbers
        left = [trial for trial in trials if trial.state == TrialState.RUNNING]
        for trial in left:
            self._take_up(trial, is_retried=trial.number in retried)
        self._enqueue_anchors()
        self._order_owed()
        self.samplers = self._make_sampler(self.settings.sampler), self._make_sampler("random")
        text = f"{self.finished} of {self.budget} trials are finished" if trials else f"{self.budget} trials"
        text += f"; {len(left)} were left open" if left else ""
        known = tuple((self.kinds[number].stored, values) for number, values in self.values.items())
        self.events(Event("start", None, text, self.finished, self.budget, known=known))
        self._note_lost(lost)
        self._tell_held()

    def _make_sampler(self, name: str) -> optuna.samplers.BaseSampler:
        return make_sampler(
            name,
            dimensions=self.space.size,
            conditional=self.space.is_conditional,
            budget=self.budget,
            seed=self.settings.seed,
            told=len(self.optuna.get_trials(deepcopy=False)),
        )

    def _recall(self, trial: FrozenTrial) -> None:
        kind = TrialKind.of(trial.user_attrs)
        self.kinds[trial.number] = kind
        if "recipe" in trial.user_attrs:
            self.recipes[trial.number] = trial.user_attrs["recipe"]
            self.digests[trial.number] = Recipe.from_json(trial.user_attrs["recipe"]).digest
        if trial.state == TrialState.COMPLETE:
            self.values[trial.number] = tuple(trial.values)
        elif trial.state != TrialState.FAIL or trial.user_attrs.get("reason", "").startswith(NOT_COUNTED):
            return
        elif kind in self.reference_kinds:
            return  # a failed reference is scored again: the person may have mended what broke it
        self.finished += 1
        if trial.number in self.digests:
            self.seen.setdefault(self.digests[trial.number], trial.number)

    def _find_lost(self) -> list[str]:
        """Owe every finished trial whose outcomes are missing or damaged; what is wrong with each file, in words."""
        faults = []
        for number in self.values:
            if fault := self._fault_of(number, SEARCH):
                self.owed.append(number)
                faults.append(fault)
            elif self.kinds[number] in self.reference_kinds:
                self.references[self.kinds[number]] = number
        return faults

    def _fault_of(self, number: int, suite: str) -> str:
        """What is wrong with a trial's stored outcomes, in words; empty where nothing is."""
        return self.run.outcomes_fault(number, suite, digest=self.digests[number], tasks=self.tasks)

    def _note_lost(self, faults: Sequence[str]) -> None:
        if faults:
            self._emit("note", None, f"{listed(faults)}; what is lost is scored again")

    def _take_up(self, trial: FrozenTrial, *, is_retried: bool) -> None:
        """Hold an open trial whose outcomes are on the disk, to be told; owe any other, under its own number."""
        number = trial.number
        digest = self.digests.get(number)
        if digest is not None and digest not in self.seen and not self._fault_of(number, SEARCH):
            self.seen[digest] = number
            self._hold(number, trial.user_attrs.get("seconds", math.nan))
        elif is_retried or (digest is None and self.kinds[number] not in self.anchors):
            self._tell_failed(number, DRIVER_DIED)
        else:
            self.owed.append(number)

    def _enqueue_anchors(self) -> None:
        standing = set()
        for trial in self.optuna.get_trials(deepcopy=False):
            kind = TrialKind.of(trial.user_attrs)
            if trial.state != TrialState.FAIL or kind not in self.reference_kinds:
                standing.add(kind)
        for kind, params in self.anchors.items():
            if kind not in standing:
                self.optuna.enqueue_trial(params, user_attrs={"kind": kind.stored})
                _fault("enqueue.after")

    def _order_owed(self) -> None:
        """The base and the experts first, also those that wait behind others: by them every score is measured."""
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            kind = TrialKind.of(trial.user_attrs)
            if kind in self.reference_kinds:
                self.kinds[trial.number] = kind
                self.owed.append(trial.number)
        self.owed = deque(sorted(self.owed, key=self._place_of))

    def _place_of(self, number: int) -> tuple[int, bool, int]:
        """Where an owed trial stands: references in their order, what is in the budget already, the rest by number."""
        kinds, kind = self.reference_kinds, self.kinds[number]
        return kinds.index(kind) if kind in kinds else len(kinds), number not in self.values, number

    # Spending the budget --------------------------------------------------------------------------------------------

    def spend_budget(self) -> None:
        """Give every free worker the next recipe until enough trials are finished."""
        while True:
            while self.crew.has_room and self._may_ask():
                self._ask()
            if not self.crew.out:
                break
            self._heed_interrupt()
            for result, seconds in self.crew.wait():
                if result.evaluation is None:
                    self._failed(result.job.trial, f"{WORKER_DIED}: {result.error}" if result.died else result.error)
                else:
                    self._scored(result, seconds)
        if self.interrupt.since is not None:
            raise KeyboardInterrupt

    def _may_ask(self) -> bool:
        if self.interrupt.since is not None:
            return False
        open_kinds = {*self.references, *(self.kinds[number] for number in self.crew.out)}
        if not open_kinds.issuperset(self.reference_kinds):
            return True  # without the base and the experts nothing could be told, whatever the budget
        if self.owed and self.owed[0] in self.values:
            return True  # it is in the budget already
        room = self.asked < self.budget and self.repeats < REPEATS_BEFORE_END
        return room and time.monotonic() < self.deadline

    @property
    def asked(self) -> int:
        """Trials of the budget that are finished or in hand."""
        return self.finished + len(self.held) + len(self.crew.out.keys() - self.values.keys())

    def _heed_interrupt(self) -> None:
        if self.interrupt.overdue:
            raise KeyboardInterrupt

    def _ask(self) -> None:
        """Give a worker the next recipe: of a trial that is owed, of one that waits, or a new one."""
        assert self.samplers is not None
        if self.owed and self.owed[0] in self.values:
            number = self.owed.popleft()
            self.crew.submit(Job(number, self.recipes[number], SEARCH))
            return
        self.optuna.sampler = self.samplers[self.repeats >= REPEATS_BEFORE_RANDOM]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*greenlet")  # optuna's GP sampler: slower without it
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self._reopened(self.owed.popleft()) if self.owed else self._asked()
            params = self.space.suggest(trial)
        number, recipe = trial.number, self.space.recipe(params)
        kind = TrialKind.of(trial.user_attrs)
        self.kinds[number], self.recipes[number], self.digests[number] = kind, recipe.to_json(), recipe.digest
        trial.set_user_attr("recipe", self.recipes[number])
        _fault("ask.after")
        twin = self.seen.setdefault(recipe.digest, number)
        if twin != number and kind not in self.reference_kinds:
            self.repeats += 1
            self._tell_failed(number, f"{DUPLICATE} {twin}")
            if self.repeats == REPEATS_BEFORE_END:
                self._emit("note", None, f"the last {self.repeats} recipes were known already: the space has no more")
            return
        self.repeats = 0
        self.crew.submit(Job(number, self.recipes[number], SEARCH))

    def _reopened(self, number: int) -> optuna.Trial:
        """A trial that waits or was left open; what it has of params stays, and Optuna's own queue is passed by."""
        trial_id = self._id_of(number)
        self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        return optuna.Trial(self.optuna, trial_id)

    def _asked(self) -> optuna.Trial:
        self._enqueue_midpoint()
        return self.optuna.ask()

    def _enqueue_midpoint(self) -> None:
        """Now and then have the next recipe lie halfway between the neighbours on the front that are farthest apart.

        Samplers enlarge the volume under a front and leave gaps in it, where a person may want a point; and what lies
        between two good merges is mostly good. A random search stays random.
        """
        due = 2 * self.asked >= self.budget and self.asked % MIDPOINT_EVERY == 0 and self.scale is not None
        if not due or len(self.names) > 2 or self.settings.sampler == "random":
            return
        front = sorted(self._front(), key=lambda number: self.values[number][-1])
        params = {trial.number: trial.params for trial in self.optuna.get_trials(deepcopy=False)}
        for left, right in widest_gaps([self.values[number] for number in front]):
            between = _midpoint(params[front[left]], params[front[right]])
            if between is not None and self.space.recipe(between).digest not in self.seen:
                self.optuna.enqueue_trial(between)
                return

    def _scored(self, result: Result, seconds: float) -> None:
        assert result.evaluation is not None
        number, outcomes = result.job.trial, result.evaluation.outcomes
        if broken := _not_finite(outcomes):
            self._failed(number, broken)
            return
        _fault("outcome.before")
        self.run.write_outcomes(number, SEARCH, self.digests[number], outcomes)
        _fault("outcome.after")
        if number in self.values:
            self.streak.clear()
            self._emit("note", number, "its outcomes are stored again")
        self._hold(number, seconds)
        self._tell_held()

    def _hold(self, number: int, seconds: float) -> None:
        if number not in self.values:  # else it was told before its outcomes were lost
            self.held[number] = seconds
        if self.kinds[number] in self.reference_kinds:
            self.references[self.kinds[number]] = number

    def _tell_held(self) -> None:
        """Tell what is scored, in trial order, once the base and every expert are there to measure it by."""
        if len(self.references) < len(self.reference_kinds):
            return
        if self.scale is None:
            self._find_scale()
        for number in sorted(self.held):
            self._tell(number, self.held.pop(number))

    def _find_scale(self) -> None:
        """Measure the references by themselves, and say what they cannot show."""
        outcomes = pd.concat([self.run.read_outcomes(n, SEARCH) for n in self.references.values()], ignore_index=True)
        trials = {name: self.references[TrialKind.expert(name)] for name in self.experts}
        self.scale = _Scale(self.tasks, self.references[BASE], trials, outcomes)
        try:
            self.scale.objectives(self.scale.base)
        except TaskError as error:
            raise SearchError(f"these tasks cannot carry a search: {error}") from error
        for finding in self.scale.findings():
            self._emit("note", None, finding)

    def _tell(self, number: int, seconds: float) -> None:
        assert self.scale is not None
        try:
            values = self.scale.objectives(number, self.run)
        except TaskError as error:
            self._failed(number, str(error))
            return
        if not all(math.isfinite(value) for value in values):
            self._failed(number, f"objectives must be finite: {dict(zip(self.names, values, strict=True))}")
            return
        if math.isfinite(seconds):
            self._note(number, "seconds", round(seconds, 3))
        _fault("tell.before")
        self.optuna.tell(number, values)
        _fault("tell.after")
        self.values[number] = values
        self.finished += 1
        self.streak.clear()
        self.ended += 1
        self._emit("trial", number, f"{seconds:.1f} s" if math.isfinite(seconds) else "", values)

    # Failing --------------------------------------------------------------------------------------------------------

    def _failed(self, number: int, reason: str) -> None:
        """End a trial that will not be tried again; stop the search where going on makes no sense."""
        if number not in self.values:  # else it stays COMPLETE, and the next start tries to score it again
            self._tell_failed(number, reason)
            self.finished += 1
        kind = self.kinds[number]
        self._emit("failed", number, reason)
        if kind in self.reference_kinds:
            raise SearchError(f"every score is measured by the {kind.label}, and it failed: {reason}")
        self.streak.append(reason)
        self.reasons.append(reason)
        self.ended += 1
        if len(self.streak) >= FAILURES_IN_A_ROW:
            raise _too_many(f"the last {len(self.streak)} trials", self.streak)
        if self.ended <= FIRST_TRIALS < 2 * len(self.reasons):
            raise _too_many(f"{len(self.reasons)} of the first {self.ended} trials", self.reasons)

    def _tell_failed(self, number: int, reason: str) -> None:
        self._note(number, "reason", reason.splitlines()[0])  # a worker's log may follow
        _fault("fail.before")
        self.optuna.tell(number, state=TrialState.FAIL)

    def _note(self, number: int, key: str, value: object) -> None:
        self.storage.set_trial_user_attr(self._id_of(number), key, value)

    def _id_of(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)

    def _retried(self, number: int, text: str) -> None:
        self._emit("retry", number, text)

    def _emit(self, kind: str, number: int | None, text: str, values: tuple[float, ...] | None = None) -> None:
        label = self.kinds[number].stored if number in self.kinds else ""
        self.events(Event(kind, number, text, self.finished, self.budget, values, label))

    # Judging --------------------------------------------------------------------------------------------------------

    def judge_front(self) -> None:
        """Score the front and the anchors on the holdout items, which the search has not seen."""
        numbers = self._to_judge()
        faults = {n: fault for n in numbers if (fault := self._fault_of(n, HOLDOUT))}
        self._note_lost([fault for n, fault in faults.items() if self.run.has_outcomes(n, HOLDOUT)])
        waiting = list(faults)
        done = len(numbers) - len(waiting)
        while waiting or self.crew.out:
            while waiting and self.crew.has_room and self.interrupt.since is None:
                number = waiting.pop(0)
                self.crew.submit(Job(number, self.recipes[number], HOLDOUT))
            if not self.crew.out:
                break
            self._heed_interrupt()
            for result, _ in self.crew.wait():
                done += self._judged(result, done, len(numbers))
        if self.interrupt.since is not None:
            raise KeyboardInterrupt
        front = sum(1 for n in numbers if n in self._front())
        self._emit("done", None, f"{self.finished} trials finished, {front} on the front")

    def _to_judge(self) -> list[int]:
        anchors = [number for number in self.values if self.kinds[number].is_anchor]
        return sorted({*self._front(), *anchors})

    def _front(self) -> set[int]:
        numbers = list(self.values)
        signs = np.array([-1.0] * len(self.experts) + [1.0])  # `non_dominated` minimises
        mask = non_dominated(np.array([self.values[n] for n in numbers]) * signs)
        return {number for number, on_front in zip(numbers, mask, strict=True) if on_front}

    def _judged(self, result: Result, done: int, total: int) -> bool:
        number = result.job.trial
        error = result.error if result.evaluation is None else _not_finite(result.evaluation.outcomes)
        if result.evaluation is not None and not error:
            _fault("holdout.before")
            self.run.write_outcomes(number, HOLDOUT, self.digests[number], result.evaluation.outcomes)
        elif self.kinds[number] in self.reference_kinds:
            raise SearchError(f"the {self.kinds[number]} failed on the holdout suite: {error}")
        kind, text = ("failed", f"holdout suite: {error}") if error else ("holdout", "")
        self.events(Event(kind, number, text, done + (not error), total, None, self.kinds[number].stored))
        return not error


def _midpoint(one: Mapping[str, float | str], other: Mapping[str, float | str]) -> dict[str, float | str] | None:
    """Params halfway between two trials'; None where they are of different methods."""
    if one.keys() != other.keys():
        return None
    between: dict[str, float | str] = {}
    for name, value in one.items():
        partner = other[name]
        if isinstance(value, str) or isinstance(partner, str):
            if value != partner:
                return None
            between[name] = value
        else:
            between[name] = (value + partner) / 2
    return between


def _too_many(which: str, reasons: Sequence[str]) -> SearchError:
    """The error that ends a search whose trials fail: which did, the commonest reason and its latest example."""
    causes = Counter(WORKER_DIED if text.startswith(WORKER_DIED) else text for text in reasons)
    commonest, times = causes.most_common(1)[0]
    example = next(text for text in reversed(reasons) if text.startswith(commonest))
    return SearchError(
        f"{which} failed, {times} of them so: {example}\n"
        "Mend the cause and start the search again; finished trials are kept"
    )


def _not_finite(outcomes: Sequence[Outcome]) -> str:
    """Where a value is NaN or infinite, in words; empty where none is."""
    for row in outcomes:
        if not math.isfinite(row.value):
            return f"score not finite: task {row.task}, item {row.item}"
    return ""


_PASSES: Counter[str] = Counter()


def _fault(point: str) -> None:
    """Die here, as `kill -9` would, at the n-th pass: MERGEFRONT_FAULT=point:n. For tests of recovery."""
    wanted, _, nth = os.environ.get("MERGEFRONT_FAULT", "").partition(":")
    if wanted == point:
        _PASSES[point] += 1
        if _PASSES[point] == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)
