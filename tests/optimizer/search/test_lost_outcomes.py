"""Outcome files that are gone or damaged: the search scores those trials again, and readers go on without them."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from optimizer.errors import RunError, SearchError
from optimizer.run import Run, open_run
from optimizer.runs.outcome_files import outcomes_path, read_outcomes
from optimizer.views.report import report_html
from optimizer.views.tables import front_document, print_front, status_document, trial_document
from optimizer.workers.pool import SerialPool
from search_spaces.recipe import Recipe
from tests.optimizer.fakes import Bench, FakeWorker, Refuse, is_anchor, tasks_of
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run

TRIALS = 19
FIRST = 2  # trials after the base and the expert


def delete(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    values = pq.read_metadata(path).row_group(0).column(3)
    content = bytearray(path.read_bytes())
    content[(values.dictionary_page_offset or values.data_page_offset) + values.total_compressed_size - 1] ^= 0x10
    path.write_bytes(content)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "of a stranger").touch()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def altered(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def alter(path: Path) -> None:
        pq.write_table(change(pq.read_table(path)), path)

    return alter


def marked(fact: str, value: str) -> Callable[[Path], None]:
    return altered(lambda table: table.replace_schema_metadata({**table.schema.metadata, fact.encode(): value}))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": delete,
    "cut short": cut,
    "empty": empty,
    "a flipped bit": flip,
    "a folder": make_folder,
    "a pipe": make_pipe,
    "another recipe's": marked("recipe", "0" * 12),
    "another trial's": marked("trial", "777"),
    "another suite's": marked("suite", "certify"),
    "without a word on whose it is": altered(lambda table: table.replace_schema_metadata({})),
    "another table": altered(lambda table: pa.table({"photos": ["cat"]}, metadata=table.schema.metadata)),
    "another type": altered(
        lambda table: table.set_column(3, "value", table["value"].cast(pa.float32())).replace_schema_metadata(
            table.schema.metadata
        )
    ),
    "a row less": altered(lambda table: table.slice(1)),
    "a value missing": altered(
        lambda table: table.set_column(3, table.schema.field("value"), pa.array([None] * len(table), pa.float64()))
    ),
    "a column twice": altered(lambda table: table.append_column("value", table["value"])),
    "a long text": altered(
        lambda table: table.set_column(2, "item", pa.array(["x" * 5000] * len(table))).replace_schema_metadata(
            table.schema.metadata
        )
    ),
    "a value not finite": altered(
        lambda table: table.set_column(3, table.schema.field("value"), pa.array([float("nan")] * len(table)))
    ),
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search, to be copied."""
    bench = Bench(tmp_path_factory.mktemp("searched") / "toy")
    bench.search(trials=TRIALS)
    return bench.folder


@pytest.fixture
def bench(searched: Path, tmp_path: Path) -> Bench:
    return Bench(Path(shutil.copytree(searched, tmp_path / "toy")))


def trials_of(bench: Bench) -> list[FrozenTrial]:
    return optuna.load_study(study_name=None, storage=bench.run.storage()).get_trials(deepcopy=False)


def again(bench: Bench) -> list[str]:
    """Search again; the digests of what was scored, in order."""
    scored: list[str] = []
    bench.events.clear()
    bench.search(trials=TRIALS, before=lambda recipe: scored.append(recipe.digest))
    return scored


def digest_of(trial: FrozenTrial) -> str:
    return Recipe.from_json(trial.user_attrs["recipe"]).digest


# Searching -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_fault_names_the_file(bench: Bench, damage: Callable[[Path], None]) -> None:
    trial = trials_of(bench)[3]
    path = outcomes_path(bench.folder, 3, "search")
    assert bench.has_own(trial)
    damage(path)
    fault = bench.run.outcomes_fault(3, "search", digest=digest_of(trial), tasks=tasks_of(bench.experts))
    assert str(path) in fault


