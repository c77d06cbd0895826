"""The figure of a front: what each gain in the domain costs, every merge a mark."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from evals.outcomes import HOLDOUT, SEARCH
from optimizer.runs.families import PREPARED
from optimizer.runs.frames import Row, rows_of
from optimizer.runs.front import losses, non_dominated
from optimizer.runs.trial import NO_ANCHORS, SEARCHED, Role, TrialKind, roles_of
from optimizer.views import canvas
from optimizer.views.canvas import BLUE, GREY, INK, ORANGE, PALE, PALE_BLUE, PAPER, PLOT_WIDTH, RED, SERIES, VEIL, WINE
from optimizer.words import Interval, percent

JUDGED = (*NO_ANCHORS, *PREPARED)  # shown again by the holdout items, where these judge the front


def front(points: Mapping[str, pd.DataFrame], *, knee: int | None, suite: str) -> go.Figure:
    """Draw forgetting against domain gain, in per cent: anchors, points derived, learned and searched, the front, the
    knee, holdout re-scores.

    Args:
        points: `Run.points(suite)` by suite.
        knee: the trial to mark.
        suite: the suite whose intervals are drawn: that which judges the front.
    """
    unseen = suite == HOLDOUT
    judge = "items the search never saw" if unseen else "the items the search used"
    more = roles_of(points[SEARCH]["kind"]).isin((Role.START, *PREPARED)).any()
    figure = canvas.figure(
        "What each gain in the domain costs",
        f"one mark is one merge; bars are 95 % intervals on {judge}",
        legend_lines=2 if more else 1,
    )
    if points[SEARCH].empty:
        return canvas.nothing_yet(figure)
    hover = _hover_texts(points)
    search, judged = (points[suite].assign(hover=hover) for suite in (SEARCH, HOLDOUT))
    shown = _with_a_mark(search, judged if unseen else None)
    figure.add_traces(_front_traces(search, judged if unseen else None))
    canvas.axes(figure, "forgetting, % of the base's general ability", "domain gain, % of the expert's gain")
    left, right = _span(shown["forgetting"], below=0.04, above=0.12)
    figure.update_xaxes(range=[left, right])
    figure.update_yaxes(range=_span(shown["domain"], below=0.08, above=0.26))
    rows = rows_of(search)
    ends = [row for row in rows.values() if TrialKind(row["kind"]).is_reference]
    for place, row in enumerate(ends):  # experts may lie close together: their labels go up and down in turn
        label, y = canvas.escaped(TrialKind(row["kind"]).label), -26 if place % 2 else 26
        is_left = 100 * row["forgetting"] - left < (right - left) / 2  # a label runs towards the middle
        _point_at(figure, row, label, x=12 if is_left else -12, y=y, anchor="left" if is_left else "right")
    if knee is not None:
        figure.add_trace(_marks(search.loc[[knee]], "knee", "circle-open", INK, 20))
        from_left = PLOT_WIDTH * (100 * rows[knee]["forgetting"] - left) / (right - left)
        # Above and left of the front there is nothing to cover; near the axis the label stays right of it.
        _point_at(figure, rows[knee], _knee_label(knee, points), x=max(-60, round(130 - from_left)), y=-52)
    return figure


def _front_traces(search: pd.DataFrame, judged: pd.DataFrame | None) -> list[go.Scatter]:
    """Make the marks and lines of the front's figure.

    Args:
        search: the points by the search items.
        judged: the same by the holdout items, where these judge the front.
    """
    roles = roles_of(search["kind"])
    base, experts, uniform = (roles == role for role in (Role.BASE, Role.EXPERT, Role.UNIFORM))
    chosen = search[search["front"]].sort_values(["forgetting", "domain"])
    found = chosen[roles[chosen.index].isin(NO_ANCHORS)]
    again = chosen[roles[chosen.index].isin(JUDGED)]
    several = experts.sum() > 1  # then the front is a surface and has no edge, and the uniform line meets no expert
    line = search[uniform if several else uniform | base | experts].sort_values("forgetting")
    return [
        _marks(search[roles.isin(NO_ANCHORS) & ~search["front"]], "searched", "circle", PALE, 8, rank=3),
        _curve(line, ORANGE, dash="dot"),
        *([] if several else [_curve(_path(search, roles), WINE, width=1.2), _curve(_edge(chosen), BLUE, shape="hv")]),
        *([] if judged is None else _judgement(again, judged.loc[again.index])),
        *(
            _marks(search[roles == role], *look, rank=rank, bars=judged is None and role in PREPARED)
            for rank, (role, look) in enumerate(SERIES.items(), start=4)
        ),
        _marks(found, "front", "circle", BLUE, 11, rank=1, bars=judged is None),
        _marks(search[base], "base", "square", INK, 13),
        _marks(search[experts], "expert", "diamond", RED, 14),
    ]


def _edge(chosen: pd.DataFrame) -> pd.DataFrame:
    """Return the points of a front that none of it beats: learned ones may beat others that stand on it."""
    return chosen[non_dominated(losses(chosen[["domain", "forgetting"]].to_numpy()))]


def _path(search: pd.DataFrame, roles: pd.Series) -> pd.DataFrame:
    """Return the points learned, by what the domain counts, between base and expert; none where nothing was learned."""
    if not (roles == Role.LEARNED).any():
        return search.iloc[:0]
    ends = {Role.BASE: 0.0, Role.EXPERT: 1.0}
    places = [ends.get(TrialKind(kind).role, TrialKind(kind).preference) for kind in search["kind"]]
    return search.assign(place=places).dropna(subset=["place"]).sort_values("place", kind="stable")


def _with_a_mark(search: pd.DataFrame, judged: pd.DataFrame | None) -> pd.DataFrame:
    """Return the figures of all marks: each point's, and by the holdout items, where these judge, the front's."""
    if judged is None:
        return search
    again = judged[judged["front"] & roles_of(judged["kind"]).isin(JUDGED)]
    return pd.concat([search, again])


def _span(shares: pd.Series, *, below: float, above: float) -> tuple[float, float]:
    """Return an axis range in per cent that holds 0 and the values, with room around them."""
    low, high = min(0.0, 100 * float(shares.min())), max(1.0, 100 * float(shares.max()))
    return low - below * (high - low), high + above * (high - low)


def _knee_label(knee: int, points: Mapping[str, pd.DataFrame]) -> str:
    by_suite = [rows_of(points[suite])[knee] for suite in (HOLDOUT, SEARCH)]
    row = next(row for row in by_suite if math.isfinite(row["domain"]))
    gain, loss = percent(row["domain"]), percent(row["forgetting"])
    method = f" ({row['method']})" if points[SEARCH]["method"].nunique() > 1 else ""
    return f"<b>trial {knee}, the knee{method}</b><br>keeps {gain}, forgets {loss}"


def _marks(
    rows: pd.DataFrame, name: str, symbol: str, color: str, size: int, *, rank: int = 0, bars: bool = False
) -> go.Scatter:
    """Make marks at the search figures of some points; rank 0 keeps them out of the legend."""
    hollow = symbol.endswith("-open")
    return go.Scatter(
        x=100 * rows["forgetting"], y=100 * rows["domain"], name=name, mode="markers",
        showlegend=rank > 0 and len(rows) > 0, legendrank=rank or None,
        marker={"symbol": symbol, "color": color, "size": size,
                "line": {"width": 2.2 if hollow else 1, "color": color if hollow else PAPER}},
        **(_bars(rows) if bars else {}), **_hover(rows),
    )  # fmt: skip


def _judgement(found: pd.DataFrame, judged: pd.DataFrame) -> list[go.Scatter]:
    """Make the front scored again on holdout items, with intervals, and a line to each from its search figures."""
    marks = go.Scatter(
        x=100 * judged["forgetting"], y=100 * judged["domain"], name="front, unseen items", mode="markers",
        showlegend=len(judged) > 0, legendrank=2,
        marker={"symbol": "circle-open", "color": BLUE, "size": 10, "line": {"width": 2.2, "color": BLUE}},
        **_bars(judged), **_hover(judged),
    )  # fmt: skip
    return [_links(found, judged), marks]


def _bars(rows: pd.DataFrame) -> dict[str, object]:
    bars: dict[str, object] = {}
    for axis, name in (("x", "forgetting"), ("y", "domain")):
        bars[f"error_{axis}"] = canvas.bar(rows[name], rows[f"{name}_low"], rows[f"{name}_high"], PALE_BLUE, 1.2)
    return bars


def _curve(
    rows: pd.DataFrame, color: str, *, shape: str = "linear", dash: str = "solid", width: float = 2
) -> go.Scatter:
    """Make a line through points; as steps ("hv") it is the edge of what they beat."""
    return go.Scatter(
        x=100 * rows["forgetting"], y=100 * rows["domain"], mode="lines", showlegend=False, hoverinfo="skip",
        line={"color": color, "width": width, "shape": shape, "dash": dash},
    )  # fmt: skip


def _links(found: pd.DataFrame, judged: pd.DataFrame) -> go.Scatter:
    """Make lines from each point's search figures to its holdout figures, a gap between pairs."""
    pairs = {
        name: [v for pair in zip(found[name], judged[name], strict=True) for v in (*(100 * end for end in pair), None)]
        for name in ("forgetting", "domain")
    }
    return go.Scatter(
        x=pairs["forgetting"], y=pairs["domain"], mode="lines", line={"color": PALE, "width": 1.2}, showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip


def _hover(rows: pd.DataFrame) -> dict[str, object]:
    return {"text": list(rows["hover"]), "customdata": list(rows.index), "hovertemplate": "%{text}<extra></extra>"}


def _hover_texts(points: Mapping[str, pd.DataFrame]) -> pd.Series[str]:
    """Write what a mark says under the pointer, by trial: what it is, and its figures on both suites."""
    search, holdout = rows_of(points[SEARCH]), rows_of(points[HOLDOUT])
    several = points[SEARCH]["method"].nunique() > 1  # else it need not be said of each mark
    texts = [_hover_text(trial, search[trial], holdout[trial], method=several) for trial in search]
    return pd.Series(texts, index=points[SEARCH].index)


def _hover_text(trial: object, search: Row, holdout: Row, *, method: bool) -> str:
    about = [canvas.escaped(search["kind"])] if search["kind"] != SEARCHED.stored else []
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
