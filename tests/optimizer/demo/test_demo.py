"""The demo from end to end on the pico model: what it leaves, what a kill costs, and that the export is the trial."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks.agreement import agreements
from evals.outcomes import HOLDOUT, SEARCH
from optimizer.demo.demo import _dtype
from optimizer.demo.tasks import (
    clinical_terms,
    clinical_training_texts,
    manual_passages,
    write_clinical_text,
    write_clinical_words,
    write_docstring_words,
)
from optimizer.run import open_run
from optimizer.run_study import run_study
from optimizer.runs.frames import rows_of
from optimizer.views.tables import status_document
from optimizer.workers.ray_cluster import PREFIX
from tests.conftest import demo_command, demo_environment
from tests.optimizer.fakes import processes_of

pytestmark = pytest.mark.slow  # whole demos are run


def test_leaves_a_front_a_report_and_a_model(tiny_demo: Path) -> None:
    run = open_run(tiny_demo)
    kinds = set(run.points()["kind"])
    assert {"base", "expert:clinical", "uniform a=0.50", "derived kfac 0.4", "search"} <= kinds
    assert (run.trials()["state"] == "complete").sum() == 16
    knee = run.knee()
    _, info = AutoModelForCausalLM.from_pretrained(tiny_demo / "models" / f"trial-{knee}", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "default-src 'none'" in (tiny_demo / "report.html").read_text()  # the page may ask no network for anything
    shown = tiny_demo.with_name("demo.txt").read_text()
    assert str(knee) in shown
    assert "forgets" in shown
    assert set(run.sentinels()["task"]) == {"minimal_pairs"}
    (sentence,) = run.sentinel_words(knee)
    assert sentence in " ".join(shown.split())


def test_a_second_time_starts_from_what_is_there(tiny_demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_demo.glob("outcomes/*")}
    command, environment = demo_command(tiny_demo), demo_environment(tiny_demo.parent)
    subprocess.run(command, cwd=tiny_demo.parent, env=environment, check=True, capture_output=True, timeout=600)
    assert {path: path.stat().st_mtime_ns for path in tiny_demo.glob("outcomes/*")} == before


def test_a_study_over_several_methods_names_them(demo_inputs: Path) -> None:
    methods = ["task_arithmetic", "ties", "dare_ties", "della", "sce"]
    overrides = ["name=several", f"space.method=[{', '.join(methods)}]", "search.trials=16"]
    overrides += ["search.learned=0", "anchors.derived=none"]
    overrides += ["workers.count=0", "workers.threads=1"]  # threads that share a busy core wait for each other
    study = demo_inputs / "study.yaml"
    said = io.StringIO()
    told = Console(file=said, width=160)
    run = run_study(study, [*overrides, f"runs={demo_inputs}"], told)
    assert {"task_arithmetic"} < set(run.methods) <= set(methods)
    assert set(run.front()["method"]) <= set(methods)
    assert all(run.recipe(trial).method == row["method"] for trial, row in rows_of(run.points()).items())
    table = said.getvalue().partition("Front of several")[2]
    report, hovers = (run.path / "report.html").read_text(), json.dumps(run.plot_front().to_plotly_json(), default=list)
    for trial, row in rows_of(run.front()).items():
        assert re.search(rf"\s{trial}\s+\S.*\b{row['method']}\b", table), table
        assert f"trial {trial} ({row['method']})" in report
        assert re.search(rf"trial {trial}</b>[^<]*{row['method']}", hovers)
    assert status_document(run)["methods"].keys() == set(run.methods)
    assert f"({run.recipe(run.knee()).method}) keeps" in run.summary()


def test_killed_half_way_it_ends_with_as_many_trials(tiny_demo: Path, demo_inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command, environment = demo_command(out), demo_environment(tmp_path)
    first = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(list(out.glob("outcomes/*-search.parquet"))) >= 7, first)
    folder = pool_folder(first.pid)
    assert processes_of(folder)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (out / "front.json").exists()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=600)
    states = open_run(out).trials()["state"].value_counts()
    undisturbed = open_run(tiny_demo).trials()["state"].value_counts()
    assert states["complete"] == undisturbed["complete"]
    assert states.get("running", 0) == 0
    assert processes_of(folder) == []
    assert not (folder / "lock").exists()  # removed by the second start; an agent of Ray's may make the folder again


def pool_folder(pid: int) -> Path:
    """The folder of a process's pool, by the lock that the process holds open."""
    files = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    (lock,) = (file for file in files if file.endswith("/lock") and f"/{PREFIX}" in file)
    return Path(lock).parent


def test_lm_eval_gives_the_exported_model_the_scores_of_its_trial(tiny_demo: Path) -> None:
    knee = open_run(tiny_demo).knee()
    found = list(agreements(tiny_demo, knee, tiny_demo / "models" / f"trial-{knee}", dtype="float32"))
    assert {(row.task, row.suite) for row in found} == {
        *((task, suite) for task in ("clinical_text", "python_prose", "python_source") for suite in (SEARCH, HOLDOUT)),
        ("minimal_pairs", HOLDOUT),
    }
    for row in found:
        assert row.theirs == pytest.approx(row.ours, rel=1e-5), row


def test_no_training_text_is_asked_about(tmp_path: Path) -> None:
    terms = clinical_terms()
    trained = set(clinical_training_texts(terms))
    held_out = tuple(f"{term.name}: " for term in terms if term.held_out)
    for folder in (write_clinical_text(tmp_path, terms), write_clinical_words(tmp_path, terms)):
        texts = [json.loads(row)["text"] for row in (folder / f"{folder.name}.jsonl").read_text().splitlines()]
        assert len(texts) > 500
        assert not trained & set(texts)
        assert all(text.startswith(held_out) for text in texts)


def test_the_last_word_of_a_docstring_stands_before_in_it_and_is_not_in_the_manual(tmp_path: Path) -> None:
    folder = write_docstring_words(tmp_path)
    rows = [json.loads(row) for row in (folder / "docstring_words.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 140
    manual = " ".join(" ".join(manual_passages()).split())
    for row in rows:
        assert re.search(rf"\b{row['word']}\b", row["text"])
        assert f"{row['text']} {row['word']}" not in manual


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Until `ready()` is true; fails when the process ends first or time runs out."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_cpu_without_such_instructions_or_an_old_torch_scores_the_demo_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for known, dtype in (({"avx512_bf16": True}, "auto"), ({"amx_bf16": True}, "auto"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert _dtype(tiny=False) == dtype
        assert _dtype(tiny=True) == "float32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert _dtype(tiny=False) == "float32"
