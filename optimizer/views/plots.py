"""The four figures of a run, drawn by plotly from plain frames.

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

from evals.outcomes import HOLDOUT, SEARCH
from optimizer.runs.frames import Row, rows_of
from optimizer.runs.scored import NO_TRIAL_YET
from optimizer.runs.trial import Role, TrialKind, roles_of
from optimizer.views.front_rows import share_of
from optimizer.words import Interval, percent, task_labels

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


def front(points: Mapping[str, pd.DataFrame], *, knee: int | None, suite: str) -> go.Figure:
    """Forgetting against domain gain, in per cent: anchors, searched points, the front, the knee, holdout re-scores.

    Args:
        points: `Run.points(suite)` by suite.
        knee: the trial to mark.
        suite: the suite whose intervals are drawn: that which judges the front.
    """
    unseen = suite == HOLDOUT
    judge = "items the search never saw" if unseen else "the items the search used"
    figure = _figure("What each gain in the domain costs", f"one mark is one merge; bars are 95 % intervals on {judge}")
    if points[SEARCH].empty:
        return _nothing_yet(figure)
    hover = _hover_texts(points)
    search, judged = (points[suite].assign(hover=hover) for suite in (SEARCH, HOLDOUT))
    shown = _with_a_mark(search, judged if unseen else None)
    figure.add_traces(_front_traces(search, judged if unseen else None))
    _axes(figure, "forgetting, % of the base's general ability", "domain gain, % of the expert's gain")
    left, right = _span(shown["forgetting"], below=0.04, above=0.12)
    figure.update_xaxes(range=[left, right])
    figure.update_yaxes(range=_span(shown["domain"], below=0.08, above=0.16))
    rows = rows_of(search)
    ends = [row for row in rows.values() if TrialKind(row["kind"]).is_reference]
    for place, row in enumerate(ends):  # experts may lie close together: their labels go up and down in turn
        label, y = _escaped(TrialKind(row["kind"]).label), -26 if place % 2 else 26
        is_left = 100 * row["forgetting"] - left < (right - left) / 2  # a label runs towards the middle
        _point_at(figure, row, label, x=12 if is_left else -12, y=y, anchor="left" if is_left else "right")
    if knee is not None:
        figure.add_trace(_marks(search.loc[[knee]], "knee", "circle-open", INK, 20))
        from_left = PLOT_WIDTH * (100 * rows[knee]["forgetting"] - left) / (right - left)
        # Above and left of the front there is nothing to cover; near the axis the label stays right of it.
        _point_at(figure, rows[knee], _knee_label(knee, points), x=max(-60, round(130 - from_left)), y=-52)
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
            text=share_of(row).text(), x=1.01, xref="paper", y=place, yref="y",
            xanchor="left", showarrow=False, font={"size": 15, "color": INK},
        )  # fmt: skip
    _axes(figure, "%, where 100 is the expert (domain) or the base (general)", "")
    figure.update_yaxes(
        tickvals=list(rows), ticktext=[_escaped(name) for name in task_labels(rows.values())], ticklabelstandoff=8
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


def _front_traces(search: pd.DataFrame, judged: pd.DataFrame | None) -> list[go.Scatter]:
    """The marks and lines of the front's figure.

    Args:
        search: the points by the search items.
        judged: the same by the holdout items, where these judge the front.
    """
    roles = roles_of(search["kind"])
    base, experts, uniform, start = (roles == role for role in (Role.BASE, Role.EXPERT, Role.UNIFORM, Role.START))
    chosen = search[search["front"]].sort_values(["forgetting", "domain"])
    found = chosen[roles[chosen.index] == Role.SEARCHED]
    several = experts.sum() > 1  # then the front is a surface and has no edge, and the uniform line meets no expert
    line = search[uniform if several else uniform | base | experts].sort_values("forgetting")
    return [
        _marks(search[(roles == Role.SEARCHED) & ~search["front"]], "searched", "circle", PALE, 8, rank=3),
        _curve(line, ORANGE, dash="dot"),
        *([] if several else [_curve(chosen, BLUE, shape="hv")]),
        *([] if judged is None else _judgement(found, judged.loc[found.index])),
        _marks(search[uniform], "uniform line", "triangle-up", ORANGE, 12, rank=4),
        _marks(search[roles == Role.SLOPE], "depth slope", "triangle-down", GREEN, 12, rank=5),
        *([_marks(search[start], "the recipe it starts from", "star", PURPLE, 14, rank=6)] if start.any() else []),
        _marks(found, "front", "circle", BLUE, 11, rank=1, bars=judged is None),
        _marks(search[base], "base", "square", INK, 13),
        _marks(search[experts], "expert", "diamond", RED, 14),
    ]


def _with_a_mark(search: pd.DataFrame, judged: pd.DataFrame | None) -> pd.DataFrame:
    """The figures of all marks: each point's, and where the holdout items judge, those of the front's searched ones."""
    if judged is None:
        return search
    again = judged[judged["front"] & (roles_of(judged["kind"]) == Role.SEARCHED)]
    return pd.concat([search, again])


def _span(shares: pd.Series, *, below: float, above: float) -> tuple[float, float]:
    """An axis range in per cent that holds 0 and the values, with room around them."""
    low, high = min(0.0, 100 * float(shares.min())), max(1.0, 100 * float(shares.max()))
    return low - below * (high - low), high + above * (high - low)


def _knee_label(knee: int, points: Mapping[str, pd.DataFrame]) -> str:
    by_suite = [rows_of(points[suite])[knee] for suite in (HOLDOUT, SEARCH)]
    row = next(row for row in by_suite if math.isfinite(row["domain"]))
    gain, loss = percent(row["domain"]), percent(row["forgetting"])
    method = f" ({row['method']})" if points[SEARCH]["method"].nunique() > 1 else ""
    return f"<b>trial {knee}, the knee{method}</b><br>keeps {gain}, forgets {loss}"


def _figure(title: str, subtitle: str, *, height: float = HEIGHT) -> go.Figure:
    heading = {
        "text": title, "subtitle": {"text": subtitle, "font": {"size": 15, "color": GREY}}, "font": {"size": 21},
        "x": 0.012, "xanchor": "left", "y": 1 - 26 / height, "yanchor": "top",
    }  # fmt: skip
    layout = {
        "template": "none", "title": heading, "font": {"family": FONT, "size": 16, "color": INK},
        "width": WIDTH, "height": round(height), "margin": {"l": 90, "r": 30, "t": 125, "b": 65},
        "paper_bgcolor": PAPER, "plot_bgcolor": PAPER,
        "hoverlabel": {"bgcolor": PAPER, "font": {"size": 15, "family": FONT}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
    }  # fmt: skip
    return go.Figure(layout=layout)


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
        **(_bars(rows) if bars else {}), **_hover(rows),
    )  # fmt: skip


def _judgement(found: pd.DataFrame, judged: pd.DataFrame) -> list[go.Scatter]:
    """The front scored again on holdout items, with its intervals, and a line to each from its search figures."""
    marks = go.Scatter(
        x=100 * judged["forgetting"], y=100 * judged["domain"], name="front, unseen items", mode="markers",
        showlegend=len(judged) > 0, legendrank=2,
        marker={"symbol": "circle-open", "color": BLUE, "size": 10, "line": {"width": 2.2, "color": BLUE}},
        **_bars(judged), **_hover(judged),
    )  # fmt: skip
    return [_links(found, judged), marks]


def _task_bars(rows: pd.DataFrame, name: str, color: str) -> go.Bar:
    scores = [
        [_escaped(row["metric"]), f"{row['base_score']:.3f}", f"{row['score']:.3f}"] for row in rows_of(rows).values()
    ]
    return go.Bar(
        orientation="h", name=name, x=100 * rows["share"], y=list(rows.index), width=0.62, customdata=scores,
        marker={"color": color, "opacity": 0.85}, error_x=_bar(rows["share"], rows["low"], rows["high"], INK, 2),
        hovertemplate="%{customdata[0]}: base %{customdata[1]}, here %{customdata[2]}<extra></extra>",
    )  # fmt: skip


def _bars(rows: pd.DataFrame) -> dict[str, object]:
    bars: dict[str, object] = {}
    for axis, name in (("x", "forgetting"), ("y", "domain")):
        bars[f"error_{axis}"] = _bar(rows[name], rows[f"{name}_low"], rows[f"{name}_high"], PALE_BLUE, 1.2)
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


def _links(found: pd.DataFrame, judged: pd.DataFrame) -> go.Scatter:
    """From each point's search figures to its holdout figures, a gap between pairs."""
    pairs = {
        name: [v for pair in zip(found[name], judged[name], strict=True) for v in (*(100 * end for end in pair), None)]
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
    return {"text": list(rows["hover"]), "customdata": list(rows.index), "hovertemplate": "%{text}<extra></extra>"}


def _hover_texts(points: Mapping[str, pd.DataFrame]) -> pd.Series[str]:
    """What a mark says under the pointer, by trial: what it is, and its figures on both suites."""
    search, holdout = rows_of(points[SEARCH]), rows_of(points[HOLDOUT])
    several = points[SEARCH]["method"].nunique() > 1  # else it need not be said of each mark
    texts = [_hover_text(trial, search[trial], holdout[trial], method=several) for trial in search]
    return pd.Series(texts, index=points[SEARCH].index)


def _hover_text(trial: object, search: Row, holdout: Row, *, method: bool) -> str:
    about = [_escaped(search["kind"])] if TrialKind(search["kind"]).is_anchor else []
    lines = [" ".join([f"<b>trial {trial}</b>", *about, *([search["method"]] if method else [])])]
    for row, items in ((search, "search items"), (holdout, "unseen items")):
        if math.isfinite(row["domain"]):
            gain, loss = (Interval.of(row, name).text() for name in ("domain", "forgetting"))
            lines.append(f"{items}: gain {gain}, forgets {loss}")
    return "<br>".join(lines)


def _point_at(figure: go.Figure, row: Row, text: str, *, x: int, y: int, anchor: str = "center") -> None:
    figure.add_annotation(
        x=100 * row["forgetting"], y=100 * row["domain"], text=text, xanchor=anchor, ax=x, ay=y, showarrow=True,
        arrowhead=0, arrowwidth=1.2, arrowcolor=GREY, standoff=9, font={"size": 15, "color": INK}, bgcolor=VEIL,
    )  # fmt: skip


def _nothing_yet(figure: go.Figure) -> go.Figure:
    figure.add_annotation(text=NO_TRIAL_YET.lower(), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    figure.update_layout(xaxis={"visible": False}, yaxis={"visible": False})
    return figure


def _escaped(name: str) -> str:
    """A name as inert text, control characters gone and long ones cut in the middle: they differ at their ends."""
    plain = "".join(c if c.isprintable() else " " for c in name)
    return html.escape(plain if len(plain) <= 60 else f"{plain[:34]}…{plain[-25:]}")
