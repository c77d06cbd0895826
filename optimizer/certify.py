"""What `certify` does: test, on items that nothing has looked at, which recipe forgets at most so much.

The ledger is on the disk before the first item is scored; a certificate that was broken off goes on from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.certificates import BUDGET, Hypothesis
from evals.hypotheses import Known, forgetting_hypotheses, gain_hypothesis
from evals.outcomes import HOLDOUT
from optimizer.errors import RunError
from optimizer.run import open_run
from optimizer.run_study import fingerprint, worker_spec
from optimizer.runs.certificates import (
    FORMAT,
    Question,
    Record,
    close_record,
    left_of_budget,
    new_record,
    read_records,
    require_budget,
)
from optimizer.runs.chain import Link, chain_of
from optimizer.runs.differences import differences
from optimizer.runs.manifest import read_manifest, stored_study, task_entry
from optimizer.runs.run_folder import RunFolder, renew_fingerprints
from optimizer.search.certifier import Examined, Say, Scorer, Stock, examine
from optimizer.search.plan import count_tokens, make_plan, require_own_names, require_sound
from optimizer.study.study_file import read_study
from optimizer.words import listed, one_line, percent
from optimizer.workers.worker import Worker

if TYPE_CHECKING:
    from optimizer.run import Run
    from optimizer.search.plan import Ready
    from optimizer.study.schema import Study

BLOCKS = 10  # that the items of each task are scored in; after each, the bets are looked at


def certify_run(
    path: Path,
    question: Question,
    *,
    storage: str | None = None,
    say: Say = print,
    make_scorer: Callable[[Study], Scorer] | None = None,
) -> Mapping[str, Any]:
    """Certify a recipe of a run, or find that none can be; a certificate that is there already is read.

    Args:
        storage: as of `open_run`.
        say: is told what goes on, a line at a time.
        make_scorer: makes what scores; None: a worker of the run's study, in this process.

    Returns:
        What certificate.json holds.

    Raises:
        NoPointError: no point does what is asked on the items that are known; nothing was spent.
        RunError: the run's error is used up, or its study is not what it was.
    """
    run, known = open_run(path, storage=storage), read_records(path)
    asked = [record for record in known if record.ledger["question"] == question.document()]
    if asked and asked[-1].certificate is not None:
        return asked[-1].certificate
    if not asked:
        require_budget(known, question.delta)
        chain_of(run, question)  # there is something to test, before any model is read
    with RunFolder(path).lock():
        ready = _opened(path)
        items, sizes = ready.harness.certify_order()
        if not asked:
            asked = [new_record(path, _ledger(run, question, items, sizes, left=left_of_budget(known)))]
        record = asked[-1]
        if any(sorted(items[task]) != sorted(hashes) for task, hashes in record.ledger["items"].items()):
            raise RunError(f"{record.folder}: the study's certify items are no longer those of the ledger")
        say(f"ledger: {record.folder / 'ledger.json'}")
        scorer: Scorer = make_scorer(ready.study) if make_scorer else Worker(worker_spec(ready.study))
        stock = Stock(run, record.ledger["items"], scorer, say)
        closed = close_record(record, _certificate(run, record, stock, left_of_budget(read_records(path))))
        assert closed.certificate is not None
        return closed.certificate


def _opened(path: Path) -> Ready:
    """Open what the run was made from, and require that it is the same still."""
    require_own_names()
    study = read_study(path / "study.yaml")
    study = study.model_copy(update={"search": study.search.model_copy(update={"storage": None})})
    plan = make_plan(study)
    count_tokens(plan)
    ready = require_sound(plan)
    renew_fingerprints(path, {model.dated: model.fingerprint for model in ready.models})
    stored = read_manifest(path)
    tasks = [task_entry(task) for task in ready.harness.infos]
    present = {**stored, "tasks": tasks, "fingerprint": json.loads(json.dumps(fingerprint(ready)))}
    kept = stored_study(path)
    if changed := differences(stored, present, old_study=kept, new_study=kept):
        lines = "".join(f"  {line}\n" for line in changed)
        raise RunError(f"{path} was made from other things than its study names now; what changed:\n{lines}")
    return ready


def _ledger(
    run: Run, question: Question, items: Mapping[str, list[str]], sizes: Mapping[str, tuple[int, ...]], *, left: float
) -> dict[str, Any]:
    """Write down all that decides: the recipes in their order, what is tested of each, the items in their order."""
    used = {task.name for task in run.tasks if task.role == "general" or (task.role == "domain" and question.min_gain)}
    return {
        "format": FORMAT,
        "made": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "question": question.document(),
        "budget": {"all": BUDGET, "left_before": left},
        "items": {task: hashes for task, hashes in items.items() if task in used},
        "blocks": BLOCKS,
        "candidates": [
            {
                **dataclasses.asdict(link),
                "digest": run.recipe(link.trial).digest,
                "hypotheses": [dataclasses.asdict(h) for h in _hypotheses(run, link, question, items, sizes)],
            }
            for link in chain_of(run, question)
        ],
    }


def _hypotheses(
    run: Run, link: Link, question: Question, items: Mapping[str, list[str]], sizes: Mapping[str, tuple[int, ...]]
) -> list[Hypothesis]:
    assert run.references is not None, "a chain has scored points"
    base, experts = run.references
    numbers = {task: len(hashes) for task, hashes in items.items()}
    known = Known(run.outcomes(HOLDOUT), base, link.trial, experts, run.tasks, numbers, sizes)
    limits = forgetting_hypotheses(known, question.max_forgetting, each_task=question.each_task, delta=question.delta)
    gains = [] if question.min_gain is None else [gain_hypothesis(known, question.min_gain, delta=question.delta)]
    return [*limits, *gains]


def _certificate(run: Run, record: Record, stock: Stock, left: float) -> dict[str, Any]:
    """Examine the chain's recipes in turn, and say what came of it."""
    ledger = record.ledger
    question = Question(**ledger["question"])
    done: list[Examined] = []
    for candidate in ledger["candidates"]:
        done.append(examine(run, candidate, stock, blocks=ledger["blocks"], delta=question.delta))
        if not done[-1].is_certified:
            break
    best = next((one for one in reversed(done) if one.is_certified), None)
    spent = {task: max(one.items.get(task, 0) for one in done) for task in ledger["items"]}
    return {
        "format": FORMAT,
        "sentence": _certified(question, best) if best else _refused(question, done[0]),
        "trial": best.trial if best else None,
        "digest": best.digest if best else "",
        "question": ledger["question"],
        "spent": {task: {"used": number, "of": len(ledger["items"][task])} for task, number in spent.items()},
        "budget": {"all": BUDGET, "left": left},
        "tested": [one.document() for one in done],
        "ledger": ledger,
    }


