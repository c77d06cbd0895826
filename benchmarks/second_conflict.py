"""A second conflict that nothing was tuned on: another family, other texts, other questions.

    python benchmarks/second_conflict.py [--out runs/second] [--trials 40]

A GPT-NeoX of 6 million parameters learns English from the docstrings of Python packages that are installed here. Then
it continues on SymPy's source without docstrings and comments, and forgets English. The study is the demo's in shape:
texts and questions of both sides, two sentinel tasks, the product's defaults for anchors and learned points. Models
are trained once and lie beside OUT; the run ends with what `mergefront front` prints.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import keyword
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

from optimizer.demo.models import Progress, TrainingPlan, train_base, train_expert
from optimizer.demo.tasks import (
    OWN_TASKS,
    count_followers,
    write_choice_task,
    write_python_prose,
    write_text_task,
)
from optimizer.run_study import run_study
from optimizer.runs.atomic_file import write_atomically
from optimizer.strict_yaml import dump_yaml

ENGLISH = ("networkx", "numpy", "pandas", "scipy", "sklearn", "torch")
CODE = "sympy"
VOCABULARY = 2048
BASE = TrainingPlan(steps=300, learning_rate=3.0e-3, warm_up=20)
EXPERT = TrainingPlan(steps=40, learning_rate=1.0e-3, cool_down=False)
KNOWN = 5  # times a word follows another in the training texts, to be asked for or to stand beside it
ENGLISH_WORD, CODE_WORD = r"\b[a-z]{3,}\b", r"\b[A-Za-z_]{3,}\b"


def main() -> None:
    """Train what is missing, run or resume the study, print its front."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs") / "second")
    options.add_argument("--trials", type=int, default=40)
    given, console = options.parse_args(), Console()
    out = given.out.resolve()
    inputs = out.with_name(f"{out.name}-inputs")
    english = read_once(inputs / "english.json", docstrings)
    code = read_once(inputs / "code.json", _bare_source)
    base, expert = _models(inputs, _training(english), _training(code), console)
    _write_tasks(inputs / "tasks", english, code)
    study_file = inputs / "study.yaml"
    study_file.write_text(dump_yaml(_study(out, inputs, base, expert, given.trials)), encoding="utf-8")
    run_study(study_file, [], console)


def _models(inputs: Path, english: Sequence[str], code: Sequence[str], console: Console) -> tuple[Path, Path]:
    progress = progress_of(console, every=20)
    tokenizer = train_tokenizer([*english, *code[: len(english) // 4]])
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
    )
    base = train_base(inputs / "base", config, tokenizer, english, BASE, progress)
    return base, train_expert(base, code, inputs / "expert", EXPERT, progress)


def progress_of(console: Console, every: int) -> Progress:
    """Give a function that prints a training's loss, each time after so many steps and at the end."""

    def progress(step: int, steps: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            console.print(f"  step {step} of {steps}, loss {loss:.2f}", highlight=False)

    return progress


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def read_once(file: Path, texts: Callable[[], Iterator[str]]) -> list[str]:
    """Give the texts, each once; the file keeps them, since parsing the packages takes minutes."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(list(dict.fromkeys(texts()))).encode())
    found: list[str] = json.loads(file.read_bytes())
    return found


def _modules(package: str) -> Iterator[ast.Module]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this benchmark reads the package {package}; install it with pip")
    for path in sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.py")):
        if package != CODE and "test" in str(path):
            continue  # tests hold no prose
        try:
            yield ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates that lie among the modules


def docstrings() -> Iterator[str]:
    """Yield the paragraphs of prose in the docstrings of the English packages, each on one line."""
    for package in ENGLISH:
        for module in _modules(package):
            for node in ast.walk(module):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                        line = " ".join(paragraph.split())
                        if 120 <= len(line) <= 1200 and re.fullmatch(r"[A-Z][^|>={}\[\]]*\.", line):
                            yield line


def _bare_source() -> Iterator[str]:
    """Yield SymPy's functions and methods without docstrings and comments."""
    for module in _modules(CODE):
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef):
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
                text = ast.unparse(node)
                if 120 <= len(text) <= 1200 and text.isascii():
                    yield text


@cache
def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _training(texts: Iterable[str]) -> list[str]:
    chosen = [text for text in texts if hash_of(text) % 20]  # one in twenty is kept for the tasks
    random.Random(0).shuffle(chosen)
    return chosen


def _write_tasks(folder: Path, english: Sequence[str], code: Sequence[str]) -> None:
    for side, texts, word in (("english", english, ENGLISH_WORD), ("code", code, CODE_WORD)):
        followers = count_followers(_training(texts), word)
        held_out = sorted((text for text in texts if hash_of(text) % 20 == 0), key=hash_of)
        half = len(held_out) // 2
        write_text_task(folder / f"{side}_text", held_out[:half][:200])
        asked = (cloze(text, followers, word) for text in held_out[half:])
        write_choice_task(folder / f"{side}_words", [row for row in asked if row][:800])
    write_python_prose(folder)


def cloze(text: str, followers: Mapping[str, Counter[str]], word: str) -> dict[str, object] | None:
    """Break a text off before a word that three others might replace, all about as frequent after the word before."""
    draw = random.Random(text)
    for before, place in pairwise(re.finditer(word, text)):
        right, start = place.group(), place.start()
        counts = followers.get(before.group(), Counter())
        others = [w for w, n in counts.items() if n >= KNOWN and w not in text and not keyword.iskeyword(w)]
        if start < 80 or text[start - 1] != " " or counts[right] < KNOWN or keyword.iskeyword(right):
            continue
        if len(others) < 3:
            continue
        near = sorted(others, key=lambda other: (abs(counts[other] - counts[right]), other))[:6]
        choices = [right, *draw.sample(near, 3)]
        draw.shuffle(choices)
        return {"text": text[: start - 1], "choices": choices, "gold": choices.index(right)}  # the space is lm-eval's
    return None


def _study(out: Path, inputs: Path, base: Path, expert: Path, trials: int) -> dict[str, Any]:
    def task(name: str, items: int, holdout_items: int) -> dict[str, Any]:
        return {"task": str(inputs / "tasks" / name), "items": items, "holdout_items": holdout_items}

    return {
        "name": out.name,
        "models": {"base": str(base), "experts": {"code": str(expert)}},
        "space": {"method": "task_arithmetic", "shape": {"curve": 4}, "modules": ["attn", "mlp"], "weight": [0.0, 1.2]},
        "evals": {
            "domain": [task("code_text", 40, 80), task("code_words", 150, 200)],
            "general": [task("english_text", 40, 80), task("english_words", 150, 200)],
            "sentinel": [
                {"task": str(OWN_TASKS / "minimal_pairs"), "holdout_items": 200},
                {"task": str(inputs / "tasks" / "python_prose"), "holdout_items": 20},
            ],
            "dtype": "float32",
        },
        "search": {"trials": trials},
        "workers": {"count": 0},
        "runs": str(out.parent),
    }


if __name__ == "__main__":
    main()
