"""The examination of one recipe for a certificate: its items scored a block at a time, until the bets decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.certificates import Hypothesis, Part, Start, play, rounds_needed, verdicts
from evals.outcomes import CERTIFY, OUTCOME_COLUMNS
from optimizer.errors import DamagedError
from optimizer.runs.certificates import MEND
from optimizer.runs.outcome_files import outcomes_of, outcomes_path, read_outcomes, write_outcomes
from optimizer.runs.recorded import RecordedRun
from optimizer.search.fault_point import fault
from optimizer.words import count
from optimizer.workers.worker import Evaluation

Array = NDArray[np.float64]
Say = Callable[[str], None]
CERTIFIED, HOPELESS, OPEN, USED_UP = "certified", "hopeless", "left open", "items used up"


class Scorer(Protocol):
    """What a certificate needs of a worker."""

    def evaluate(self, recipe: str, suite: str, only: Mapping[str, Sequence[str]] | None = None) -> Evaluation: ...


class Stock:
    """Outcomes on a run's certify items: those in its folder, and those that are scored when they are asked for."""

    def __init__(self, run: RecordedRun, items: Mapping[str, list[str]], scorer: Scorer, say: Say) -> None:
        self._run, self._items, self._scorer, self._say = run, items, scorer, say
        self._frames: dict[int, pd.DataFrame] = {}

    def have(self, trials: Sequence[int], wanted: Mapping[str, int]) -> None:
        """Score, for each of these trials, what is missing of each task's first so many items, and keep it."""
        for trial in trials:
            frame = self._frame(trial)
            there = set(zip(frame["task"], frame["item"], strict=True))
            missing = {
                task: found
                for task, number in wanted.items()
                if (found := [item for item in self._items[task][:number] if (task, item) not in there])
            }
            if missing:
                self._score(trial, frame, missing)

    def values(self, trials: Mapping[str, int], task: str, number: int) -> tuple[dict[str, Array], Array]:
        """Return the values of a task's first items by model, (n,) each, and their weights; all of them are there."""
        items, rows = self._items[task][:number], {}
        for name, trial in trials.items():
            frame = self._frame(trial)
            rows[name] = frame[frame["task"] == task].set_index("item").loc[items]
        return {name: np.asarray(found["value"], dtype=float) for name, found in rows.items()}, np.asarray(
            rows["base"]["weight"], dtype=float
        )

    def _score(self, trial: int, frame: pd.DataFrame, missing: Mapping[str, list[str]]) -> None:
        self._say(f"trial {trial}: {count(sum(map(len, missing.values())), 'item')} scored for the certificate")
        recipe = self._run.recipe(trial)
        scored = self._scorer.evaluate(recipe.to_json(), CERTIFY, missing).outcomes
        fault("certify.before")
        write_outcomes(self._run.path, trial, CERTIFY, recipe.digest, [*outcomes_of(frame), *scored])
        fault("certify.after")
        del self._frames[trial]

    def _frame(self, trial: int) -> pd.DataFrame:
        if trial not in self._frames:
            path = outcomes_path(self._run.path, trial, CERTIFY)
            there = read_outcomes(path) if path.exists() else pd.DataFrame(columns=list(OUTCOME_COLUMNS))
            self._frames[trial] = there
        return self._frames[trial]


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """How the test of one hypothesis stands.

    Args:
        losses, bets, capital: of each round that was played.
        items: that it used, by task.
        above: losses that were above the bound and counted as it.
    """

    hypothesis: Hypothesis
    verdict: str
    losses: Array
    bets: Array
    capital: Array
    items: Mapping[str, int]
    above: int

    def document(self) -> dict[str, Any]:
        """Return it as JSON values; the hypothesis itself stands in the ledger."""
        return {
            "name": self.hypothesis.name,
            "limit": self.hypothesis.limit,
            "verdict": self.verdict,
            "rounds": len(self.losses),
            "items": dict(self.items),
            "mean_loss": float(self.losses.mean()) if len(self.losses) else None,
            "capital_at_end": float(self.capital[-1]) if len(self.capital) else 1.0,
            "losses_above_bound": self.above,
            "losses": self.losses.tolist(),
            "bets": self.bets.tolist(),
            "capital": self.capital.tolist(),
        }

    def items_needed(self, delta: float) -> int | None:
        """Estimate how many items it would take, from what is known and what was tested; None: no number would do."""
        start = self.hypothesis.start
        below = -float(np.append(self.losses, np.full(round(start.rounds), start.measured)).mean())
        if below <= 0:
            return None
        variance = float(self.losses.var()) if len(self.losses) >= 20 else start.square - start.mean**2
        each = sum(part.items for part in self.hypothesis.parts) / self.hypothesis.rounds
        return math.ceil(each * rounds_needed(below, variance, delta, self.hypothesis.most))


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """One recipe of a chain and its proofs: certified where every one is."""

    trial: int
    digest: str
    proofs: tuple[Proof, ...]

    @property
    def is_certified(self) -> bool:
        """Whether all that was asked was shown. Each is tested at the whole error: to err, a false one must pass."""
        return all(proof.verdict == CERTIFIED for proof in self.proofs)

    @property
    def items(self) -> dict[str, int]:
        """How many items of each task it was scored on."""
        found: dict[str, int] = {}
        for proof in self.proofs:
            found |= {task: max(number, found.get(task, 0)) for task, number in proof.items.items()}
        return found

    def items_needed(self, delta: float) -> int | None:
        """Estimate how many items its open proofs would take together; None: no number would do."""
        needed = [proof.items_needed(delta) for proof in self.proofs if proof.verdict != CERTIFIED]
        numbers = [number for number in needed if number is not None]
        return sum(numbers) if len(numbers) == len(needed) else None

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        tests = [proof.document() for proof in self.proofs]
        return {"trial": self.trial, "digest": self.digest, "certified": self.is_certified, "tests": tests}


