"""Models in GGUF files: read by transformers, dequantised once into a folder of safetensors that is kept.

From there on they are checkpoints like any other. A quantised model's numbers are those its file stands for, rounded to
bfloat16; files of float32 or float16 alone keep that.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimizer.checkpoints.configs import SETTINGS, refused, silent
from optimizer.checkpoints.contents import full_digest
from optimizer.checkpoints.hub import own_cache
from optimizer.errors import CheckpointError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def gguf_in(source: Path) -> Path | None:
    """Find the GGUF file that a path is, or that a folder without safetensors holds alone."""
    if source.is_file():
        return source if source.suffix == SUFFIX else None
    if not source.is_dir() or any(source.glob("*.safetensors")) or (source / "model.safetensors.index.json").exists():
        return None
    found = sorted(source.glob(f"*{SUFFIX}"))
    return found[0] if len(found) == 1 else None


def kept_folder() -> Path:
    """Give the folder in which dequantised models are kept."""
    return own_cache("gguf")


def dequantised(file: Path) -> Path:
    """Return a folder with the model of a GGUF file, made where it is not kept yet.

    The whole model is held in memory in float32 while it is made. The tokenizer's files are those beside the file where
    there is a tokenizer.json, else what the file itself holds.

    Raises:
        CheckpointError: the file is none, of a kind that transformers cannot read, or cannot be written out.
    """
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{file} is not a GGUF file: it does not begin with {MAGIC.decode()}")
    try:
        version("gguf")
    except PackageNotFoundError as error:
        raise CheckpointError(f"{file} is a GGUF file: pip install 'mergefront[gguf]' reads it") from error
    out = kept_folder() / f"{file.stem[:80]}-{full_digest(file)[:16]}-transformers-{version('transformers')}"
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{file.stem[:40]}.", dir=out.parent))
        try:
            _write(file, temporary)
            temporary.chmod(0o755)
            temporary.rename(out)
        except OSError as error:
            if not out.is_dir():  # else another process was faster
                raise CheckpointError(f"{file} cannot be dequantised into {out} ({error.strerror})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    with refused(file, what="a model"), silent():
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    if own := [name for name in (*TOKENIZER_FILES, *SETTINGS) if (file.parent / name).is_file()]:
        own = [name for name in own if name not in ("config.json", "generation_config.json")]
    if "tokenizer.json" in own:
        for name in dict.fromkeys(own):
            shutil.copyfile(file.parent / name, folder / name)
    else:
        with refused(file, what="a tokenizer (put its tokenizer.json beside it)"), silent():
            AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(folder)
    plain: Any = model
    plain.hf_quantizer = None  # its numbers are plain ones now, and transformers would not write them
    plain.config.__dict__.pop("quantization_config", None)
    with silent():
        plain.to(dtype=_stored_as(file)).save_pretrained(folder)
    config = folder / "config.json"
    document = _as_typed(json.loads(config.read_text(encoding="utf-8")))
    config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _as_typed(value: Any) -> Any:
    """Give numbers as people wrote them: a file has an epsilon of 1e-6 in float32, which is 9.99999997e-07."""
    if isinstance(value, float):
        return float(str(np.float32(value)))
    if isinstance(value, dict):
        return {key: _as_typed(entry) for key, entry in value.items()}
    return [_as_typed(entry) for entry in value] if isinstance(value, list) else value


def _stored_as(file: Path) -> torch.dtype:
    """Return the type that holds a file's matrices: float32 or float16 where all are such, else bfloat16."""
    import gguf

    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1}
    plain = {gguf.GGMLQuantizationType.F32: torch.float32, gguf.GGMLQuantizationType.F16: torch.float16}
    return plain.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16
