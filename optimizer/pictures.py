"""Still pictures of the figures in `optimizer.plots`, for places without JavaScript: notebooks on a code host, READMEs.

Each figure is defined once, in plotly; this draws the few kinds of traces they are made of with matplotlib (extra
`notebook`), so that the picture and the interactive figure cannot disagree.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 100  # plotly's pixels per inch of picture
POINTS = 72 / DPI  # one of plotly's pixels, in points
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v"}
DASHES = {"solid": "-", "dot": ":", "dash": "--"}
ANCHORS = {"left": "left", "right": "right", "center": "center", "auto": "center"}


def picture(figure: go.Figure) -> Figure:
    """Draw a figure of `optimizer.plots` with matplotlib, at the same size."""
    layout = figure.layout
    still = Figure(figsize=(layout.width / DPI, layout.height / DPI), dpi=DPI, layout="constrained")
    panels = _panels(figure)
    axes = still.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (x_name, y_name) in zip(axes, panels, strict=True):
        _style(ax, layout[x_name], layout[y_name])
        for trace in sorted(figure.data, key=lambda trace: trace.legendrank or 1000):
            if (trace.yaxis or "y").replace("y", "yaxis") == y_name:
                _draw(ax, trace)
        _legend(ax)
    for shape in layout.shapes:
        _line(axes[0], shape)
    for note in layout.annotations:
        _note(axes, panels, note)
    titles = {"x": 0.012, "ha": "left", "va": "top"}
    inch = 1 / still.get_figheight()
    still.text(y=1 - 0.12 * inch, s=_plain(layout.title.text), fontsize=15, color=layout.font.color, **titles)
    still.text(y=1 - 0.42 * inch, s=_plain(layout.title.subtitle.text), fontsize=11, color="#6b7785", **titles)
    still.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.66 * inch))
    return still


def save_png(figure: go.Figure, path: Path | str) -> None:
    """Write a figure of `optimizer.plots` as a PNG, at twice its size in pixels."""
    picture(figure).savefig(path, dpi=2 * DPI)


def _panels(figure: go.Figure) -> list[tuple[str, str]]:
    """The axes' names of each panel, from top to bottom."""
    pairs = dict.fromkeys((trace.xaxis or "x", trace.yaxis or "y") for trace in figure.data) or {("x", "y"): None}
    return [(x.replace("x", "xaxis"), y.replace("y", "yaxis")) for x, y in pairs]


def _style(ax: Axes, x: Any, y: Any) -> None:
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=12, labelcolor="#1f2933")
    ax.set_axisbelow(True)
    for name, spec in (("x", x), ("y", y)):
        axis = ax.xaxis if name == "x" else ax.yaxis
        axis.set_visible(spec.visible is not False)
        if spec.gridcolor and spec.showgrid is not False:
            axis.grid(True, color=spec.gridcolor, linewidth=1)
        if spec.range is not None:
            ax.set(**{f"{name}lim": spec.range})
        if spec.tickvals is not None:
            axis.set_ticks(list(spec.tickvals), [html.unescape(text) for text in spec.ticktext or spec.tickvals])
        axis.set_label_text(_plain(spec.title.text), fontsize=13, color="#1f2933")


def _draw(ax: Axes, trace: Any) -> None:
    if trace.type == "bar":
        ax.barh(list(trace.y), list(trace.x), height=trace.width, color=trace.marker.color, alpha=trace.marker.opacity,
                label=_label(trace), zorder=2)  # fmt: skip
    else:
        _scatter(ax, trace)
    for axis in ("x", "y"):
        bars = trace[f"error_{axis}"]
        if bars.array is not None:
            ends = {f"{axis}err": [list(bars.arrayminus), list(bars.array)]}
            width = bars.thickness * POINTS
            ax.errorbar(trace.x, trace.y, **ends, fmt="none", ecolor=_colour(bars.color), elinewidth=width, zorder=3)


def _scatter(ax: Axes, trace: Any) -> None:
    look: dict[str, Any] = {"linestyle": "none", "zorder": 3}
    if "lines" in trace.mode:
        steps = "steps-post" if trace.line.shape == "hv" else "default"
        look |= {"linestyle": DASHES[trace.line.dash or "solid"], "color": trace.line.color, "drawstyle": steps,
                 "linewidth": trace.line.width * POINTS, "zorder": 2}  # fmt: skip
    if "markers" in trace.mode:
        symbol, hollow = trace.marker.symbol.removesuffix("-open"), trace.marker.symbol.endswith("-open")
        look |= {"marker": SYMBOLS[symbol], "markersize": trace.marker.size * POINTS,
                 "markerfacecolor": "none" if hollow else trace.marker.color,
                 "markeredgecolor": trace.marker.color if hollow else "white",
                 "markeredgewidth": (trace.marker.line.width or 0) * POINTS}  # fmt: skip
    values = ([float("nan") if value is None else value for value in axis] for axis in (trace.x, trace.y))
    ax.plot(*values, label=_label(trace), **look)


def _colour(css: str) -> tuple[float, ...] | str:
    numbers = re.findall(r"[\d.]+", css) if css.startswith("rgba") else []
    return (*(float(part) / 255 for part in numbers[:3]), float(numbers[3])) if numbers else css


def _legend(ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(labels), frameon=False,
                  fontsize=12, columnspacing=1.2, handletextpad=0.3)  # fmt: skip


def _line(ax: Axes, shape: Any) -> None:
    assert shape.type == "line", "figures use upright lines only"
    assert shape.x0 == shape.x1, "figures use upright lines only"
    ax.axvline(shape.x0, color=shape.line.color, linewidth=shape.line.width * POINTS,
               linestyle=DASHES[shape.line.dash], zorder=1 if shape.layer == "below" else 4)  # fmt: skip


def _note(axes: Any, panels: list[tuple[str, str]], note: Any) -> None:
    ax = axes[0]
    if note.xref == note.yref == "paper" and len(panels) > 1:
        _panel_title(axes, note)
        return
    across = {("x", "y"): "data", ("paper", "paper"): "axes fraction", ("paper", "y"): ax.get_yaxis_transform(),
              ("x", "paper"): ax.get_xaxis_transform()}[note.xref or "x", note.yref or "y"]  # fmt: skip
    arrow = bool(note.showarrow)
    shift = (note.ax, -note.ay) if arrow else (note.xshift or 0, note.yshift or 0)
    ax.annotate(
        _plain(note.text), (note.x, note.y), xycoords=across, xytext=[v * POINTS for v in shift],
        textcoords="offset points", fontsize=12, color=note.font.color or "#1f2933", zorder=5,
        fontweight="bold" if "<b>" in note.text else "normal",
        ha=ANCHORS[note.xanchor or "center"], va={"bottom": "bottom", None: "center"}[note.yanchor],
        arrowprops={"arrowstyle": "-", "color": note.arrowcolor, "shrinkB": 6} if arrow else None,
        annotation_clip=False,
    )  # fmt: skip


def _panel_title(axes: Any, note: Any) -> None:
    ax = min(axes, key=lambda candidate: 0 if candidate.get_title() == "" else 1)
    ax.set_title(_plain(note.text), fontsize=13, loc="right")


def _label(trace: Any) -> str:
    return "_hidden" if trace.showlegend is False else trace.name


def _plain(text: str | None) -> str:
    """A label without plotly's tags; a dollar sign would otherwise start mathematics."""
    lines = re.sub(r"<br>", "\n", text or "")
    return html.unescape(re.sub(r"<[^>]*>", "", lines)).replace("$", r"\$")
