"""Still pictures of the figures of a run, for places without JavaScript: notebooks on a code host, READMEs.

Each figure is defined once, in plotly; this draws the few kinds of traces they are made of with matplotlib (extra
`notebook`), so that the picture and the interactive figure cannot disagree.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image  # with which matplotlib writes its own

from optimizer.views.canvas import GREY, INK

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS = 256  # of a notebook's picture
DPI = 100  # plotly's pixels to an inch of picture
POINTS = 72 / DPI  # one of plotly's pixels, in points
LEGEND_MARK, LEGEND_LETTER, SUBTITLE_LETTER = 60, 9, 8.5  # pixels
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "star": "*"}
SYMBOLS |= {"x": "X", "cross": "P"}
DASHES = {"solid": "-", "dot": ":", "dash": "--"}


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure: a notebook shows it as a PNG, `save` writes it; both are sharper than the figure's own pixels."""

    figure: Figure

    def save(self, path: Path | str) -> None:
        """Write the picture; the name's ending says as what (.png, .svg, .pdf)."""
        self.figure.savefig(path, dpi=2 * DPI)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        drawn, sink = io.BytesIO(), io.BytesIO()
        self.figure.savefig(drawn, format="png", dpi=1.25 * DPI)
        # a palette makes a third of it, and nobody sees the difference in lines, letters and plain areas
        Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(sink, "png", optimize=True)
        width, height = (round(inches * DPI) for inches in self.figure.get_size_inches())
        return sink.getvalue(), {"width": width, "height": height}


def picture(figure: go.Figure) -> Picture:
    """Draw a figure of a run with matplotlib, at the same size."""
    layout = figure.layout
    still = Figure(figsize=(layout.width / DPI, layout.height / DPI), dpi=DPI, layout="constrained")
    panels = _panels(figure)
    axes: list[Axes] = list(still.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0])
    for ax, (x_name, y_name) in zip(axes, panels, strict=True):
        _style(ax, layout[x_name], layout[y_name])
        for trace in sorted(figure.data, key=lambda trace: trace.legendrank or 1000):
            if _axis_name(trace.yaxis, "y") == y_name:
                _draw(ax, trace, layout[x_name])
    _legend(axes[0], layout.width)
    for shape in layout.shapes:
        _line(axes[0], shape)
    for note in layout.annotations:
        _note(axes, note)
    titles: dict[str, Any] = {"x": 0.012, "ha": "left", "va": "top"}
    inch = 1 / still.get_figheight()
    still.text(y=1 - 0.12 * inch, s=_plain(layout.title.text), fontsize=15, color=INK, **titles)
    lines = textwrap.wrap(_plain(layout.title.subtitle.text), int(layout.width / SUBTITLE_LETTER)) or [""]
    still.text(y=1 - 0.42 * inch, s="\n".join(lines), fontsize=11, color=GREY, **titles)
    still.set_layout_engine("constrained", rect=(0, 0, 1, 1 - (0.48 + 0.18 * len(lines)) * inch))
    return Picture(still)


def _axis_name(axis: str | None, letter: str) -> str:
    return (axis or letter).replace(letter, f"{letter}axis")


def _panels(figure: go.Figure) -> list[tuple[str, str]]:
    """Name each panel's axes, from top to bottom."""
    pairs = dict.fromkeys((_axis_name(trace.xaxis, "x"), _axis_name(trace.yaxis, "y")) for trace in figure.data)
    return list(pairs) or [("xaxis", "yaxis")]


def _style(ax: Axes, x: Any, y: Any) -> None:
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=12, labelcolor=INK)
    ax.set_axisbelow(True)
    for name, spec in (("x", x), ("y", y)):
        axis = ax.xaxis if name == "x" else ax.yaxis
        axis.set_visible(spec.visible is not False)
        if spec.gridcolor and spec.showgrid is not False:
            axis.grid(True, color=spec.gridcolor, linewidth=1)
        if spec.range is not None:
            ax.set(**{f"{name}lim": spec.range})
        if spec.tickvals is not None and spec.type != "category":
            axis.set_ticks(list(spec.tickvals), [html.unescape(text) for text in spec.ticktext or spec.tickvals])
        axis.set_label_text(_plain(spec.title.text), fontsize=13, color=INK)


