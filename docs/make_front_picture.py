"""Draw the README's picture of a front: python docs/make_front_picture.py RUN_FOLDER PICTURE.png"""

from __future__ import annotations

import sys
from pathlib import Path

from optimizer.run import Run, open_run
from optimizer.views.pictures import picture


def front_png(run: Run, path: Path | str) -> None:
    """Write a run's front as a PNG."""
    picture(run.plot_front()).save(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    front_png(open_run(sys.argv[1]), sys.argv[2])