def spent_sentence(certificate: Mapping[str, Any]) -> str:
    """Say what a certificate used of a run's certify items, and what is left of the error."""
    spent = [f"{row['used']} of {row['of']} items of {one_line(task)}" for task, row in certificate["spent"].items()]
    left, whole = (percent(certificate["budget"][key]) for key in ("left", "all"))
    return (
        f"Spent: {listed(spent, shown=9)}. Of the error of {whole} that all certificates of a run share, {left} is "
        "left for others."
    )


def _certified(question: Question, best: Examined) -> str:
    number = sum(best.items.values())
    parts = [part for proof in best.proofs for part in proof.hypothesis.parts]
    bounded = sorted({one_line(part.task) for part in parts if part.is_bounded})
    stated = (
        f", where a loss on {', '.join(bounded)} counts up to the bound stated in certificate.json" if bounded else ""
    )
    return (
        f"Recipe {best.digest[:6]} (trial {best.trial}) {question.words}: on items like these, at "
        f"{question.confidence} confidence, by {number} items{stated}."
    )


def _refused(question: Question, first: Examined) -> str:
    """Say that none can be certified, and how many items it would take."""
    number, needed = sum(first.items.values()), first.items_needed(question.delta)
    who = f"trial {first.trial}, the surest by search and holdout items"
    if needed is None:
        why = f"{who}, did not do it on these items, and more of them would not show it"
    else:
        why = f"for {who}, about {needed:,} would be needed"
    return (
        f"None can be certified with {number} items: that a recipe {question.words}, at {question.confidence} "
        f"confidence. {why[0].upper()}{why[1:]}."
    )