def _draw(ax: Axes, trace: Any, x: Any) -> None:
    """Draw a trace.

    Args:
        x: the axis below it.
    """
    if trace.type == "heatmap":
        _heat_map(ax, trace, x)
        return
    if trace.type == "bar":
        ax.barh(list(trace.y), list(trace.x), height=trace.width, color=trace.marker.color, alpha=trace.marker.opacity,
                label=_label(trace), zorder=2)  # fmt: skip
    else:
        _scatter(ax, trace)
    for axis in ("x", "y"):
        bars = trace[f"error_{axis}"]
        if bars.array is not None:
            ends: dict[str, Any] = {f"{axis}err": [list(bars.arrayminus), list(bars.array)]}
            width = bars.thickness * POINTS
            ax.errorbar(trace.x, trace.y, **ends, fmt="none", ecolor=_colour(bars.color), elinewidth=width, zorder=3)


def _heat_map(ax: Axes, trace: Any, x: Any) -> None:
    """Draw a table of numbers as colours, its first row on top; what is not there stays empty."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("of the figure", list(map(tuple, trace.colorscale)))
    image = ax.imshow(trace.z, aspect="auto", cmap=colours, vmin=trace.zmin, vmax=trace.zmax)
    columns = list(trace.x)
    ax.set_xticks([columns.index(name) for name in x.tickvals], [html.unescape(name) for name in x.ticktext])
    ax.set_yticks(range(len(trace.y)), [html.unescape(name) for name in trace.y])
    ax.tick_params(labelbottom=True)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=12, format=f"%{trace.colorbar.tickformat}")
    bar.set_label(trace.colorbar.title.text, color=INK)
    bar.outline.set_visible(False)


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


def _colour(css: str) -> tuple[float, float, float, float] | str:
    if not css.startswith("rgba"):
        return css
    red, green, blue, alpha = (float(part) for part in re.findall(r"[\d.]+", css))
    return red / 255, green / 255, blue / 255, alpha


def _legend(ax: Axes, width: float) -> None:
    """Name the marks above a panel, on as many lines as they need on a picture so many pixels wide."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        needed = sum(LEGEND_MARK + LEGEND_LETTER * len(label) for label in labels)
        lines = math.ceil(needed / (width - LEGEND_MARK))
        columns = math.ceil(len(labels) / lines)
        ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False,
                  fontsize=12, columnspacing=1.2, handletextpad=0.3)  # fmt: skip


def _line(ax: Axes, shape: Any) -> None:
    assert shape.type == "line", "figures use upright lines only"
    assert shape.x0 == shape.x1, "figures use upright lines only"
    ax.axvline(shape.x0, color=shape.line.color, linewidth=shape.line.width * POINTS,
               linestyle=DASHES[shape.line.dash], zorder=1 if shape.layer == "below" else 4)  # fmt: skip


def _note(axes: Sequence[Axes], note: Any) -> None:
    if note.yref == "paper" and len(axes) > 1:  # the title of a panel: make_subplots places it above the panel
        panel = min(len(axes) - 1, int((1 - note.y) * len(axes) + 0.5))
        axes[panel].set_title(_plain(note.text), fontsize=13, loc="right", color=INK)
        return
    ax, paper = axes[0], {"paper": True, "x": False, "y": False, None: False}
    place: Any = {
        (False, False): "data",
        (True, True): "axes fraction",
        (True, False): ax.get_yaxis_transform(),
        (False, True): ax.get_xaxis_transform(),
    }[paper[note.xref], paper[note.yref]]
    arrow = bool(note.showarrow)
    right, up = (note.ax, -note.ay) if arrow else (note.xshift or 0, note.yshift or 0)
    ax.annotate(
        _plain(note.text),
        (note.x, note.y),
        xycoords=place,
        xytext=(right * POINTS, up * POINTS),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": note.arrowcolor, "shrinkB": 6} if arrow else None,
        ha=note.xanchor or "center",
        va=note.yanchor or "center",
        fontsize=12,
        color=note.font.color or INK,
        fontweight="bold" if note.text.startswith("<b>") and "<br>" not in note.text else "normal",
        zorder=5,
        annotation_clip=False,
    )


def _label(trace: Any) -> str:
    return "_hidden" if trace.showlegend is False else trace.name


def _plain(text: str | None) -> str:
    """Return a label without plotly's tags; a dollar sign would otherwise start mathematics."""
    lines = re.sub(r"<br>", "\n", text or "")
    return html.unescape(re.sub(r"<[^>]*>", "", lines)).replace("$", r"\$")
