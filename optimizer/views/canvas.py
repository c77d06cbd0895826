"""What all figures are drawn on: colours, sizes, titles and axes. Plotly draws them, from plain frames.

Names come from a person's study file: each is escaped, since plotly reads labels as a subset of HTML.
"""

from __future__ import annotations

import html

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from optimizer.runs.scored import NO_TRIAL_YET
from optimizer.runs.trial import Role

# Okabe and Ito's colours, told apart with any colour vision; every series also has a symbol of its own.
INK, GREY, PALE, RULE = "#1f2933", "#6b7785", "#b6bfca", "#e4e8ed"
BLUE, RED, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7"
PAPER, VEIL, OCHRE, PALE_BLUE = "#ffffff", "rgba(255,255,255,0.85)", "#9a6a00", "rgba(0,114,178,0.4)"
WINE = "#aa3377"
DARK = {  # for each colour above that a dark ground does not carry, the one that takes its place there
    INK: "#e6edf3", GREY: "#9aa7b4", PALE: "#5d6875", RULE: "#2b333d", BLUE: "#56b4e9", RED: "#f0803c",
    PAPER: "#161b22", VEIL: "rgba(22,27,34,0.85)", OCHRE: ORANGE, PALE_BLUE: "rgba(86,180,233,0.4)",
    WINE: "#e07bb5",
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
WIDTH, HEIGHT, PLOT_WIDTH = 980, 600, 860  # pixels
LEGEND_LINE = 26  # pixels
SERIES = {  # legend entry, symbol, colour and size of the points that need no search
    Role.UNIFORM: ("uniform line", "triangle-up", ORANGE, 12),
    Role.SLOPE: ("depth slope", "triangle-down", GREEN, 12),
    Role.START: ("the recipe it starts from", "star", PURPLE, 14),
    Role.DERIVED: ("derived", "x", INK, 12),
    Role.LEARNED: ("learned", "cross", WINE, 14),
}
AXIS = {"gridcolor": RULE, "zerolinecolor": PALE, "zerolinewidth": 1.5, "automargin": True, "title_standoff": 14}


def figure(title: str, subtitle: str, *, height: float = HEIGHT, legend_lines: int = 1) -> go.Figure:
    """Make an empty figure with a title and a line below it.

    Args:
        height: in pixels, with a legend of one line.
        legend_lines: on how many its legend stands.
    """
    more = LEGEND_LINE * (legend_lines - 1)
    height += more
    heading = {
        "text": title, "subtitle": {"text": subtitle, "font": {"size": 15, "color": GREY}}, "font": {"size": 21},
        "x": 0.012, "xanchor": "left", "y": 1 - 26 / height, "yanchor": "top",
    }  # fmt: skip
    layout = {
        "template": "none", "title": heading, "font": {"family": FONT, "size": 16, "color": INK},
        "width": WIDTH, "height": round(height), "margin": {"l": 90, "r": 30, "t": 125 + more, "b": 65},
        "paper_bgcolor": PAPER, "plot_bgcolor": PAPER,
        "hoverlabel": {"bgcolor": PAPER, "font": {"size": 15, "family": FONT}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
    }  # fmt: skip
    return go.Figure(layout=layout)


def axes(figure: go.Figure, x: str, y: str) -> None:
    """Title the axes of a figure."""
    figure.update_layout(xaxis={**AXIS, "title_text": x}, yaxis={**AXIS, "title_text": y})


def bar(middle: pd.Series, low: pd.Series, high: pd.Series, color: str, thickness: float) -> dict[str, object]:
    """Draw the intervals of shares, in per cent."""
    return {
        "type": "data", "symmetric": False, "array": 100 * (high - middle), "arrayminus": 100 * (middle - low),
        "color": color, "thickness": thickness, "width": 0,
    }  # fmt: skip


def nothing_yet(figure: go.Figure) -> go.Figure:
    """Say on an empty figure that no trial is finished yet."""
    figure.add_annotation(text=NO_TRIAL_YET.lower(), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    figure.update_layout(xaxis={"visible": False}, yaxis={"visible": False})
    return figure


def escaped(name: str) -> str:
    """Turn a name into inert text, control characters gone, a long one cut in the middle: ends differ."""
    plain = "".join(c if c.isprintable() else " " for c in name)
    return html.escape(plain if len(plain) <= 60 else f"{plain[:34]}…{plain[-25:]}")


def library_script() -> str:
    """Give plotly's own JavaScript, to be put into a page once."""
    return get_plotlyjs()
