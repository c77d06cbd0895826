"""The four figures of a run, drawn by plotly from plain frames; the only module that knows plotly.

Names come from a person's study file: each is escaped, since plotly reads labels as a subset of HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from evals.outcomes import HOLDOUT
from optimizer.runs.frames import Row, rows_of
from optimizer.runs.trial import Role, TrialKind, roles_of
from optimizer.words import percent, tasks_said

# Okabe and Ito's colours, told apart with any colour vision; every series also has a symbol of its own.
INK, GREY, PALE, RULE = "#1f2933", "#6b7785", "#b6bfca", "#e4e8ed"
BLUE, RED, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7"
PAPER, VEIL, OCHRE, PALE_BLUE = "#ffffff", "rgba(255,255,255,0.85)", "#9a6a00", "rgba(0,114,178,0.4)"
DARK = {  # for each colour above that a dark ground does not carry, the one that takes its place there
    INK: "#e6edf3", GREY: "#9aa7b4", PALE: "#5d6875", RULE: "#2b333d", BLUE: "#56b4e9", RED: "#f0803c",
    PAPER: "#161b22", VEIL: "rgba(22,27,34,0.85)", OCHRE: ORANGE, PALE_BLUE: "rgba(86,180,233,0.4)",
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
WIDTH, HEIGHT, PLOT_WIDTH = 980, 600, 860  # pixels
AXIS = {"gridcolor": RULE, "zerolinecolor": PALE, "zerolinewidth": 1.5, "automargin": True, "title_standoff": 14}

MODULES = {"attn": ("attention", BLUE, "circle"), "mlp": ("feed-forward", ORANGE, "square")}
BOTH = ("attention and feed-forward", BLUE, "circle")
ENDS = {"embed": ("embeddings", GREEN, "diamond"), "head": ("head", PURPLE, "triangle-up")}


def front(points: pd.DataFrame, *, knee: int | None, suite: str) -> go.Figure:
    """Forgetting against domain gain, in per cent: anchors, searched points, the front, the knee, holdout re-scores.

    Args:
        points: `Run.points()`.
        knee: the trial to mark.
        suite: the suite whose intervals are drawn: that which judges the front.
    """
    unseen = suite == HOLDOUT
    judge = "items the search never saw" if unseen else "the items the search used"
    figure = _figure("What each gain in the domain costs", f"one mark is one merge; bars are 95 % intervals on {judge}")
    if points.empty:
        return _nothing_yet(figure)
    if points["method"].nunique() == 1:  # then it need not be said of each mark
        points = points.drop(columns="method")
    figure.add_traces(_front_traces(points, unseen=unseen))
    _axes(figure, "forgetting, % of the base's general ability", "domain gain, % of the expert's gain")
    left, right = _span(_shown(points, "forgetting", unseen=unseen), below=0.04, above=0.12)
    figure.update_xaxes(range=[left, right])
    figure.update_yaxes(range=_span(_shown(points, "domain", unseen=unseen), below=0.08, above=0.16))
    rows = rows_of(points)
    ends = [row for row in rows.values() if TrialKind(row["kind"]).is_reference]
    for place, row in enumerate(ends):  # experts may lie close together: their labels go up and down in turn
        label, y = _escaped(TrialKind(row["kind"]).label), -26 if place % 2 else 26
        is_left = 100 * row["forgetting"] - left < (right - left) / 2  # a label runs towards the middle
        _point_at(figure, row, label, x=12 if is_left else -12, y=y, anchor="left" if is_left else "right")
    if knee is not None:
        figure.add_trace(_marks(points.loc[[knee]], "knee", "circle-open", INK, 20))
        from_left = PLOT_WIDTH * (100 * rows[knee]["forgetting"] - left) / (right - left)
        # Above and left of the front there is nothing to cover; near the axis the label stays right of it.
        _point_at(figure, rows[knee], _knee_label(knee, rows[knee]), x=max(-60, round(130 - from_left)), y=-52)
    return figure


def weights(frame: pd.DataFrame, *, title: str) -> go.Figure:
    """The weight of each expert over the depth of the model, a panel per expert and a line per module.

    Args:
        frame: `Run.weights(trial)`.
    """
    experts = list(dict.fromkeys(frame["expert"]))
    subtitle = "0 is the base, 1 the expert; a line for each kind of module"
    figure = _figure(title, subtitle, height=HEIGHT * 0.75 + 220 * (len(experts) - 1))
    panels = make_subplots(
        rows=len(experts), cols=1, shared_xaxes=True, vertical_spacing=0.08, figure=figure,
        subplot_titles=[f"expert {_escaped(name)}" for name in experts] if len(experts) > 1 else None,
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
    frame: pd.DataFrame, *, anchors: float, first_searched: int, reference: Mapping[str, float]
) -> go.Figure:
    """What the points so far cover, after each trial, and what the anchors alone cover as a dashed line.

    Args:
        frame: `Run.hypervolume()`.
        anchors: `Run.anchors_hypervolume()`.
        first_searched: how many trials at the start are anchors.
        reference: the corner the hypervolume is measured to.
    """
    corner = f"forgetting {percent(reference['forgetting'])} (worst expert), domain gain 0 % (base)"
    subtitle = "" if frame.empty else f"hypervolume on search items; reference point: {corner}"
    figure = _figure("How the search grew the front", subtitle, height=HEIGHT * 0.75)
    if frame.empty:
        return _nothing_yet(figure)
    figure.add_trace(
        go.Scatter(
            x=frame["trial"], y=frame["hypervolume"], name="all trials so far", mode="lines",
            line={"color": BLUE, "width": 3, "shape": "hv"}, showlegend=False,
            hovertemplate="after trial %{x}: %{y:.4f}<extra></extra>",
        )
    )  # fmt: skip
    end = float(frame["trial"].max())
    figure.add_trace(
        go.Scatter(
            x=[0, end], y=[anchors, anchors], name="anchors alone", mode="lines", showlegend=False,
            line={"color": ORANGE, "width": 2.5, "dash": "dash"}, hoverinfo="skip",
        )
    )  # fmt: skip
    _axes(figure, "trial", "hypervolume")
    final = float(frame["hypervolume"].iloc[-1])
    label = {"xref": "x", "yref": "y", "showarrow": False, "xanchor": "right", "x": end}
    figure.add_annotation(text="anchors alone", y=anchors, yshift=-14, font={"color": OCHRE, "size": 15}, **label)
    figure.add_annotation(text="all trials so far", y=final, yshift=14, font={"color": BLUE, "size": 15}, **label)
    bottom, top = 0.8 * min(anchors, final), max(anchors, final)
    figure.update_yaxes(range=[bottom, top + (0.12 * (top - bottom) or 1.0)])
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
    """What a trial won of each domain task and kept of each general one: bars, 95 % intervals, figures at the right.

    Args:
        frame: `Run.retention(trial)`.
    """
    upwards = pd.concat([frame[frame["role"] == role].iloc[::-1] for role in ("general", "domain")], ignore_index=True)
    rows = rows_of(upwards)
    unseen = (upwards["suite"] == HOLDOUT).all()
    judge = "items the search never saw" if unseen else "the items the search used"
    figure = _figure(title, f"with 95 % intervals, on {judge}", height=215 + 50 * len(rows))
    figure.update_layout(margin={"l": 40, "r": 150})
    figure.add_traces(
        [
            _task_bars(upwards[upwards["role"] == "domain"], "domain gain", BLUE),
            _task_bars(upwards[upwards["role"] == "general"], "general ability kept", GREEN),
        ]
    )
    for place, row in rows.items():
        figure.add_annotation(
            text=percent(row["share"], row["low"], row["high"]), x=1.01, xref="paper", y=place, yref="y",
            xanchor="left", showarrow=False, font={"size": 15, "color": INK},
        )  # fmt: skip
    _axes(figure, "%, where 100 is the expert (domain) or the base (general)", "")
    figure.update_yaxes(
        tickvals=list(rows), ticktext=[_escaped(name) for name in tasks_said(rows.values())], ticklabelstandoff=8
    )
    figure.update_yaxes(range=[-0.6, len(rows) - 0.4], showgrid=False, zeroline=False)
    figure.add_shape(
        type="line", x0=100, x1=100, y0=0, y1=1, yref="paper", line={"color": INK, "width": 1.5, "dash": "dash"}
    )
    low, high = 100 * min(0.0, upwards["low"].min()), 100 * max(1.0, upwards["high"].max())
    figure.update_xaxes(range=[low - 2 if low < 0 else 0, high + 4])
    return figure


def library_script() -> str:
    """plotly's own JavaScript, to be put into a page once."""
    return get_plotlyjs()


