"""Samplers beside one another on a function made like a merge: what their fronts truly cover, by budget.

    python benchmarks/samplers.py [--seeds 5] [--trials 60] [--dimensions 40] [--noise 0.02] [--untold]
    python benchmarks/samplers.py --ask 1000

Gain is concave in the weights and forgetting convex, with weights that matter unequally to both and neighbours that
interact; both are measured with normal noise. No model is merged: what a sampler gains on real merges is for a study to
show. Every study begins with base, expert and a uniform line. Each sampler's front is chosen by what it measured, and
judged by the truth: its hypervolume with the reference point (no gain, the expert's forgetting), as a share of what
10,000 steps of gradients reach. `--ask` measures the seconds of an ask after so many trials.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution

from optimizer.runs.front import hypervolume, non_dominated
from optimizer.runs.trial import STDERR
from optimizer.search.samplers import SAMPLERS, make_sampler

Array = NDArray[np.float64]
ANCHORS = {"base": 0.0, "expert:x": 1.0, "uniform a=0.25": 0.25, "uniform a=0.50": 0.5, "uniform a=0.75": 0.75}
SHARES = 21  # of gain against forgetting, that the best front is found for


class Merge:
    """Two objectives of d weights, by a seed."""

    def __init__(self, d: int, seed: int) -> None:
        rng = np.random.default_rng((seed, d))
        self.gains = rng.lognormal(0.0, 1.0, d)
        self.losses = rng.lognormal(0.0, 1.0, d)
        self.gains /= self.gains.sum()
        self.losses /= self.losses.sum()
        self.coupling = rng.uniform(0.0, 0.5)

    def values(self, w: Array) -> Array:
        """Give gain and forgetting of weights (..., d): (..., 2)."""
        between = np.diff(w, axis=-1) ** 2
        gain = (self.gains * (1 - (1 - w) ** 2)).sum(-1) - 0.5 * between.mean(-1)
        own, joint = (self.losses * w**2).sum(-1), (self.losses * w).sum(-1) ** 2
        forgetting = 0.3 * ((1 - self.coupling) * own + self.coupling * joint) + 0.1 * between.mean(-1)
        return np.stack([gain, forgetting], axis=-1)

    def covered(self, values: Array) -> float:
        """Compute the hypervolume of points (n, 2)."""
        corner = self.values(np.ones(len(self.gains)))[1]
        return hypervolume(values * [-1, 1], [0.0, float(corner)])

    def best(self) -> float:
        """Compute what a front of the best weights covers, by projected steps along finite differences."""
        d, found = len(self.gains), []
        w = np.full(d, 0.5)
        for share in np.linspace(0.02, 0.98, SHARES):
            for step in np.geomspace(0.5, 0.005, 250):
                height = self.values(np.vstack([w, w + 1e-5 * np.eye(d)])) @ [share, share - 1]
                w = np.clip(w + step * (height[1:] - height[0]) / 1e-5, 0.0, 1.0)
            found.append(self.values(w))
        return self.covered(np.array(found))


def run(name: str, merge: Merge, trials: int, noise: float, seed: int, *, is_told: bool) -> list[float]:
    """Give what a sampler's front truly covers after each trial."""
    d = len(merge.gains)
    rng = np.random.default_rng((seed, 1))
    sampler = make_sampler(name, dimensions=d, conditional=False, budget=trials, seed=seed, told=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    space = {f"w{i:02d}": FloatDistribution(0.0, 1.0) for i in range(d)}
    for kind, weight in ANCHORS.items():
        study.enqueue_trial(dict.fromkeys(space, weight), user_attrs={"kind": kind})
    truth, measured, found = np.empty((0, 2)), np.empty((0, 2)), []
    for _ in range(trials):
        trial = study.ask(dict(space))
        true = merge.values(np.array([trial.params[name] for name in space]))
        seen = true + (0.0 if trial.user_attrs.get("kind") in ("base", "expert:x") else noise) * rng.normal(size=2)
        if is_told:
            trial.set_user_attr(STDERR, [noise, noise])
        study.tell(trial, seen.tolist())
        truth, measured = np.vstack([truth, true]), np.vstack([measured, seen])
        found.append(merge.covered(truth[non_dominated(measured * [-1, 1])]))
    return found


def compare(names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Print what each sampler covers at some budgets, the mean over seeds, and in how many seeds it is first."""
    budgets = [b for b in (15, 30, 60, 120, 240) if b <= arguments.trials]
    shares = {name: np.zeros((arguments.seeds, len(budgets))) for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for seed in range(arguments.seeds):
        merge = Merge(arguments.dimensions, seed)
        best = merge.best()
        for name in names:
            began = time.process_time()
            found = run(name, merge, arguments.trials, arguments.noise, seed, is_told=not arguments.untold)
            seconds[name] += time.process_time() - began
            shares[name][seed] = [found[b - 1] / best for b in budgets]
    first = np.argmax(np.stack([shares[name] for name in names]), axis=0)  # (seeds, budgets)
    print(f"{arguments.dimensions} dimensions, noise {arguments.noise:g}, {arguments.seeds} seeds: share of the best")
    print(
        "| sampler | "
        + " | ".join(f"{b} trials (first in)" for b in budgets)
        + " | ms an ask |\n|---"
        + "|---" * (len(budgets) + 1)
        + "|"
    )
    for place, name in enumerate(names):
        cells = [
            f"{100 * shares[name][:, i].mean():.1f} % ({(first[:, i] == place).sum()})" for i in range(len(budgets))
        ]
        print(
            f"| {name} | " + " | ".join(cells) + f" | {1e3 * seconds[name] / arguments.seeds / arguments.trials:.0f} |"
        )


def time_asks(names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Print the seconds of some asks after many trials."""
    for name in names:
        merge = Merge(arguments.dimensions, 0)
        sampler = make_sampler(name, dimensions=arguments.dimensions, conditional=False, budget=10**6, seed=0, told=0)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
        space = {f"w{i:02d}": FloatDistribution(0.0, 1.0) for i in range(arguments.dimensions)}
        for _ in range(arguments.ask):
            trial = study.ask(dict(space))
            study.tell(trial, merge.values(np.array(list(trial.params.values()))).tolist())
        study.sampler = sampler
        took = []
        for _ in range(5):
            began, busy = time.perf_counter(), time.process_time()
            trial = study.ask(dict(space))
            took.append((time.perf_counter() - began, time.process_time() - busy))
            study.tell(trial, merge.values(np.array(list(trial.params.values()))).tolist())
        asks = ", ".join(f"{clock:.2f} ({busy:.2f} of a core)" for clock, busy in took)
        print(f"{name} after {arguments.ask} trials, {arguments.dimensions} dimensions: {asks} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--dimensions", type=int, default=40)
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS[1:], default=["random", "qmc", "tpe", "nsga2", "cmaes", "front"]
    )
    parser.add_argument("--untold", action="store_true", help="no sampler is told the noise")
    parser.add_argument("--ask", type=int, default=0)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")
    if arguments.ask:
        time_asks(arguments.samplers, arguments)
    else:
        compare(arguments.samplers, arguments)


if __name__ == "__main__":
    main()
