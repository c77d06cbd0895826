"""Adapters: the base plus two factors."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimizer.checkpoints.compare import compare
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.errors import CheckpointError
from tests.optimizer.checkpoints.edits import UP, Q, adapter, edit_json


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_an_adapter_is_the_base_plus_its_delta(rslora: bool, scale: float, base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", use_rslora=rslora)
    opened = open_checkpoint(base)
    expert = open_checkpoint(folder, base=opened)
    down, up = load_file(folder / "adapter_model.safetensors").values()
    wanted = (opened.tensor(Q).double() + scale * up.double() @ down.double()).bfloat16()
    assert torch.allclose(expert.tensor(Q).float(), wanted.float(), rtol=2**-7)
    assert torch.equal(expert.tensor(UP), opened.tensor(UP))
    assert expert.is_adapter
    assert not opened.is_adapter
    assert compare(opened, expert) == []
    assert expert.fingerprint != opened.fingerprint
    expert.require_unchanged()


def test_an_adapter_needs_its_base(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can be an expert, not a base"):
        open_checkpoint(adapter(tmp_path / "lora"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"init_lora_weights": "pissa"}, "changes the base itself"),
        ({"r": 8}, "do not fit its factors"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2 and shape"),
        ({"rank_pattern": {"q_proj": "4"}}, "r must be a whole number from 1 to 65,536"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern must map regular expressions to numbers"),
        ({"rank_pattern": {r"((\w|\.)+)+x": 4}}, "rank_pattern: a pattern may repeat 8 times and no group"),
        ({"alpha_pattern": {".*" * 30: 4}}, "alpha_pattern: a pattern may repeat 8 times and no group"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must map regular expressions to numbers"),
        ({"r": "4"}, "r must be a whole number from 1 to 65,536"),
        ({"lora_alpha": None}, "lora_alpha a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha a number"),
        ({"r": 10**250}, "r must be a whole number from 1 to 65,536"),
        ({"peft_type": ["LORA"]}, "knows no peft_type"),
        ({"use_dora": True, "r": 10**9}, "r may be 65,536 at most; given 1000000000"),
    ],
)
def test_an_adapter_that_does_not_fit_itself_is_refused(
    config: dict[str, object], words: str, base: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "lora")
    edit_json(folder / "adapter_config.json", **config)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder, base=open_checkpoint(base))


def test_a_module_may_have_a_rank_and_an_alpha_of_its_own(base: Path, tmp_path: Path) -> None:
    opened, own = open_checkpoint(base), {r"layers\.1\..*q_proj": 12, "proj": 1}
    patterned = adapter(tmp_path / "own", rank=4, r=64, lora_alpha=7, rank_pattern={"q_proj": 4}, alpha_pattern=own)
    plain = adapter(tmp_path / "plain", rank=4, lora_alpha=12)
    one, other = (open_checkpoint(folder, base=opened) for folder in (patterned, plain))
    assert one.tensor(Q).equal(other.tensor(Q))
    assert not one.tensor(Q).equal(opened.tensor(Q))


def test_an_adapter_for_peft_says_what_to_install(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("optimizer.checkpoints.peft_fold.version", missing)
    with pytest.raises(CheckpointError, match=r"not plain LoRA, .* pip install 'mergefront\[adapters\]'"):
        open_checkpoint(adapter(tmp_path / "lora", use_dora=True), base=open_checkpoint(base))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lora_A", "lora_magnitude_vector", "not a plain LoRA factor"),
        ("q_proj", "z_proj", "which the base does not have"),
        ("q_proj.lora_A", "k_proj.lora_A", "has no partner"),
    ],
)
def test_an_adapter_whose_tensors_do_not_pair_is_refused(
    old: str, new: str, words: str, base: Path, tmp_path: Path
) -> None:
    file = adapter(tmp_path / "lora") / "adapter_model.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(file.parent, base=open_checkpoint(base))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        open_checkpoint(file.parent, base=open_checkpoint(base))
