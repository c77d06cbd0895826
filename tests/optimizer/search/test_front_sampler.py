"""The sampler for fronts: its arithmetic against simulation and closed forms, and that it learns what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from threadpoolctl import threadpool_info, threadpool_limits

from optimizer.runs.front import hypervolume
from optimizer.search.front_sampler import FrontSampler, expected_improvement
from optimizer.search.gaussian_process import LINEAR, NOISE, Posterior, fit
from optimizer.search.samplers import make_sampler
from tests.optimizer.fakes import Bench

D = 12
SPACE = {f"w{i}": FloatDistribution(-0.5, 1.5) for i in range(D)}
ANCHORS = {"base": 0.0, "expert:law": 1.0, "uniform a=0.25": 0.25, "uniform a=0.50": 0.5, "uniform a=0.75": 0.75}


def test_the_expected_improvement_is_that_of_simulation() -> None:
    rng = np.random.default_rng(0)
    front, corner = np.array([[-0.8, 0.3], [-0.5, 0.1], [-0.2, 0.02], [-0.9, 0.9]]), np.array([0.0, 0.5])
    means = np.array([[-0.7, 0.15], [-0.3, 0.3], [-0.95, 0.05]])
    deviations = np.array([[0.1, 0.05], [0.2, 0.2], [0.05, 0.3]])
    found = expected_improvement(front, corner, means, deviations)
    covered = hypervolume(front, corner)
    for mean, deviation, expected in zip(means, deviations, found, strict=True):
        drawn = mean + deviation * rng.normal(size=(4000, 2))
        simulated = [hypervolume(np.vstack([front, point]), corner) - covered for point in drawn]
        assert expected == pytest.approx(np.mean(simulated), abs=4 * np.std(simulated) / 60)


def test_without_a_front_it_is_the_expected_area_to_the_corner() -> None:
    found = expected_improvement(np.empty((0, 2)), np.array([0.0, 1.0]), np.array([[-2.0, 0.5]]), np.full((1, 2), 1e-6))
    assert found == pytest.approx([2.0 * 0.5])


def test_a_process_meets_its_points_and_knows_little_far_from_them() -> None:
    rng = np.random.default_rng(1)
    points = rng.random((60, 3))
    values = np.sin(3 * points[:, 0]) + points[:, 1]
    process = fit(points, values, np.zeros(60))
    mean, deviation = process.predict(points)
    assert np.abs(mean - values).max() < 0.05
    other = rng.random((40, 3))
    assert np.abs(process.predict(other)[0] - np.sin(3 * other[:, 0]) - other[:, 1]).max() < 0.2
    assert process.predict(np.full((1, 3), 3.0))[1][0] > 5 * deviation.max()


def test_an_ask_leaves_the_other_cores_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def watched(*args: Any, **kwargs: Any) -> Posterior:
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return fit(*args, **kwargs)

    monkeypatch.setattr("optimizer.search.front_sampler.fit", watched)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=FrontSampler(seed=0))
    with threadpool_limits(2, user_api="blas"):
        for _ in range(7):
            trial = study.ask(dict(SPACE))
            study.tell(trial, [sum(trial.params.values()), trial.params["w0"] ** 2])
    assert threads
    assert set(threads) == {1}


def test_what_is_noisy_is_believed_less() -> None:
    points = np.linspace(0, 1, 30)[:, None]
    values = np.where(np.arange(30) == 15, 3.0, points[:, 0])
    plain, told = (fit(points, values, noise) for noise in (np.full(30, 1e-4), np.where(values > 1, 9.0, 1e-4)))
    at = points[15:16]
    assert abs(told.predict(at)[0][0] - 0.5) < 0.1 < abs(plain.predict(at)[0][0] - 0.5)


def test_the_kernel_is_as_likely_as_it_says() -> None:
    """The likelihood that is compared is the normal density's, up to a constant."""
    rng = np.random.default_rng(2)
    points, values = rng.random((25, 4)), rng.normal(size=25)
    process = fit(points, values, np.zeros(25))
    targets = (values - process.mean) / process.scale
    covariance = process.factor @ process.factor.T
    assert process.weights == pytest.approx(np.linalg.solve(covariance, targets))
    assert np.diag(covariance).min() >= NOISE[process.choice[2]]
    assert 0 <= process.choice[1] < len(LINEAR)


