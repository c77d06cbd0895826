"""Drivers killed with SIGKILL at random moments, and what is left of their study beside an undisturbed one.

    python benchmarks/kill_loop.py [--kills 25] [--seed 0] [--workers 2] [--trials 60] [--folder DIR]
                                   [--storage URL | --postgres]

The study is of pico models with real workers. First it is run undisturbed. Then the same study is started again and
again: half of its drivers are killed before they have shown anything, the others while trials run; the last one runs to
the end. Exits 1 where anything was lost or doubled. `--storage` keeps the studies on a database server, `--postgres` on
a PostgreSQL server that is started for it (Debian's package postgresql, the extra `postgres`). With two Ray workers a
kill takes about half a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from optuna.trial import FrozenTrial, TrialState

from evals.outcomes import HOLDOUT, SEARCH
from optimizer.database.study_db import snapshot
from optimizer.database.study_home import stored_trials
from optimizer.runs.manifest import read_manifest, tasks_of
from optimizer.runs.run_folder import RunFolder
from optimizer.runs.trial import DRIVER_DIED, TrialKind
from optimizer.search.events import Event
from optimizer.views.progress import event_text
from search_spaces.recipe import Recipe
from tests.optimizer.small_study import write_study
from tests.postgres import postgres

COMMAND = "from optimizer.cli import main; main()"
AT_WORK = re.compile(r"^[\d:]{8} \d+/\d+ trial \d+ ")
FINISHED = re.compile(AT_WORK.pattern + r".*: domain")
DONE = re.compile(r"\d+ trials finished, \d+ on the front$")
LONGEST_SECONDS = 900.0  # of one driver
POLL_SECONDS = 0.02


@dataclass
class Driver:
    """One `mergefront search`, and what it shows: lines in a file that all drivers of a run share."""

    process: subprocess.Popen[bytes]
    shown: Path
    began: float  # monotonic seconds
    seen: int  # bytes that earlier drivers have shown

    @classmethod
    def start(cls, study: Path, name: str, *, workers: int, trials: int, storage: str | None = None) -> Driver:
        shown = study.parent / f"{name}.txt"
        words = ["search", str(study), f"--set=name={name}", f"--set=search.trials={trials}", f"--workers={workers}"]
        words += [f"--set=search.storage={storage}"] if storage else []
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": root, "COLUMNS": "200", "CI": "1"}
        with shown.open("ab") as output:
            seen, began = shown.stat().st_size, time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *words], stdout=output, stderr=output, env=environment, cwd=study.parent
            )
        return cls(process, shown, began, seen)

    def lines(self) -> list[str]:
        """What it has shown so far."""
        return self.shown.read_bytes()[self.seen :].decode().splitlines()

    def wait_for(self, line: re.Pattern[str]) -> float:
        """Wait until it has shown such a line, or has ended; the seconds since its start."""
        while self.process.poll() is None and not any(map(line.search, self.lines())):
            time.sleep(POLL_SECONDS)
        return time.monotonic() - self.began

    def kill_after(self, seconds: float) -> bool:
        """Kill it, unless it ends by itself before."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return True
        self.finish()
        return False

    def finish(self) -> float:
        """Wait for its end; the seconds since its start."""
        if code := self.process.wait(LONGEST_SECONDS):
            raise SystemExit(f"a driver ended with {code}:\n" + "\n".join(self.lines()[-20:]))
        return time.monotonic() - self.began


def loop(study: Path, *, kills: int, seed: int, workers: int, trials: int, storage: str | None = None) -> None:
    """Run the study undisturbed, then under so many kills."""
    first = Driver.start(study, "undisturbed", workers=workers, trials=trials, storage=storage)
    startup = first.wait_for(AT_WORK)
    work = first.wait_for(DONE) - startup
    first.finish()
    print(f"undisturbed: {startup:.1f} s to start, {work:.1f} s of work")
    rng, at_work = random.Random(seed), 0
    for number in range(kills):
        driver = Driver.start(study, "killed", workers=workers, trials=trials, storage=storage)
        if number % 2:
            driver.wait_for(AT_WORK)
        if not driver.kill_after(rng.uniform(0, 2 * work / kills if number % 2 else startup)):
            print(f"the study was finished after {number} kills: ask for more --trials")
            return
        at_work += any(FINISHED.match(line) for line in driver.lines())
    print(f"{kills} drivers killed, {at_work} of them after they had finished a trial")
    Driver.start(study, "killed", workers=workers, trials=trials, storage=storage).finish()