def _front_traces(points: pd.DataFrame, *, unseen: bool) -> list[go.Scatter]:
    roles = roles_of(points["kind"])
    base, experts, uniform, start = (roles == role for role in (Role.BASE, Role.EXPERT, Role.UNIFORM, Role.START))
    chosen = points[points["front"]].sort_values(["forgetting", "domain"])
    found = chosen[roles[chosen.index] == Role.SEARCHED]
    several = experts.sum() > 1  # then the front is a surface and has no edge, and the uniform line meets no expert
    line = points[uniform if several else uniform | base | experts].sort_values("forgetting")
    return [
        _marks(points[(roles == Role.SEARCHED) & ~points["front"]], "searched", "circle", PALE, 8, rank=3),
        _curve(line, ORANGE, dash="dot"),
        *([] if several else [_curve(chosen, BLUE, shape="hv")]),
        *([_links(found), _judged(found, "front, unseen items", rank=2)] if unseen else []),
        _marks(points[uniform], "uniform line", "triangle-up", ORANGE, 12, rank=4),
        _marks(points[roles == Role.SLOPE], "depth slope", "triangle-down", GREEN, 12, rank=5),
        *([_marks(points[start], "the recipe it starts from", "star", PURPLE, 14, rank=6)] if start.any() else []),
        _marks(found, "front", "circle", BLUE, 11, rank=1, bars=not unseen),
        _marks(points[base], "base", "square", INK, 13),
        _marks(points[experts], "expert", "diamond", RED, 14),
    ]


