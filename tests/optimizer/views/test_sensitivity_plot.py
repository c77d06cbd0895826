"""The heat map shows every tensor once, in its layer's column, and the totals that were measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from optimizer.runs.sensitivities import Sensitivities
from optimizer.views.pictures import picture
from optimizer.views.sensitivity_plot import heat_map

TENSORS = (
    "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight",
    "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight",
)  # fmt: skip


DOMAIN = tuple(-0.1 * (i + 1) for i in range(8))
GENERAL = tuple(0.01 * (i + 1) for i in range(8))


def figure_of() -> go.Figure:
    rows = (DOMAIN, DOMAIN), (GENERAL, GENERAL)
    return heat_map(Sensitivities("a<b>", TENSORS, (0.25, 0.75), (0.5, 0.5), *rows, -3.6, 0.36, 9, 30.0, 1.0))


def test_a_picture_of_it_has_its_numbers_and_names(tmp_path: Path) -> None:
    still = picture(figure_of())
    for ax, values in zip(still.figure.axes[:2], (DOMAIN, GENERAL), strict=True):
        (image,) = ax.images
        assert np.nansum(np.asarray(image.get_array(), dtype=float)) == pytest.approx(sum(values))
        assert image.get_clim() == (-max(map(abs, values)), max(map(abs, values)))
        assert [label.get_text() for label in ax.get_yticklabels()][-1] == "norm"
        assert [label.get_text() for label in ax.get_xticklabels()] == ["embed", "head"]
    still.save(tmp_path / "still.png")
    said = [text.get_text() for text in still.figure.texts]
    assert "a<b>" in said[1]
    assert "\n" in said[1]  # it is longer than the picture is wide


def test_every_tensor_has_its_place_and_sign() -> None:
    figure = figure_of()
    for panel, values in zip(figure.data, (DOMAIN, GENERAL), strict=True):
        shown = np.array(panel.z, dtype=float)
        assert np.nansum(shown) == pytest.approx(sum(values))
        assert np.isfinite(shown).sum() == len(TENSORS)
        assert shown[list(panel.y).index("self_attn.q_proj"), list(panel.x).index("1")] == pytest.approx(values[6])
        assert shown[list(panel.y).index("embed_tokens"), list(panel.x).index("embed")] == pytest.approx(values[0])
        assert shown[list(panel.y).index("norm"), list(panel.x).index("head")] == pytest.approx(values[7])
        assert (panel.zmin, panel.zmax) == (-max(map(abs, values)), max(map(abs, values)))
    assert "loss on the expert's domain (-3.6)" in figure.layout.annotations[0].text
    said = figure.layout.title.subtitle.text
    assert "added up, the parts miss the measured change by 0.0 % (domain) and 0.0 % (general)" in said
    assert "a&lt;b&gt;" in figure.layout.title.subtitle.text
