"""CMA-ES without a state in the study: it finds optima, and who takes a study up goes on with the same distribution."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution

from optimizer.search.cmaes import CmaEsState, ScalarisedCmaEs

N = 8
SPACE = {f"w{i}": FloatDistribution(-0.5, 1.5) for i in range(N)}


@pytest.mark.parametrize("name", ["sphere", "ellipsoid"])
def test_it_finds_the_lowest_point(name: str) -> None:
    rng = np.random.default_rng(0)
    target = rng.uniform(0.2, 0.8, N)
    rotation = np.linalg.qr(rng.normal(size=(N, N)))[0]
    axes = np.ones(N) if name == "sphere" else np.geomspace(1, 100, N)
    state = CmaEsState(np.full(N, 0.5), 10)
    for _ in range(150 if name == "sphere" else 400):
        points = np.stack([state.draw(rng) for _ in range(10)])
        state.tell(points, ((((points - target) @ rotation) * axes) ** 2).sum(axis=1))
    assert np.abs(state.mean - target).max() < 1e-3


def test_it_stays_in_the_box_where_the_best_lies_outside() -> None:
    rng = np.random.default_rng(0)
    state = CmaEsState(np.full(N, 0.5), 10)
    for _ in range(60):
        points = np.stack([state.draw(rng) for _ in range(10)])
        assert ((points >= 0) & (points <= 1)).all()
        state.tell(points, -points.sum(axis=1))
    assert state.mean.min() > 0.95


def study_of(sampler: ScalarisedCmaEs, storage: optuna.storages.BaseStorage | None = None) -> optuna.Study:
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=sampler, storage=storage, study_name="s", load_if_exists=True
    )
    if not study.trials:
        for kind, weight in {"base": 0.0, "expert:law": 1.0, "uniform a=0.50": 0.5}.items():
            study.enqueue_trial(dict.fromkeys(SPACE, weight), user_attrs={"kind": kind})
    return study


def step(study: optuna.Study, *, limit: float | None = None) -> None:
    """A merge whose gain grows with all weights, and which forgets by the first half of them."""
    trial = study.ask(dict(SPACE))
    w = np.array([trial.params[name] for name in SPACE])
    gain, forgetting = float(1 - ((1 - w) ** 2).mean()), float(0.4 * (w[: N // 2] ** 2).mean())
    if limit is not None:
        trial.set_constraint("max_forgetting", forgetting - limit)
    study.tell(trial, [gain, forgetting])


def heights(study: optuna.Study) -> np.ndarray:
    values = np.array([trial.values for trial in study.trials])
    return values[:, 0] - values[:, 1] / 0.2


def test_it_climbs_from_the_best_anchor() -> None:
    study = study_of(ScalarisedCmaEs(seed=1))
    for _ in range(203):
        step(study)
    found = heights(study)
    first = np.array([list(trial.params.values()) for trial in study.trials[3:13]])
    assert found[:3].argmax() == 2
    assert first.mean() == pytest.approx(0.5, abs=0.1)
    assert found[-20:].mean() > found[:3].max() + 0.1
    assert found.max() > found[:3].max() + 0.15


def test_whoever_takes_the_study_up_has_the_same_distribution() -> None:
    storage = optuna.storages.InMemoryStorage()
    study = study_of(ScalarisedCmaEs(seed=1), storage)
    for _ in range(50):
        step(study)
    one, other = ScalarisedCmaEs(seed=5), study.sampler
    trial = study.trials[-1]
    assert isinstance(other, ScalarisedCmaEs)
    assert one.infer_relative_search_space(study, trial) == SPACE
    states = [sampler._replayed(study, dict(SPACE)) for sampler in (one, other)]
    assert states[0].generation == states[1].generation == 47 // states[0].population
    assert np.array_equal(states[0].covariance, states[1].covariance)
    assert states[0].sigma == states[1].sigma
    assert not any("cma" in key for t in study.trials for key in t.system_attrs)


def test_what_exceeds_a_limit_is_worse_than_all_else() -> None:
    study = study_of(ScalarisedCmaEs(seed=1))
    for _ in range(203):
        step(study, limit=0.02)
    kept = [trial.values[1] <= 0.02 for trial in study.trials[3:]]
    assert np.mean(kept[-50:]) > 0.5 > np.mean(kept[:10])
