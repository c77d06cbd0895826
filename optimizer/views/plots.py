"""The figures of a run beside its front, from plain frames: weights over depth, hypervolume over trials, tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from evals.outcomes import HOLDOUT
from optimizer.runs.families import PREPARED
from optimizer.runs.frames import rows_of
from optimizer.runs.trial import TrialKind, roles_of
from optimizer.views import canvas
from optimizer.views.canvas import AXIS, BLUE, GREEN, GREY, HEIGHT, INK, OCHRE, ORANGE, PALE, PAPER, PURPLE, SERIES
from optimizer.views.front_rows import share_of
from optimizer.words import percent, task_labels

MODULES = {"attn": ("attention", BLUE, "circle"), "mlp": ("feed-forward", ORANGE, "square")}
BOTH = ("attention and feed-forward", BLUE, "circle")
MARKS = ((OCHRE, "diamond"), (GREEN, "triangle-down"), (PURPLE, "x"), (GREY, "cross"))  # kinds of a study's own
ENDS = {"embed": ("embeddings", GREEN, "diamond"), "head": ("head", PURPLE, "triangle-up")}


def weights(frame: pd.DataFrame, *, title: str, subtitle: str) -> go.Figure:
    """Draw each expert's weight over the depth of the model, a panel per expert and a line per module.

    Args:
        frame: `Run.weights(trial)`.
    """
    experts = list(dict.fromkeys(frame["expert"]))
    figure = canvas.figure(title, subtitle, height=HEIGHT * 0.75 + 220 * (len(experts) - 1))
    panels = make_subplots(
        rows=len(experts), cols=1, shared_xaxes=True, vertical_spacing=0.08, figure=figure,
        subplot_titles=[f"expert {canvas.escaped(name)}" for name in experts] if len(experts) > 1 else None,
    )  # fmt: skip
    last = int(frame["layer"].max())
    for row, name in enumerate(experts, start=1):
        rows = frame[frame["expert"] == name]
        for trace in _module_traces(rows, legend=row == 1):
            panels.add_trace(trace, row=row, col=1)
        panels.update_yaxes(title_text="weight", row=row, col=1)
    panels.update_annotations(x=1, xanchor="right")
    if len(experts) > 1:  # the legend stands above the first panel's title
        panels.update_layout(legend_y=1 + 28 / (figure.layout.height - 190))
    panels.update_xaxes(AXIS, zeroline=False)
    panels.update_yaxes(AXIS)
    low, high = min(0.0, frame["weight"].min()), max(1.0, frame["weight"].max())
    panels.update_yaxes(range=[low - 0.06, high + 0.06])
    step = math.ceil((last + 1) / 12)
    layers = list(range(0, last + 1, step))
    panels.update_xaxes(range=[-2 * step, last + 2 * step], tickvals=[-step, *layers, last + step], tickangle=0)
    panels.update_xaxes(ticktext=["embed", *map(str, layers), "head"])
    panels.update_xaxes(title_text="layer, from the embeddings to the head", row=len(experts), col=1)
    return panels


def hypervolume(
    frame: pd.DataFrame, *, anchors: float, first_searched: int | None, reference: Mapping[str, float]
) -> go.Figure:
    """Draw what the points so far cover, after each trial, and dashed what those cover that were not searched.

    Args:
        frame: `Run.hypervolume()`.
        anchors: `Run.anchors_hypervolume()`.
        first_searched: the first trial that was searched; points learned may come after it.
        reference: the corner the hypervolume is measured to.
    """
    corner = f"forgetting {percent(reference['forgetting'])} (worst expert), domain gain 0 % (base)"
    subtitle = "" if frame.empty else f"hypervolume on search items; reference point: {corner}"
    figure = canvas.figure("How the search grew the front", subtitle, height=HEIGHT * 0.75)
    if frame.empty:
        return canvas.nothing_yet(figure)
    figure.add_trace(
        go.Scatter(
            x=frame["trial"], y=frame["hypervolume"], name="all trials so far", mode="lines",
            line={"color": BLUE, "width": 3, "shape": "hv"}, showlegend=False,
            hovertemplate="after trial %{x}: %{y:.4f}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_traces(_prepared_marks(frame))
    end = float(frame["trial"].max())
    figure.add_trace(
        go.Scatter(
            x=[0, end], y=[anchors, anchors], name="without the search", mode="lines", showlegend=False,
            line={"color": ORANGE, "width": 2.5, "dash": "dash"}, hoverinfo="skip",
        )
    )  # fmt: skip
    canvas.axes(figure, "trial", "hypervolume")
    final = float(frame["hypervolume"].iloc[-1])
    label = {"xref": "x", "yref": "y", "showarrow": False, "xanchor": "right", "x": end}
    figure.add_annotation(text="without the search", y=anchors, yshift=-14, font={"color": OCHRE, "size": 15}, **label)
    figure.add_annotation(text="all trials so far", y=final, yshift=14, font={"color": BLUE, "size": 15}, **label)
    bottom, top = 0.8 * min(anchors, final), max(anchors, final)
    figure.update_yaxes(range=[bottom, top + (0.12 * (top - bottom) or 1.0)])
    if first_searched is not None:
        figure.add_shape(
            type="line", x0=first_searched - 0.5, x1=first_searched - 0.5, y0=0, y1=1, yref="paper", layer="below",
            line={"color": PALE, "width": 1.5, "dash": "dot"},
        )  # fmt: skip
        figure.add_annotation(
            text="search begins", x=first_searched - 0.5, y=0, xref="x", yref="paper", xanchor="left", yanchor="bottom",
            showarrow=False, xshift=6, font={"color": GREY, "size": 14},
        )  # fmt: skip
    return figure


def retention(frame: pd.DataFrame, *, title: str) -> go.Figure:
    """Draw what a trial won of domain tasks and kept of general ones: bars, 95 % intervals, figures at the right.

    Args:
        frame: `Run.retention(trial)`.
    """
    upwards = pd.concat([frame[frame["role"] == role].iloc[::-1] for role in ("general", "domain")], ignore_index=True)
    rows = rows_of(upwards)
    unseen = (upwards["suite"] == HOLDOUT).all()
    judge = "items the search never saw" if unseen else "the items the search used"
    figure = canvas.figure(title, f"with 95 % intervals, on {judge}", height=215 + 50 * len(rows))
    figure.update_layout(margin={"l": 40, "r": 150})
    figure.add_traces(
        [
            _task_bars(upwards[upwards["role"] == "domain"], "domain gain", BLUE),
            _task_bars(upwards[upwards["role"] == "general"], "general ability kept", GREEN),
        ]
    )
    for place, row in rows.items():
        figure.add_annotation(
            text=share_of(row).text(), x=1.01, xref="paper", y=place, yref="y",
            xanchor="left", showarrow=False, font={"size": 15, "color": INK},
        )  # fmt: skip
    canvas.axes(figure, "%, where 100 is the expert (domain) or the base (general)", "")
    figure.update_yaxes(
        tickvals=list(rows), ticktext=[canvas.escaped(name) for name in task_labels(rows.values())], ticklabelstandoff=8
    )
    figure.update_yaxes(range=[-0.6, len(rows) - 0.4], showgrid=False, zeroline=False)
    figure.add_shape(
        type="line", x0=100, x1=100, y0=0, y1=1, yref="paper", line={"color": INK, "width": 1.5, "dash": "dash"}
    )
    low, high = 100 * min(0.0, upwards["low"].min()), 100 * max(1.0, upwards["high"].max())
    figure.update_xaxes(range=[low - 2 if low < 0 else 0, high + 4])
    return figure


def _prepared_marks(frame: pd.DataFrame) -> list[go.Scatter]:
    """Mark where points were derived and learned, on the line of what all cover."""
    traces = []
    for role in PREPARED:
        name, symbol, color, size = SERIES[role]
        rows = frame[roles_of(frame["kind"]) == role]
        traces.append(
            go.Scatter(
                x=rows["trial"], y=rows["hypervolume"], name=name, mode="markers", showlegend=len(rows) > 0,
                marker={"symbol": symbol, "color": color, "size": size, "line": {"width": 1, "color": PAPER}},
                text=[canvas.escaped(TrialKind(kind).label) for kind in rows["kind"]],
                hovertemplate="trial %{x}, %{text}: %{y:.4f}<extra></extra>",
            )
        )  # fmt: skip
    return traces


def _task_bars(rows: pd.DataFrame, name: str, color: str) -> go.Bar:
    scores = [
        [canvas.escaped(row["metric"]), f"{row['base_score']:.3f}", f"{row['score']:.3f}"]
        for row in rows_of(rows).values()
    ]
    return go.Bar(
        orientation="h", name=name, x=100 * rows["share"], y=list(rows.index), width=0.62, customdata=scores,
        marker={"color": color, "opacity": 0.85}, error_x=canvas.bar(rows["share"], rows["low"], rows["high"], INK, 2),
        hovertemplate="%{customdata[0]}: base %{customdata[1]}, here %{customdata[2]}<extra></extra>",
    )  # fmt: skip


def _module_traces(rows: pd.DataFrame, *, legend: bool) -> list[go.Scatter]:
    """Make a line for each kind of module, one for both where they are alike; embeddings and head are marks."""
    last = int(rows["layer"].max())
    step = math.ceil((last + 1) / 12)  # embeddings and head stand one tick before and after the layers
    attn, mlp = (rows.loc[rows["kind"] == kind, "weight"].tolist() for kind in MODULES)
    series = {**ENDS, "attn": BOTH} if attn == mlp else {**ENDS, **MODULES}
    own = [kind for kind in dict.fromkeys(rows["kind"]) if kind not in (*ENDS, *MODULES)]
    series |= {kind: (canvas.escaped(kind.replace("_", " ")), *MARKS[i % len(MARKS)]) for i, kind in enumerate(own)}
    traces = []
    for kind, (name, color, symbol) in series.items():
        part = rows[rows["kind"] == kind]
        if part.empty:
            continue
        in_layers = kind not in ENDS
        traces.append(
            go.Scatter(
                x=part["layer"].where(part["layer"] >= 0, part["group"].map(
                    lambda group: -step if group.startswith("embed") else last + step)), y=part["weight"],
                name=name, legendgroup=name, showlegend=legend, mode="lines+markers" if in_layers else "markers",
                line={"color": color, "width": 2.5},
                marker={"symbol": symbol, "color": color, "size": 8 if in_layers else 13, "line": {"width": 0}},
                text=part["group"], hovertemplate="%{text}: %{y:.3f}<extra></extra>",
            )
        )  # fmt: skip
    return traces
