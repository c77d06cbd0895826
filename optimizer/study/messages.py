"""What is wrong with a study file, in words: the key, the rule, what was given, and the mend.

There are three kinds of problems: keys and values that break the schema; texts that are no name, path or URL; and
what is well typed and cannot be meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import get_args

from evals.outcomes import KINDS, KL_TO_BASE, TASK
from optimizer.checkpoints.urls import is_url, url_problem
from optimizer.masking import TOKEN, redacted
from optimizer.strict_yaml import CONTROL, shown
from optimizer.study.forms import TAGS
from optimizer.study.schema import Finding, Models, ShapeEntry, SpaceSection, Study
from optimizer.study.section import Section
from optimizer.study.task_entry import TaskEntry
from optimizer.workers.ray_address import address_problem
from search_spaces.parameters import DOMAINS, METHODS, MethodSpec
from search_spaces.shape import LEAST

Problem = tuple[str, str]  # the key's path, and what is wrong with its value

LONGEST_TEXT = 4096  # characters of one value of a study
EXPERT_RULE = "an expert's name must be letters, digits, dash or underscore, 32 at most"
# What lm-eval calls some of our keys.
LM_EVAL_WORDS = {
    "batch_size": "token_budget",
    "limit": "items",
    "num_fewshot": "shots",
    "apply_chat_template": "chat_template",
}


def schema_problems(found: Sequence[Finding]) -> list[Problem]:
    """Say in words what breaks the schema."""
    return [_problem(entry) for entry in _without_consequences(found)]


def _without_consequences(found: Sequence[Finding]) -> list[Finding]:
    """Leave out "too short" for a list that is short because its entries are wrong."""
    places = [entry["loc"] for entry in found]

    def follows(entry: Finding) -> bool:
        loc = entry["loc"]
        return entry["type"] == "too_short" and any(len(p) > len(loc) and p[: len(loc)] == loc for p in places)

    return [entry for entry in found if not follows(entry)]


def _problem(entry: Finding) -> Problem:
    """Say one finding: the rule, what was given and the mend."""
    path = [part for part in entry["loc"] if part not in ("[key]", *TAGS)]
    key = ".".join(str(part) for part in path)
    given = shown(entry["input"])
    if entry["type"] == "extra_forbidden":
        return key, f"there is no such key; given {given}; {_did_you_mean(path)}"
    if entry["type"] == "missing":
        return key, "must be given"
    if "[key]" in entry["loc"]:
        return key, EXPERT_RULE
    if key == "name" and entry["type"] == "string_pattern_mismatch":
        return key, f"must be letters, digits, dot, dash or underscore, 64 at most; given {given}"
    rule = entry["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    rule = re.sub(r"^(Tuple|List|Dictionary) should", "must", rule)
    return key, f"{rule[:1].lower()}{rule[1:]}; given {given}"


def _did_you_mean(path: Sequence[str | int]) -> str:
    *parents, wrong = (str(part) for part in path)
    here = keys_at(parents)
    wrong = LM_EVAL_WORDS.get(wrong, wrong)
    close = difflib.get_close_matches(wrong, here, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    elsewhere = [f"{section}.{wrong}" for section in Study.model_fields if wrong in keys_at((section,))]
    if elsewhere:
        return f'did you mean "{elsewhere[0]}"?'
    return f"the keys here are {', '.join(here)}"


def text_problems(value: object, place: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Yield the problem of every text that is no name, path or URL: it would reach file system and terminal."""
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            yield ".".join(place), f"must have {LONGEST_TEXT:,} characters at most; given {shown(value)}"
        elif CONTROL.search(value):
            yield ".".join(place), f"must not hold control characters; given {shown(value)}"
        elif TOKEN.search(value):  # it would be part of every recipe, and so of every export
            yield ".".join(place), "must not hold an access token (hf_…); put it in HF_TOKEN, outside the study"
    elif isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from text_problems(entry, (*place, str(key)))