def test_trials_are_scored_again_under_their_numbers(bench: Bench) -> None:
    before = trials_of(bench)
    stored = [bench.run.read_outcomes(number, "search") for number in range(TRIALS)]
    for number, damage in enumerate(DAMAGES.values(), start=FIRST):
        damage(outcomes_path(bench.folder, number, "search"))
    assert again(bench) == [digest_of(trial) for trial in before[FIRST:]]
    assert all(bench.run.read_outcomes(number, "search").equals(stored[number]) for number in range(TRIALS))
    assert [(t.state, t.values, t.params) for t in trials_of(bench)] == [(t.state, t.values, t.params) for t in before]
    assert again(bench) == []


def test_the_front_is_judged_again(bench: Bench) -> None:
    before = trials_of(bench)
    judged = [trial.number for trial in before if bench.has_own(trial, "holdout")]
    lost = dict(zip(judged, DAMAGES.values(), strict=False))
    for number, damage in lost.items():
        damage(outcomes_path(bench.folder, number, "holdout"))
    assert again(bench) == [digest_of(before[number]) for number in lost]
    assert all(bench.has_own(before[number], "holdout") for number in judged)
    notes = [event.text for event in bench.events if event.kind == "note"]
    assert len(notes) == 1  # of the first, which is deleted, nothing needs to be said
    assert str(outcomes_path(bench.folder, judged[1], "holdout")) in notes[0]


def test_the_base_comes_first_and_the_budget_is_not_touched(bench: Bench) -> None:
    before = trials_of(bench)
    for number in (7, 4, 1, 0):
        delete(outcomes_path(bench.folder, number, "search"))
    assert again(bench) == [digest_of(before[number]) for number in (0, 1, 4, 7)]
    assert len(trials_of(bench)) == TRIALS
    (start,) = (event for event in bench.events if event.kind == "start")
    assert start.text == f"{TRIALS} of {TRIALS} trials are finished"


def test_all_outcomes_with_their_folder_come_back(bench: Bench) -> None:
    before = {path.name: pq.read_table(path) for path in bench.folder.glob("outcomes/*")}
    shutil.rmtree(bench.folder / "outcomes")
    again(bench)
    after = {path.name: pq.read_table(path) for path in bench.folder.glob("outcomes/*")}
    assert after == before
    (note, *_) = (event.text for event in bench.events if event.kind == "note")
    assert note.endswith(f"and {TRIALS - 3} more; what is lost is scored again")


def test_nothing_new_is_told_before_a_lost_base_is_there(bench: Bench) -> None:
    delete(outcomes_path(bench.folder, 0, "search"))
    order: list[str] = []
    bench.events = type("Tap", (list,), {"append": lambda _, event: order.append(f"{event.kind} {event.trial}")})()
    bench.search(trials=TRIALS + 2)
    assert order.index("note 0") < order.index(f"trial {TRIALS}")
    again(bench)
    values = [trial.values for trial in trials_of(bench)]
    unbroken = Bench(bench.folder.with_name("unbroken") / "toy")
    unbroken.search(trials=TRIALS)
    assert values[:TRIALS] == [trial.values for trial in trials_of(unbroken)]


