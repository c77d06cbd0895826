"""A merge to disk holds a few tensors at a time, mapped pages included, whatever the size of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.merge_memory import write_model
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.merging.merge import Sources, merge_to_folder
from search_spaces import Recipe, Setting

SHARD = 8_000_000


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def merge(folder: Path, shards: int, method: str) -> None:
    """Merge two models of so many shards into one file."""
    for seed, name in enumerate(("base", "law")):
        write_model(folder / name, shards=shards, shard_bytes=SHARD, seed=seed, hidden=256)
    sources = Sources.open(folder / "base", {"law": str(folder / "law")})
    density = [Setting("density", "", "", 0.5)] if method == "ties" else []
    recipe = Recipe(method, "base", (("law", "law"),), (Setting("weight", "", "", 0.3), *density))
    before = resident("VmRSS")
    merge_to_folder(sources, recipe, folder / "out", shard_bytes=20 * SHARD)
    assert (folder / "out/model.safetensors").stat().st_size > 0.8 * shards * SHARD
    assert shards == 2 or resident("VmHWM") - before < 2 * SHARD


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_merge_to_disk_takes_less_than_two_shards(method: str, tmp_path: Path) -> None:
    merge(tmp_path / "small", 2, method)  # whatever is loaded once
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    except OSError:
        pytest.skip("this kernel does not reset the peak")
    merge(tmp_path / "large", 12, method)


def test_what_is_read_anew_is_what_is_mapped(tmp_path: Path) -> None:
    write_model(tmp_path / "model", shards=2, shard_bytes=SHARD, seed=0, hidden=256)
    model = open_checkpoint(tmp_path / "model")
    files = (tmp_path / "model").glob("*.safetensors")
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert stored.keys() == set(model.names)
    assert all(tensor.equal(model.tensor(name)) for name, tensor in stored.items())
    assert all(tensor.equal(model.read_anew().tensor(name)) for name, tensor in stored.items())
