"""Objectives: the definitions by hand, the bootstrap against brute force, and what cannot carry a search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from evals.errors import TaskError
from evals.objectives import (
    Scale,
    draw_objectives,
    objective_names,
    objectives,
    sentinel_changes,
    task_retention,
    task_scores,
)
from evals.outcomes import TaskInfo
from evals.weak_tasks import weak_tasks

DOMAIN = TaskInfo("terms", "domain", "", "multiple_choice", "acc", True, 0.25, 0, 0)
GENERAL = TaskInfo("prose", "general", "", "loglikelihood_rolling", "bits_per_byte", False, 0.0, 0, 0)
SENTINEL = replace(GENERAL, name="letters", role="sentinel")


def rows(trial: int, task: str, values: Sequence[float], weights: Sequence[float] | None = None) -> pd.DataFrame:
    n = len(values)
    return pd.DataFrame(
        {
            "trial": trial,
            "task": task,
            "suite": "search",
            "item": [f"{i:016x}" for i in range(n)],
            "value": np.asarray(values, dtype=float),
            "weight": np.ones(n) if weights is None else np.asarray(weights, dtype=float),
            "loglikelihoods": [()] * n,
            "truncated": False,
        }
    )


def study(trials: int = 4, n: int = 60) -> pd.DataFrame:
    """Trial 0 is the base, the last the expert; skill rises and prose worsens with the trial."""
    rng = np.random.default_rng(0)
    hard, sizes = rng.random(n), rng.integers(20, 200, n)
    frames = []
    for t in range(trials):
        share = t / (trials - 1)
        frames.append(rows(t, "terms", (hard < 0.4 + 0.4 * share).astype(float)))
        frames.append(rows(t, "prose", sizes * (1 + 0.3 * share + rng.normal(0, 0.02, n)), sizes))
    return pd.concat(frames)


def measured(outcomes: pd.DataFrame, **options: Any) -> pd.DataFrame:
    given = {"tasks": (DOMAIN, GENERAL), "suite": "search", "base": 0, "experts": {"x": 3}} | options
    drawn = {name: given.pop(name) for name in ("replicates", "seed") if name in given}
    return objectives(draw_objectives(Scale(outcomes, **given), **drawn))


def test_definitions_by_hand() -> None:
    outcomes = pd.concat(
        [
            rows(0, "terms", [1, 0, 0, 0]),
            rows(1, "terms", [1, 1, 0, 0]),
            rows(2, "terms", [1, 1, 1, 0]),
            rows(0, "prose", [10, 30], [10, 10]),  # 2.0 bits per byte
            rows(1, "prose", [15, 30], [10, 10]),  # 2.25
            rows(2, "prose", [30, 30], [10, 10]),  # 3.0
        ]
    )
    frame = measured(outcomes, experts={"x": 2}, replicates=0)
    assert frame["domain"].tolist() == [0, 0.5, 1]
    assert frame["forgetting"].tolist() == [0, 0.125, 0.5]
    assert frame["domain_low"].isna().all()


def test_forgetting_counts_from_chance() -> None:
    general = replace(DOMAIN, name="facts", role="general", chance=0.25)
    frames = [rows(t, "terms", [0, t]) for t in (0, 1)]
    frames += [rows(0, "facts", [1, 1, 1, 0]), rows(1, "facts", [1, 1, 0, 0])]
    frame = measured(pd.concat(frames), tasks=(DOMAIN, general), experts={"x": 1}, replicates=0)
    assert frame["forgetting"].tolist() == [0, 0.5]  # 0.25 lost of the 0.5 above chance


def test_base_and_expert_are_exact_with_no_width() -> None:
    frame = measured(study())
    assert frame.loc[0].tolist() == [0.0] * 8
    assert frame.loc[3, ["domain", "domain_low", "domain_high", "domain_stderr"]].tolist() == [1, 1, 1, 0]
    assert frame.loc[3, "forgetting_low"] < frame.loc[3, "forgetting"] < frame.loc[3, "forgetting_high"]


def test_bootstrap_resamples_items_as_a_loop_would() -> None:
    outcomes = study()
    frame = measured(outcomes, replicates=4000)
    prose = outcomes[outcomes["task"] == "prose"].pivot(index="item", columns="trial", values="value").to_numpy()
    sizes = outcomes[(outcomes["task"] == "prose") & (outcomes["trial"] == 0)]["weight"].to_numpy()
    rng = np.random.default_rng(1)
    draws = []
    for _ in range(4000):
        picked = rng.integers(len(sizes), size=len(sizes))
        scores = prose[picked].sum(axis=0) / sizes[picked].sum()
        draws.append((scores[2] - scores[0]) / scores[0])
    expected = np.quantile(draws, [0.025, 0.975])
    width = expected[1] - expected[0]
    assert frame.loc[2, ["forgetting_low", "forgetting_high"]].to_numpy() == pytest.approx(expected, abs=0.1 * width)
    assert frame.loc[2, "forgetting_stderr"] == pytest.approx(np.std(draws), rel=0.1)


def test_interval_covers_the_truth_about_19_times_in_20() -> None:
    rng = np.random.default_rng(5)
    hit = 0
    for seed in range(120):
        hard, noise = rng.random(150), rng.random(150)
        frames = [rows(t, "terms", hard < skill) for t, skill in enumerate((0.3, 0.5, 0.7))]
        frames += [rows(t, "prose", 1 + noise + 0.1 * t) for t in range(3)]
        frame = measured(pd.concat(frames), experts={"x": 2}, replicates=300, seed=seed)
        hit += frame.loc[1, "domain_low"] <= 0.5 <= frame.loc[1, "domain_high"]
    assert 0.88 <= hit / 120 <= 0.99


def test_same_seed_same_numbers_whatever_the_order_and_the_other_trials() -> None:
    outcomes = study()
    frame = measured(outcomes)
    pd.testing.assert_frame_equal(frame, measured(outcomes.sample(frac=1, random_state=1), tasks=(GENERAL, DOMAIN)))
    pd.testing.assert_frame_equal(frame.drop(1), measured(outcomes[outcomes["trial"] != 1]))
    assert not frame.equals(measured(outcomes, seed=1))


def test_several_experts_have_an_objective_each() -> None:
    first, second = replace(DOMAIN, expert="a"), replace(DOMAIN, name="law", expert="b")
    frames = [rows(t, "terms", values) for t, values in enumerate([[0, 0], [1, 1], [0, 1], [0, 1]])]
    frames += [rows(t, "law", values) for t, values in enumerate([[0, 0], [0, 0], [1, 1], [0, 1]])]
    frames += [rows(t, "prose", [1, 1 + t]) for t in range(4)]
    frame = measured(pd.concat(frames), tasks=(first, second, GENERAL), experts={"a": 1, "b": 2}, replicates=0)
    assert frame["domain_a"].tolist() == [0, 1, 0.5, 0.5]
    assert frame["domain_b"].tolist() == [0, 0, 1, 0.5]
    assert frame["domain"].tolist() == [0, 0.5, 0.75, 0.5]


def test_objectives_are_named_by_the_experts() -> None:
    assert objective_names(["a"]) == ("domain", "forgetting")
    assert objective_names(["a", "b"]) == ("domain_a", "domain_b", "forgetting")


def test_task_without_a_scale_is_refused() -> None:
    outcomes = pd.concat([rows(t, task, [1, 0]) for t in (0, 3) for task in ("terms", "prose")])
    with pytest.raises(TaskError, match="terms has no scale: expert x scores exactly as the base"):
        measured(outcomes)


def test_missing_item_is_refused() -> None:
    outcomes = study()
    gap = (outcomes["trial"] == 2) & (outcomes["item"] == f"{7:016x}") & (outcomes["task"] == "prose")
    with pytest.raises(TaskError, match="trial 2 has item 0000000000000007 of task prose 0 times"):
        measured(outcomes[~gap])


def test_not_a_number_is_refused() -> None:
    outcomes = study()
    outcomes.iloc[3, outcomes.columns.get_loc("value")] = np.nan
    with pytest.raises(TaskError, match="finite"):
        measured(outcomes)


def test_task_scores_have_the_standard_error_of_a_mean() -> None:
    values = [1.0, 0, 1, 1, 0, 1, 0, 1]
    row = task_scores(rows(0, "terms", values), "search").iloc[0]
    assert row["score"] == np.mean(values)
    assert row["stderr"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(8))
    assert row["n"] == 8


def test_retention_by_task_agrees_with_the_objectives() -> None:
    outcomes = study()
    frame, long = (
        measured(outcomes),
        task_retention(Scale(outcomes, tasks=(DOMAIN, GENERAL), suite="search", base=0, experts={"x": 3})),
    )
    domain, general = long[long["task"] == "terms"], long[long["task"] == "prose"]
    assert domain["gain_share"].tolist() == frame["domain"].tolist()
    assert domain["low"].tolist() == frame["domain_low"].tolist()
    assert general["forgetting"].tolist() == frame["forgetting"].tolist()
    assert domain["forgetting"].isna().all()


def test_what_cannot_carry_a_search_is_said() -> None:
    given: dict[str, Any] = {"suite": "search", "base": 0}
    assert weak_tasks(Scale(study(), tasks=(DOMAIN, GENERAL), experts={"x": 3}, **given)) == []
    weak = replace(DOMAIN, name="facts", role="general", chance=0.4)
    outcomes = pd.concat([study(), *(rows(t, "facts", np.arange(60) < 25 + t) for t in range(4))])
    found = weak_tasks(Scale(outcomes, tasks=(DOMAIN, GENERAL, weak), experts={"x": 3}, **given))
    assert len(found) == 1
    assert "general task facts: the base is at chance" in found[0]
    found = weak_tasks(Scale(study(), tasks=(DOMAIN, GENERAL), experts={"x": 0}, **given))
    assert "expert x does not beat the base" in found[0]
    assert "no expert is below the base" in found[1]


def test_hundreds_of_trials_take_about_a_second() -> None:
    outcomes = study(trials=200, n=1000)
    start = time.process_time()
    measured(outcomes, experts={"x": 199})
    assert time.process_time() - start < 3  # about 0.5 s on a free core


def with_sentinel() -> pd.DataFrame:
    """The study, and a sentinel of eight items for each of its trials."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(20, 200, 8)
    return pd.concat([study(), *(rows(t, "letters", sizes * (1 + 0.1 * t + rng.random(8)), sizes) for t in range(4))])


