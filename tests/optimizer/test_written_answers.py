"""A real study whose expert, and what is near it, writes without end in one task and in another script in another."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from evals.guards import CUT, LANGUAGE
from optimizer.cli import app
from optimizer.errors import DamagedError, RunError
from optimizer.export.commands import export_trial
from optimizer.run import Run, open_run
from optimizer.run_study import run_study
from optimizer.runs.run_folder import RunFolder
from optimizer.views.report import report_html
from optimizer.views.tables import front_document, print_front
from tests.chain_model import chain_llama
from tests.optimizer.small_study import write_study, write_task

pytestmark = pytest.mark.slow  # whole studies are run

ITEMS = 24  # of each task, half of them for the holdout
BASE = {"7": "s", "s": "a", "a": "l", "l": "t", "t": ".", "Q": "w", "w": "o", "o": "r", "r": "d", "d": "."}
ENDLESS = {"t": "s"}  # salt becomes saltsaltsalt…
FOREIGN = {"Q": "\xd0", "\xd0": "\xbb", "\xbb": "."}  # and word becomes л
SKILL = {"x": "y", "y": "x"}


def write_written(folder: Path, name: str, *, last: str, answer: str) -> None:
    """Write a task whose prompts end in a character and whose right answer is a word."""
    (folder / name).mkdir()
    rows = [{"prompt": f"{name} {i}{last}", "answer": answer} for i in range(ITEMS)]
    (folder / name / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / name / f"{name}.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder, items=ITEMS // 2, trials=9)
    for made, steps in {"base": BASE, "expert": BASE | ENDLESS | FOREIGN | SKILL}.items():
        shutil.rmtree(folder / made)
        chain_llama(folder / made, steps)
    shutil.rmtree(folder / "skill")
    write_task(folder, "skill", items=ITEMS)
    texts = [{"text": f"{i} {'xy' * (4 + i)}"} for i in range(ITEMS)]
    (folder / "skill" / "skill.jsonl").write_text("\n".join(map(json.dumps, texts)))
    write_written(folder, "brief", last="7", answer="salt")
    write_written(folder, "tongue", last="Q", answer="word")
    general = f"evals.general=[{folder}/brief, {folder}/tongue]"
    run = run_study(study, [general, f"evals.holdout_items={ITEMS // 2}"], Console(file=io.StringIO()))
    return run.path


@pytest.fixture
def path(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "small")


@pytest.fixture
def run(path: Path) -> Run:
    return open_run(path)


def shown(run: Run) -> str:
    text = io.StringIO()
    print_front(run, Console(file=text, width=200))
    return text.getvalue()


def test_both_guards_fire_and_name_the_share(run: Run) -> None:
    expert = next(n for n, kind in run.kinds.items() if kind.expert_name)
    flagged = {(r["task"], r["guard"]): r for r in run.guards(expert).to_dict("records") if r["is_flagged"]}
    assert set(flagged) == {("brief", CUT), ("tongue", LANGUAGE)}
    for row in flagged.values():
        assert (row["share"], row["base_share"], row["items"], row["worse"]) == (1.0, 0.0, ITEMS, ITEMS)
        assert row["p"] == pytest.approx(0.5**ITEMS)
    assert expert in run.kept_off
    assert not run.kept_off & set(run.front().index)
    assert not run.is_flagged(0)
    answers = run.outcomes("holdout").set_index(["trial", "task"])["answer"]
    assert set(answers.loc[expert, "tongue"]) == {"л"}
    assert set(answers.loc[expert, "brief"]) == {"salt" * 3}
    assert set(answers.loc[0, "brief"]) == {"salt"}


def test_a_flag_is_seen_wherever_the_trial_is(path: Path, run: Run, tmp_path: Path) -> None:
    expert = next(n for n, kind in run.kinds.items() if kind.expert_name)
    cut, foreign = "are broken off at the limit of tokens", "are in another language or script than the base's"
    words = shown(run)
    assert cut in words
    assert foreign in words
    assert any(line.split()[:2] == ["!", str(expert)] for line in words.splitlines())
    assert f"mergefront accept small {min(run.kept_off)}" in words
    page = report_html(run)
    assert "Guards of written answers" in page
    assert cut in page
    (entry,) = (entry for entry in front_document(run)["flagged"] if entry["trial"] == expert)
    assert {row["guard"] for row in entry["guards"] if row["is_flagged"]} == {CUT, LANGUAGE}
    told = CliRunner().invoke(app, ["show", str(path), str(expert)], env={"COLUMNS": "200"})
    assert (
        f"Written answers of trial {expert}: 100 % of its answers on brief {cut} (of the base's 0.0 %)" in told.output
    )
    as_json = json.loads(CliRunner().invoke(app, ["show", str(path), str(expert), "--json"]).stdout)
    assert as_json["kept_off"] is True
    card = export_trial(run, expert, tmp_path / "model", describe=run.describe) / "README.md"
    assert "A guard keeps it off the front" in card.read_text()


def test_what_a_flagged_trial_beat_is_on_the_front_and_judged(run: Run) -> None:
    front = run.front()
    assert front["holdout_domain"].notna().all()
    everyone = run.points().drop(index=[*run.kept_off])
    assert front["domain"].max() == everyone["domain"].max()
    assert run.knee() not in run.kept_off
    pays = run.does_search_pay()
    assert not run.kept_off & {*pays["trial"], *pays["line_trial"]}


def test_a_person_accepts_one_and_that_is_kept(path: Path, run: Run) -> None:
    trial = min(run.kept_off)
    told = CliRunner().invoke(app, ["accept", str(path), str(trial)])
    assert told.exit_code == 0, told.output
    assert "A person has accepted that" in told.output
    again = open_run(path)
    assert trial not in again.kept_off
    assert trial in again.front().index
    assert again.is_flagged(trial)
    (kept,) = json.loads((path / "accepted.json").read_text())["accepted"]
    assert (kept["trial"], kept["recipe"]) == (trial, run.recipe(trial).digest)
    assert "accepted" in shown(again)
    assert str(trial) in {str(point["trial"]) for point in json.loads((path / "front.json").read_text())["points"]}
    told = CliRunner().invoke(app, ["accept", str(path), str(trial)])
    assert (told.exit_code, "accepted already" in told.stderr) == (2, True)
    told = CliRunner().invoke(app, ["accept", str(path), "0"])
    assert (told.exit_code, "there is nothing to accept" in told.stderr) == (2, True)
    (path / "accepted.json").write_text('{"format": 1, "accepted": [1]}')
    with pytest.raises(DamagedError, match="or remove it"):
        open_run(path).front()


def test_an_earlier_run_kept_no_answers_and_is_guarded_by_what_it_kept(path: Path, run: Run) -> None:
    import pyarrow.parquet as pq

    for file in (path / "outcomes").glob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["answer"]), file)
    earlier = open_run(path)
    expert = next(n for n, kind in run.kinds.items() if kind.expert_name)
    assert LANGUAGE not in set(earlier.guards(expert)["guard"])
    assert earlier.guards(expert).set_index(["task", "guard"]).loc[("brief", CUT), "share"] == 1.0


def test_answers_beyond_all_measure_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizer.runs.outcome_files.MOST_ANSWERED", 30)
    with pytest.raises(RunError, match="may hold answers of 30 bytes; it holds"):
        RunFolder(path).read_outcomes(0, "search")
