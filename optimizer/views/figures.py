"""The four figures of a run, each from its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evals.outcomes import SUITES
from optimizer.runs.scored import ScoredRun
from optimizer.views import plots
from optimizer.views.sentences import titled

if TYPE_CHECKING:
    import plotly.graph_objects as go


def front(run: ScoredRun) -> go.Figure:
    """Forgetting against domain gain: anchors, searched points, the front with intervals, the knee."""
    points = {suite: run.points(suite) for suite in SUITES}
    return plots.front(points, knee=run.knee() if len(run.points()) else None, suite=run.judging_suite)


def weights(run: ScoredRun, trial: int) -> go.Figure:
    """The weights of one trial over the depth of the model, by module and expert."""
    return plots.weights(run.weights(trial), title=f"{titled(run, trial)}: how much of the expert each layer takes")


def hypervolume(run: ScoredRun) -> go.Figure:
    """The hypervolume over trials, against what the anchors alone cover."""
    return plots.hypervolume(
        run.hypervolume(),
        anchors=run.anchors_hypervolume(),
        first_searched=len(run.anchors()),
        reference=run.reference(),
    )


def retention(run: ScoredRun, trial: int) -> go.Figure:
    """What one trial kept of each general task and won of each domain task, with intervals."""
    return plots.retention(run.retention(trial), title=f"{titled(run, trial)}: what it won and what it kept")
