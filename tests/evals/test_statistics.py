"""Scores that are no mean over items: as lm-eval computes them, on all items and on any resampling of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lm_eval.api.metrics import f1_score, matthews_corrcoef, perplexity, weighted_perplexity

from evals.engine import Engine
from evals.errors import ScoreError, TaskError
from evals.hypotheses import Known
from evals.lm_asked import LoadedTask
from evals.objectives import Scale, draw_objectives, task_scores
from evals.outcomes import SEARCH, Outcome, TaskInfo
from evals.score_table import table_of
from evals.statistics import F1, MCC, PERPLEXITY, RATIO, parts_of_choice, pseudo_values, score_of
from optimizer.runs.outcome_files import read_outcomes, write_outcomes
from tests.evals.conftest import load, questions, words, write_task

RNG = np.random.default_rng(0)
PAIRS = RNG.integers(0, 2, size=(60, 2)).tolist()
CHOSEN = RNG.integers(0, 4, size=(60, 2)).tolist()
LOGS = [(-float(x), float(n)) for x, n in zip(RNG.gamma(2, size=60), RNG.integers(1, 9, size=60), strict=True)]


@pytest.mark.parametrize(
    ("statistic", "classes", "given", "theirs"),
    [
        (F1, 2, PAIRS, f1_score),
        (MCC, 2, PAIRS, matthews_corrcoef),
        (MCC, 4, CHOSEN, matthews_corrcoef),
        (PERPLEXITY, 0, [x for x, _ in LOGS], perplexity),
        (PERPLEXITY, 0, LOGS, weighted_perplexity),
    ],
)
def test_a_statistic_of_sums_is_lm_evals_on_every_resampling(
    statistic: str, classes: int, given: list[Any], theirs: Callable[[list[Any]], float]
) -> None:
    def parts(item: Any) -> tuple[float, ...]:
        if classes:
            return parts_of_choice(statistic, tuple(item), classes)
        return item if isinstance(item, tuple) else (item, 1.0)

    kept = np.array([parts(item) for item in given])
    for draw in [np.arange(60), *RNG.integers(60, size=(20, 60))]:
        expected = theirs([given[i] for i in draw])
        assert float(score_of(statistic, kept[draw].sum(axis=0))) == pytest.approx(expected, abs=1e-12)


def test_what_is_undefined_is_nought() -> None:
    assert score_of(F1, np.zeros(3)) == 0
    assert score_of(MCC, np.array([5.0, 0, 3, 0])) == 0  # always the same choice
    with pytest.raises(TaskError, match="cannot recompute: 'gini' of 2 parts"):
        score_of("gini", np.zeros(2))
    with pytest.raises(TaskError, match="cannot recompute: 'mcc' of 3 parts"):
        score_of(MCC, np.zeros(3))


def test_pseudo_values_have_the_score_as_their_mean_and_a_means_are_its_items() -> None:
    numbers = [float(x) for x in RNG.normal(size=30)]
    assert pseudo_values(lambda items: float(np.mean(items)), list(numbers)) == pytest.approx(numbers)
    spread = pseudo_values(lambda items: float(np.std(items)), list(numbers))
    assert np.mean(spread) == pytest.approx(np.std(numbers))
    draws = [np.std(RNG.choice(numbers, 30)) for _ in range(2000)]
    assert np.std(spread) / np.sqrt(30) == pytest.approx(np.std(draws), rel=0.15)


def rows_of(outcomes: list[Outcome], trial: int = 0) -> pd.DataFrame:
    return pd.DataFrame([{"trial": trial, **asdict(row)} for row in outcomes])


def study(statistic: bool) -> pd.DataFrame:
    """Four trials of 80 items on two tasks, as accuracies or as ratios of sums."""
    rows = []
    for task, shares in (("domain", (0.3, 0.8, 0.6, 0.5)), ("general", (0.8, 0.4, 0.7, 0.75))):
        rng = np.random.default_rng(len(task))
        luck = rng.random(80)
        for trial, share in enumerate(shares):
            for i in range(80):
                value = float(luck[i] < share)
                own = {"statistic": RATIO, "parts": (value, 1.0)} if statistic else {}
                row = Outcome(task, SEARCH, f"{i:016x}", value, 1.0, (), False)
                rows.append({"trial": trial, **asdict(replace(row, **own))})
    return pd.DataFrame(rows)


def test_a_mean_said_as_a_statistic_has_the_same_scores_errors_and_intervals() -> None:
    tasks = [TaskInfo(name, name, "", "multiple_choice", "acc", True, 0.25, 80, 80) for name in ("domain", "general")]
    plain, other = study(statistic=False), study(statistic=True)
    ours, theirs = (task_scores(rows, SEARCH) for rows in (plain, other))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-12)
    table, same = table_of(plain, "domain"), table_of(other, "domain")
    assert table.stderr_of_difference(1, 0) == pytest.approx(same.stderr_of_difference(1, 0))
    draws, again = (draw_objectives(Scale(rows, tasks, SEARCH, 0, {"x": 1}), replicates=50) for rows in (plain, other))
    for name, samples in draws.samples.items():
        np.testing.assert_allclose(samples, again.samples[name], rtol=1e-12)
    assert np.ptp(draws.samples["forgetting"][:, 2]) > 0


def test_parts_come_back_from_a_run_folder(tmp_path: Path) -> None:
    rows = study(statistic=True)
    kept = rows[(rows["trial"] == 1) & (rows["task"] == "domain")].drop(columns="trial")
    write_outcomes(tmp_path, 1, SEARCH, "a" * 12, [Outcome(**row) for row in kept.to_dict("records")])
    again = read_outcomes(tmp_path / "outcomes/00001-search.parquet")
    assert table_of(again, "domain").scores == table_of(rows[rows["trial"] == 1], "domain").scores
    assert set(again["statistic"]) == {RATIO}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": (1.0,)}, "parts of one length"),
        ({"parts": ()}, "parts of one length"),
        ({"statistic": ""}, "must be of one score"),
        ({"statistic": F1}, "must be of one score; they are of f1, ratio"),
        ({"parts": (1e300, 1.0)}, "must be finite, and below"),
        ({"parts": (float("nan"), 1.0)}, "must be finite"),
    ],
)
def test_parts_that_make_no_score_are_refused(changes: dict[str, Any], message: str) -> None:
    rows = study(statistic=True)
    for name, value in changes.items():
        rows.at[3, name] = value
    with pytest.raises(TaskError, match=f"domain {message}|domain must.*{message}"):
        table_of(rows, "domain")


def measured_by_lm_eval(task: LoadedTask, asked: list[Any]) -> float:
    """Aggregate what the task's metric gives for the answers that lm-eval's instances still hold."""
    found = []
    for item in asked:
        member = task.members[item.item.member]
        answers = [request.instance.filtered_resps[task.filter] for request in item.requests]
        found.append(member.process_results(item.item.doc, answers)[task.info.metric])
    return float(task.aggregate(found))


def two_choices(n: int = 40) -> list[dict[str, Any]]:
    return [{"question": f"{i}: {words(i, 3)}", "choices": [words(i, 1), words(i + 1, 2)], "gold": i % 2}
            for i in range(n)]  # fmt: skip


TEXTS = [{"text": words(i, 8), "last": f" {words(i + 3, 1)}"} for i in range(40)]
LAST = {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{last}}", "doc_to_choice": None}


@pytest.mark.parametrize(
    ("metric", "rows", "settings", "statistic"),
    [
        ("f1", two_choices(), {}, F1),
        ("mcc", questions(40), {}, MCC),
        ("brier_score", questions(40), {}, ""),
        ("perplexity", TEXTS, LAST, PERPLEXITY),
    ],
)
def test_lm_evals_metrics_are_scored_as_lm_eval_aggregates_them(
    metric: str, rows: list[dict[str, Any]], settings: dict[str, Any], statistic: str, tmp_path: Path, engine: Engine
) -> None:
    path = write_task(tmp_path / "t", rows, metric_list=[{"metric": metric}], **settings)
    harness = load(path, search=24, holdout=8, metric=metric)
    outcomes = harness.score(engine, SEARCH)
    (task,) = harness.tasks
    assert (task.info.metric, task.info.statistic) == (metric, statistic)
    assert task.info.higher_is_better == (metric in ("f1", "mcc"))
    score = task_scores(rows_of(outcomes), SEARCH)["score"].item()
    assert score == pytest.approx(measured_by_lm_eval(task, list(harness.asked(SEARCH))), rel=1e-9)
    if statistic:
        known = Known(rows_of(outcomes), 0, 0, {}, [task.info], {})
        with pytest.raises(TaskError, match=f"means over items, task t's {metric} is none"):
            known.values(task.info)
        banked = load(path, search=12, holdout=8, metric=metric, bank_items=24)
        assert banked.infos[0].drawn_items == 0


OWN = """
def spread(items):
    return max(items) - min(items) + sum(items) / len(items)

