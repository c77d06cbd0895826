"""The notebook runs from top to bottom on a run folder, and the stored one shows its pictures."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "trade_offs.ipynb"
PICTURES = 5


def _outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def _pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in _outputs(notebook))


@pytest.mark.slow
def test_runs_on_the_tiny_demo(tiny_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEFRONT_RUN", str(tiny_demo))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, startup_timeout=300, resources=place).execute()
    assert _pictures(notebook) == PICTURES
    assert "mergefront export" in notebook.cells[-1].outputs[0].text


def test_stored_notebook_shows_its_pictures_and_no_local_path() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert _pictures(notebook) == PICTURES
    outputs = _outputs(notebook)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = "".join(f"{output.get('text', '')} {output.get('data', {}).get('text/plain', '')}" for output in outputs)
    assert "/tmp" not in text
    assert str(Path.home()) not in text
