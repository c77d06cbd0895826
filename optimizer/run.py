"""What a notebook opens: a run folder's numbers, sentences and figures, also while a search is writing to it.

Needs neither torch nor ray nor lm-eval, and changes nothing. What is read is kept: open the run again to see it grow.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from evals.outcomes import SUITES
from optimizer.errors import RunError
from optimizer.runs.scored import ScoredRun
from optimizer.views import sentences

if TYPE_CHECKING:
    import plotly.graph_objects as go


def open_run(path: Path | str, *, storage: str | None = None) -> Run:
    """Open a run folder for reading.

    Args:
        storage: the Optuna URL of a study that is not kept in the folder's own study.db.

    Raises:
        RunError: the folder is not a run, or its study is damaged or not ours.
    """
    return Run(Path(path), storage)


class Run(ScoredRun):
    """A run as it was when it was opened. Points are trials by number; figures are shares (0.06 is 6 %)."""

    # --- sentences -----------------------------------------------------------------------------------------------

    def named(self, trial: int) -> str:
        """Name a trial as people call it: its number, and its method where the run has several."""
        return sentences.named(self, trial)

    def describe(self, trial: int) -> str:
        """Say in one sentence what a trial keeps and forgets, with intervals, and on which items."""
        return sentences.describe(self, trial)

    def how_sure(self, trial: int, max_forgetting: float) -> str:
        """Say in one sentence how sure it is that a trial forgets at most so much, by the items that judge it."""
        return sentences.how_sure(self, trial, max_forgetting)

    def verdict(self) -> list[str]:
        """Say whether searching was worth it: what was found beside the best of the lines, for some limits, and what
        derived and learned points add."""
        return sentences.verdict(self)

    def certificates(self) -> list[str]:
        """Say what the run's certificates say, those that refuse too: a sentence each."""
        return sentences.certificates(self)

    def sentinel_words(self, trial: int) -> list[str]:
        """Say in one sentence whether the sentinel tasks show ability kept or a form learned; nothing without them."""
        return sentences.sentinels(self, trial)

    def cut_short(self) -> list[str]:
        """Name tasks with items longer than the model's context, or answers that hit their limit of tokens: a sentence
        each, over all finished trials and both suites."""
        return sentences.cut_short(self)

    def lost(self) -> list[str]:
        """Name finished trials whose stored outcomes are missing or damaged and that every figure leaves out: a
        sentence for each suite, naming the files."""
        return sentences.lost(self)

    def findings(self) -> list[str]:
        """Say what a reader should know first, in plain words: tasks that cannot carry a measurement, what was cut
        short, lost outcomes, failed trials."""
        return sentences.findings(self)

    def summary(self) -> str:
        """Tell the run in a few plain sentences."""
        return sentences.summary(self)

    # --- figures: plotly is imported only where one is drawn -----------------------------------------------------

    def plot_front(self) -> go.Figure:
        """Draw forgetting against domain gain: anchors, points derived, learned and searched, the front with intervals,
        the knee."""
        from optimizer.views import figures

        return figures.front(self)

    def plot_weights(self, trial: int) -> go.Figure:
        """Draw the weights of one trial over the depth of the model, by module and expert."""
        from optimizer.views import figures

        return figures.weights(self, trial)

    def plot_hypervolume(self) -> go.Figure:
        """Draw the hypervolume over trials, against what the points that were not searched cover."""
        from optimizer.views import figures

        return figures.hypervolume(self)

    def plot_retention(self, trial: int) -> go.Figure:
        """Draw what one trial kept of each general task and won of each domain task, with intervals."""
        from optimizer.views import figures

        return figures.retention(self, trial)

    def plot_sensitivities(self, expert: str) -> go.Figure:
        """Draw where an expert's gain and loss come from, by layer and kind of tensor.

        Raises:
            RunError: it was not measured.
        """
        from optimizer.views.sensitivity_plot import heat_map

        measured = self.sensitivities()
        if expert not in measured:
            rule = "a search with learned points measures it"
            raise RunError(f"run {self.name} has no sensitivities of {expert!r}; {rule}")
        return heat_map(measured[expert])

    def __repr__(self) -> str:
        return f"<run {self.name}>"

    def _repr_html_(self) -> str:
        front = self.front()
        columns = ["kind", *(name for suite in SUITES for name in self.columns(suite))]
        table = front[columns].to_html(float_format=lambda value: f"{value:.1%}", escape=True)
        return f"<p>{html.escape(self.summary())}</p>{table if len(front) else ''}"