def test_a_sentinel_moves_no_objective_and_no_finding() -> None:
    with_it, without = with_sentinel(), study()
    tasks = (DOMAIN, GENERAL, SENTINEL)
    pd.testing.assert_frame_equal(measured(with_it, tasks=tasks), measured(without))
    scales = [Scale(with_it, tasks, "search", 0, {"x": 3}), Scale(without, (DOMAIN, GENERAL), "search", 0, {"x": 3})]
    pd.testing.assert_frame_equal(*map(task_retention, scales))
    one, other = map(weak_tasks, scales)
    assert one == other
    # nor need the search have any item of it
    pd.testing.assert_frame_equal(measured(without, tasks=tasks), measured(without))
    assert weak_tasks(Scale(without, tasks, "search", 0, {"x": 3})) == other


def test_a_sentinels_change_is_paired_and_turned_so_that_higher_is_better() -> None:
    outcomes = with_sentinel()
    changes = sentinel_changes(Scale(outcomes, (DOMAIN, GENERAL, SENTINEL), "search", 0, {"x": 3}), replicates=4000)
    assert changes[["trial", "task"]].to_numpy().tolist() == [[t, "letters"] for t in range(4)]
    assert changes.loc[0, ["change", "low", "high"]].tolist() == [0, 0, 0]
    mine = outcomes[outcomes["task"] == "letters"]
    values = mine.pivot(index="item", columns="trial", values="value").to_numpy()
    sizes = mine[mine["trial"] == 0]["weight"].to_numpy()
    scores = values.sum(axis=0) / sizes.sum()
    assert changes["score"].to_numpy() == pytest.approx(scores)
    assert changes["change"].to_numpy() == pytest.approx(scores[0] - scores)  # fewer bits are better
    rng, draws = np.random.default_rng(1), []
    for _ in range(4000):
        picked = rng.integers(len(sizes), size=len(sizes))
        drawn = values[picked].sum(axis=0) / sizes[picked].sum()
        draws.append(drawn[0] - drawn[2])
    low, high = np.quantile(draws, [0.025, 0.975])
    assert changes.loc[2, ["low", "high"]].to_numpy() == pytest.approx([low, high], abs=0.1 * (high - low))