def longest(items):
    return [item for item in items if item > 1e9][0]

def nearness(references, predictions, **_):
    return {"nearness": 2.5 * len(references[0]) + 0 * len(predictions[0])}

def length(doc, results):
    return {"spread": results[0][0]}
"""


def own(folder: Path, aggregate: str) -> Path:
    path = write_task(folder, questions(40), process_results="FUNCTION own.length", metric_list="METRICS")
    (path / "own.py").write_text(OWN)
    file = path / f"{folder.name}.yaml"
    metrics = f"[{{metric: spread, aggregation: !function own.{aggregate}, higher_is_better: true}}]"
    text = file.read_text().replace("METRICS", metrics).replace("FUNCTION", "!function")
    file.write_text(text.replace("'!function own.length'", "!function own.length"))
    return path


def test_an_aggregation_of_a_tasks_own_is_its_score_and_its_items_tell_its_spread(
    tmp_path: Path, engine: Engine
) -> None:
    path = own(tmp_path / "t", "spread")
    with pytest.raises(TaskError, match=r"looked for as code; set evals\.allow_task_code"):
        load(path)
    harness = load(path, search=24, holdout=8, allow_task_code=True)
    outcomes = harness.score(engine, SEARCH)
    (task,) = harness.tasks
    assert task.info.statistic == "own"
    table = task_scores(rows_of(outcomes), SEARCH)
    assert table["score"].item() == pytest.approx(measured_by_lm_eval(task, list(harness.asked(SEARCH))))
    assert table["stderr"].item() > 0
    broken = load(own(tmp_path / "b", "longest"), search=24, holdout=8, allow_task_code=True)
    with pytest.raises(TaskError, match="task b: aggregation of spread: IndexError"):
        broken.score(engine, SEARCH)


def test_a_metric_may_be_a_function_where_code_is_allowed(tmp_path: Path, engine: Engine) -> None:
    rows = [{"text": words(i, 3), "answer": words(i, 2)} for i in range(40)]
    path = write_task(
        tmp_path / "t", rows, output_type="generate_until", doc_to_text="text", doc_to_target="answer",
        doc_to_choice=None, generation_kwargs={"until": ["."], "max_gen_toks": 4}, metric_list="METRICS",
    )  # fmt: skip
    (path / "own.py").write_text(OWN)
    metrics = "[{metric: !function own.nearness, aggregation: mean, higher_is_better: true}]"
    file = path / "t.yaml"
    file.write_text(file.read_text().replace("METRICS", metrics))
    with pytest.raises(TaskError, match="runs code"):
        load(path)
    outcomes = load(path, search=24, holdout=8, allow_task_code=True).score(engine, SEARCH)
    assert {row.value for row in outcomes} - {0.0, 1.0}


def test_a_perplexity_beyond_numbers_is_no_score(tmp_path: Path, engine: Engine) -> None:
    path = write_task(tmp_path / "t", TEXTS, metric_list=[{"metric": "perplexity"}], **LAST)
    harness = load(path, search=24, holdout=8)
    head = engine.model.lm_head.weight
    kept = head.data.clone()
    head.data.mul_(1e4)
    try:
        with pytest.raises(ScoreError, match="perplexity is above 1e\\+30"):
            harness.score(engine, SEARCH)
    finally:
        head.data.copy_(kept)
