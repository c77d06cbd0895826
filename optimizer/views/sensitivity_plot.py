"""Where in a model an expert's gain and loss come from: a heat map of sensitivities, layer by kind of tensor."""

from __future__ import annotations

import html
import math

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from optimizer.runs.sensitivities import OBJECTIVES, Objective, Sensitivities
from optimizer.views.canvas import FONT, GREY, INK, PAPER
from optimizer.words import percent
from search_spaces.groups import split_name

LESS, MORE = "#0072b2", "#d55e00"  # of loss; told apart with any colour vision
TITLES = {"domain": "loss on the expert's domain", "general": "loss on the general tasks"}
WIDTH, ROW, AROUND = 980, 24, 210  # pixels: of the figure, of a kind of tensor, and what a panel has beside its rows


def heat_map(found: Sensitivities) -> go.Figure:
    """Draw the average dL/dw of every tensor: a column per layer, a row per kind of tensor, a panel per objective.

    Args:
        found: of one expert. Blue is where more of the expert lowers the loss. A panel has a scale of its own, since
            the losses' units differ; its title gives the measured change, the subtitle by how much the parts miss it.
    """
    kinds, layers = _kinds(found), max((layer or 0) for _, layer in map(_place, found.tensors)) + 1
    columns = ["embed", *map(str, range(layers)), "head"]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=[_title(found, o) for o in OBJECTIVES]
    )
    for row, objective in enumerate(OBJECTIVES, start=1):
        table = np.full((len(kinds), len(columns)), np.nan)
        for tensor, value in found.by_tensor(objective).items():
            kind, layer = _place(tensor)
            column = layer + 1 if layer is not None else (0 if kind.startswith("embed") else len(columns) - 1)
            table[kinds.index(kind), column] = value
        most = float(np.nanmax(np.abs(table))) or 1.0
        y = figure.layout[f"yaxis{row if row > 1 else ''}"].domain
        figure.add_trace(
            go.Heatmap(
                z=table, x=columns, y=[html.escape(kind) for kind in kinds], zmin=-most, zmax=most, xgap=1, ygap=1,
                colorscale=[(0, LESS), (0.5, "#f4f5f7"), (1, MORE)], hoverongaps=False,
                hovertemplate="layer %{x}, %{y}: %{z:.2e}<extra></extra>",
                colorbar={"y": sum(y) / 2, "len": y[1] - y[0], "thickness": 14, "title": "dL/dw", "tickformat": ".0e"},
            ),
            row=row, col=1,
        )  # fmt: skip
        figure.update_yaxes(autorange="reversed", row=row, col=1)
    shown = range(2, layers - 2, math.ceil(layers / 10))  # beside the ends there is no room
    ticks = ["embed", *map(str, shown), "head"]
    figure.update_xaxes(type="category", showgrid=False, tickangle=0, tickvals=ticks, ticktext=ticks)
    figure.update_xaxes(title_text="layer, from the embeddings to the head", row=2, col=1)
    figure.update_yaxes(showgrid=False, automargin=True)
    figure.update_annotations(x=0, xanchor="left", font={"size": 14, "color": INK})
    subtitle = f"dL/dw along base → {html.escape(found.expert)}; blue: more of it lowers the loss, orange: raises it; "
    domain, general = (percent(found.error(objective)) for objective in OBJECTIVES)
    subtitle += f"added up, the parts miss the measured change by {domain} (domain) and {general} (general)"
    figure.update_layout(
        title={"text": "Where gain and loss come from", "subtitle": {"text": subtitle, "font": {"color": GREY}}},
        width=WIDTH, height=2 * ROW * len(kinds) + AROUND, font={"family": FONT, "color": INK, "size": 13},
        paper_bgcolor=PAPER, plot_bgcolor=PAPER, margin={"t": 120, "l": 20, "r": 20, "b": 60},
    )  # fmt: skip
    return figure


def _title(found: Sensitivities, objective: Objective) -> str:
    return f"{TITLES[objective]} ({found.change(objective):+.3g})"


def _kinds(found: Sensitivities) -> list[str]:
    """List the kinds of tensors: those of layers in the order of the model, attention first, then the others."""
    places = [_place(tensor) for tensor in found.tensors]
    inside = sorted({kind for kind, layer in places if layer is not None}, key=lambda kind: ("mlp" in kind, kind))
    return [*inside, *dict.fromkeys(kind for kind, layer in places if layer is None)]


def _place(tensor: str) -> tuple[str, int | None]:
    """Split a tensor's name into its kind, such as `self_attn.q_proj`, and its layer."""
    stack, layer, rest = split_name(tensor)
    name = rest if layer is not None else stack.removeprefix("model.")
    return name.removesuffix(".weight"), layer
