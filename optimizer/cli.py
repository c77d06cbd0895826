"""The command line: one short function per verb; what a verb needs is imported inside it, so that --help is instant.

Exit codes: 0 done, 1 the run failed, 2 something given is wrong, 3 not now (no point to give, another search at work, a
full disk, no answer from a database), 4 a study is damaged, missing or another program's, 130 interrupted.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimizer.commands import (
    AsJson,
    Commands,
    DomainText,
    Download,
    Experts,
    FromEvolve,
    Full,
    GeneralText,
    Include,
    KlToBase,
    RayAddress,
    RunPath,
    Sets,
    Storage,
    StudyPath,
    TrialNumber,
    WorkerCount,
    chosen_point,
    fail,
    print_json,
    run_at,
    say,
    study_of,
    terminal,
    version_asked,
)
from optimizer.exit_codes import NOT_NOW, WRONG
from optimizer.workers.memory import HUGE_PAGES
from optimizer.workers.orders import STEPS, By, Form, Loss

if TYPE_CHECKING:
    pass

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich's help takes twice as long to start
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The Pareto front of model merges: domain skill against forgetting, with error bars.",
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=version_asked, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Read the options that stand before the command."""
    from optimizer.views.notices import make_notices_printable

    make_notices_printable()


@app.command()
def init(
    base: Annotated[str, typer.Argument(help="The base: a folder or a hub id.", show_default=False)] = "",
    experts: Experts = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("study.yaml"),
    domain: Annotated[list[str] | None, typer.Option(help="A domain task; may be repeated.")] = None,
    general: Annotated[list[str] | None, typer.Option(help="A general task; may be repeated.")] = None,
    domain_text: DomainText = None,
    general_text: GeneralText = None,
    kl_to_base: KlToBase = None,
    from_evolve: FromEvolve = None,
    include: Include = None,
    then_search: Annotated[bool, typer.Option("--search", help="Run the study at once.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented study file to start from."""
    from evals.documents import resolved_path
    from evals.outcomes import KL_TO_BASE, TEXT
    from optimizer.study.from_evolve import study_from_evolve
    from optimizer.study.new_study import new_study

    resolved_path(out, Path.cwd(), where="--out")
    if os.path.lexists(out) and not force:
        go_on = f"go on with it by `mergefront search {out}`, " if then_search else ""
        fail(f"{out} exists; {go_on}name another file with --out, or replace it with --force", WRONG)
    if from_evolve is not None:
        if base or domain or domain_text or general_text or kl_to_base:
            fail("--from-evolve takes models and domain tasks from its file; give only --general and --out", WRONG)
        text = study_from_evolve(from_evolve, out, general or (), include or ())
    elif include:
        fail("--include goes with --from-evolve; in a study file it is evals.include", WRONG)
    elif base and experts:
        asked = ("domain", TEXT, domain_text), ("general", TEXT, general_text), ("general", KL_TO_BASE, kl_to_base)
        texts = [(role, kind, path) for role, kind, paths in asked for path in paths or ()]
        text = new_study(out, base, experts, domain=domain or (), general=general or (), texts=texts)
    else:
        fail("name the base and at least one expert: mergefront init BASE EXPERT", WRONG)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"--out: {out} cannot be written: {error.strerror}; name a file in a folder that is there", WRONG)
    say(f"wrote {out}; edit it, then look at it with: mergefront check {out}")
    if then_search:
        search(out)


@app.command()
def check(
    study: StudyPath,
    sets: Sets = [],  # noqa: B006  # typer makes a new list
    full: Full = False,
    download: Download = False,
) -> None:
    """Say what a study would run, and all that does not fit."""
    from optimizer.search.plan import count_tokens, make_plan, read_in_full, require_own_names
    from optimizer.views.plan import print_plan

    require_own_names()
    plan = make_plan(study_of(study, sets, download=download))
    count_tokens(plan)
    digests = read_in_full(plan) if full else {}
    print_plan(plan, terminal())
    for file, digest in digests.items():
        say(f"{digest}  {file}")
    if plan.problems:
        raise typer.Exit(WRONG)


@app.command()
def search(
    study: StudyPath,
    sets: Sets = [],  # noqa: B006  # typer makes a new list
    workers: WorkerCount = None,
    ray_address: RayAddress = None,
    download: Download = False,
) -> None:
    """Run a study, or take it up where it was left."""
    from optimizer.run_study import run_study

    if download:
        study_of(study, sets, download=True)
    given = {"workers.count": workers, "workers.ray_address": ray_address}
    overrides = [*sets, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    run = run_study(study, overrides, terminal())
    say(f"report: {run.path / 'report.html'}")
    if run.front().empty:
        raise typer.Exit(NOT_NOW)


@app.command()
def status(run: RunPath, as_json: AsJson = False, storage: Storage = None) -> None:
    """Say how far a run is, and what to know first."""
    from optimizer.views.tables import status_document

    opened = run_at(run, storage)
    document = status_document(opened)
    if as_json:
        print_json(document)
        return
    say(opened.summary() + (" A search is writing to it now." if document["running"] else ""))
    if len(document["methods"]) > 1:
        say("Trials by method: " + ", ".join(f"{name} {n}" for name, n in document["methods"].items()))
    for finding in document["findings"]:
        say(f"- {finding}")


@app.command()
def front(run: RunPath, as_json: AsJson = False, storage: Storage = None) -> None:
    """Print the front: each gain and what it costs."""
    from optimizer.views.tables import front_document, print_front

    opened = run_at(run, storage)
    if as_json:
        print_json(front_document(opened))
    else:
        print_front(opened, terminal())


@app.command()
def show(
    run: RunPath,
    trial: TrialNumber,
    lost: Annotated[
        bool, typer.Option("--lost", help="List the items it lost and won against the base, with their texts.")
    ] = False,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """Print one trial: its weights, what it won and kept."""
    from optimizer.views.tables import print_trial, trial_document

    opened = run_at(run, storage)
    if lost:
        from optimizer.lost import flipped_document, flipped_lines

        if as_json:
            print_json(trial_document(opened, trial) | flipped_document(opened, trial))
        else:
            say("\n".join(flipped_lines(opened, trial)))
    elif as_json:
        print_json(trial_document(opened, trial))
    else:
        print_trial(opened, trial, terminal())


@app.command()
def export(
    run: RunPath,
    trial: Annotated[int | None, typer.Option(help="The trial's number.", show_default=False)] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="The front's point farthest above the base-expert line.")
    ] = False,
    max_forgetting: Annotated[
        float | None, typer.Option(help="The most domain gain that forgets at most so much: a share, 0.05 for 5 %.")
    ] = None,
    sure: Annotated[
        float | None, typer.Option(help="With --max-forgetting: share of resamplings that keep it (0.9).", min=0, max=1)
    ] = None,
    knob: Annotated[
        float | None,
        typer.Option(help="A place from 0, the base, over the learned points, each at its p, to 1, the expert."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The new model folder.", show_default="RUN/exports/trial-N")] = None,
    storage: Storage = None,
) -> None:
    """Write one point as a model folder, with card and recipe."""
    if sure is not None and max_forgetting is None:
        fail("--sure says how sure --max-forgetting must be: give both", WRONG)
    if sum((trial is not None, knee, max_forgetting is not None, knob is not None)) != 1:
        fail("name one point: --trial N, --knee, --max-forgetting SHARE or --knob PLACE", WRONG)
    opened = run_at(run, storage)
    from evals.documents import checked_path
    from optimizer.export.commands import export_knob, export_trial  # brings torch

    folder = out and checked_path(out, where="--out")
    if knob is not None:
        say(f"wrote {export_knob(opened, knob, folder, describe=opened.describe)}")
        return
    number = trial if trial is not None else chosen_point(opened, max_forgetting, sure)
    say(f"wrote {export_trial(opened, number, folder, describe=opened.describe)}")
    if number in opened.points().index:
        say(opened.describe(number))
        if max_forgetting is not None:
            say(opened.how_sure(number, max_forgetting))


@app.command()
def certify(
    run: RunPath,
    max_forgetting: Annotated[
        float, typer.Option(help="The most that may be forgotten: a share, 0.05 for 5 %.", show_default=False)
    ],
    min_gain: Annotated[
        float | None, typer.Option(help="The least of the domain gain to be kept: a share.", show_default=False)
    ] = None,
    delta: Annotated[float, typer.Option(help="How often the answer may be wrong: 0.1 for 90 % confidence.")] = 0.1,
    each_task: Annotated[bool, typer.Option("--each-task", help="The limit holds on every general task.")] = False,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """Certify which recipe forgets little, on unseen items."""
    from optimizer.certify import certify_run, spent_sentence
    from optimizer.errors import NoPointError
    from optimizer.runs.certificates import Question
    from optimizer.study.study_file import stored_storage

    question = Question(max_forgetting, min_gain, each_task, delta)
    path = run_at(run, storage).path
    tell = partial(say, error=True) if as_json else say
    try:
        certificate = certify_run(path, question, storage=storage or stored_storage(path), say=tell)
    except NoPointError as error:
        fail(str(error), NOT_NOW)
    if as_json:
        print_json(certificate)
    else:
        say(f"{certificate['sentence']}\n{spent_sentence(certificate)}")
    if certificate["trial"] is None:
        raise typer.Exit(NOT_NOW)


@app.command()
def accept(
    run: RunPath,
    trial: TrialNumber,
    storage: Storage = None,
) -> None:
    """Accept a merge although a guard flags its answers."""
    from optimizer.accept import accept_trial

    for line in accept_trial(run_at(run, storage).path, trial, storage=storage):
        say(line)


@app.command()
def report(run: RunPath, storage: Storage = None) -> None:
    """Write the run's report.html and front.json anew."""
    from optimizer.run_study import finish

    finish(run_at(run, storage))
    say(f"wrote {run / 'report.html'}")


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="A mergekit YAML file, or a recipe.json.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The new model folder.", show_default=False)],
) -> None:
    """Merge checkpoints by a recipe, without a search."""
    from evals.documents import checked_path
    from optimizer.export.commands import merge_recipe

    say(f"wrote {merge_recipe(recipe, checked_path(out, where='OUT'))}")


@app.command()
def learn(
    study: StudyPath,
    out: Annotated[Path, typer.Argument(help="The new recipe file (JSON).", show_default=False)],
    sets: Sets = [],  # noqa: B006  # typer makes a new list
    preference: Annotated[
        float, typer.Option(help="What the domain counts beside the general tasks.", min=0, max=1)
    ] = 0.6,
    start: Annotated[float, typer.Option(help="The weight to begin at: 0 the base, 1 the expert.", min=0, max=1)] = 0.5,
    steps: Annotated[int, typer.Option(help="Steps; each reads a few items of every task.", min=1, max=10_000)] = STEPS,
    by: Annotated[By, typer.Option(help="A weight for every tensor, or for every layer group.")] = "tensor",
    loss: Annotated[
        Loss, typer.Option(help="labels: the items' own; teachers: how far the merge is from base and experts.")
    ] = "labels",
) -> None:
    """Learn one recipe's weights by gradients on the search items."""
    from optimizer.learn import learn_weights

    learned = learn_weights(study, sets, out, preference=preference, start=start, steps=steps, by=by, loss=loss)
    say(f"wrote {out}; merge it with: mergefront merge {out} FOLDER")
    say(
        f"Loss on items kept apart {learned.kept_before:.3f} -> {learned.kept:.3f} (on those learned from "
        f"{learned.seen_before:.3f} -> {learned.seen:.3f}), after {learned.steps} steps, at the price of "
        f"{learned.candidates:.1f} candidates."
    )


@app.command()
def derive(
    study: StudyPath,
    out: Annotated[Path, typer.Argument(help="The folder to make the expert's folder in.", show_default=False)],
    sets: Sets = [],  # noqa: B006  # typer makes a new list
    form: Annotated[Form, typer.Option(help="The closed form.")] = "regmean",
    share: Annotated[float, typer.Option(help="How far to the expert, between 0 and 1.")] = 0.4,
    expert: Annotated[str, typer.Option(help="The expert, where the study has several.", show_default=False)] = "",
) -> None:
    """Make an expert by a closed form over the search items."""
    from optimizer.learn import derive_expert

    if not 0 < share < 1:
        fail(f"--share lies between 0 (the base) and 1 (the expert); given {share:g}", WRONG)
    folder = derive_expert(study, sets, out, form=form, share=share, expert=expert)
    say(f"derived expert: {folder}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to work in.")] = Path("runs/demo"),
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy model, trained in seconds.")] = False,
    workers: Annotated[int | None, typer.Option(help="Worker processes; 0 is this.", show_default="the demo's")] = None,
) -> None:
    """Run a whole study of a real model, from nothing to an export."""
    from evals.documents import resolved_path
    from optimizer.demo.demo import run_demo
    from optimizer.errors import StudyFileError

    resolved_path(out, Path(), where="--out", error=StudyFileError)
    run_demo(out, tiny, workers, terminal())


def main() -> None:
    """Run the `mergefront` command."""
    from optimizer.search.interrupt import interrupted_once

    os.environ.setdefault(*HUGE_PAGES)
    with interrupted_once():
        app()