def _shown(points: pd.DataFrame, name: str, *, unseen: bool) -> pd.Series:
    """The values of an objective that have a mark."""
    again = points.loc[points["front"] & (roles_of(points["kind"]) == Role.SEARCHED), f"holdout_{name}"].dropna()
    return pd.concat([points[name], again]) if unseen else points[name]


def _span(shares: pd.Series, *, below: float, above: float) -> tuple[float, float]:
    """An axis range in per cent that holds 0 and the values, with room around them."""
    low, high = min(0.0, 100 * float(shares.min())), max(1.0, 100 * float(shares.max()))
    return low - below * (high - low), high + above * (high - low)


def _knee_label(knee: int, row: Row) -> str:
    prefix = "holdout_" if math.isfinite(row["holdout_domain"]) else ""
    gain, loss = (percent(row[f"{prefix}{name}"]) for name in ("domain", "forgetting"))
    method = f" ({row['method']})" if "method" in row else ""
    return f"<b>trial {knee}, the knee{method}</b><br>keeps {gain}, forgets {loss}"


def _figure(title: str, subtitle: str, *, height: float = HEIGHT) -> go.Figure:
    under = {"text": subtitle, "font": {"size": 15, "color": GREY}}
    return go.Figure(
        layout={
            "template": "none",
            "title": {
                "text": title,
                "subtitle": under,
                "x": 0.012,
                "xanchor": "left",
                "y": 1 - 26 / height,
                "yanchor": "top",
                "font": {"size": 21},
            },
            "font": {"family": FONT, "size": 16, "color": INK},
            "width": WIDTH,
            "height": round(height),
            "margin": {"l": 90, "r": 30, "t": 125, "b": 65},
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "hoverlabel": {"bgcolor": PAPER, "font": {"size": 15, "family": FONT}, "align": "left"},
            "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        }
    )


def _axes(figure: go.Figure, x: str, y: str) -> None:
    figure.update_layout(xaxis={**AXIS, "title_text": x}, yaxis={**AXIS, "title_text": y})


def _marks(
    rows: pd.DataFrame, name: str, symbol: str, color: str, size: int, *, rank: int = 0, bars: bool = False
) -> go.Scatter:
    """Marks at the search figures of some points; rank 0 keeps them out of the legend."""
    hollow = symbol.endswith("-open")
    return go.Scatter(
        x=100 * rows["forgetting"], y=100 * rows["domain"], name=name, mode="markers",
        showlegend=rank > 0 and len(rows) > 0, legendrank=rank or None,
        marker={"symbol": symbol, "color": color, "size": size,
                "line": {"width": 2.2 if hollow else 1, "color": color if hollow else PAPER}},
        **(_bars(rows, "") if bars else {}), **_hover(rows),
    )  # fmt: skip


def _judged(found: pd.DataFrame, name: str, *, rank: int) -> go.Scatter:
    """The front scored again on holdout items, with its intervals."""
    return go.Scatter(
        x=100 * found["holdout_forgetting"], y=100 * found["holdout_domain"], name=name, mode="markers",
        showlegend=len(found) > 0, legendrank=rank,
        marker={"symbol": "circle-open", "color": BLUE, "size": 10, "line": {"width": 2.2, "color": BLUE}},
        **_bars(found, "holdout_"), **_hover(found),
    )  # fmt: skip


def _task_bars(rows: pd.DataFrame, name: str, color: str) -> go.Bar:
    scores = [
        [_escaped(row["metric"]), f"{row['base_score']:.3f}", f"{row['score']:.3f}"] for row in rows_of(rows).values()
    ]
    return go.Bar(
        orientation="h", name=name, x=100 * rows["share"], y=list(rows.index), width=0.62, customdata=scores,
        marker={"color": color, "opacity": 0.85}, error_x=_bar(rows["share"], rows["low"], rows["high"], INK, 2),
        hovertemplate="%{customdata[0]}: base %{customdata[1]}, here %{customdata[2]}<extra></extra>",
    )  # fmt: skip


def _bars(rows: pd.DataFrame, prefix: str) -> dict[str, object]:
    bars: dict[str, object] = {}
    for axis, name in (("x", "forgetting"), ("y", "domain")):
        middle, low, high = (rows[f"{prefix}{name}{end}"] for end in ("", "_low", "_high"))
        bars[f"error_{axis}"] = _bar(middle, low, high, PALE_BLUE, 1.2)
    return bars


def _bar(middle: pd.Series, low: pd.Series, high: pd.Series, color: str, thickness: float) -> dict[str, object]:
    return {
        "type": "data", "symmetric": False, "array": 100 * (high - middle), "arrayminus": 100 * (middle - low),
        "color": color, "thickness": thickness, "width": 0,
    }  # fmt: skip


def _curve(rows: pd.DataFrame, color: str, *, shape: str = "linear", dash: str = "solid") -> go.Scatter:
    """A line through points; as steps ("hv") it is the edge of what they beat."""
    return go.Scatter(
        x=100 * rows["forgetting"], y=100 * rows["domain"], mode="lines", showlegend=False, hoverinfo="skip",
        line={"color": color, "width": 2, "shape": shape, "dash": dash},
    )  # fmt: skip


def _links(judged: pd.DataFrame) -> go.Scatter:
    """From each point's search figures to its holdout figures, a gap between pairs."""
    pairs = {
        name: [v for row in rows_of(judged).values() for v in (100 * row[name], 100 * row[f"holdout_{name}"], None)]
        for name in ("forgetting", "domain")
    }
    return go.Scatter(
        x=pairs["forgetting"], y=pairs["domain"], mode="lines", line={"color": PALE, "width": 1.2}, showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip


def _module_traces(rows: pd.DataFrame, *, legend: bool) -> list[go.Scatter]:
    """A line for each kind of module, one for both where they are alike; embeddings and head as marks of their own."""
    last = int(rows["layer"].max())
    step = math.ceil((last + 1) / 12)  # embeddings and head stand one tick before and after the layers
    attn, mlp = (rows.loc[rows["kind"] == kind, "weight"].tolist() for kind in MODULES)
    series = {**ENDS, "attn": BOTH} if attn == mlp else {**ENDS, **MODULES}
    traces = []
    for kind, (name, color, symbol) in series.items():
        part = rows[rows["kind"] == kind]
        if part.empty:
            continue
        in_layers = kind in MODULES
        traces.append(
            go.Scatter(
                x=part["layer"] if in_layers else [-step if kind == "embed" else last + step], y=part["weight"],
                name=name, legendgroup=name, showlegend=legend, mode="lines+markers" if in_layers else "markers",
                line={"color": color, "width": 2.5},
                marker={"symbol": symbol, "color": color, "size": 8 if in_layers else 13, "line": {"width": 0}},
                text=part["group"], hovertemplate="%{text}: %{y:.3f}<extra></extra>",
            )
        )  # fmt: skip
    return traces


def _hover(rows: pd.DataFrame) -> dict[str, object]:
    text = [_told(trial, row) for trial, row in rows_of(rows).items()]
    return {"text": text, "customdata": list(rows.index), "hovertemplate": "%{text}<extra></extra>"}


def _told(trial: object, row: Row) -> str:
    about = [_escaped(row["kind"])] if TrialKind(row["kind"]).is_anchor else []
    lines = [" ".join([f"<b>trial {trial}</b>", *about, *([row["method"]] if "method" in row else [])])]
    for prefix, items in (("", "search items"), ("holdout_", "unseen items")):
        if math.isfinite(row[f"{prefix}domain"]):
            gain, loss = (
                percent(*(row[f"{prefix}{name}{end}"] for end in ("", "_low", "_high")))
                for name in ("domain", "forgetting")
            )
            lines.append(f"{items}: gain {gain}, forgets {loss}")
    return "<br>".join(lines)


def _point_at(figure: go.Figure, row: Row, text: str, *, x: int, y: int, anchor: str = "center") -> None:
    figure.add_annotation(
        x=100 * row["forgetting"], y=100 * row["domain"], text=text, xanchor=anchor, ax=x, ay=y, showarrow=True,
        arrowhead=0, arrowwidth=1.2, arrowcolor=GREY, standoff=9, font={"size": 15, "color": INK}, bgcolor=VEIL,
    )  # fmt: skip


def _nothing_yet(figure: go.Figure) -> go.Figure:
    figure.add_annotation(text="no finished trial yet", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    figure.update_layout(xaxis={"visible": False}, yaxis={"visible": False})
    return figure


def _escaped(name: str) -> str:
    """A name as inert text, control characters gone and long ones cut in the middle: they differ at their ends."""
    plain = "".join(c if c.isprintable() else " " for c in name)
    return html.escape(plain if len(plain) <= 60 else f"{plain[:34]}…{plain[-25:]}")
