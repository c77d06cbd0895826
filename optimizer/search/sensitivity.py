"""Where an expert's gain and loss come from: measured once for a study that learns weights, stored in its folder."""

from __future__ import annotations

from optimizer.runs.atomic_file import write_atomically
from optimizer.runs.sensitivities import sensitivity_file
from optimizer.search.events import Reporter
from optimizer.search.ledger import Ledger
from optimizer.workers.pool import Result, SensitivityJob

ITEMS = 6  # of each task: the parts add up to the difference on these items, whatever their number


def sensitivity_jobs(ledger: Ledger) -> list[SensitivityJob]:
    """Give the jobs that measure what the run folder does not have yet of each expert."""
    experts = {kind.expert_name: number for kind, number in ledger.references.items() if kind.expert_name}
    return [
        SensitivityJob(number, name, ITEMS)
        for name, number in experts.items()
        if not sensitivity_file(ledger.run.path, name).exists()
    ]


def take_in_sensitivities(result: Result, seconds: float, ledger: Ledger, reporter: Reporter) -> None:
    """Store what was measured; what failed is said, and nothing hangs on it."""
    name = ledger.kinds[result.job.trial].expert_name
    if result.answer is None:
        reporter.say("note", f"the sensitivities of {name} cannot be measured: {result.error}")
    else:
        write_atomically(sensitivity_file(ledger.run.path, name), (result.answer.to_json() + "\n").encode())
        reporter.say("note", f"the sensitivities of {name} are measured ({seconds:.0f} s)")