def examine(run: RecordedRun, candidate: Mapping[str, Any], stock: Stock, *, blocks: int, delta: float) -> Examined:
    """Examine a ledger's candidate on more and more items, until all its hypotheses are certified or one is hopeless.

    Args:
        blocks: in which the items of each task are scored.
    """
    assert run.references is not None, "a ledger is of a run that was scored"
    base, experts = run.references
    hypotheses = [hypothesis_of(document) for document in candidate["hypotheses"]]
    proofs: dict[str, Proof] = {}
    for block in range(1, blocks + 1):
        waiting = [h for h in hypotheses if h.name not in proofs or proofs[h.name].verdict == OPEN]
        if not waiting or any(proof.verdict == HOPELESS for proof in proofs.values()):
            break
        for h in waiting:
            wanted = {part.task: part.items_of(part.units * block // blocks) for part in h.parts}
            trials = {"base": base, "candidate": int(candidate["trial"])}
            trials |= {name: experts[name] for part in h.parts for name in part.experts}
            stock.have(list(dict.fromkeys(trials.values())), wanted)
            proofs[h.name] = _proof(h, trials, stock, wanted, delta=delta, is_last=block == blocks)
    return Examined(int(candidate["trial"]), str(candidate["digest"]), tuple(proofs[h.name] for h in hypotheses))


def _proof(
    hypothesis: Hypothesis,
    trials: Mapping[str, int],
    stock: Stock,
    wanted: Mapping[str, int],
    *,
    delta: float,
    is_last: bool,
) -> Proof:
    """Bet on all rounds that are there, from the first: the same outcomes give the same end, however they came."""
    losses, above = {}, 0
    for part in hypothesis.parts:
        losses[part.task], more = part.losses(*stock.values(trials, part.task, wanted[part.task]))
        above += more
    rounds = hypothesis.round_losses(losses)
    game = play(rounds, most=hypothesis.most, start=hypothesis.start)
    (won,), (number,) = (
        verdicts(rounds, game.capital, delta, rounds=hypothesis.rounds, most=hypothesis.most)
        if len(rounds)
        else ([0], [0])
    )
    verdict = {1: CERTIFIED, -1: HOPELESS}.get(int(won), USED_UP if is_last else OPEN)
    return Proof(
        hypothesis, verdict, rounds[:number], game.bets[0, :number], game.capital[0, :number], dict(wanted), above
    )


def hypothesis_of(document: Mapping[str, Any]) -> Hypothesis:
    """Make a hypothesis of what a ledger holds of it.

    Raises:
        DamagedError: it holds something else.
    """
    try:
        parts = tuple(Part(**{**part, "sizes": tuple(part.get("sizes", ()))}) for part in document["parts"])
        return Hypothesis(document["name"], document["limit"], parts, Start(**document["start"]))
    except (TypeError, KeyError) as error:
        raise DamagedError(f"a ledger's hypothesis cannot be read ({error}); {MEND}") from None
