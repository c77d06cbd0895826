"""The judge of a search: its fronts and the anchors are scored on the holdout items, which the search has not seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from evals.outcomes import HOLDOUT
from optimizer.errors import SearchError
from optimizer.runs.front import front_without, losses
from optimizer.runs.trial import TrialKind, fitted
from optimizer.search.crew import Crew
from optimizer.search.events import Reporter
from optimizer.search.failures import not_finite
from optimizer.search.fault_point import fault
from optimizer.search.ledger import Ledger
from optimizer.search.scale import values_now
from optimizer.search.sensitivity import take_in_sensitivities
from optimizer.workers.pool import Result, SensitivityJob

Values = Mapping[int, tuple[float, ...]]  # objectives by trial


def judge_front(ledger: Ledger, crew: Crew, reporter: Reporter, *, beside: Sequence[SensitivityJob] = ()) -> None:
    """Score the front and the anchors on the holdout suite, but for those whose holdout outcomes are there.

    Also the front that there would be without derived and learned points, so that what these add is judged fairly.

    Args:
        beside: other jobs, which begin first, since they take long and keep one worker only.

    Raises:
        SearchError: the base or an expert fails on the holdout suite.
        KeyboardInterrupt: a person asked to stop.
    """
    values = {n: value for n, value in values_now(ledger).items() if n not in ledger.stopped}
    tried: set[int] = set()
    while True:  # where a guard finds a judged trial's answers wanting, what it beat is on the front, and judged too
        front = front_of(values, ledger.is_kept_off, fitted(ledger.kinds))
        others = front_without_prepared(values, ledger.kinds, ledger.is_kept_off)
        numbers = sorted({*front, *others, *_within_limits(values, ledger), *ledger.finished_anchors()})
        faults = {n: why for n in numbers if n not in tried and (why := ledger.outcomes_fault(n, HOLDOUT))}
        if not faults and not beside:
            break
        tried |= faults.keys()
        reporter.lost([why for number, why in faults.items() if ledger.run.has_outcomes(number, HOLDOUT)])
        _judge([*faults], ledger, crew, reporter, total=len(numbers), beside=beside)
        beside = ()
    reporter.say("done", f"{ledger.finished} trials finished, {len(front)} on the front")


def _within_limits(values: Values, ledger: Ledger) -> list[int]:
    """Give the trials that no other beats of those that keep the study's limits: floors may have them off the front."""
    limited = {number: ledger.constraints(number) for number in values}
    kept = {n: values[n] for n, found in limited.items() if found and max(found.values()) <= 0}
    return front_of(kept, ledger.is_kept_off) if kept else []


def _judge(
    numbers: Sequence[int],
    ledger: Ledger,
    crew: Crew,
    reporter: Reporter,
    *,
    total: int,
    beside: Sequence[SensitivityJob],
) -> None:
    done = total - len(numbers)
    for result, seconds in crew.work_off([*beside, *(ledger.job(number, HOLDOUT) for number in numbers)]):
        if isinstance(result.job, SensitivityJob):
            take_in_sensitivities(result, seconds, ledger, reporter)
            continue
        error = _take_in(result, ledger)
        done += not error
        kind, text = ("failed", f"holdout suite: {error}") if error else ("holdout", "")
        reporter.judged(kind, result.job.trial, text, done=done, total=total)


def front_of(values: Values, is_kept_off: Callable[[int], bool], fitted_ones: Collection[int] = ()) -> list[int]:
    """Give the trials that no other beats, without those that are kept off; fitted ones beat only one another."""
    numbers = list(values)
    points = losses([values[number] for number in numbers])
    is_fitted = [number in fitted_ones for number in numbers]
    mask, _ = front_without(points, lambda place: is_kept_off(numbers[place]), is_fitted)
    return [number for number, on_front in zip(numbers, mask, strict=True) if on_front]


def front_without_prepared(
    values: Values, kinds: Mapping[int, TrialKind], is_kept_off: Callable[[int], bool]
) -> list[int]:
    """Give the finished trials that no other beats, were there no derived and no learned ones."""
    plain = {n: value for n, value in values.items() if kinds[n].has_params}
    return front_of(plain, is_kept_off)


def _take_in(result: Result, ledger: Ledger) -> str:
    """Store a trial's holdout outcomes; what is wrong with them, in words, where nothing is stored."""
    number = result.job.trial
    error = result.error if result.answer is None else not_finite(result.answer.outcomes)
    if result.answer is not None and not error:
        fault("holdout.before")
        ledger.run.write_outcomes(number, HOLDOUT, ledger.digests[number], result.answer.outcomes)
    elif ledger.kinds[number] in ledger.reference_kinds:
        raise SearchError(f"the {ledger.kinds[number]} failed on the holdout suite: {error}")
    return error
