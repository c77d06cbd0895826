"""Weights learned by gradients: downhill on the items, alike on every worker, within their bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from evals.losses import Example
from evals.packing import build_trie
from evals.tokens import Pair
from optimizer.errors import MergeError
from optimizer.run_study import worker_spec
from optimizer.study.study_file import Study
from optimizer.workers.aims import Aims, size_of
from optimizer.workers.learner import KEPT, Descent, Learner, Places, minibatches, split_examples
from optimizer.workers.orders import PULLS, Learned, Lesson, counts, loss_unit
from optimizer.workers.worker import Worker
from search_spaces import Recipe, Setting

pytestmark = pytest.mark.slow  # weights are learned


def test_a_group_starts_at_the_mean_of_its_tensors_and_what_is_learned_knows_no_kinds() -> None:
    names = [f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    settings = (Setting("weight", "law", "layer.00.attn", 0.2), Setting("weight", "law", "layer.00.qk", 0.6))
    start = Recipe("task_arithmetic", "b", (("law", "l"),), settings, kinds=(("qk", ("q_proj", "k_proj")),))
    by_tensor, by_group = (Places.of(names, ["law"], by) for by in ("tensor", "group"))
    assert by_tensor.weights(start).tolist() == [[0.6, 0.6, 0.2, 0.2]]
    assert by_group.weights(start).tolist() == [[pytest.approx(0.4)]]
    learned = by_group.recipe(start, np.array([[0.7]]))
    assert (learned.kinds, [(s.group, s.value) for s in learned.settings]) == ((), [("layer.00.attn", 0.7)])


@pytest.mark.parametrize("by", ["tensor", "group"])
def test_what_else_a_start_has_for_kinds_stays(by: str) -> None:
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qv"]
    settings = [Setting("density", "", "", 0.5), Setting("density", "", "layer.00.reads", 0.25)]
    start = Recipe(
        "ties",
        "base",
        (("law", "expert"),),
        (*settings, Setting("weight", "law", "", 0.5)),
        kinds=(("reads", ("q_proj",)),),
    )
    places = Places.of(names, ["law"], by)
    learned = places.recipe(start, places.weights(start) + 0.25)
    assert [learned.value("density", group=name) for name in names] == [0.25, 0.5]
    assert [learned.value("weight", expert="law", group=name) for name in names] == [0.75, 0.75]


def lesson(study: Study, **changes: object) -> Lesson:
    start = Recipe(
        "task_arithmetic",
        study.models.base,
        tuple(study.models.experts.items()),
        (Setting("weight", "clinical", "", 0.5),),
    )
    plain = Lesson(start.to_json(), (("clinical", 0.5),), "tensor", 8, (-1.0, 2.0), 0)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture
def fresh(study: Study) -> Worker:
    """A worker that has learned nothing yet."""
    return Worker(worker_spec(study))


def weights(learned: Learned) -> list[float]:
    return [setting.value for setting in Recipe.from_json(learned.recipe).settings if setting.parameter == "weight"]


@pytest.mark.parametrize("loss", ["labels", "teachers"])
def test_what_is_learned_has_a_lower_loss_than_the_start(loss: str, study: Study, worker: Worker) -> None:
    learned = worker.learn(lesson(study, loss=loss))
    assert learned.steps > 0
    assert learned.kept < learned.kept_before
    assert learned.seen < learned.seen_before
    assert learned.candidates > 3  # eight steps backward over part of the items, and the looks


@pytest.mark.parametrize("loss", ["labels", "teachers"])
def test_the_same_lesson_gives_the_same_weights_on_any_worker_and_in_any_order(
    loss: str, study: Study, worker: Worker, fresh: Worker
) -> None:
    first = worker.learn(lesson(study, loss=loss))
    worker.learn(lesson(study, preference=(("clinical", 1.0),)))
    worker.learn(lesson(study, loss="teachers"))
    other = fresh.learn(lesson(study, loss=loss))
    again = worker.learn(lesson(study, loss=loss))
    assert first.recipe == again.recipe == other.recipe
    assert (first.kept, first.seen) == (again.kept, again.seen) == (other.kept, other.seen)


def test_weights_are_by_tensor_or_by_group_and_within_their_bounds(study: Study, worker: Worker) -> None:
    by_group = Recipe.from_json(worker.learn(lesson(study, by="group")).recipe)
    assert not by_group.tensors
    assert {s.group for s in by_group.settings if s.parameter == "weight"} >= {"embed", "layer.00.attn", "head"}
    narrow = worker.learn(lesson(study, bounds=(0.45, 0.55)))
    assert all(0.45 <= weight <= 0.55 for weight in weights(narrow))


@pytest.mark.parametrize("loss", ["labels", "teachers"])
def test_a_preference_leads_to_its_own_side(loss: str, study: Study, worker: Worker) -> None:
    domain = worker.learn(lesson(study, preference=(("clinical", 1.0),), steps=12, loss=loss))
    general = worker.learn(lesson(study, preference=(("clinical", 0.0),), steps=12, loss=loss))
    scores = {name: [o.value for o in worker.evaluate(recipe, "search").outcomes if o.task == "skill"]
              for name, recipe in (("domain", domain.recipe), ("general", general.recipe))}  # fmt: skip
    assert sum(scores["domain"]) < sum(scores["general"])  # bits of the domain's texts


@pytest.mark.parametrize(("items", "kept"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (9, 1), (10, 2)])
def test_small_tasks_keep_an_item_apart_too(items: int, kept: int) -> None:
    examples = [Example("a", str(i), (), (), (), 1.0) for i in range(items)]
    assert [len(part) for part in split_examples(examples)] == [items - kept, kept]


def test_kept_items_are_never_learned_from() -> None:
    examples = [Example(task, str(i), (), (), (), 1.0) for task in ("a", "b") for i in range(11)]
    seen, kept = split_examples(examples)
    assert len(kept) == 2 * (11 // KEPT)
    assert not {(e.task, e.item) for e in seen} & {(e.task, e.item) for e in kept}
    batches = minibatches(seen, 1, questions=10, texts=2)
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


def test_divergences_count_in_shares_of_that_between_base_and_expert(study: Study, worker: Worker) -> None:
    seen, kept = split_examples(worker.examples())
    aims = Aims(worker, seen, kept, tasks=worker.tasks, base=study.models.base, experts=study.models.experts)
    for preference in (1.0, 0.0):
        aim = aims.aim("teachers", {"clinical": preference})
        base, expert = (aim.read(aims.only(name), seen) for name in ("", "clinical"))
        assert expert - base == pytest.approx(1 - 2 * preference, abs=1e-5)


def test_tasks_share_their_sides_preference_by_weight(worker: Worker) -> None:
    heavy = [dataclasses.replace(task, weight=3.0, name="other") for task in worker.tasks if task.role == "general"]
    found = [*counts({"clinical": 0.6}, [*worker.tasks, *heavy])]
    assert [(name, share) for _, name, share in found if name] == [("clinical", pytest.approx(0.6))]
    assert [share for _, name, share in found if not name] == [pytest.approx(0.1), pytest.approx(0.3)]
    assert loss_unit(0.5, 2.0) == 0.5
    assert loss_unit(-0.5, 2.0) == loss_unit(0.01, 2.0) == pytest.approx(0.1)  # an expert that hardly moved it


def test_teachers_at_their_own_place_ask_for_no_step(study: Study, worker: Worker) -> None:
    whole = Setting("weight", "clinical", "", 1.0)
    start = dataclasses.replace(Recipe.from_json(lesson(study).start), settings=(whole,)).to_json()
    learned = worker.learn(lesson(study, start=start, preference=(("clinical", 1.0),), loss="teachers", steps=2))
    assert learned.kept_before == pytest.approx(0.0, abs=1e-4)
    assert learned.steps == 0


def test_the_cost_is_that_of_the_steps_and_little_more(
    study: Study, fresh: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {"forward": 0, "backward": 0}

    def count(name: str, kind: str) -> None:
        real = getattr(fresh.engine, name)

        def counted(pairs: Sequence[Pair], *more: object) -> object:
            read[kind] += len(build_trie(dict(enumerate(pairs))))
            return real(pairs, *more)

        monkeypatch.setattr(fresh.engine, name, counted)

    examples = fresh.examples()
    whole, (seen, kept) = size_of(examples), split_examples(examples)
    for name, kind in (("loglikelihoods", "forward"), ("agreements", "forward"), ("beliefs", "forward")):
        count(name, kind)
    count("backward", "backward")
    for i, (loss, ends) in enumerate((("labels", 2), ("labels", 0), ("teachers", 0))):
        read |= {"forward": 0, "backward": 0}
        learned = fresh.learn(lesson(study, loss=loss))
        assert learned.candidates == pytest.approx((read["forward"] + 3 * read["backward"]) / whole, abs=1e-9)
        at_start = i != 1  # the second lesson knows what base, expert and start lose
        first = next(minibatches(seen, 0, questions=10, texts=2))
        looks = (3 + len(PULLS) + at_start) * size_of(kept) + size_of(first)
        sides = [[e for e in seen if e.task == task] for task in ("skill", "manners")]
        everything = [[e for e in examples if e.task == task] for task in ("skill", "manners")]
        taught = sum(map(size_of, sides + everything))  # beliefs of all, each side's divergence at the other's end
        assert read["forward"] == looks + (taught if loss == "teachers" else ends * size_of(seen)), (loss, i)


def test_with_a_bank_the_cost_counts_in_candidates_of_drawn_items(study: Study, fresh: Worker) -> None:
    examples, whole = fresh.examples(), fresh.learn(lesson(study)).candidates
    tasks = [dataclasses.replace(task, drawn_items=4) for task in fresh.tasks]
    learner = Learner(fresh, examples, tasks=tasks, base=study.models.base, experts=study.models.experts)
    drawn = [e for task in tasks for e in [e for e in examples if e.task == task.name][:4]]
    assert learner.learn(lesson(study)).candidates == pytest.approx(whole * size_of(examples) / size_of(drawn))


def test_items_that_count_nothing_are_not_read(study: Study, worker: Worker) -> None:
    worker.learn(lesson(study))
    both, one = (worker.learn(lesson(study, preference=(("clinical", p),))).candidates for p in (0.5, 1.0))
    assert one < 0.7 * both


def test_a_gradient_that_is_no_number_names_its_tensor(study: Study, worker: Worker) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, states: torch.Tensor) -> torch.Tensor:
            return states.clone()

        @staticmethod
        def backward(_: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * torch.nan

    before = worker.learn(lesson(study))
    (module,) = (m for name, m in worker.engine.model.named_modules() if name.endswith("layers.1.mlp.down_proj"))
    hook = module.register_forward_hook(lambda _module, _given, states: Broken.apply(states))
    try:
        with pytest.raises(MergeError, match=r"must be finite.*clinical.*layers\.1\.mlp\.down_proj\.weight is nan"):
            worker.learn(lesson(study))
    finally:
        hook.remove()
    assert worker.learn(lesson(study)).recipe == before.recipe
