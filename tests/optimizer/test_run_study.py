"""A whole study with real workers, and what befalls its checkpoints on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from optimizer import run_study as run_study_module
from optimizer.errors import SearchError
from optimizer.run_study import run_study
from optimizer.runs.run_folder import RunFolder
from optimizer.search.events import Event
from optimizer.views.progress import Progress
from tests.optimizer.small_study import write_study

pytestmark = pytest.mark.slow  # whole studies are run

TRIALS = 7


def cut_short(file: Path) -> None:
    """In place: the mapped pages are gone, and a worker that reads them dies of SIGBUS."""
    os.truncate(file, file.stat().st_size // 2)


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(bytes(reversed(file.read_bytes())))
    other.rename(file)


def trials_of(run: Path) -> list[FrozenTrial]:
    return optuna.load_study(study_name=None, storage=RunFolder(run).storage()).get_trials(deepcopy=False)


@pytest.mark.parametrize("change", [cut_short, replaced])
def test_a_checkpoint_that_changes_in_mid_run_stops_it_and_burns_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    study, shard = write_study(tmp_path, trials=TRIALS), tmp_path / "expert" / "model.safetensors"
    kept, about = shard.read_bytes(), shard.stat()

    def change_after_the_fourth(progress: Progress, run: RunFolder, event: Event) -> None:
        if (event.kind, event.trial) == ("trial", 3):
            change(shard)

    console = Console(file=(tmp_path / "shown").open("w"))
    monkeypatch.setattr(run_study_module, "_tell_both", change_after_the_fourth)
    with pytest.raises(SearchError, match=f"{shard} changed"):
        run_study(study, (), console)
    states = [trial.state for trial in trials_of(tmp_path / "runs" / "small")]
    assert states.count(TrialState.COMPLETE) == 4
    assert TrialState.FAIL not in states

    shard.write_bytes(kept)
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))
    monkeypatch.undo()
    states = [trial.state for trial in trials_of(run_study(study, (), console).path)]
    assert states.count(TrialState.COMPLETE) == TRIALS
    assert set(states) == {TrialState.COMPLETE, TrialState.WAITING}  # there are more anchors than trials
