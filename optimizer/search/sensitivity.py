"""Where an expert's gain and loss come from: measured once for a study that learns weights, stored in its folder."""

from __future__ import annotations

from optimizer.runs.atomic_file import write_atomically
from optimizer.runs.sensitivities import sensitivity_file
from optimizer.search.crew import Crew
from optimizer.search.events import Reporter
from optimizer.search.ledger import Ledger
from optimizer.workers.pool import SensitivityJob

ITEMS = 6  # of each task: the parts add up to the difference on these items, whatever their number


def measure_sensitivities(ledger: Ledger, crew: Crew, reporter: Reporter) -> None:
    """Measure what the run folder does not have yet of each expert; what fails is said, and nothing hangs on it.

    Raises:
        KeyboardInterrupt: a person asked to stop.
    """
    experts = {kind.expert_name: number for kind, number in ledger.references.items() if kind.expert_name}
    waiting = [
        SensitivityJob(number, name, ITEMS)
        for name, number in experts.items()
        if not sensitivity_file(ledger.run.path, name).exists()
    ]
    while waiting or crew.out:
        while waiting and crew.takes_jobs:
            crew.submit(waiting.pop(0))
        if not crew.out:
            break
        for result, seconds in crew.wait():
            if result.answer is None:
                reporter.say("note", f"where gain and loss come from cannot be measured: {result.error}")
                continue
            path = sensitivity_file(ledger.run.path, result.answer.expert)
            write_atomically(path, (result.answer.to_json() + "\n").encode())
            reporter.say(
                "note", f"where {result.answer.expert}'s gain and loss come from is measured ({seconds:.0f} s)"
            )
    crew.end()
