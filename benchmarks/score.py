"""How long scoring takes, beside lm-eval's HFLM on the same requests and beside the arithmetic itself.

    python benchmarks/score.py [MODEL] [--dtype bf16] [--threads 1] [--items 60] [--only rolling]

MODEL is a folder; the default is the base that `make demo` leaves in runs/demo-inputs/base. Both sides use one dtype,
by default the one in which a plain matrix product is faster here. HFLM takes the best of batch sizes 1, 8 and 16, found
on a fifth of the requests; ours is the median of three runs. Columns: seconds of HFLM and of ours, and their ratio;
tokens that HFLM and that we send through the model, each over distinct tokens of the requests' prefix tree (the first
is about the ratio to expect, if both use the machine alike); what share the arithmetic of the distinct tokens has of
the rate of a plain matrix product in bf16, and in the dtype used; the share of the time spent outside the model; and
the largest difference between the two in a log-likelihood, in nats.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from evals.engine import Engine, budget_for
from evals.lm_tasks import load_tasks
from evals.outcomes import SEARCH, Chat, Outcome, TaskSpec
from evals.tokens import Pair
from optimizer.demo.tasks import write_python_prose
from optimizer.merging.merge import DEVICE_ROOM

ROOT = Path(__file__).parent.parent
DEFAULT_MODEL = ROOT / "runs" / "demo-inputs" / "base"
KNOWLEDGE = ROOT / "evals" / "tasks" / "general_knowledge"
BATCH_SIZES = (1, 8, 16)
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Case:
    """What is scored: a task, and how large a share of the items asked for is enough for a figure."""

    name: str
    folder: Path
    share: float
    shots: int = 0


@dataclass(slots=True)
class Meter:
    """Seconds and tokens of a model's forward passes, while `metered`."""

    seconds: float = 0.0
    tokens: int = 0


@contextmanager
def metered(model: PreTrainedModel) -> Iterator[Meter]:
    """Count what passes through the model's body and its head."""
    meter = Meter()
    body, head = model.base_model, model.get_output_embeddings()
    begun: list[float] = []

    def before(module: torch.nn.Module, _: object, given: dict[str, Any]) -> None:
        if module is body:
            meter.tokens += given["input_ids"].numel()
        begun.append(now())

    def after(*_: object) -> None:
        meter.seconds += now() - begun.pop()

    hooks = [part.register_forward_pre_hook(before, with_kwargs=True) for part in (body, head)]
    hooks += [part.register_forward_hook(after) for part in (body, head)]
    try:
        yield meter
    finally:
        for hook in hooks:
            hook.remove()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(action: Callable[[], object]) -> float:
    start = now()
    action()
    return now() - start


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a plain matrix product of 2,048 x 2,048 numbers, the median of five."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    times = sorted(seconds(lambda: a @ b) for _ in range(6))
    return 2 * 2048**3 / times[2]


