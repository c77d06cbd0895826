"""GGUF files are models: dequantised once, kept, said, and merged like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evals.documents import DocumentError
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.errors import CheckpointError
from optimizer.export.model_folder import export_model
from optimizer.merging.merge import Sources
from optimizer.views.plan import model_rows
from search_spaces import Recipe, Setting
from tests.pico import pico_expert, pico_llama

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(model: Path, out: Path, kind: str = "F32") -> Path:
    """Write a Llama's tensors as llama.cpp has them, matrices in a kind of its own."""
    config, tensors = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in tensors.items():
        numbers: Any = tensor.float()
        for part, count in (("q_proj", heads), ("k_proj", config["num_key_value_heads"])):
            if part in name:  # llama.cpp has the two halves of a rotation beside each other
                rows = len(numbers) // count // 2
                numbers = numbers.reshape(count, 2, rows, -1).swapaxes(1, 2).reshape(numbers.shape)
        array, stored = numbers.numpy(), getattr(gguf.GGMLQuantizationType, kind)
        place = names.get_name(name, try_suffixes=(".weight",))
        if array.ndim > 1 and kind == "F16":
            writer.add_tensor(place, array.astype("float16"))
        elif array.ndim > 1 and kind != "F32":
            writer.add_tensor(place, gguf.quants.quantize(array, stored), raw_dtype=stored)
        else:
            writer.add_tensor(place, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Write a base as it is, and an expert as a folder with a GGUF file beside the tokenizer."""
    base = pico_llama(tmp_path / "base", dtype="float32", tied=False)
    expert = pico_expert(base, tmp_path / "law", scale=0.1)
    return base, expert


def only_gguf(model: Path, kind: str) -> Path:
    file = write_gguf(model, model / f"{kind}.gguf", kind)
    (model / "model.safetensors").rename(model.parent / f"{model.name}.safetensors")
    (model / "config.json").unlink()
    return file


@pytest.mark.parametrize(("kind", "dtype", "near"), [
    ("F32", torch.float32, 0.0), ("F16", torch.float16, 1e-3), ("Q8_0", torch.bfloat16, 0.02),
])  # fmt: skip
def test_a_file_is_dequantised_once_and_kept(
    pair: tuple[Path, Path], cache: Path, kind: str, dtype: torch.dtype, near: float
) -> None:
    _, law = pair
    file = only_gguf(law, kind)
    made = open_checkpoint(file)
    assert made.folder.is_relative_to(cache / "mergefront/gguf")
    wanted = load_file(law.parent / "law.safetensors")
    assert set(made.names) == set(wanted)
    for name, tensor in wanted.items():
        assert made.dtype(name) == dtype
        torch.testing.assert_close(made.tensor(name).float(), tensor, atol=near, rtol=near)
    before = (made.folder / "model.safetensors").stat().st_mtime_ns
    again = open_checkpoint(law)  # the folder, which holds no other weights
    assert (again.folder, again.fingerprint) == (made.folder, made.fingerprint)
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == before
    (row,) = model_rows({"law": made})
    assert f"(GGUF, dequantised in {made.folder})" in row[1]
    assert not list(cache.glob("mergefront/gguf/.*"))


def test_a_quantised_expert_is_merged_with_a_base_of_another_type(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, law = pair
    file = only_gguf(law, "Q8_0")
    recipe = Recipe("linear", str(base), (("law", str(file)),), (Setting("weight", "", "", 0.5),))
    sources = Sources.open(base, {"law": str(file)})
    merged = load_file(export_model(recipe, sources, tmp_path / "out") / "model.safetensors")
    ours, theirs = load_file(base / "model.safetensors"), load_file(tmp_path / "law.safetensors")
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, (ours[name] + theirs[name]) / 2, atol=0.01, rtol=0.01)


def test_what_is_no_model_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGU")
    with pytest.raises(CheckpointError, match=r"x\.gguf is not a GGUF file"):
        open_checkpoint(tmp_path / "x.gguf")
    (tmp_path / "y.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises((CheckpointError, DocumentError), match=r"y\.gguf: a model, which transformers cannot use"):
        open_checkpoint(tmp_path / "y.gguf")
    bare = tmp_path / "bare"
    bare.mkdir()
    write_gguf(pair[0], bare / "z.gguf")
    with pytest.raises(CheckpointError, match=r"z\.gguf: a tokenizer \(put its tokenizer.json beside it\)"):
        open_checkpoint(bare / "z.gguf")