def faults(study: Path, *, trials: int, storage: str | None = None) -> Iterator[str]:
    """What is wrong with the study whose drivers were killed."""
    broken, whole = (study.parent / "runs" / name for name in ("killed", "undisturbed"))
    if storage is None:
        snapshot(broken / "study.db").close()  # raises where the database is damaged
    found = _trials(broken, storage)
    complete = [trial for trial in found if trial.state == TrialState.COMPLETE]
    yield from _miscounted(found, complete, trials)
    yield from _without_outcomes(RunFolder(broken), complete)
    yield from _other_anchors(
        complete, [trial for trial in _trials(whole, storage) if trial.state == TrialState.COMPLETE]
    )
    yield from _forgotten(study.parent / "killed.txt", complete)


def _trials(run: Path, storage: str | None) -> list[FrozenTrial]:
    return stored_trials(run, read_manifest(run), storage)


def _miscounted(found: list[FrozenTrial], complete: list[FrozenTrial], trials: int) -> Iterator[str]:
    if len(complete) != trials:
        yield f"{len(complete)} trials are finished, the budget is {trials}"
    for trial in found:
        given_up = trial.user_attrs.get("reason") == DRIVER_DIED and "recipe" not in trial.user_attrs
        if trial.state != TrialState.COMPLETE and not given_up:  # killed before it was known what was asked for
            yield f"trial {trial.number} is {trial.state.name.lower()}: {trial.user_attrs.get('reason', '')}"
    for digest, number in Counter(_recipe(trial).digest for trial in complete).items():
        if number > 1:
            yield f"recipe {digest} was scored {number} times"


def _without_outcomes(run: RunFolder, complete: list[FrozenTrial]) -> Iterator[str]:
    tasks = tasks_of(read_manifest(run.path), run.path)
    for trial in complete:
        for suite in (SEARCH, HOLDOUT) if TrialKind.of(trial.user_attrs).is_anchor else (SEARCH,):
            if fault := run.outcomes_fault(trial.number, suite, digest=_recipe(trial).digest, tasks=tasks):
                yield fault


def _other_anchors(complete: list[FrozenTrial], undisturbed: list[FrozenTrial]) -> Iterator[str]:
    ours, theirs = _anchors(complete), _anchors(undisturbed)
    for kind in sorted(ours.keys() | theirs.keys()):
        if ours.get(kind) != theirs.get(kind):
            yield f"anchor {kind}: {ours.get(kind)}, undisturbed {theirs.get(kind)}"


def _anchors(complete: list[FrozenTrial]) -> dict[str, tuple[str, list[float]]]:
    """The digest and the objectives of every anchor, by its kind."""
    kinds = {TrialKind.of(trial.user_attrs): (_recipe(trial).digest, trial.values) for trial in complete}
    return {kind.stored: about for kind, about in kinds.items() if kind.is_anchor}


def _forgotten(shown: Path, complete: list[FrozenTrial]) -> Iterator[str]:
    """Trials that a person was shown as finished, and that the study does not have so, or that were shown twice."""
    told = {}
    for trial in complete:
        event = Event("trial", trial.number, "", 0, 0, tuple(trial.values), TrialKind.of(trial.user_attrs).stored)
        told[event_text(event)] = trial.number
    lines = [line for line in shown.read_text().splitlines() if FINISHED.match(line)]
    known = Counter(number for line in lines for text, number in told.items() if text in line)
    yield from (f"trial {number} was shown {times} times" for number, times in known.items() if times > 1)
    yield from (f"shown, but not in the study: {line}" for line in lines if not any(text in line for text in told))
    print(f"{len(known)} trials were shown as finished")


def _recipe(trial: FrozenTrial) -> Recipe:
    return Recipe.from_json(trial.user_attrs["recipe"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=2, help="Ray workers; 0 is the driver itself")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="a new folder to work in, kept; default: a temporary one")
    parser.add_argument("--storage", help="the URL of a database server to keep both studies on")
    parser.add_argument("--postgres", action="store_true", help="start a PostgreSQL server, and keep them on it")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="kill-loop-") as temporary,
        postgres() if given.postgres else nullcontext(given.storage) as storage,
    ):
        study = write_study(given.folder or Path(temporary))
        loop(study, kills=given.kills, seed=given.seed, workers=given.workers, trials=given.trials, storage=storage)
        found = list(faults(study, trials=given.trials, storage=storage))
    print("\n".join(found) or "nothing was lost, nothing was doubled; the anchors are the undisturbed run's")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
