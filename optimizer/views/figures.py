"""The four figures of a run, each from its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evals.outcomes import SUITES
from optimizer.runs.scored import ScoredRun
from optimizer.runs.trial import NO_ANCHORS, roles_of
from optimizer.views import front_plot, plots
from optimizer.views.sentences import titled

if TYPE_CHECKING:
    import plotly.graph_objects as go


def front(run: ScoredRun) -> go.Figure:
    """Draw forgetting against domain gain: anchors, points derived, learned and searched, the front with intervals, the
    knee."""
    points = {suite: run.points(suite) for suite in SUITES}
    return front_plot.front(points, knee=run.knee() if len(run.points()) else None, suite=run.judging_suite)


def weights(run: ScoredRun, trial: int) -> go.Figure:
    """Draw the weights of one trial over the depth of the model, by module and expert."""
    what = "the mean of a module's tensors" if run.recipe(trial).tensors else "a line for each kind of module"
    title = f"{titled(run, trial)}: how much of the expert each layer takes"
    return plots.weights(run.weights(trial), title=title, subtitle=f"0 is the base, 1 the expert; {what}")


def hypervolume(run: ScoredRun) -> go.Figure:
    """Draw the hypervolume over trials, against what the points that were not searched cover."""
    growth = run.hypervolume()
    searched = growth["trial"][roles_of(growth["kind"]).isin(NO_ANCHORS)]
    return plots.hypervolume(
        growth,
        anchors=run.anchors_hypervolume(),
        first_searched=None if searched.empty else int(searched.min()),
        reference=run.reference(),
    )


def retention(run: ScoredRun, trial: int) -> go.Figure:
    """Draw what one trial kept of each general task and won of each domain task, with intervals."""
    return plots.retention(run.retention(trial), title=f"{titled(run, trial)}: what it won and what it kept")
