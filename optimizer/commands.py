"""What all commands share: arguments that several take, how they speak, and errors as lines with an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from optimizer.exit_codes import FAILED, INTERRUPTED, MENDABLE, NOT_NOW, exit_code
from optimizer.words import printable

if TYPE_CHECKING:
    from rich.console import Console

    from optimizer.run import Run
    from optimizer.study.schema import Study

StudyPath = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file.", show_default=False)]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False)]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a value, such as search.trials=40.")]
DomainText = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="A plain text of the expert's domain; may be repeated.", show_default=False),
]
GeneralText = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="A plain text of anything else; may be repeated.", show_default=False),
]
KlToBase = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="A plain text over which a merge is compared with the base, as forgetting; may be repeated.",
        show_default=False,
    ),
]
FromEvolve = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Convert a mergekit-evolve configuration instead.", show_default=False),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="FOLDER", help="With --from-evolve: its --task-search-path.", show_default=False),
]
TrialNumber = Annotated[int, typer.Argument(help="The trial's number.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Experts = Annotated[
    list[str] | None, typer.Argument(metavar="EXPERT...", help="Experts: PATH, or NAME=PATH.", show_default=False)
]
Full = Annotated[
    bool, typer.Option("--full", help="Read every byte of the models: values are finite; give each file's sha256.")
]
WorkerCount = Annotated[
    int | None, typer.Option(help="Worker processes; 0 is this process.", show_default="the study's")
]
RayAddress = Annotated[str | None, typer.Option(help="A Ray cluster to join.", show_default="a local one of our own")]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch models named by hub id or URL that are not here yet; never else.")
]
Storage = Annotated[
    str | None,
    typer.Option(envvar="MERGEFRONT_STORAGE", metavar="URL", help="The study's storage, where its URL has a password."),
]


def study_of(path: Path, sets: Sequence[str], *, download: bool) -> Study:
    """Read a study; where asked, bring what it names by hub ids and URLs to this machine, and say where that lies."""
    from optimizer.study.study_file import read_study

    study = read_study(path, sets)
    if download:
        from optimizer.checkpoints.hub import fetched
        from optimizer.checkpoints.urls import copied

        sources = [study.models.base, *study.models.experts.values()]
        for source, folder in fetched(sources).items():
            say(f"from the hub: {source} in {folder}")
        for source, folder in copied(sources, say).items():
            say(f"copied: {source} in {folder}")
    return study


class Commands(TyperGroup):
    """Turns our errors into one line on stderr and an exit code; a traceback only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if ctx.params.get("debug"):
                raise
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nobody to tell
            raise typer.Exit(FAILED) from None
        except OSError as error:
            if error.errno not in MENDABLE or ctx.params.get("debug"):
                raise
            place = f"{error.filename}: " if error.filename else ""
            fail(f"{place}{error.strerror}; with --debug before the command it shows where", MENDABLE[error.errno])
        except Exception as error:
            if "message" in vars(error):  # how typer words a usage error, with what was typed
                vars(error)["message"] = printable(str(vars(error)["message"]))
            code = exit_code(error)
            if code is None or ctx.params.get("debug"):
                raise
            fail(str(error), code)


def version_asked(asked: bool) -> None:
    """Print the version where it is asked for, and end."""
    if asked:
        from importlib.metadata import version

        say(f"mergefront {version('mergefront')}")
        raise typer.Exit


def fail(text: str, code: int) -> NoReturn:
    """Print an error and end with an exit code."""
    say(f"error: {text}", error=True)
    raise typer.Exit(code)


def run_at(run: Path, storage: str | None) -> Run:
    """Open a run, from the storage given or the one that its study names."""
    from evals.documents import checked_path
    from optimizer.run import open_run
    from optimizer.study.study_file import stored_storage

    run = checked_path(run, where="RUN")
    return open_run(run, storage=storage or stored_storage(run))


def chosen_point(run: Run, max_forgetting: float | None, sure: float | None) -> int:
    """Choose the knee, or the best point that forgets little enough; exit with 3 where there is none."""
    from optimizer.errors import NoPointError
    from optimizer.runs.front import SURE

    try:
        return run.knee() if max_forgetting is None else run.best(max_forgetting, sure=SURE if sure is None else sure)
    except NoPointError as error:
        fail(str(error), NOT_NOW)


def terminal() -> Console:
    """Return where progress and tables are written."""
    from optimizer.views.terminal import Terminal

    return Terminal()


def say(text: str, *, error: bool = False) -> None:
    """Print a line as it is, whatever is in it."""
    from optimizer.views.terminal import say as show  # brings rich

    show(text, error=error)


def print_json(document: Mapping[str, Any]) -> None:
    """Print a document for machines."""
    say(json.dumps(document, indent=1, allow_nan=False))
