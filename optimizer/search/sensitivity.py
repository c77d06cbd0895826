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
    missing = [
        SensitivityJob(number, name, ITEMS)
        for name, number in experts.items()
        if not sensitivity_file(ledger.run.path, name).exists()
    ]
    for result, seconds in crew.work_off(missing):
        name = ledger.kinds[result.job.trial].expert_name
        if result.answer is None:
            reporter.say("note", f"the sensitivities of {name} cannot be measured: {result.error}")
        else:
            write_atomically(sensitivity_file(ledger.run.path, name), (result.answer.to_json() + "\n").encode())
            reporter.say("note", f"the sensitivities of {name} are measured ({seconds:.0f} s)")
