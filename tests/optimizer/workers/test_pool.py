"""Pools: what all have in common, and the one in this process."""

from __future__ import annotations

import sys
import time

import pytest

from optimizer.errors import CheckpointError, MergeError
from optimizer.workers.pool import Pool, Result, ScoreJob, SerialPool, describe
from search_spaces.recipe import Recipe
from search_spaces.shape import Shape
from tests.optimizer.fakes import FakeWorker, Refuse, space_of

WAIT_SECONDS = 120.0


def recipes() -> list[Recipe]:
    space = space_of(["clinical"], Shape("uniform"))
    return [space.recipe(anchor.params) for anchor in space.anchors()]


def collect(pool: Pool, count: int) -> list[Result]:
    results: list[Result] = []
    end = time.monotonic() + WAIT_SECONDS
    while len(results) < count and time.monotonic() < end:
        results += pool.wait(1.0)
    assert len(results) == count
    return results


def test_a_serial_pool_works_when_waited_for_and_gives_errors_as_words() -> None:
    jobs = [ScoreJob(number, recipe.to_json(), "search") for number, recipe in enumerate(recipes()[:3])]
    with SerialPool(lambda: FakeWorker(Refuse(1.0))) as pool:
        assert pool.wait(0.0) == []
        for job in jobs:
            pool.submit(job)
        first, second, third = collect(pool, 3)
    assert [result.job for result in (first, second, third)] == jobs
    assert first.answer is not None
    assert first.answer.outcomes[0].suite == "search"
    assert second == Result(jobs[1], None, "nonfinite: tensor model.norm.weight")
    assert third.answer is not None


def test_a_serial_pool_tells_a_changed_checkpoint_from_a_recipe_that_fails() -> None:
    def change(recipe: Recipe) -> None:
        raise CheckpointError("model.safetensors changed")

    pool, job = SerialPool(lambda: FakeWorker(change)), ScoreJob(0, recipes()[0].to_json(), "search")
    pool.submit(job)
    assert pool.wait(1.0) == [Result(job, None, "model.safetensors changed", sources_changed=True)]


def test_a_serial_pool_lets_a_person_interrupt() -> None:
    def interrupt(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    pool = SerialPool(lambda: FakeWorker(interrupt))
    pool.submit(ScoreJob(0, recipes()[0].to_json(), "search"))
    with pytest.raises(KeyboardInterrupt):
        pool.wait(1.0)


def test_a_pool_in_this_process_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with SerialPool(FakeWorker) as pool:
        pool.submit(ScoreJob(0, recipes()[0].to_json(), "search"))
        assert pool.wait(0.0)[0].answer


def test_errors_of_ours_stand_for_themselves_and_others_get_their_kind() -> None:
    assert describe(MergeError("tensor x is\nnot finite")) == "tensor x is not finite"
    assert describe(KeyError("x")) == "KeyError: 'x'"
    assert describe(MemoryError()) == "MemoryError: "
