"""How long do a run's figures take? 1,000 trials on 2,000 items: read, intervals, front probabilities, the verdict.

    python benchmarks/statistics.py [--trials 1000] [--items 2000] [--run runs/statistics] [--json FILE]

Writes a made-up run folder (some minutes; kept) and reads it in a process of its own, as a person does who opens a run.
Each row is a step: its seconds, those of the processor, and the most memory that the process had by then. Aim: 10 s and
1 GB in all. What is measured stands in run_figures.py, since this file has the name of one of Python's own modules.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "statistics":  # another benchmark, whose folder stands first on its path, means Python's own
    import importlib.util
    import sysconfig

    spec = importlib.util.spec_from_file_location("statistics", Path(sysconfig.get_path("stdlib"), "statistics.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["statistics"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["statistics"])
elif __name__ == "__main__":
    sys.path[:] = [str(HERE.parent), *(place for place in sys.path if Path(place).resolve() != HERE)]
    from benchmarks.run_figures import main

    sys.exit(main(__doc__))
