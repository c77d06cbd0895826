"""The command line over a made-up run: tables fit, JSON is alone on stdout, errors are one line and an exit code."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from optimizer.cli import app
from optimizer.errors import DamagedError, MergeError, RunError, UnavailableError
from optimizer.run import open_run
from optimizer.runs.run_folder import RunFolder
from optimizer.study.study_file import read_study
from tests.optimizer.small_study import write_study
from tests.pico import pico_expert
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run

WIDTH = 100


def call(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": str(WIDTH), "CI": "1"}).invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, or written by what writes the same again."""
    return toy_run(tmp_path_factory.mktemp("run") / "toy", trials=12)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file whose study has been run."""
    study = write_study(tmp_path_factory.mktemp("study"))
    result = call("search", study)
    assert result.exit_code == 0, result.output
    assert "Front of small" in result.stdout
    assert "7/7 trial 6" in result.stdout
    return study


# --- help, version, errors ---


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from optimizer.cli import app; from typer.testing import CliRunner; "
        "assert CliRunner().invoke(app, ['search', '--help']).exit_code == 0; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'ray', 'optuna', 'pandas', 'numpy', 'lm_eval', 'transformers', 'plotly', 'yaml'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_command_says_what_it_does() -> None:
    listed = call("--help").stdout
    for command in ("init", "check", "search", "status", "front", "show", "export", "report", "merge", "demo"):
        (line,) = (line for line in listed.splitlines() if line.startswith(f"  {command} "))
        assert line.endswith("."), line
        assert not line.endswith("..."), line


def test_an_error_of_ours_is_one_line_on_stderr(tmp_path: Path) -> None:
    result = call("check", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}/none.yaml does not exist\n"
    assert result.stdout == ""


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    result = call("--debug", "check", tmp_path / "none.yaml")
    assert result.exit_code == 1
    assert "does not exist" in str(result.exception)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    result = call("check", tmp_path / "a\x1b[31m.yaml")
    assert "\\x1b[31m" in result.stderr
    assert "\x1b" not in result.stderr


def test_names_of_others_do_not_reach_the_terminal_as_commands(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run, tmp_path / "a\x1b]0;title\x07\x9b31m")
    tasks = (copy / "tasks.json").read_text()
    (copy / "tasks.json").write_text(tasks.replace('"acc"', '"a\\u001b[2Jb\\u202e"'))
    for command in ("status", "front", "show 0", "report"):
        verb, *rest = command.split()
        result = call(verb, copy, *rest)
        assert result.exit_code == 0, result.output
        assert not set(result.output) & set("\x1b\x07\x9b\u202e"), command
    assert "a\\x1b]0;title\\x07\\x9b31m" in call("status", copy).output
    assert "a\\x1b]0;title\\x07\\x9b31m" in call("front", copy).output
    assert "a\\x1b[2Jb\\u202e" in call("show", copy, "0").output
    assert not set(call("show", copy, "1", "\x1b[31m").output) & {"\x1b"}


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 2), (errno.ENAMETOOLONG, 2), (errno.ENOSPC, 3), (errno.EDQUOT, 3), (errno.EFBIG, 3)],
)
def test_what_the_system_refuses_is_one_line_that_asks_for_debug(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/some/\x1bfile")

    monkeypatch.setattr("optimizer.run.open_run", fail)
    result = call("front", run)
    assert result.exit_code == code
    said = f"error: /some/\\x1bfile: {os.strerror(number)}; with --debug before the command it shows where\n"
    assert result.stderr == said
    assert isinstance(call("--debug", "front", run).exception, OSError)


@pytest.mark.parametrize(
    "error", [TypeError("ours"), FileNotFoundError(2, "none", "x"), RecursionError(), OSError("x")]
)
def test_a_fault_of_ours_stays_visible(run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("optimizer.run.open_run", fail)
    assert call("front", run).exception is error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init", "a/b", "c/d", "--out", "x" * 300], "--out: a path may have 255 bytes in each name"),
        (["init", "a/b", "c/d", "--out", "none/x.yaml"], "--out: none/x.yaml cannot be written: No such file"),
        (["init", "a/b", "c/d", "--force", "--out", "."], "--out: . cannot be written: Is a directory"),
        (["init", "a/b", "a\0b"], "a path must not hold a NUL character"),
        (["init", "a/b", "~nobody-by-this-name"], "no user of this machine has the home folder"),
        (["init", "a/b", "x" * 300], "a path may have 255 bytes in each name"),
        (["init", "a/b", "c/d", "--force", "--out", "loop/x"], "leads nowhere"),
        (["init", "a/b", "c/d", "--force", "--out", "loop"], "leads nowhere"),
        (["init", "--from-evolve", "evolve.yaml", "--out", "x"], "genome.base_model: {}/loop leads nowhere"),
        (["demo", "--tiny", "--out", "loop/x"], "--out: loop/x leads nowhere"),
        (["check", "loop"], "loop"),
        (["merge", "loop", "out"], "loop"),
        (["status", "loop"], "loop"),
        (["status", "x" * 300], "RUN: a path may have 255 bytes in each name"),
        (["report", "x/" * 3000], "RUN: a path may have 255 bytes in each name and 4,095 in all"),
        (["merge", "x" * 300, "out"], "a path may have 255 bytes in each name"),
        (["merge", "/dev/zero", "out"], "must be a regular file; given a device"),
    ],
)
def test_a_path_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    genome = "{models: [./e], base_model: ./loop, merge_method: linear, layer_granularity: 2}"
    (tmp_path / "evolve.yaml").write_text(f"genome: {genome}\ntasks: [{{name: x}}]\n")
    result = call(*words)
    assert result.exit_code == 2, result.exception
    assert result.stderr.startswith("error: ")
    assert message.format(tmp_path) in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunError("no such trial"), 2),
        (UnavailableError("locked"), 3),
        (DamagedError("torn"), 4),
        (MergeError("not finite"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("optimizer.run.open_run", fail)
    assert call("front", run).exit_code == code


# --- init ---


def test_init_writes_a_study_that_can_be_read(tmp_path: Path) -> None:
    out = tmp_path / "study.yaml"
    result = call("init", "org/base", "clinical=org/expert", "--out", out, "--domain", "pubmedqa")
    assert result.exit_code == 0
    study = read_study(out)
    assert study.models.experts == {"clinical": "org/expert"}
    assert study.evals.domain[0].task == "pubmedqa"
    assert f"mergefront check {out}" in result.stdout


def test_init_does_not_replace_a_file(tmp_path: Path) -> None:
    out = tmp_path / "study.yaml"
    out.write_text("mine")
    assert call("init", "a/b", "c/d", "--out", out).exit_code == 2
    assert out.read_text() == "mine"
    assert call("init", "a/b", "c/d", "--out", out, "--force").exit_code == 0


# --- reading a run ---


def test_status_counts_and_names_failures(run: Path) -> None:
    result = call("status", run)
    assert result.exit_code == 0
    assert "finished" in result.stdout
    assert "1 trial failed" in result.stdout
    document = json.loads(call("status", run, "--json").stdout)
    assert document["trials"]["fail"] == 1
    assert document["running"] is False


def test_status_knows_a_running_search(run: Path) -> None:
    with RunFolder(run).lock():
        assert json.loads(call("status", run, "--json").stdout)["running"] is True


def test_the_front_fits_and_marks_the_knee(run: Path) -> None:
    result = call("front", run)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines) <= WIDTH
    assert sum("*" in line for line in lines[1:]) == 1
    assert any("%" in line and "[" in line for line in lines)


def test_front_json_is_alone_on_stdout_and_whole(run: Path) -> None:
    document = json.loads(call("front", run, "--json").stdout)
    points = document["points"]
    assert sum(point["knee"] for point in points) == 1
    assert {"base", "search"} <= {point["kind"] for point in points}
    forgetting = [point["search"]["forgetting"] for point in points]
    assert forgetting == sorted(forgetting)
    for point in points:
        for suite in ("search", "holdout"):
            assert point[suite]["domain_low"] <= point[suite]["domain"] <= point[suite]["domain_high"]


def test_a_front_of_two_experts_fits_and_has_an_objective_for_each(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "two", trials=6, experts=("clinical", "legal"))
    result = call("front", run)
    assert max(len(line) for line in result.stdout.splitlines()) <= WIDTH
    document = json.loads(call("front", run, "--json").stdout)
    assert document["objectives"] == ["domain_clinical", "domain_legal", "forgetting"]
    assert {"domain", "domain_clinical", "domain_legal", "forgetting"} <= set(document["points"][0]["holdout"])


def test_a_front_without_holdout_has_nulls(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "early", trials=4, holdout=False)
    assert call("front", run).exit_code == 0
    assert json.loads(call("front", run, "--json").stdout)["points"][0]["holdout"]["domain"] is None


def test_show_gives_weights_and_tasks(run: Path) -> None:
    knee = next(p["trial"] for p in json.loads(call("front", run, "--json").stdout)["points"] if p["knee"])
    result = call("show", run, knee)
    assert result.exit_code == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= WIDTH
    for word in ("embed", "attn", "mlp", "clinical_questions", "grammar", "holdout"):
        assert word in result.stdout
    document = json.loads(call("show", run, knee, "--json").stdout)
    assert document["trial"] == knee
    assert len(document["tasks"]) == 5
    for row in document["flips"]:
        assert f"{row['lost']} lost, {row['won']} won" in result.stdout
    assert {row["task"] for row in document["flips"]} == {"clinical_questions", "science", "grammar"}


def test_show_lists_what_was_lost_also_where_no_text_is_left(run: Path) -> None:
    knee = open_run(run).knee()
    flips = json.loads(call("show", run, knee, "--json").stdout)["flips"]
    document = json.loads(call("show", run, knee, "--lost", "--json").stdout)
    assert len(document["flipped"]) == sum(row["lost"] + row["won"] for row in flips) > 0
    assert document["without_texts"].startswith("texts cannot be read: ")
    told = call("show", run, knee, "--lost").stdout.splitlines()
    assert told[0] == "lost  {task}  {item}".format(**document["flipped"][0])
    assert told[-1].startswith("texts cannot be read: ")


def test_show_lists_what_was_lost_with_what_both_answered(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    rows = [{"q": f"is {i} {w}?", "c": ["yes", "no", "never \x1b[2J"], "g": i % 3} for i, w in enumerate(60 * ["so"])]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "quiz.yaml").write_text(
        "task: quiz\ndataset_path: json\ndataset_kwargs: {data_files: {test: quiz.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: g\n"
        "metric_list: [{metric: acc}]\n"
    )
    tasks = "evals.sentinel=[{task: ./quiz.yaml, holdout_items: 40}]"
    searched = call("search", study, "--set", tasks, "--set", "search.trials=7")
    assert searched.exit_code == 0, searched.output
    run = tmp_path / "runs" / "small"
    opened = open_run(run)
    expert = next(int(n) for n, kind in opened.kinds.items() if kind.expert_name)
    document = json.loads(call("show", run, expert, "--lost", "--json").stdout)
    assert document["without_texts"] == ""
    assert document["flipped"]
    for row in document["flipped"]:
        assert row["question"].startswith("is ")
        assert (row["base"] in row["right"], row["merge"] in row["right"]) == (
            (True, False) if row["change"] == "lost" else (False, True)
        )
    assert "\x1b" not in call("show", run, expert, "--lost").stdout

    (tmp_path / "code.py").write_text("open('ran', 'w').close()\ndef ask(doc): return doc['q']\n")
    quiz = tmp_path / "quiz.yaml"
    quiz.write_text(quiz.read_text().replace("doc_to_text: q\n", "doc_to_text: !function code.ask\n"))
    own = run / "study.yaml"
    own.write_text(own.read_text().replace("allow_task_code: false", "allow_task_code: true"))
    assert "allow_task_code: true" in own.read_text()
    shown = call("show", run, expert, "--lost")  # whoever reads a run consents to nothing
    assert shown.exit_code == 0
    assert "texts cannot be read" in shown.output
    assert not [*tmp_path.rglob("ran"), *Path().glob("ran")]


def test_show_of_a_failed_trial_says_why_and_of_none_says_so(run: Path) -> None:
    failed = int(open_run(run).trials().query("state == 'fail'").index[0])
    assert "not finite" in call("show", run, failed).stdout
    assert json.loads(call("show", run, failed, "--json").stdout)["tasks"] == []
    result = call("show", run, 999)
    assert result.exit_code == 2
    assert "run toy has no trial 999; it has trials 0 to 19" in result.stderr


def test_what_is_missing_does_not_exist(tmp_path: Path) -> None:
    for command in ("status", "front", "report"):
        result = call(command, tmp_path / "none")
        assert result.exit_code == 2
        assert f"{tmp_path}/none does not exist; a run folder is made by `mergefront search`" in result.stderr
    for command in ("check", "search"):
        assert f"{tmp_path}/none.yaml does not exist" in call(command, tmp_path / "none.yaml").stderr
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file is a file, not a run folder" in call("status", tmp_path / "file").stderr


def test_what_is_no_run_is_said_so(tmp_path: Path) -> None:
    for command in ("status", "front", "report"):
        result = call(command, tmp_path)
        assert result.exit_code == 2
        assert "is not a run folder" in result.stderr


def test_report_writes_both_files(run: Path) -> None:
    assert call("report", run).exit_code == 0
    assert (run / "report.html").stat().st_size > 1000
    assert json.loads((run / "front.json").read_text())["run"] == "toy"


def test_an_export_needs_exactly_one_point(run: Path) -> None:
    for choice in ([], ["--knee", "--trial", "3"]):
        result = call("export", run, *choice)
        assert result.exit_code == 2
        assert "name one point" in result.stderr


def test_an_export_of_nothing_feasible_exits_with_3(run: Path) -> None:
    result = call("export", run, "--max-forgetting", "-0.9")
    assert result.exit_code == 3
    assert "forgets at most" in result.stderr


@pytest.mark.parametrize("given", ["5", "-5", "nan"])
def test_a_limit_that_is_no_share_is_refused(run: Path, given: str) -> None:
    result = call("export", run, "--max-forgetting", given)
    assert result.exit_code == 2
    assert f"a limit on forgetting is a share: 5 % is 0.05; given {given}" in result.stderr
    assert not (run / "exports").exists()


def test_how_sure_needs_a_limit(run: Path) -> None:
    result = call("export", run, "--knee", "--sure", "0.9")
    assert result.exit_code == 2
    assert "--sure says how sure --max-forgetting must be" in result.stderr


# --- running a study ---


def test_search_leaves_a_run_that_can_be_read(searched: Path) -> None:
    run = searched.parent / "runs/small"
    assert (run / "report.html").exists()
    written = json.loads((run / "front.json").read_text())
    assert written == json.loads(call("front", run, "--json").stdout)
    assert "clinical" in (run / "study.yaml").read_text()
    assert "trial 6" in (run / "log.txt").read_text()


def test_search_again_goes_on_from_there(searched: Path) -> None:
    result = call("search", searched, "--set", "search.trials=8")
    assert result.exit_code == 0, result.output
    assert "7 of 8 trials are finished" in result.stdout
    assert "8/8 trial 7" in result.stdout
    assert "7/8 trial" not in result.stdout


def test_search_with_other_items_is_refused(searched: Path) -> None:
    result = call("search", searched, "--set", "evals.seed=5")
    assert result.exit_code == 2
    assert "seed: 0 -> 5" in result.stderr


def test_search_with_a_broken_expert_names_file_and_tensor(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    weights = tmp_path / "expert" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["search", str(study)])
    assert result.exit_code == 2
    assert "expert/model.safetensors" in result.stderr
    assert "model.norm.weight has 1 of 32 values NaN" in result.stderr


def test_a_second_driver_is_told_before_any_model_is_read(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    monkeypatch.setattr("optimizer.run_study.make_plan", read.append)
    run = searched.parent / "runs/small"
    before = (run / "study.yaml").read_bytes()
    with RunFolder(run).lock():
        result = call("search", searched, "--set", "search.trials=9")
        assert call("front", run).exit_code == 0
    assert result.exit_code == 3
    assert f"process {os.getpid()}" in result.stderr
    assert read == []
    assert (run / "study.yaml").read_bytes() == before


def test_two_experts_measured_by_one_task_are_shown_apart_from_search_to_card(tmp_path: Path) -> None:
    write_study(tmp_path)
    pico_expert(tmp_path / "base", tmp_path / "lawyer", seed=2, scale=0.1)
    study, run = tmp_path / "two.yaml", tmp_path / "runs/two"
    experts = [f"clinical={tmp_path / 'expert'}", f"legal={tmp_path / 'lawyer'}"]
    tasks = ["--domain", tmp_path / "skill/skill.yaml", "--general", tmp_path / "manners/manners.yaml"]
    assert call("init", tmp_path / "base", *experts, *tasks, "--out", study).exit_code == 0
    small = ["items=4", "holdout_items=4"]
    sets = [*(f"--set=evals.{item}" for item in small), "--set=search.trials=8", "--set=search.sampler=random"]
    sets += ["--set=search.learned=0"]
    shown = call("search", study, *sets, "--set=space.shape=uniform", "--workers", "0")
    assert shown.exit_code == 0, shown.output
    knee = open_run(run).knee()
    for result in (shown, call("front", run), call("show", run, knee)):
        assert result.exit_code == 0, result.output
        for expert in ("clinical", "legal"):
            assert any(f"skill ({expert})" in line and "won" in line for line in result.stdout.splitlines())
    assert call("status", run).exit_code == call("report", run).exit_code == 0
    document = json.loads(call("show", run, knee, "--json").stdout)
    assert [(row["task"], row["expert"]) for row in document["tasks"]][:2] == [
        ("skill", "clinical"),
        ("skill", "legal"),
    ]
    assert call("export", run, "--knee", "--out", tmp_path / "out").exit_code == 0
    card = (tmp_path / "out/README.md").read_text()
    for row in document["tasks"][:2]:
        (line,) = (line for line in card.splitlines() if line.startswith(f"| skill ({row['expert']}) (domain, "))
        assert line.endswith(f"{row['share']:.4g} |")


def test_an_interrupted_search_says_how_to_go_on(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optimizer.run_study.run_search", interrupt)
    result = call("search", searched, "--set", "search.trials=9", "--workers", "0")
    assert result.exit_code == 130
    assert f"mergefront search {searched} --set=search.trials=9 --set=workers.count=0" in result.stdout.replace(
        "\n", ""
    )


def test_check_of_a_sound_study_exits_with_0_and_of_another_with_2(searched: Path) -> None:
    assert call("check", searched).exit_code == 0
    assert call("check", searched, "--set", "models.base=./nowhere").exit_code == 2


def test_a_full_check_reads_every_value_and_gives_each_file_its_sha256(searched: Path) -> None:
    result = call("check", searched, "--full")
    assert result.exit_code == 0, result.output
    for file in (searched.parent / "base/model.safetensors", searched.parent / "expert/config.json"):
        assert f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}" in result.stdout.splitlines()
    weights = searched.parent / "expert/model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-2] + b"\xc0\x7f")  # a NaN in bfloat16
    assert call("check", searched).exit_code == 0
    result = call("check", searched, "--full")
    weights.write_bytes(kept)
    assert result.exit_code == 2
    assert "expert/model.safetensors, tensor" in "".join(result.stdout.splitlines())


def test_an_exported_trial_and_its_recipes_are_the_same_model(searched: Path, tmp_path: Path) -> None:
    run = searched.parent / "runs/small"
    assert call("export", run, "--trial", "3", "--out", tmp_path / "a").exit_code == 0
    card = (tmp_path / "a/README.md").read_text()
    assert "Trial 3 keeps" in card
    assert "manners" in card
    assert str(searched.parent) not in card
    for recipe, out in (("recipe.json", "b"), ("mergekit.yaml", "c")):
        result = call("merge", tmp_path / "a" / recipe, tmp_path / out)
        assert result.exit_code == 0, result.output
        assert (tmp_path / out / "model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()


def test_an_export_of_changed_checkpoints_is_refused_and_of_touched_ones_is_not(searched: Path, tmp_path: Path) -> None:
    run, weights = searched.parent / "runs/small", searched.parent / "expert/model.safetensors"
    before = weights.read_bytes()
    os.utime(weights, ns=(1, 1))
    assert call("export", run, "--trial", "3", "--out", tmp_path / "touched").exit_code == 0
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        result = call("export", run, "--trial", "3", "--out", tmp_path / "changed")
    finally:
        weights.write_bytes(before)
    assert result.exit_code == 2
    assert "(clinical) has changed since run small scored it" in result.stderr


def test_a_run_of_an_earlier_version_whose_fingerprints_held_times_goes_on(searched: Path) -> None:
    manifest = searched.parent / "runs/small/tasks.json"
    now = json.loads(manifest.read_text())
    dated = {name: _dated(searched.parent / name) for name in ("base", "expert")}
    told = {**now["fingerprint"], "base": dated["base"], "experts": {"clinical": dated["expert"]}}
    manifest.write_text(json.dumps({**now, "fingerprint": told}))
    assert call("export", manifest.parent, "--trial", "3", "--out", manifest.parent / "a").exit_code == 0
    assert call("search", searched, "--set=search.trials=10").exit_code == 0
    assert json.loads(manifest.read_text()) == now
    manifest.write_text(json.dumps({**now, "fingerprint": told}))
    os.utime(searched.parent / "base/model.safetensors", ns=(1, 1))
    result = call("search", searched, "--set=search.trials=10")
    manifest.write_text(json.dumps(now))
    assert result.exit_code == 2
    assert f"models.base: the files of {searched.parent / 'base'} have changed" in result.stderr


def test_a_run_goes_on_with_models_that_were_moved_and_not_with_others(searched: Path, tmp_path: Path) -> None:
    run = searched.parent / "runs/small"
    for name in ("base", "expert"):
        shutil.copytree(searched.parent / name, tmp_path / name, copy_function=shutil.copyfile)
    moved = [f"--set=models.base={tmp_path}/base", f"--set=models.experts.clinical={tmp_path}/expert"]
    result = call("search", searched, *moved, "--set=search.trials=10")
    assert result.exit_code == 0, result.output
    assert "of 10 trials are finished" in result.stdout
    (searched.parent / "expert").rename(tmp_path / "away")
    try:
        assert call("export", run, "--trial", "3", "--out", tmp_path / "out").exit_code == 0
    finally:
        (tmp_path / "away").rename(searched.parent / "expert")
    weights = tmp_path / "expert/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\0\0")
    result = call("search", searched, *moved, "--set=search.trials=11")
    assert result.exit_code == 2
    assert "experts.clinical: " in result.stderr


def _dated(folder: Path) -> str:
    """A fingerprint as versions before this one made it."""
    facts: list[list[object]] = []
    for name in ("config.json", "model.safetensors"):
        status, content = (folder / name).stat(), (folder / name).read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")] if name == "model.safetensors" else b""
        digest = hashlib.sha256(header).hexdigest()[:16] if header else ""
        facts.append([name, status.st_size, status.st_mtime_ns, digest])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("recipe.json", "{}", "a recipe has the keys"),
        ("recipe.yaml", "merge_method: linear", "base_model: must name the base's folder; given None"),
        ("recipe.yaml", "a: &x [*x]", "an alias stands within what it stands for"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    result = call("merge", tmp_path / name, tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_search_from_a_recipe_scores_it_with_the_anchors(searched: Path) -> None:
    recipe, known = searched.parent / "recipe.json", open_run(searched.parent / "runs/small").recipe(3)
    settings = tuple(replace(s, value=0.37) if s.parameter == "weight" else s for s in known.settings)
    recipe.write_text(replace(known, settings=settings).to_json())
    result = call("search", searched, "--set=name=again", f"--set=space.from={recipe}", "--set=search.trials=9")
    assert result.exit_code == 0, result.output
    points = open_run(searched.parent / "runs/again").points()
    assert "from recipe.json" in set(points["kind"])
    assert "from recipe.json" in "".join(result.stdout.split("\n"))
    weights = open_run(searched.parent / "runs/again").weights(points.index[points["kind"] == "from recipe.json"][0])
    assert set(weights["weight"]) == {0.37}


def test_the_command_has_torch_take_huge_pages() -> None:
    # in a process of its own: main() is how one ends, and leaves Ctrl-C ignored
    app_prints = "cli.app = lambda: print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    code = f"import os\nfrom optimizer import cli\n{app_prints}\ncli.main()"
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