def study_of(sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for kind, weight in ANCHORS.items():
        study.enqueue_trial(dict.fromkeys(SPACE, weight), user_attrs={"kind": kind})
    return study


def merged(weights: np.ndarray) -> tuple[float, float]:
    """All weights are worth as much; the first half forget ten times as much as the others."""
    costs = np.where(np.arange(D) < D // 2, 10.0, 1.0)
    return float(1 - ((1 - weights) ** 2).mean()), float(0.3 * (costs * weights**2).sum() / costs.sum())


def covered(name: str, trials: int, seed: int) -> float:
    study = study_of(make_sampler(name, dimensions=D, conditional=False, budget=trials, seed=seed, told=0))
    rng, truth = np.random.default_rng(seed), []
    for _ in range(trials):
        trial = study.ask(dict(SPACE))
        gain, forgot = merged(np.array([trial.params[key] for key in SPACE]))
        trial.set_user_attr("stderr", [0.02, 0.01])
        study.tell(trial, [gain + 0.02 * rng.normal(), forgot + 0.01 * rng.normal()])
        truth.append((-gain, forgot))
    return hypervolume(truth, [0.0, 0.3])


def test_it_finds_more_than_tpe_and_chance_in_as_many_trials() -> None:
    found = {name: np.mean([covered(name, 40, seed) for seed in range(3)]) for name in ("front", "tpe", "random")}
    lines = hypervolume([(-merged(np.full(D, w))[0], merged(np.full(D, w))[1]) for w in ANCHORS.values()], [0.0, 0.3])
    assert found["front"] - lines > 2 * (max(found["tpe"], found["random"]) - lines)


def test_what_runs_is_not_proposed_again() -> None:
    study = study_of(FrontSampler(seed=0))
    for _ in range(12):
        trial = study.ask(dict(SPACE))
        study.tell(trial, merged(np.array([trial.params[key] for key in SPACE])))
    asked = np.array([[study.ask(dict(SPACE)).params[key] for key in SPACE] for _ in range(4)])
    distances = np.linalg.norm(asked[:, None] - asked[None], axis=2) + 9 * np.eye(4)
    assert distances.min() > 0.1


def test_words_several_gains_and_floors_are_no_trouble() -> None:
    study = optuna.create_study(directions=["maximize", "maximize", "minimize"], sampler=FrontSampler(seed=0))
    space = {**SPACE, "method": CategoricalDistribution(["ties", "sce"])}
    for kind, weight in {"base": 0.0, "expert:a": 1.0, "expert:b": 0.8}.items():
        study.enqueue_trial({**dict.fromkeys(SPACE, weight), "method": "ties"}, user_attrs={"kind": kind})
    for _ in range(45):
        trial = study.ask(dict(space))
        weights = np.array([trial.params[key] for key in SPACE])
        assert (weights >= -0.5).all()
        assert (weights <= 1.5).all()
        gain, forgot = merged(weights)
        trial.set_constraint("max_forgetting 0.1", forgot - 0.1)
        trial.set_constraint("arc 0.05", 2 * forgot - 0.05)
        trial.set_user_attr("stderr", ["much", None, 0.1])  # what somebody wrote by hand is as nothing
        study.tell(trial, [gain, weights[0], forgot])
    kept = [trial.values[2] <= 0.025 for trial in study.trials[-20:]]
    assert np.mean(kept) >= 0.5


@pytest.mark.slow
def test_a_study_tells_it_the_errors_of_its_objectives(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "toy")
    bench.search(trials=12, sampler="front")
    trials = bench.run.storage().get_all_trials(1)
    assert all(len(t.user_attrs["stderr"]) == 2 for t in trials)
    assert trials[0].user_attrs["stderr"] == [0.0, 0.0]
    assert any(error > 0 for t in trials for error in t.user_attrs["stderr"])
    other = Bench(tmp_path / "other")
    other.search(trials=9)
    assert not any("stderr" in t.user_attrs for t in other.run.storage().get_all_trials(1))
