"""Sensitivities add up to the difference between base and expert, and follow the tasks of each side."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter

import pytest

from evals.losses import Example
from optimizer.errors import MergeError
from optimizer.run_study import worker_spec
from optimizer.runs.sensitivities import OBJECTIVES, Sensitivities
from optimizer.study.study_file import read_study
from optimizer.workers.sensitivity import some_of_each
from optimizer.workers.worker import Worker
from search_spaces import Recipe, Setting
from tests.optimizer.small_study import write_study
from tests.pico import pico_expert, pico_llama

pytestmark = pytest.mark.slow  # gradients are taken


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A worker whose merges are not rounded to bf16, between models as far apart as a fine-tuning moves them."""
    folder = tmp_path_factory.mktemp("float32")
    path = write_study(folder, items=10)
    for name in ("base", "expert"):
        shutil.rmtree(folder / name)
    pico_expert(pico_llama(folder / "base", layers=2, dtype="float32"), folder / "expert", scale=0.03)
    return Worker(worker_spec(read_study(path, ["evals.dtype=float32"])))


@pytest.fixture(scope="module")
def found(worker: Worker) -> Sensitivities:
    return worker.sensitivities("clinical")


def test_path_averages_add_up_to_the_measured_difference(found: Sensitivities, worker: Worker) -> None:
    for objective in OBJECTIVES:
        assert found.error(objective) < 1e-3, objective
        groups = found.by_group(objective)
        assert {"embed", "layer.00.attn", "layer.01.mlp", "head"} <= set(groups)
        assert sum(groups.values()) == pytest.approx(found.change(objective), rel=1e-3)
    scores = {}
    for weight in (0.0, 1.0):
        outcomes = worker.evaluate(_uniform(weight), "search").outcomes
        for task in ("skill", "manners"):
            mine = [o for o in outcomes if o.task == task]
            scores[task, weight] = sum(o.value for o in mine) / sum(o.weight for o in mine)
    assert found.domain_change == pytest.approx(scores["skill", 1.0] - scores["skill", 0.0], rel=1e-4)
    assert found.general_change == pytest.approx(scores["manners", 1.0] - scores["manners", 0.0], rel=1e-4)


def test_a_few_items_and_points_cost_less(found: Sensitivities, worker: Worker) -> None:
    few = worker.sensitivities("clinical", items=3, points=2)
    assert (few.items, len(few.points)) == (6, 2)
    assert few.candidates < 0.5 * found.candidates
    assert found.candidates > 5 * 3
    assert few == dataclasses.replace(worker.sensitivities("clinical", items=3, points=2), seconds=few.seconds)


def test_they_survive_json(found: Sensitivities) -> None:
    assert Sensitivities.from_json(found.to_json()) == found


def test_an_expert_that_is_not_there_is_named(worker: Worker) -> None:
    with pytest.raises(MergeError, match="the experts are clinical; given 'nobody'"):
        worker.sensitivities("nobody")


def test_some_of_each_task_are_drawn_in_order() -> None:
    right = {"texts": (), "questions": (0,)}
    examples = [Example(task, str(i), (), right[task], (), 1.0) for i in range(9) for task in right]
    drawn = some_of_each(examples, 4, 3, seed=0)
    assert Counter(e.task for e in drawn) == {"questions": 4, "texts": 3}
    assert drawn == [e for e in examples if e in drawn]
    assert drawn != some_of_each(examples, 4, 3, seed=1)
    assert some_of_each(examples, 20, 20, seed=0) == examples


def _uniform(weight: float) -> str:
    recipe = Recipe("task_arithmetic", "base", (("clinical", "expert"),), (Setting("weight", "clinical", "", weight),))
    return recipe.to_json()
