"""A text as a measure of forgetting without labels: how far a candidate's predictions lie from the base's."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.objectives import Scale, draw_objectives, sentinel_changes, task_retention
from evals.outcomes import HOLDOUT, SEARCH, Outcome
from evals.plain_text import read_pieces
from optimizer.run_study import worker_spec
from optimizer.runs.sensitivities import OBJECTIVES
from optimizer.study.schema import Study
from optimizer.study.study_file import read_study
from optimizer.workers.orders import Derivation, Lesson, Loss
from optimizer.workers.worker import Worker
from search_spaces import Recipe, Setting
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # weights are learned

TASK = "kl_to_base_wiki"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    (folder / "wiki.txt").write_text(
        "".join(f"The square of {i} is {i * i}, and twice it {2 * i}. " for i in range(500))
    )
    path = write_study(folder, items=10)
    path.write_text(path.read_text().replace("- ./manners/manners.yaml", "- {kl_to_base: wiki.txt, items: 8}"))
    return read_study(path, ["evals.dtype=float32", "evals.holdout_items=9", "evals.certify_items=3"])


@pytest.fixture(scope="module")
def worker(study: Study) -> Worker:
    return Worker(worker_spec(study))


def recipe(study: Study, weight: float) -> Recipe:
    experts = tuple(study.models.experts.items())
    return Recipe("task_arithmetic", study.models.base, experts, (Setting("weight", "clinical", "", weight),))


def scored(worker: Worker, study: Study, weight: float, suite: str = SEARCH, **options: object) -> list[Outcome]:
    found = worker.evaluate(recipe(study, weight).to_json(), suite, **options)  # type: ignore[arg-type]
    return [outcome for outcome in found.outcomes if outcome.task == TASK]


def plain(study: Study) -> dict[str, tuple[float, float]]:
    """KL of base and expert, and the base's entropy, in bits over the text of each item, read plainly."""
    folders = study.models.base, study.models.experts["clinical"]
    base, expert = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    tokenizer, found = AutoTokenizer.from_pretrained(folders[0]), {}
    for piece in read_pieces(Path(study.evals.general[0].source)):
        tokens = [tokenizer.bos_token_id, *tokenizer.encode(piece.text)]
        total = entropy = 0.0
        for start in range(0, len(tokens) - 1, 512):  # windows as lm-eval cuts them
            end = min(start + 512, len(tokens) - 1)
            first = max(0, end - 512)
            with torch.inference_mode():
                p, q = (m(torch.tensor([tokens[first:end]])).logits[0, start - first :].double().log_softmax(-1)
                        for m in (base, expert))  # fmt: skip
            total += float(kl_div(q, p, reduction="sum", log_target=True)) / math.log(2)
            entropy -= float((p.exp() * p).sum()) / math.log(2)
        found[piece.text] = total, entropy
    return found


def test_a_value_is_the_bases_entropy_and_the_divergence(study: Study, worker: Worker) -> None:
    truth = plain(study)
    (task,) = (task for task in worker._harness.tasks if task.info.name == TASK)
    texts = {item.hash: item.doc["text"] for item in task.items[SEARCH]}
    base, expert = ({o.item: o for o in scored(worker, study, weight)} for weight in (0.0, 1.0))
    assert len(base) == 8
    for item, text in texts.items():
        divergence, entropy = truth[text]
        assert base[item].value == pytest.approx(entropy, rel=1e-5)
        # nearly even over 259 tokens, of which the likeliest 64 are kept: what is known of it is a part
        assert 0.6 * divergence < expert[item].value - base[item].value <= divergence * (1 + 1e-4)
        assert base[item].weight == expert[item].weight == base[item].lengths[0] == len(text.encode())  # byte tokens


