"""The search: ask Optuna for a recipe, have it scored, tell its objectives, and in the end judge the front.

The driver is the only writer of the study and the run folder, and may be killed at any moment. For each trial the order
is: outcomes on the disk, told to the study, shown to the person; so what was shown is never lost, and what was scored
is scored again only where its outcomes were lost. A trial keeps its number whatever happens to drivers and files. Call
it with the run folder's lock held.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import optuna
from optuna.study import StudyDirection
from sqlalchemy.exc import SQLAlchemyError

from evals.errors import TaskError
from evals.objectives import Scale, objective_names
from evals.outcomes import SEARCH, TaskInfo
from evals.weak_tasks import weak_tasks
from optimizer.database.study_db import unwritable
from optimizer.database.study_home import storage_file
from optimizer.errors import SearchError
from optimizer.runs.limits import Limits
from optimizer.runs.run_folder import RunFolder
from optimizer.runs.trial import DUPLICATE, WORKER_DIED, Role, TrialKind
from optimizer.search.crew import Crew
from optimizer.search.ends import Ends, cost_of_trial, require_budget
from optimizer.search.events import Event, Reporter
from optimizer.search.failures import Failures, not_finite
from optimizer.search.fault_point import fault
from optimizer.search.interrupt import interruptible
from optimizer.search.judge import judge_front
from optimizer.search.ledger import Ledger
from optimizer.search.midpoint import Midpoint, due_midpoint
from optimizer.search.prepared import Preparation, Preparer
from optimizer.search.racing import Verdict, verdict_of
from optimizer.search.samplers import WITHOUT_LIMITS, make_sampler
from optimizer.search.scale import find_scale, measured_of, with_anchor
from optimizer.search.sensitivity import sensitivity_jobs, take_in_sensitivities
from optimizer.workers.pool import Pool, Result, ScoreJob, SensitivityJob
from search_spaces.choice import Choice
from search_spaces.space import Space

if TYPE_CHECKING:
    from optimizer.study.schema import SearchSection

REPLICATES = 100  # resamplings of a trial's items, for a sampler that goes by standard errors
REPEATS_BEFORE_RANDOM = 10  # a sampler that insists on known points is helped out with random ones
REPEATS_BEFORE_END = 200  # and where random ones are known too, the space has no more to give


def run_search(
    settings: SearchSection,
    run: RunFolder,
    *,
    space: Space | Choice,
    pool: Pool,
    tasks: Sequence[TaskInfo],
    require_unchanged: Callable[[], None],
    events: Callable[[Event], None],
    preparation: Preparation,
) -> None:
    """Search until the budget is used, then score the front and the anchors on the holdout suite.

    Started again on the same run folder it takes up where it was left, however that was.

    Args:
        run: the caller holds its lock.
        pool: the caller closes it.
        require_unchanged: raises CheckpointError where a checkpoint's file is not as it was when the caller opened it;
            asked before any result is taken.
        events: is told of each step after it is safely stored.
        preparation: the anchors that a worker prepares.

    Raises:
        SearchError: the base or an expert cannot be scored, the tasks give no scale, trials keep failing, or a
            checkpoint's file changed; trials in hand are then run again by the next start.
        RunError: the study's database cannot be used.
        KeyboardInterrupt: the person (or SIGTERM) stopped the search; its state is whole.
    """
    require_budget(settings, space)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with interruptible() as interrupt, run.opened_storage(settings.storage) as storage:
            directions = [StudyDirection.MAXIMIZE] * len(space.experts) + [StudyDirection.MINIMIZE]
            study = run.study(storage, settings.storage, directions)
            ledger = Ledger(storage, study, run, space, tasks, seed=settings.seed)
            reporter = Reporter(events, ledger, settings.trials)
            crew = Crew(pool, settings.max_attempts, require_unchanged, partial(reporter.trial, "retry"), interrupt)
            search = _Search(settings, space, ledger, crew, reporter, Preparer(preparation, ledger, space))
            search.resume()
            search.spend_budget()
            judge_front(ledger, crew, reporter, beside=search.sensitivity_jobs())
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:  # optuna's text blames the data
        raise unwritable(storage_file(run.path, settings.storage), error) from error
    finally:
        optuna.logging.set_verbosity(verbosity)


class _Search:
    """One driver of a study; what must outlive it stands in the ledger."""

    def __init__(
        self,
        settings: SearchSection,
        space: Space | Choice,
        ledger: Ledger,
        crew: Crew,
        reporter: Reporter,
        preparer: Preparer,
    ) -> None:
        self.settings, self.space = settings, space
        self.ledger, self.crew, self.reporter, self.preparer = ledger, crew, reporter, preparer
        self.study = ledger.study
        self.names = objective_names([name for name, _ in space.experts])
        self.budget = settings.trials
        self.limits = Limits(settings.max_forgetting, settings.floors)
        self.ends, self.ended = Ends(settings, ledger), ""
        self.replicates = REPLICATES if settings.sampler == "front" else 0
        self.scale: Scale | None = None  # once all references are scored
        self.failures = Failures()
        self.repeats = 0  # duplicates asked in a row
        self.measured: set[int] = set()  # experts whose sensitivities were asked for

    def resume(self) -> None:
        """Take up what is there: tell what is scored already, and owe what was left open or is lost."""
        found = self.ledger.resume()
        self.sampler, self.random_sampler = self._make_sampler(self.settings.sampler), self._make_sampler("random")
        done = f"{self.ledger.finished} of {self.budget} trials are finished"
        text = done if found.trials else f"{self.budget} trials"
        self.reporter.start(text + (f"; {found.left_open} were left open" if found.left_open else ""))
        if self.limits and self.settings.sampler in WITHOUT_LIMITS:
            self.reporter.say("note", f"{self.settings.sampler} draws without regard to limits ({self.limits.text()})")
        self.reporter.lost(found.lost)
        self.ledger.owed.extend(n for n in self.preparer.removed() if n not in self.ledger.owed)
        self._tell_held()

    def _make_sampler(self, name: str) -> optuna.samplers.BaseSampler:
        return make_sampler(
            name,
            dimensions=self.space.size,
            conditional=self.space.is_conditional,
            budget=self.budget,
            seed=self.settings.seed,
            told=len(self.ledger.trials()),
        )

    def spend_budget(self) -> None:
        """Give every free worker the next recipe until enough trials are finished."""
        while True:
            while self.crew.takes_jobs and self._may_ask():
                self._ask()
            if self.crew.takes_jobs and self.preparer.waits(self.crew.jobs):
                self._measure_meanwhile()
            if not self.crew.out:
                break
            for result, seconds in self.crew.wait():
                if isinstance(result.job, SensitivityJob):
                    take_in_sensitivities(result, seconds, self.ledger, self.reporter)
                elif result.answer is None:
                    self._failed(result.job.trial, f"{WORKER_DIED}: {result.error}" if result.died else result.error)
                elif not isinstance(result.job, ScoreJob):
                    self._prepared(result, seconds)
                else:
                    self._scored(result, seconds)
        self.crew.end()

    def sensitivity_jobs(self) -> list[SensitivityJob]:
        """Give what measures each expert's sensitivities in a study that learns, where this driver has not tried to."""
        jobs = sensitivity_jobs(self.ledger) if self.preparer.preparation.learned else []
        return [job for job in jobs if job.trial not in self.measured and job.trial not in self.crew.out]

    def _measure_meanwhile(self) -> None:
        """Give a worker that waits for an anchor what else is to be measured once."""
        for job in self.sensitivity_jobs()[:1]:
            self.measured.add(job.trial)
            self.crew.submit(job)

    # Asking ---------------------------------------------------------------------------------------------------------

    def _may_ask(self) -> bool:
        ledger = self.ledger
        open_kinds = {*ledger.references, *(ledger.kinds[number] for number in self.crew.out)}
        if not open_kinds.issuperset(ledger.reference_kinds):
            return True  # without the base and the experts nothing could be told, whatever the budget
        if ledger.has_bank and not ledger.has_references:
            return ledger.anchors_wait and not ledger.owed  # what they answer says what others are scored on
        if ledger.owes_told or ledger.owes_longer:
            return True  # it is in the budget already
        if self.preparer.waits(self.crew.jobs):
            return False  # a free worker waits for its lesson: asked for by chance, trials would take its place
        return self.asked < self.budget and self.repeats < REPEATS_BEFORE_END and not self._has_ended()

    def _has_ended(self) -> bool:
        """Tell whether the study's own end is reached, and a person why; what is in hand may still cost less."""
        reason = self.ends.reason(self.in_hand)
        if reason and not self.ended:
            self.reporter.say("note", f"no more trials are started: {reason}")
        self.ended = reason
        return bool(reason)

    @property
    def asked(self) -> int:
        """Trials of the budget that are finished or in hand."""
        return self.ledger.finished + len(self.in_hand)

    @property
    def in_hand(self) -> set[int]:
        """Trials that workers have, or that are scored and not told."""
        return self.ledger.held.keys() | (self.crew.out.keys() - self.ledger.values.keys())

    def _ask(self) -> None:
        """Give a worker the next job: a trial that is owed, an anchor to prepare, a midpoint, or a recipe to sample."""
        ledger = self.ledger
        if ledger.owed and not ledger.kinds[ledger.owed[0]].has_params:
            self._take_up(ledger.owed.popleft())
        elif ledger.owes_told or ledger.owes_longer:
            self._submit(ledger.owed.popleft())
        elif job := self.preparer.next(self.crew.jobs):
            self.crew.submit(job)
        elif not ledger.owed and not ledger.anchors_wait and (between := self._midpoint()) is not None:
            self._ask_between(between)
        else:
            self._ask_sampled()

    def _take_up(self, number: int) -> None:
        """Score a trial without parameters, or have an anchor prepared again that lacks recipe or checkpoint."""
        if number not in self.ledger.values:
            self.ledger.reopened(number)
        if self.preparer.is_ready(number) or not self.ledger.kinds[number].is_prepared:
            self._submit(number)
        else:
            self.crew.submit(self.preparer.job(number))

    def _ask_between(self, between: Midpoint) -> None:
        """Give a worker what lies between two trials; a sampler sees it where it has parameters."""
        if between.params is not None:
            self.study.enqueue_trial(between.params)
            self._ask_sampled()
        else:
            kind = TrialKind.between(*between.trials)
            number = self.ledger.create(kind, {"recipe": between.recipe.to_json()})
            self.ledger.enter(number, kind, between.recipe)
            fault("ask.after")
            self.ledger.twin_of(number)
            self._submit(number)

    def _ask_sampled(self) -> None:
        """Give a worker a recipe that is not known yet."""
        number = self._ask_recipe()
        fault("ask.after")
        twin = self.ledger.twin_of(number)
        if twin is None:
            self.repeats = 0
            self._submit(number)
        else:
            self._pass_over(number, twin)

    def _submit(self, number: int) -> None:
        self.crew.submit(self.ledger.job(number, SEARCH))

    def _pass_over(self, number: int, twin: int) -> None:
        """End a trial whose recipe another trial has."""
        self.repeats += 1
        self.ledger.tell_failed(number, f"{DUPLICATE} {twin}")
        if self.repeats == REPEATS_BEFORE_END:
            self.reporter.say("note", f"the last {self.repeats} recipes were known already: the space has no more")

    def _ask_recipe(self) -> int:
        """Have a trial that is owed, waits or is new get its recipe, and give its number."""
        self.study.sampler = self.random_sampler if self.repeats >= REPEATS_BEFORE_RANDOM else self.sampler
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*greenlet")  # optuna's GP sampler: slower without it
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.ledger.reopened(self.ledger.owed.popleft()) if self.ledger.owed else self.study.ask()
            params = self.space.suggest(trial)
        self.ledger.enter(trial.number, TrialKind.of(trial.user_attrs), self.space.recipe(params))
        return trial.number

    def _midpoint(self) -> Midpoint | None:
        """Give what lies halfway between two on the front, where that is due; a random search stays random."""
        may = len(self.names) <= 2 and self.settings.sampler != "random" and self.scale is not None
        return due_midpoint(self.asked, self.budget, self.ledger, self.space) if may else None

    def _prepared(self, result: Result, seconds: float) -> None:
        """Enter the recipe of an anchor that a worker has prepared, and have it scored."""
        number = result.job.trial
        kind = self.ledger.kinds[number]
        if number not in self.ledger.values:  # else its checkpoint was removed, and is there again
            self.ledger.enter(number, kind, self.preparer.recipe(result.job, result.answer))
        fault("prepared.after")
        twin = self.ledger.twin_of(number)
        if twin is not None:
            self.ledger.tell_failed(number, f"{DUPLICATE} {twin}")
            return
        made = "its weights are learned" if kind.role is Role.LEARNED else "its checkpoint is made"
        self.reporter.trial("note", number, f"{made} ({seconds:.0f} s)")
        if self.crew.takes_jobs:  # else a person asked to stop, and the next start scores it
            self._submit(number)

    # Telling --------------------------------------------------------------------------------------------------------

    def _scored(self, result: Result, seconds: float) -> None:
        assert result.answer is not None
        number, outcomes = result.job.trial, result.answer.outcomes
        if broken := not_finite(outcomes):
            self._failed(number, broken)
            return
        outcomes = self.ledger.joined(number, outcomes)
        fault("outcome.before")
        self.ledger.store(number, outcomes)
        fault("outcome.after")
        if number in self.ledger.values:
            self.failures.streak.clear()
            self.reporter.trial("note", number, "its outcomes are stored again")
        self.ledger.hold(number, seconds)
        self._tell_held()

    def _tell_held(self) -> None:
        """Tell what is scored, in trial order, once the base and every expert are there to measure it by."""
        if not self.ledger.has_references:
            return
        if self.scale is None:
            self.scale = find_scale(self.ledger)
            for finding in weak_tasks(self.scale):
                self.reporter.say("note", finding)
            self._restate_limits(self.scale)
        for number in sorted(self.ledger.held):
            self._tell(number, self.ledger.held.pop(number), self.scale)
            if self.ledger.has_bank and self.ledger.kinds[number].is_anchor:
                self.scale = with_anchor(number, self.scale, self.ledger)
        self.ledger.forget_rows(self.ledger.front() if self.settings.racing else ())

    def _restate_limits(self, scale: Scale) -> None:
        """Tell the sampler of the limits as they are now, where trials were told of others."""
        for number in sorted(self.ledger.values.keys() - set(self.ledger.owed)):
            if self.ledger.constraints(number).keys() != set(self.limits.keys):
                found = measured_of(number, scale, self.ledger) if self.limits else None
                excesses = self.limits.excesses(found.values[-1], found.by_task) if found else {}
                self.ledger.restate(number, excesses)
                self.ledger.forget_rows()

    def _tell(self, number: int, seconds: float, scale: Scale) -> None:
        try:
            measured = measured_of(number, scale, self.ledger, replicates=self.replicates)
        except TaskError as error:
            self._failed(number, str(error))
            return
        values = measured.values
        if not all(math.isfinite(value) for value in values):
            self._failed(number, f"objectives must be finite: {dict(zip(self.names, values, strict=True))}")
            return
        excesses = self.limits.excesses(values[-1], measured.by_task)
        found = self._race(number, scale, is_safe=bool(self.limits.floors) and max(excesses.values()) <= 0)
        if found is Verdict.GOES_ON:
            self.ledger.lengthen(number, seconds)
            return
        self.ledger.tell(number, measured, seconds, cost=cost_of_trial(number, self.ledger), excesses=excesses)
        self.failures.told()
        took = f"{seconds:.1f} s" if math.isfinite(seconds) else ""
        text = f"{took}, stopped: it is beaten".removeprefix(", ") if found is Verdict.STOPS else took
        self.reporter.trial("trial", number, text, values)

    def _race(self, number: int, scale: Scale, *, is_safe: bool) -> Verdict:
        """Say what becomes of a trial after a block of items, and write down where it stops; one that is safe, since
        it keeps to floors that what beats it may not keep to, never does."""
        if not (self.settings.racing and self.ledger.is_drawn(number)):
            return Verdict.ENDS
        found = verdict_of(number, scale, self.ledger)
        if found is Verdict.STOPS and is_safe:
            found = Verdict.ENDS
        if found is Verdict.GOES_ON and not self.ends.is_late:
            return found
        self.ledger.mark_stopped(number, is_stopped=found is Verdict.STOPS)
        return found if found is Verdict.STOPS else Verdict.ENDS

    def _failed(self, number: int, reason: str) -> None:
        """End a trial that will not be tried again; stop the search where going on makes no sense."""
        kind = self.ledger.kinds[number]
        if number not in self.ledger.values:  # else it stays COMPLETE, and the next start tries to score it again
            self.ledger.tell_failed(number, reason)
            self.ledger.finished += not kind.is_prepared
            self.ledger.spent += 1.0
        self.reporter.trial("failed", number, reason)
        if kind in self.ledger.reference_kinds:
            raise SearchError(f"every score is measured by the {kind.label}, and it failed: {reason}")
        if not kind.is_prepared:  # those are few, and say nothing about the trials that are sampled
            self.failures.failed(reason)