def contradictions(study: Study) -> Iterator[Problem]:
    """Yield the problem of everything that is well typed and cannot be meant."""
    space, experts, storage = study.space, list(study.models.names), study.search.storage
    yield from _source_problems(study.models)
    yield from _derived_problems(study.models)
    if not space.takes_method_from_recipe:  # else what does not fit is found with the recipe
        yield from _range_problems(space)
        yield from _method_problems(space, len(experts))
    if len(set(space.modules)) < len(space.modules):
        yield "space.modules", f"must not name a module twice; given {list(space.modules)}"
    yield from _task_problems(study, experts)
    if storage is not None and (problem := _storage_problem(storage)):
        yield "search.storage", f"{problem}; given {redacted(storage)!r}"
    if study.name.endswith("."):
        yield "name", f"must not end with a dot; given {study.name!r}"
    if study.workers.gpus != "auto" and study.workers.device in ("cpu", "mps"):
        rule = f"workers.device is {study.workers.device}, which takes no GPUs of CUDA"
        yield "workers.gpus", f"{rule}; given {study.workers.gpus}; leave it out, or say device: auto"
    if study.workers.ray_address is not None:
        yield from _address_problems(study.workers.ray_address, study.workers.count)


def _source_problems(models: Models) -> Iterator[Problem]:
    sources = {"base": models.base, **{f"experts.{name}": source for name, source in models.experts.items()}}
    for key, source in sources.items():
        if is_url(source) and (problem := url_problem(source)):
            yield f"models.{key}", f"{problem}; given {redacted(source)!r}"


def _derived_problems(models: Models) -> Iterator[Problem]:
    for name, entry in models.derived.items():
        if name in models.experts:
            yield f"models.derived.{name}", f"an expert has this name; given {name!r}; give the derived one another"
        if entry.from_ not in models.experts:
            close = difflib.get_close_matches(entry.from_, models.experts, n=1, cutoff=0.5)
            mend = f'did you mean "{close[0]}"?' if close else f"they are {', '.join(models.experts)}"
            rule = "must be one of models.experts"
            yield f"models.derived.{name}.from", f"{rule}; given {entry.from_!r}; {mend}"


def _method_problems(space: SpaceSection, experts: int) -> Iterator[Problem]:
    for spec in map(METHODS.__getitem__, space.methods):
        if spec.unsearchable:
            yield "space.method", f"{spec.name} cannot be searched: {spec.unsearchable}"
        if spec.max_experts is not None and experts > spec.max_experts:
            yield "space.method", f"{spec.name} takes at most {spec.max_experts} expert(s); given {experts}"
        if experts < spec.min_experts:
            yield "space.method", f"{spec.name} needs {spec.min_experts} experts; given {experts}"


def _address_problems(address: str, workers: int) -> Iterator[Problem]:
    if workers == 0:
        yield "workers.ray_address", "needs workers: workers.count is 0, which means in this process"
    if problem := address_problem(address):
        yield "workers.ray_address", f"must be HOST:PORT, or auto: {problem}; given {address!r}"


def _storage_problem(url: str) -> str:
    from optimizer.database.study_url import storage_problem  # brings SQLAlchemy, which few studies need

    return storage_problem(url)


def _range_problems(space: SpaceSection) -> Iterator[Problem]:
    specs = [METHODS[name] for name in space.methods]
    for name, (low, high) in space.ranges.items():
        key, given = f"space.{name}", f"given [{low:g}, {high:g}]"
        having = [spec for spec in specs if spec.parameter(name)]
        if low > high:
            yield key, f"must be [low, high]; {given}"
        elif not having:
            known = sorted({parameter.name for spec in specs for parameter in spec.parameters})
            yield key, f"{' or '.join(space.methods)} has no {name}; {given}; it has {', '.join(known)}"
        for problem in dict.fromkeys(_range_problem(spec, name, low, high) for spec in having):
            if problem and low <= high:
                yield key, f"{problem}; {given}"


def _range_problem(spec: MethodSpec, name: str, low: float, high: float) -> str:
    parameter = spec.parameter(name)
    assert parameter is not None, "the caller looks for it"
    if name == spec.scale:
        missing = [
            f"{value:g} ({who})" for value, who in ((0, "the base"), (1, "the expert")) if not low <= value <= high
        ]
        return f"must hold {missing[0]}" if missing else ""
    if not low <= parameter.default <= high:
        return f"must hold {parameter.default:g}"
    return "" if parameter.allows(low) and parameter.allows(high) else f"must hold {DOMAINS[parameter.domain]} only"


