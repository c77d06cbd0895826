"""Weights learned by gradients: downhill on the items, alike on every worker, within their bounds."""

from __future__ import annotations

import dataclasses

import numpy as np

from evals.losses import Example
from optimizer.run_study import worker_spec
from optimizer.study.study_file import Study
from optimizer.workers.learner import KEPT, Descent, Learned, Lesson, minibatches, split_examples
from optimizer.workers.worker import Worker
from search_spaces import Recipe, Setting


def lesson(study: Study, **changes: object) -> Lesson:
    start = Recipe(
        "task_arithmetic",
        study.models.base,
        tuple(study.models.experts.items()),
        (Setting("weight", "clinical", "", 0.5),),
    )
    plain = Lesson(start.to_json(), (("clinical", 0.5),), "tensor", 8, (-1.0, 2.0), 0)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def weights(learned: Learned) -> list[float]:
    return [setting.value for setting in Recipe.from_json(learned.recipe).settings if setting.parameter == "weight"]


def test_what_is_learned_has_a_lower_loss_than_the_start(study: Study, worker: Worker) -> None:
    learned = worker.learn(lesson(study))
    assert learned.steps > 0
    assert learned.kept < learned.kept_before
    assert learned.seen < learned.seen_before
    assert learned.candidates > 3  # eight steps backward over part of the items, and the looks


def test_the_same_lesson_gives_the_same_weights_on_any_worker_and_in_any_order(study: Study, worker: Worker) -> None:
    first = worker.learn(lesson(study))
    worker.learn(lesson(study, preference=(("clinical", 1.0),)))
    other = Worker(worker_spec(study)).learn(lesson(study))
    again = worker.learn(lesson(study))
    assert first.recipe == again.recipe == other.recipe
    assert (first.kept, first.seen) == (again.kept, again.seen) == (other.kept, other.seen)


def test_weights_are_by_tensor_or_by_group_and_within_their_bounds(study: Study, worker: Worker) -> None:
    by_group = Recipe.from_json(worker.learn(lesson(study, by="group")).recipe)
    assert not by_group.tensors
    assert {s.group for s in by_group.settings if s.parameter == "weight"} >= {"embed", "layer.00.attn", "head"}
    narrow = worker.learn(lesson(study, bounds=(0.45, 0.55)))
    assert all(0.45 <= weight <= 0.55 for weight in weights(narrow))


def test_a_preference_leads_to_its_own_side(study: Study, worker: Worker) -> None:
    domain = worker.learn(lesson(study, preference=(("clinical", 1.0),), steps=12))
    general = worker.learn(lesson(study, preference=(("clinical", 0.0),), steps=12))
    scores = {name: [o.value for o in worker.evaluate(recipe, "search").outcomes if o.task == "skill"]
              for name, recipe in (("domain", domain.recipe), ("general", general.recipe))}  # fmt: skip
    assert sum(scores["domain"]) < sum(scores["general"])  # bits of the domain's texts


def test_kept_items_are_never_learned_from() -> None:
    examples = [Example(task, str(i), (), (), (), 1.0) for task in ("a", "b") for i in range(11)]
    seen, kept = split_examples(examples)
    assert len(kept) == 2 * (11 // KEPT)
    assert not {(e.task, e.item) for e in seen} & {(e.task, e.item) for e in kept}
    batches = minibatches(seen, seed=1)
    drawn = [(e.task, e.item) for _ in range(9) for e in next(batches)]
    assert set(drawn) == {(e.task, e.item) for e in seen}
    assert max(map(drawn.count, drawn)) - min(map(drawn.count, drawn)) <= 1  # read through before any is read again


def test_steps_go_downhill_and_fall_to_nothing() -> None:
    descent = Descent(np.array([[0.5, 0.5]]), 20, (-1.0, 2.0))
    places = [descent.weights.copy()]
    for _ in range(20):
        descent.step(descent.weights - np.array([[0.2, 0.9]]))
        places.append(descent.weights.copy())
    assert np.allclose(descent.weights, [[0.2, 0.9]], atol=0.05)
    assert np.abs(places[-1] - places[-2]).max() < 0.01


def test_random_masks_are_held_while_weights_are_learned(study: Study, worker: Worker) -> None:
    plain = Recipe.from_json(lesson(study).start)
    dropped = (*plain.settings, Setting("density", "clinical", "", 0.5), Setting("normalize", "", "", 0.0))
    start = Recipe("dare_linear", plain.base, plain.experts, dropped)
    learned = Recipe.from_json(worker.learn(lesson(study, start=start.to_json(), steps=4)).recipe)
    assert learned.digest != start.digest
    assert learned.mask_seed == start.mask_seed
    assert learned.value("density", expert="clinical") == 0.5
