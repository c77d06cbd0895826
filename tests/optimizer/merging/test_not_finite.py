"""One number of an expert that is not finite, through the search itself: a FAIL with the tensor's name, no score."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file, save_file

from optimizer.errors import SearchError
from optimizer.run_study import make_pool, preparation_of, worker_spec
from optimizer.runs.run_folder import RunFolder
from optimizer.search.driver import run_search
from optimizer.search.plan import make_plan, require_sound
from optimizer.study.schema import Study
from optimizer.study.study_file import read_study
from optimizer.workers.pool import Only, SerialPool
from optimizer.workers.worker import Evaluation, Worker
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # whole studies are run

TENSOR = "model.layers.1.mlp.down_proj.weight"
BAD = [float("nan"), float("-inf")]
KINDS = {
    "multiple_choice": "doc_to_choice: ['{{text[:3]}}', other]\ndoc_to_target: 0\n"
    "metric_list: [{metric: acc, aggregation: mean}]\n",
    "loglikelihood": "doc_to_target: ' end'\nmetric_list: [{metric: acc, aggregation: mean}]\n",
    "loglikelihood_rolling": "doc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]\n",
    "generate_until": "doc_to_target: end\ngeneration_kwargs: {until: ['.'], max_gen_toks: 3}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}


def plant(expert: Path, bad: float) -> None:
    tensors = load_file(expert / "model.safetensors")
    tensors[TENSOR][3, 5] = bad
    (expert / "model.safetensors").unlink()  # a worker may have mapped the old file
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})


def searched(study: Study, pool: SerialPool) -> tuple[RunFolder, list[FrozenTrial]]:
    """The trials of a search that has to stop because of a tensor."""
    plan = make_plan(study)
    ready = require_sound(plan)
    tasks = ready.harness.infos
    run = RunFolder.create_or_resume(study.run_path, "name: small\n", {}, tasks=tasks)
    with run.lock(), pytest.raises(SearchError, match=TENSOR):
        run_search(
            study.search,
            run,
            space=ready.space,
            pool=pool,
            tasks=tasks,
            require_unchanged=lambda: None,
            events=print,
            preparation=preparation_of(ready),
        )
    return run, optuna.load_study(study_name=None, storage=run.storage()).get_trials(deepcopy=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD)
def test_an_expert_that_is_not_finite_fails_whatever_the_task_asks(tmp_path: Path, kind: str, bad: float) -> None:
    path = write_study(tmp_path)
    for task in ("skill", "manners"):
        file = tmp_path / task / f"{task}.yaml"
        head = file.read_text().split("output_type")[0]
        file.write_text(f"{head}output_type: {kind}\ndoc_to_text: '{{{{text}}}}'\n{KINDS[kind]}")
    plant(tmp_path / "expert", bad)
    study = read_study(path)
    pool = make_pool(study)
    assert isinstance(pool, SerialPool)
    run, trials = searched(study, pool)
    failed = {trial.user_attrs["kind"]: trial for trial in trials if trial.state == TrialState.FAIL}
    assert list(failed) == ["expert:clinical"]
    assert TENSOR in failed["expert:clinical"].user_attrs["reason"]
    assert not run.has_outcomes(failed["expert:clinical"].number, "search")
    assert run.has_outcomes(0, "search")  # the base, in the same resident model, has its score


class Spoilt:
    """A worker whose expert is sound for the base and the expert's own trial, and is not from then on."""

    def __init__(self, study: Study, bad: float) -> None:
        self._make = partial(Worker, worker_spec(study))
        self._worker = self._make()
        self._expert = Path(study.models.experts["clinical"])
        self._bad, self._asked = bad, 0

    def evaluate(self, recipe: str, suite: str, only: Only | None = None) -> Evaluation:
        if self._asked == 2:
            plant(self._expert, self._bad)
            self._worker = self._make()
        self._asked += 1
        return self._worker.evaluate(recipe, suite, only)


@pytest.mark.parametrize("bad", BAD)
def test_trials_of_such_an_expert_end_as_fail_beside_those_that_stand(tmp_path: Path, bad: float) -> None:
    study = read_study(write_study(tmp_path, trials=20))
    run, trials = searched(study, SerialPool(partial(Spoilt, study, bad)))
    states = [trial.state for trial in trials]
    assert states[:2] == [TrialState.COMPLETE] * 2
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert len(failed) >= 3
    assert TrialState.COMPLETE not in states[2:]
    for trial in failed:
        assert TENSOR in trial.user_attrs["reason"]
        assert trial.values is None
        assert not run.has_outcomes(trial.number, "search")
