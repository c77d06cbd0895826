"""Models by hub id: fetched only where a person says so, weights and settings alone."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from optimizer.checkpoints.hub import FETCHED, NOT_FETCHED, fetched, is_hub_id
from optimizer.errors import CheckpointError
from tests.optimizer.checkpoints.test_opening import cached
from tests.optimizer.small_study import write_study
from tests.optimizer.test_cli import call
from tests.pico import pico_expert, pico_llama


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has org/law, an expert of the study's base, behind the client's one function; gives what was asked."""
    asked: list[str] = []
    import huggingface_hub

    place = tmp_path / "hub"
    for module in ("constants", "_snapshot_download.constants"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(place))
    theirs = huggingface_hub.snapshot_download

    def snapshot_download(source: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return theirs(source, **options)
        asked.append(source)
        assert (options["allow_patterns"], options["ignore_patterns"]) == ([*FETCHED], [*NOT_FETCHED])
        if source != "org/law":
            raise OSError("404 there is no such model")
        folder = place / "models--org--law"
        if not folder.exists():
            cached(pico_expert(tmp_path / "base", tmp_path / "law", scale=0.1), folder)
        return theirs(source, local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_nothing_is_fetched_unless_asked_for(hub: list[str], tmp_path: Path) -> None:
    study = write_study(tmp_path)
    words = ["check", study, "--set", "models.experts.clinical=org/law"]
    refused = call(*words)
    assert refused.exit_code == 2
    assert "'org/law' is not in the local hub cache; for a hub model give --download" in " ".join(
        refused.stdout.split()
    )
    assert hub == []
    there = call(*words, "--download")
    assert there.exit_code == 0, there.output
    assert "from the hub: org/law in" in there.stdout
    assert hub == ["org/law"]
    assert call(*words).exit_code == 0
    assert hub == ["org/law"]
    done = call("search", study, "--set", "models.experts.clinical=org/law", "--download")
    assert done.exit_code == 0, done.output


def test_what_the_hub_does_not_have_is_named(hub: list[str], tmp_path: Path) -> None:
    pico_llama(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"org/none cannot be downloaded from the hub \(OSError: 404.*HF_TOKEN"):
        fetched(["org/none"])
    assert fetched([str(tmp_path / "base"), "./base", "base"]) == {}
    assert hub == ["org/none"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("model-00001-of-2.safetensors", True), ("config.json", True), ("tokenizer.model", True),
     ("chat_template.jinja", True), ("pytorch_model.bin", False), ("modeling_own.py", False),
     ("onnx/model.safetensors", False), ("pytorch_model.bin.index.json", False), ("model.gguf", False)],
)  # fmt: skip
def test_weights_and_what_describes_them_are_fetched_and_no_code(name: str, wanted: bool) -> None:
    allowed = any(fnmatch(name, pattern) for pattern in FETCHED) and not any(fnmatch(name, p) for p in NOT_FETCHED)
    assert allowed == wanted


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/model")
    (tmp_path / "org/model").mkdir(parents=True)
    assert not any(map(is_hub_id, ("org/model", "./org/x", "/a/b", "a", "a/b/c", "~/x")))