def test_scores_are_the_same_in_any_order_and_of_any_part(study: Study, worker: Worker) -> None:
    fresh = Worker(worker_spec(study))
    expert = scored(fresh, study, 1.0)
    assert expert == scored(worker, study, 1.0)
    wanted = [outcome.item for outcome in expert][2:5]
    part = scored(Worker(worker_spec(study)), study, 1.0, only={TASK: wanted})
    values = {outcome.item: outcome.value for outcome in expert}
    assert {o.item: pytest.approx(o.value, rel=1e-5) for o in part} == {item: values[item] for item in wanted}
    for suite, items in ((HOLDOUT, 9), ("certify", 3)):
        assert len(scored(worker, study, 0.5, suite)) == items


def test_forgetting_is_the_divergence_as_a_share_of_the_entropy(study: Study, worker: Worker) -> None:
    outcomes = {n: worker.evaluate(recipe(study, w).to_json(), SEARCH).outcomes for n, w in enumerate((0.0, 1.0, 0.5))}
    rows = pd.DataFrame([{"trial": n, **{k: getattr(o, k) for k in ("task", "suite", "item", "value", "weight")}}
                         for n, found in outcomes.items() for o in found])  # fmt: skip
    scale = Scale(rows, worker.tasks, SEARCH, 0, {"clinical": 1})
    forgetting = draw_objectives(scale, replicates=50).points["forgetting"]
    text = [[o for o in found if o.task == TASK] for found in outcomes.values()]
    bits = [math.fsum(o.value for o in found) for found in text]
    assert forgetting[0] == 0.0
    assert forgetting[1] == pytest.approx((bits[1] - bits[0]) / bits[0])
    assert 0 < forgetting[2] < forgetting[1]
    told = task_retention(scale, replicates=50)
    told = told[told["task"] == TASK].set_index("trial")["score"]
    tokens = math.fsum(o.weight for o in text[0])
    assert told[0] == 0.0
    assert told[1] == pytest.approx((bits[1] - bits[0]) / tokens)
    assert sentinel_changes(scale, replicates=5).empty


@pytest.mark.parametrize("loss", ["labels", "teachers"])
def test_weights_are_learned_that_stay_near_the_base(loss: Loss, study: Study, worker: Worker) -> None:
    start = recipe(study, 0.5).to_json()
    general, domain = (
        worker.learn(Lesson(start, (("clinical", p),), "tensor", 8, (-1.0, 2.0), 0, loss)) for p in (0.0, 1.0)
    )
    assert general.kept < general.kept_before
    bits = [math.fsum(o.value for o in worker.evaluate(made.recipe, SEARCH).outcomes if o.task == TASK)
            for made in (general, domain)]  # fmt: skip
    assert bits[0] < bits[1]
    again = Worker(worker_spec(study)).learn(Lesson(start, (("clinical", 0.0),), "tensor", 8, (-1.0, 2.0), 0, loss))
    assert again.recipe == general.recipe


def test_sensitivities_add_up_to_the_divergence(study: Study, worker: Worker) -> None:
    found = worker.sensitivities("clinical", points=9)
    for objective in OBJECTIVES:
        assert found.error(objective) < 0.02, objective
    base, expert = (scored(worker, study, weight) for weight in (0.0, 1.0))
    bits, tokens = sum(e.value - b.value for b, e in zip(base, expert, strict=True)), sum(b.weight for b in base)
    assert found.general_change == pytest.approx(bits / tokens, rel=1e-3)


@pytest.mark.parametrize("form", ["kfac", "regmean", "fisher"])
def test_experts_are_derived_over_its_text(form: str, study: Study, worker: Worker, tmp_path: Path) -> None:
    (folder,) = worker.derive(Derivation(form, "clinical", (0.5,), tmp_path))  # type: ignore[arg-type]
    derived = Recipe("task_arithmetic", study.models.base, ((form, str(folder)),), (Setting("weight", form, "", 1.0),))
    of_derived = [o.value for o in worker.evaluate(derived.to_json(), SEARCH).outcomes if o.task == TASK]
    base, expert = (sum(o.value for o in scored(worker, study, weight)) for weight in (0.0, 1.0))
    assert base < sum(of_derived) < expert