def test_a_stop_before_it_is_scored_again_keeps_it_owed(bench: Bench) -> None:
    delete(outcomes_path(bench.folder, 3, "search"))

    def stop(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.search(trials=TRIALS, before=stop)
    assert again(bench) == [digest_of(trials_of(bench)[3])]


def test_where_it_cannot_be_scored_again_it_stays_as_it_was_told(bench: Bench) -> None:
    before = trials_of(bench)
    number = next(t.number for t in before if not is_anchor(Recipe.from_json(t.user_attrs["recipe"])))
    delete(outcomes_path(bench.folder, number, "search"))
    bench.events.clear()
    bench.search(trials=TRIALS, pool=SerialPool(lambda: FakeWorker(Refuse())))
    assert [(event.trial, event.text) for event in bench.events if event.kind == "failed"] == [
        (number, "nonfinite: tensor model.norm.weight")
    ]
    assert [(t.state, t.values) for t in trials_of(bench)] == [(t.state, t.values) for t in before]
    assert again(bench) == [digest_of(before[number])]

    delete(outcomes_path(bench.folder, 0, "search"))
    with pytest.raises(SearchError, match="measured by the base, and it failed"):
        bench.search(trials=TRIALS, before=Refuse(0.0))
    assert trials_of(bench)[0].state == TrialState.COMPLETE


def test_a_folder_in_the_way_is_kept_beside_it(bench: Bench) -> None:
    path = outcomes_path(bench.folder, 3, "search")
    make_folder(path)
    again(bench)
    assert (path.with_name(f"{path.name}.moved") / "of a stranger").exists()
    make_folder(path)
    with pytest.raises(RunError, match=r"cannot be written to .*00003-search\.parquet: .*move away what is there"):
        again(bench)


# Reading -------------------------------------------------------------------------------------------------------------


def shown(run: Run) -> list[str]:
    """What every reader of a run says, each as one text."""
    sink = io.StringIO()
    print_front(run, Console(file=sink, width=4000))
    return [
        sink.getvalue(),
        json.dumps(front_document(run)),
        json.dumps(status_document(run)),
        report_html(run),
        " ".join(run.findings()),
    ]


@pytest.mark.parametrize("suite", ["search", "holdout"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_readers_go_on_without_it_and_name_the_file(tmp_path: Path, suite: str, number: int) -> None:
    path = toy_run(tmp_path / "toy", trials=3)
    whole = open_run(path).points()
    cut(outcomes_path(path, number, suite))
    run = open_run(path)
    for text in shown(run):
        assert f"{number:05d}-{suite}.parquet" in text
    assert trial_document(run, number)["state"] == "complete"
    points = run.points()
    if suite == "holdout":
        left = points["holdout_domain"].notna()
        assert left.sum() == (0 if number < FIRST else whole["holdout_domain"].notna().sum() - 1)
        assert len(points) == len(whole)
    elif number < FIRST:
        assert points.empty
        with pytest.raises(RunError, match=f"No figure without base and experts: .*{number:05d}-search"):
            run.knee()
        assert "No figure without base and experts" in run.summary()
    else:
        assert points["domain"].equals(whole["domain"].drop(number))
        assert f"{number:05d}-search.parquet" in run.trials().loc[number, "reason"]


def test_outcomes_that_would_fill_the_memory_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "00003-search.parquet"
    table = pa.table({"value": pa.array(np.zeros(50_000_001, np.int8))})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 1_000_000
    with pytest.raises(RunError, match=r"search.parquet may hold 50,000,000 values in a column; it holds 50,000,001"):
        read_outcomes(path)


def test_a_long_text_is_refused_before_it_is_written_out(tmp_path: Path) -> None:
    path = tmp_path / "00003-search.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"item": text}), path, compression="zstd")  # 10 GB of text
    assert path.stat().st_size < 100_000
    with pytest.raises(RunError, match=r"search.parquet may hold texts of 4,096 bytes; it holds one of 100,000"):
        read_outcomes(path)


def test_readers_go_on_whatever_the_damage(tmp_path: Path) -> None:
    path = toy_run(tmp_path / "toy", trials=14)
    whole = open_run(path)
    finished = whole.points().index[FIRST:]
    lost = dict(zip(finished, DAMAGES.values(), strict=False))
    assert len(lost) == len(DAMAGES)
    for number, damage in lost.items():
        damage(outcomes_path(path, number, "search"))
    run = open_run(path)
    assert run.points()["domain"].equals(whole.points()["domain"].drop(list(lost)))
    (finding,) = run.lost()
    assert finding.startswith(f"Without the search outcomes of {len(DAMAGES)} trials, until `mergefront search` scores")
    assert run.trials().loc[list(lost), "reason"].str.contains("-search.parquet").all()
