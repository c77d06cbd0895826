"""Does a certificate err as seldom as it says, and how many items does it take? Simulated studies with a known truth.

    python benchmarks/certify.py [--studies 1000] [--out runs/certify.json]

Each study has a base that answers three quarters of four-choice questions, merges that answer some of them otherwise,
holdout items by which the merges are put in order, and certify items on which they are tested with the product's own
bets. What is done is kept in the file and not done again. About a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evals.certificates import items_for, play, start_of, verdicts

Array = NDArray[np.float64]

RIGHT, CHANCE = 0.75, 0.25  # of the base's answers; of guessing
CHANGED = 0.06  # answers that are not the base's, of a merge that forgets nothing
LOSS_FREE = 0.0
HOLDOUT = 200  # items that merges are put in order by
ALIKE = 0.7  # correlation of what makes two merges change an answer
TOGETHER = 0.5  # correlation of what makes a merge change two answers of a cluster


@dataclass(frozen=True, slots=True)
class Truth:
    """What simulated studies are like.

    Args:
        candidates: merges of a study; of several, half forget nothing.
        cluster: items that share a passage.
        in_clusters: whether clusters are what is bet on, as they should be.
        drift: the file's last items are changed most.
        shuffled: whether items come in an order of their own, as certify items do.
    """

    candidates: int = 1
    cluster: int = 1
    in_clusters: bool = True
    drift: bool = False
    shuffled: bool = True

    def __str__(self) -> str:
        words = [f"{self.candidates} merges"] if self.candidates > 1 else ["one merge"]
        if self.cluster > 1:
            words.append(f"clusters of {self.cluster}" + ("" if self.in_clusters else ", bet on as single items"))
        if self.drift:
            words.append("drift over the file" + ("" if self.shuffled else ", in the file's order"))
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Studies:
    """What came of S simulated studies.

    Args:
        losses, capital: (C, S, R) of the merges of each study in the order they were tested.
        forgets: (C, S) what each truly forgets.
        limit: that was tested.
        most: the largest loss there can be.
        size: items in a round.
    """

    losses: Array
    capital: Array
    forgets: Array
    limit: float
    most: float
    size: int

    def share_certified(self, delta: float) -> float:
        """Return the share of studies in which a merge was certified that forgets as much as the limit or more."""
        going, erred = np.ones(self.forgets.shape[1], bool), np.zeros(self.forgets.shape[1], bool)
        for losses, capital, forgets in zip(self.losses, self.capital, self.forgets, strict=True):
            won, _ = verdicts(losses, capital, delta, rounds=losses.shape[1], most=self.most)
            going &= won == 1
            erred |= going & (forgets >= self.limit)
        return float(erred.mean())

    def items(self, delta: float) -> tuple[Array, NDArray[np.bool_]]:
        """Return how many items the first merge of each study took, (S,), and whether it was certified."""
        won, rounds = verdicts(self.losses[0], self.capital[0], delta, rounds=self.losses.shape[2], most=self.most)
        return (rounds * self.size).astype(float), np.equal(won, 1)

    def median_items(self, delta: float) -> float:
        """Return the median of the items that it takes to certify the first merge; infinite where most are not."""
        items, won = self.items(delta)
        return float(np.median(np.where(won, items, math.inf)))


def study_losses(truth: Truth, *, forgets: float, limit: float, studies: int, items: int, seed: int) -> Studies:
    """Simulate studies and bet on all their certify items.

    Args:
        forgets: what a single merge forgets; of several, half of them.
        items: certify items.
    """
    rng = np.random.default_rng(seed)
    scale = RIGHT - CHANCE
    spread = (np.arange(truth.candidates) >= truth.candidates // 2).astype(float)  # half of several forget nothing
    means = forgets * spread  # (C,)
    lost, won = _shares(means, scale)
    # what is common to the merges of a study on an item, what is common to a merge on a cluster, and their own
    base = rng.random((studies, items + HOLDOUT)) < RIGHT
    common = rng.normal(size=(studies, items + HOLDOUT))
    losses = np.empty((truth.candidates, studies, items + HOLDOUT), dtype=np.float32)
    for c in range(truth.candidates):
        latent = math.sqrt(ALIKE) * common + math.sqrt(1 - ALIKE) * rng.normal(size=common.shape)
        if truth.cluster > 1:
            shared = rng.normal(size=(studies, -(-common.shape[1] // truth.cluster)))
            shared = np.repeat(shared, truth.cluster, axis=1)[:, : common.shape[1]]
            latent = math.sqrt(TOGETHER) * shared + math.sqrt(1 - TOGETHER) * latent
        level = _normal_cdf(latent)
        tilt = _tilt(items, truth.drift)
        is_lost, is_won = level < tilt * lost[c] / RIGHT, level < tilt * won[c] / (1 - RIGHT)
        candidate = np.where(base, ~is_lost, is_won)
        losses[c] = ((base.astype(float) - candidate) - limit * (base - CHANCE)) / scale
    measured = losses[:, :, items:].mean(axis=2)
    tested = losses[:, :, :items]
    if truth.drift and truth.shuffled:
        tested = _shuffled(tested, rng)
    order = np.argsort(measured, axis=0, kind="stable")  # the surest first
    tested = np.take_along_axis(tested, order[:, :, None], axis=0)
    size = truth.cluster if truth.in_clusters else 1
    rounds = tested[:, :, : items // size * size].reshape(truth.candidates, studies, -1, size).mean(axis=3)
    most = (1 - limit * (1 - CHANCE)) / scale
    variance = float(rounds.var(axis=2).mean())
    start = start_of(limit / 2, variance, 0.1)
    capital = np.stack([play(row, most=most, start=start).capital for row in rounds])
    true = np.take_along_axis(np.repeat(means[:, None], studies, axis=1), order, axis=0)
    return Studies(rounds, capital, true, limit, most, size)


def _shares(means: Array, scale: float) -> tuple[Array, Array]:
    """Return the shares of all answers that are lost and won, by what each merge forgets."""
    changed = np.maximum(CHANGED, means * scale)
    return (changed + means * scale) / 2, (changed - means * scale) / 2


def _tilt(items: int, drift: bool) -> Array:
    """Return by how much more the answers to each item change than to all; the holdout items are from everywhere."""
    first = np.linspace(0.0, 2.0, items) if drift else np.ones(items)
    return np.concatenate([first, np.ones(HOLDOUT)])


def _shuffled(losses: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Put the items of each study in an order of its own, the same for all its merges."""
    order = np.argsort(rng.random(losses.shape[1:]), axis=1)
    return np.take_along_axis(losses, order[None], axis=2)


