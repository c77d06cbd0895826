"""The heat map shows every tensor once, in its layer's column, and the totals that were measured."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.runs.sensitivities import Sensitivities
from optimizer.views.sensitivity_plot import heat_map

TENSORS = (
    "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight",
    "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight",
)  # fmt: skip


def test_every_tensor_has_its_place_and_sign() -> None:
    domain = tuple(-0.1 * (i + 1) for i in range(8))
    general = tuple(0.01 * (i + 1) for i in range(8))
    found = Sensitivities(
        "a<b>", TENSORS, (0.25, 0.75), (0.5, 0.5), (domain, domain), (general, general), -3.6, 0.36, 9, 30.0, 1.0
    )
    figure = heat_map(found)
    for panel, values in zip(figure.data, (domain, general), strict=True):
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