def test_without_a_sentinel_there_is_no_change() -> None:
    assert sentinel_changes(Scale(study(), (DOMAIN, GENERAL), "search", 0, {"x": 3})).empty


def test_a_sentinels_change_needs_the_base() -> None:
    outcomes = with_sentinel()
    lacking = outcomes[(outcomes["task"] != "letters") | (outcomes["trial"] > 0)]
    with pytest.raises(TaskError, match="trial 0 has no search outcome"):
        sentinel_changes(Scale(lacking, (DOMAIN, GENERAL, SENTINEL), "search", 0, {"x": 3}))


def test_a_task_counts_by_its_weight() -> None:
    outcomes = study()
    more = outcomes[outcomes["task"] == "prose"].assign(task="letters")
    more["value"] *= 1 + 0.2 * more["trial"]
    letters = replace(GENERAL, name="letters")
    scale = Scale(pd.concat([outcomes, more]), (DOMAIN, GENERAL, letters), "search", 0, {"x": 3})
    alike = draw_objectives(scale, replicates=20)
    prose, other = alike.by_task["prose"], alike.by_task["letters"]
    assert alike.points["forgetting"] == pytest.approx((prose + other) / 2)
    weighed = draw_objectives(replace(scale, tasks=(DOMAIN, GENERAL, replace(letters, weight=3.0))), replicates=20)
    assert weighed.points["forgetting"] == pytest.approx((prose + 3 * other) / 4)
    assert weighed.points["domain"] == pytest.approx(alike.points["domain"])
    twice = draw_objectives(
        replace(scale, tasks=(DOMAIN, replace(GENERAL, weight=2.0), replace(letters, weight=2.0))), replicates=20
    )
    assert np.array_equal(twice.samples["forgetting"], alike.samples["forgetting"])