def cases(scratch: Path) -> list[Case]:
    """Choices of one word, of a sentence, after a passage; with fixed shots; whole texts; answers to be written."""
    knowledge = yaml.safe_load(next(KNOWLEDGE.glob("*.yaml")).read_text())
    rows = [json.loads(line) for line in next(KNOWLEDGE.glob("*.jsonl")).read_text().splitlines()]
    asked = "Which of these words ({{choices | join(', ')}}) means the following?\n{{question}}\nAnswer:"
    sentences = [
        row | {"sentences": [f"{word} is the word that means this." for word in row["choices"]]} for row in rows
    ]
    notes = [f"{row['choices'][row['gold']].capitalize()}. {row['question']}" for row in rows]
    passages = [  # open book: notes about ten other words, then the question
        row | {"passage": "\n".join(notes[(i + 7 * k) % len(notes)] for k in range(1, 11))}
        for i, row in enumerate(sentences)
    ]
    open_book = "Notes:\n{{passage}}\n\n"
    fixed = {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    whole = {"doc_to_text": asked, "doc_to_choice": "sentences"}
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "doc_to_choice": None,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }

    def task(name: str, items: list[dict[str, Any]], settings: dict[str, Any]) -> Path:
        folder = scratch / name
        folder.mkdir()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        files = {"dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        config = {key: value for key, value in (knowledge | files | settings).items() if value is not None}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | {"task": name}, sort_keys=False))
        return folder

    return [
        Case("zero-shot, one word", task("words", rows, {}), 2.0),
        Case("zero-shot, sentences", task("sentences", sentences, whole), 1.0),
        Case("zero-shot, passage", task("open_book", passages, whole | {"doc_to_text": open_book + asked}), 0.5),
        Case("five-shot, one word", task("word_shots", rows, fixed), 1.0, shots=5),
        Case("five-shot, sentences", task("sentence_shots", sentences, fixed | whole), 0.5, shots=5),
        Case("rolling text", write_python_prose(scratch), 0.15),
        Case("generation", task("written", rows, written), 0.5),
    ]


def read_and_predicted(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Nodes of the prefix tree of what the model must read, and of those after which something is predicted."""
    nodes = 0
    before: tuple[int, ...] = ()
    for tokens in sorted(pair.context + pair.continuation[:-1] for pair in pairs):
        shared = next((i for i, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b), len(before))
        nodes += len(tokens) - shared
        before = tokens
    return nodes, len({pair.context + pair.continuation[:i] for pair in pairs for i in range(len(pair.continuation))})


def ask(lm: HFLM, asked: list[Instance], batch_size: int) -> list[Any]:
    """HFLM's answers, without its bars."""
    lm.batch_size_per_gpu = batch_size
    with redirect_stderr(io.StringIO()):
        return getattr(lm, asked[0].request_type)(asked, disable_tqdm=True)


def measure(case: Case, model: PreTrainedModel, tokenizer: Any, items: int) -> str:
    """A line of the table."""
    wanted = max(5, round(case.share * items))
    spec = TaskSpec(str(case.folder), "general", search_items=wanted, holdout_items=1, shots=case.shots)
    harness = load_tasks([spec], seed=0, chat=Chat(), allow_task_code=False)
    engine = Engine(model, tokenizer, token_budget=budget_for(model, DEVICE_ROOM))
    harness.prepare(tokenizer, SEARCH)
    asked = harness.requests(SEARCH)
    lm = HFLM(pretrained=model, tokenizer=tokenizer)
    some = asked[: len(asked) // 5]
    tried = {size: seconds(partial(ask, lm, some, size)) for size in BATCH_SIZES}
    size = min(tried, key=lambda size: tried[size])
    answers: list[Any] = []
    with metered(model) as their_meter:
        theirs = seconds(lambda: answers.extend(ask(lm, asked, size)))
    harness.score(engine, SEARCH)  # plans are made once for all candidates
    before = [product_rate(dtype, model.device) for dtype in (torch.bfloat16, model.dtype)]
    runs: list[tuple[float, Meter, list[Outcome]]] = []
    for _ in range(3):
        with metered(model) as meter:
            begun = now()
            outcomes = list(harness.score(engine, SEARCH))
            took = now() - begun
        runs.append((took, meter, outcomes))
    ours, meter, outcomes = sorted(runs, key=lambda run: run[0])[1]
    line = f"{case.name:<21}{theirs:>8.2f} at {size:<2}{ours:>8.2f}{theirs / ours:>6.1f}x"
    outside = f"{1 - meter.seconds / ours:>9.1%}"
    pairs = harness.pairs(SEARCH, engine.max_length)
    if not pairs:
        return f"{line}{'-':>7}{'-':>7}{'-':>7}{'-':>6}{outside}{'-':>9}"
    after = [product_rate(dtype, model.device) for dtype in (torch.bfloat16, model.dtype)]
    rates = [(a + b) / 2 for a, b in zip(before, after, strict=True)]  # other work on the machine weighs on both
    read, predicted = read_and_predicted(pairs)
    head = model.get_output_embeddings().weight.numel()
    body = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    rate = 2 * (read * body + predicted * head) / ours
    found = [score for outcome in outcomes for score in outcome.loglikelihoods]
    expected = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
    apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    shares = (
        f"{their_meter.tokens / read:>7.1f}{meter.tokens / read:>7.3f}{rate / rates[0]:>7.2f}{rate / rates[1]:>6.2f}"
    )
    return f"{line}{shares}{outside}{apart:>9.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", choices=DTYPES, help="by default the faster one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--only", default="", help="part of the name of the lines wanted")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").exists():
        parser.error(f"no model in {arguments.model}: give a folder, or let `make demo` build its base")
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype or max(DTYPES, key=lambda name: product_rate(DTYPES[name], device))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=DTYPES[dtype]).eval()
    torch.nn.Module.to(model, device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    print(f"{dtype} on {device}, {arguments.threads} threads")
    print(
        f"{'':<21}{'HFLM s at batch':>14}{'ours s':>8}{'ratio':>7}{'HFLM':>7}{'sent':>7}{'/bf16':>7}{'/own':>6}", end=""
    )
    print(f"{'outside':>9}{'apart':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(Path(scratch)):
            if arguments.only in case.name:
                print(measure(case, model, tokenizer, arguments.items), flush=True)


if __name__ == "__main__":
    main()