def _normal_cdf(values: Array) -> Array:
    """Compute the normal distribution function (Abramowitz & Stegun 26.2.17, within 1e-7)."""
    x = np.abs(values)
    t = 1 / (1 + 0.2316419 * x)
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * poly
    return np.asarray(np.where(values > 0, 1 - tail, tail))


CASES = (
    Truth(),
    Truth(candidates=40),
    Truth(cluster=5),
    Truth(candidates=40, cluster=5),
    Truth(drift=True),
    Truth(cluster=5, in_clusters=False),
    Truth(drift=True, shuffled=False),
)
DELTAS = (0.1, 0.05)
PART = 250  # studies at once


def error_row(truth: Truth, studies: int) -> dict[str, object]:
    """Measure the false certificates of one kind of study, at the limit of 10 %."""
    items, parts = 300 * (truth.cluster if truth.in_clusters else 1), max(1, studies // PART)
    found = [
        study_losses(truth, forgets=0.1, limit=0.1, studies=studies // parts, items=items, seed=seed)
        for seed in range(parts)
    ]
    shares = {delta: float(np.mean([part.share_certified(delta) for part in found])) for delta in DELTAS}
    return {"studies": str(truth), "items": items} | {f"false at {delta:g}": f"{shares[delta]:.1%}" for delta in DELTAS}


def power_row(limit: float, items: int, studies: int) -> dict[str, object]:
    """Measure how often so many items certify a merge that forgets nothing, and how many of them that takes."""
    found = study_losses(Truth(), forgets=LOSS_FREE, limit=limit, studies=studies, items=items, seed=2)
    row: dict[str, object] = {"limit": f"{limit:.0%}", "items": items}
    for delta in DELTAS:
        used, won = found.items(delta)
        row |= {
            f"closed form {delta:g}": items_for(limit, 1, delta),
            f"certified {delta:g}": f"{won.mean():.0%}",
            f"items used {delta:g}": f"{used.mean():.0f}",
            f"saved {delta:g}": f"{1 - used.mean() / items:.0%}",
        }
    return row


def refusal_row(forgets: float, studies: int) -> dict[str, object]:
    """Measure what a limit of 5 % costs for a merge that forgets too much."""
    found = study_losses(Truth(), forgets=forgets, limit=0.05, studies=studies, items=1000, seed=3)
    used, won = found.items(0.1)
    return {
        "forgets": f"{forgets:.0%}",
        "limit": "5%",
        "items": 1000,
        "certified": f"{won.mean():.1%}",
        "used": f"{used.mean():.0f}",
    }


def main() -> None:
    """Print the tables, from the file where they are in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/certify.json"))
    args = parser.parse_args()
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    begun = time.monotonic()
    work: dict[str, list[tuple[str, Callable[[], dict[str, object]]]]] = {
        "false certificates": [(str(truth), partial(error_row, truth, args.studies)) for truth in CASES],
        "power": [
            (f"{limit:g} {items}", partial(power_row, limit, items, args.studies))
            for limit, sizes in ((0.1, (100, 150, 300, 600)), (0.05, (300, 450, 600, 1000, 2000)))
            for items in sizes
        ],
        "refusals": [(f"{f:g}", partial(refusal_row, f, args.studies)) for f in (0.05, 0.1, 0.2)],
    }
    for title, rows in work.items():
        print(f"\n{title}\n")
        for n, (name, make) in enumerate(rows):
            key = f"{title}: {name}: {args.studies}"
            if key not in known:
                known[key] = make()
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(known, indent=1))
            if not n:
                print("| " + " | ".join(known[key]) + " |\n" + "|---" * len(known[key]) + "|")
            print("| " + " | ".join(map(str, known[key].values())) + " |", flush=True)
    print(f"\n{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