def _task_problems(study: Study, experts: Sequence[str]) -> Iterator[Problem]:
    unclear = [
        (f"evals.{role}.{i}", problem)
        for role, entries in study.evals.roles.items()
        for i, entry in enumerate(entries)
        if (problem := _entry_problem(entry))
    ]
    if unclear:
        yield from unclear
        return
    domain = study.evals.domain
    for i, entry in enumerate(domain):
        if entry.expert and entry.expert not in experts:
            close = difflib.get_close_matches(entry.expert, experts, n=1, cutoff=0.5)
            mend = f'did you mean "{close[0]}"?' if close else f"the experts are {', '.join(experts)}"
            yield f"evals.domain.{i}.expert", f"must be an expert of this study; given {entry.expert!r}; {mend}"
    measured = {entry.expert for entry in domain}
    if "" not in measured and (unmeasured := [name for name in experts if name not in measured]):
        yield "evals.domain", f"must measure every expert; no task is for {', '.join(unmeasured)}"
    for i, entry in enumerate(study.evals.sentinel):
        if entry.items is not None:
            rule = "the search scores no item of a sentinel task"
            yield f"evals.sentinel.{i}.items", f"{rule}; given {entry.items}; say holdout_items"
        if entry.weight != 1:  # what a run folder keeps of one that says nothing
            rule = "a sentinel task counts in no objective"
            yield f"evals.sentinel.{i}.weight", f"{rule}; given {entry.weight:g}; leave it out"
        if entry.bank is not None:
            rule = "the search scores no item of a sentinel task, so it has no bank"
            yield f"evals.sentinel.{i}.bank", f"{rule}; given {entry.bank}; leave it out"
    banks: dict[str, tuple[int | None, int]] = {}  # by key: the bank, and the most items of a task that has it
    for role, entries in (("domain", domain), ("general", study.evals.general)):
        for i, entry in enumerate(entries):
            key, bank = (
                ("evals.bank", study.evals.bank) if entry.bank is None else (f"evals.{role}.{i}.bank", entry.bank)
            )
            banks[key] = bank, max(entry.items or study.evals.items, banks.get(key, (bank, 0))[1])
    for key, (bank, items) in banks.items():
        if bank and bank <= items:
            rule = "must be more than the items that every candidate is scored on"
            yield key, f"{rule}; given {bank}, and {items} items; leave it out for no bank, or give the task bank: 0"
    if study.search.racing and not any(bank for bank, _ in banks.values()):
        yield "search.racing", "needs a bank of items to race on; given true; say evals.bank"
    seen: set[tuple[str, str]] = set()
    for role, entries in study.evals.roles.items():
        for i, entry in enumerate(entries):
            if role == "domain" and entry.kind == KL_TO_BASE:
                rule = "how far a merge is from the base is no gain, so it stands under general or sentinel"
                yield f"evals.{role}.{i}.{entry.kind}", f"{rule}; given {entry.source!r}; for a domain say text"
            if entry.expert and role != "domain":
                yield f"evals.{role}.{i}.expert", f"only a domain task belongs to an expert; given {entry.expert!r}"
            if (entry.kind, entry.source) in seen:
                yield (
                    f"evals.{role}.{i}.{entry.kind}",
                    f"a {entry.kind} may stand once in a study; given {entry.source!r} again",
                )
            seen.add((entry.kind, entry.source))


def _entry_problem(entry: TaskEntry) -> str:
    """Say what is wrong with an entry by itself."""
    if len(entry.given) != 1:
        named = " and ".join(f"{kind}: {value!r}" for kind, value in entry.given.items()) or "none of them"
        return f"must name one of {', '.join(KINDS)}; given {named}"
    if entry.kind == TASK:
        is_text = entry.source.lower().endswith((".txt", ".md"))
        return f"a plain text is no task; given {entry.source!r}; write {{text: {entry.source}}}" if is_text else ""
    for key in ("shots", "metric", "group_by", "judge"):
        if value := getattr(entry, key):
            return f"a text is read as it is and has no {key}; given {value!r}; leave it out"
    return ""


def keys_at(path: Sequence[str]) -> list[str]:
    """List the keys a person may write at a place."""
    model: type[Section] = Study
    for part in path:
        if part.isdecimal():
            continue  # an entry of a list has the list's model
        found = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
        if found is None:
            return []
        model = found
    if model is ShapeEntry:
        return list(LEAST)
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: object) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
