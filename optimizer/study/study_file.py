"""The study file: a person's words, checked and frozen. The only module that knows pydantic.

`read_study` is the first step of every command. Nothing is repaired here: a wrong key or value is an error that says
where it stands, what was given and what would be right.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    model_serializer,
)

from evals.documents import resolved_path
from evals.outcomes import REST, TaskSpec
from optimizer.errors import StudyFileError
from optimizer.masking import TOKEN, masked_url, redacted
from optimizer.strict_yaml import CONTROL, dump_yaml, parse_yaml, read_yaml, shortened, shown
from optimizer.workers.ray_address import address_problem
from search_spaces.parameters import DOMAINS, METHODS, MethodSpec

LONGEST_TEXT = 4096  # characters of one value of a study
MOST_SHOTS = 64
MOST_ITEMS, MOST_WORKERS, MOST_MINUTES = 1_000_000_000, 1024, 1e7  # beyond any machine, within its integers
MOST_PARTS = 16  # of a key given to --set
SCHEMA_FILE = Path(__file__).with_name("study.schema.json")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # becomes a folder
EXPERT_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"  # becomes part of a parameter's name, which is split at dots
EXPERT_RULE = "an expert's name must be letters, digits, dash or underscore, 32 at most"
Range = tuple[float, float]
# what lm-eval calls some of our keys
LM_EVAL_WORDS = {
    "batch_size": "token_budget",
    "limit": "items",
    "num_fewshot": "shots",
    "apply_chat_template": "chat_template",
}


# ---------------------------------------------------------------------------------------------------------------------
# The schema
# ---------------------------------------------------------------------------------------------------------------------


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True)


def _count_or(
    word: str, *, least: int = 1, most: int = MOST_ITEMS, share: bool = False
) -> tuple[PlainValidator, WithJsonSchema]:
    """How to read a whole number, or one word instead, or (where that means something) a share."""
    between = ", a share such as 0.3" if share else ""

    def read(value: object) -> object:
        if (
            value == word
            or (type(value) is int and least <= value <= most)
            or (share and type(value) is float and 0 < value < 1)
        ):
            return value
        if type(value) is int and value > most:
            raise ValueError(f"must be {most:,} at most")
        raise ValueError(f"must be a whole number, {least} or more{between}, or the word {word}")

    schema: list[dict[str, Any]] = [{"type": "integer", "minimum": least, "maximum": most}, {"const": word}]
    if share:
        schema.insert(1, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})
    return PlainValidator(read), WithJsonSchema({"anyOf": schema})


Holdout = Annotated[int | float | Literal["rest"], *_count_or("rest", share=True)]
Threads = Annotated[int | Literal["auto"], *_count_or("auto", most=MOST_WORKERS)]
Budget = Annotated[int | Literal["auto"], *_count_or("auto", least=16)]


class Models(_Section):
    """The checkpoints: each a folder, the folder of a LoRA adapter, or a hub id."""

    base: str = Field(min_length=1, description="The checkpoint all experts were trained from.")
    experts: dict[Annotated[str, Field(pattern=EXPERT_NAME)], Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="Name of each expert and its checkpoint, or a LoRA adapter on the base."
    )


SHAPES = "uniform, slope, layers, {curve: points} or {blocks: count}"
_SHAPE_SCHEMA = {
    "anyOf": [
        {"enum": ["uniform", "slope", "layers"]},
        *(
            {
                "type": "object",
                "properties": {word: {"type": "integer", "minimum": least, "maximum": 64}},
                "required": [word],
                "additionalProperties": False,
            }
            for word, least in (("curve", 2), ("blocks", 1))
        ),
    ],
    "default": {"curve": 4},
    "description": "How the weight may vary with depth: " + SHAPES + ".",
}


class ShapeEntry(_Section):
    """How weights may vary with depth; typed as a word or as `{curve: 4}`."""

    kind: Literal["uniform", "slope", "curve", "blocks", "layers"]
    n: int = 0

    @model_serializer(mode="wrap")
    def _as_typed(self, _: SerializerFunctionWrapHandler) -> str | dict[str, int]:
        return {self.kind: self.n} if self.n else self.kind


def _read_shape(value: object) -> object:
    if isinstance(value, ShapeEntry):
        return value
    if value in ("uniform", "slope", "layers"):
        return {"kind": value}
    if isinstance(value, dict) and len(value) == 1:
        (kind, n), least = next(iter(value.items())), {"curve": 2, "blocks": 1}
        if kind in least and type(n) is int and least[kind] <= n <= 64:
            return {"kind": kind, "n": n}
        if kind in least:
            raise ValueError(f"{kind} must be a whole number from {least[kind]} to 64")
    raise ValueError(f"must be {SHAPES}")


_METHODS_SCHEMA = {
    "anyOf": [
        {"enum": list(METHODS)},
        {"type": "array", "items": {"enum": list(METHODS)}, "minItems": 1, "uniqueItems": True},
    ],
    "default": "task_arithmetic",
    "description": "The merge method, or a list from which each trial chooses; the first of it gives the anchors.",
}


def _read_methods(value: object) -> object:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise ValueError("must be a merge method or a list of them")
    for name in names:
        if name not in METHODS:
            close = difflib.get_close_matches(str(name), METHODS, n=1)
            mend = f'did you mean "{close[0]}"?' if close else f"they are {', '.join(METHODS)}"
            raise ValueError(f"there is no merge method {name!r}; {mend}")
    if len(set(names)) < len(names):
        raise ValueError("must not name a method twice")
    return tuple(names) if isinstance(value, list) else value


RANGES = ("weight", "t", "density", "lambda", "epsilon", "gamma", "select_topk", "r", "alpha")


class SpaceSection(_Section):
    """What may vary."""

    from_: str | None = Field(
        default=None,
        alias="from",
        min_length=1,
        description="A recipe.json or mergekit YAML file to start from: it is scored first, and what is not given here "
        "(method, shape, modules, ranges) is what its numbers need.",
    )
    method: Annotated[str | tuple[str, ...], BeforeValidator(_read_methods), WithJsonSchema(_METHODS_SCHEMA)] = (
        "task_arithmetic"
    )
    shape: Annotated[ShapeEntry, BeforeValidator(_read_shape), WithJsonSchema(_SHAPE_SCHEMA)] = ShapeEntry(
        kind="curve", n=4
    )
    modules: tuple[Literal["attn", "mlp", "embed", "head"], ...] = Field(
        default=("attn", "mlp"), description="Module kinds with weights of their own; the others follow the layers."
    )
    weight: Range | None = Field(
        default=None, description="Range of the weights; holds 0 (base) and 1 (expert). Default: the method's own."
    )
    t: Range | None = Field(
        default=None, description="slerp: range of the interpolation; holds 0 and 1. nearswap: of the largest step."
    )
    density: Range | None = Field(
        default=None, description="Range of the share of a delta that is kept; holds 1. Default: the method's own."
    )
    lambda_: Range | None = Field(
        default=None, alias="lambda", description="Range of the scale on the summed deltas. Default: fixed at 1."
    )
    epsilon: Range | None = Field(default=None, description="della, ram: range of epsilon. Default: mergekit's.")
    gamma: Range | None = Field(default=None, description="breadcrumbs: range of gamma. Default: fixed at 0.01.")
    select_topk: Range | None = Field(default=None, description="sce: range of the share of elements kept; holds 1.")
    r: Range | None = Field(default=None, description="ramplus_tl: range of r. Default: fixed at 0.1.")
    alpha: Range | None = Field(default=None, description="ramplus_tl: range of alpha. Default: fixed at 0.2.")

    @property
    def method_is_the_recipes(self) -> bool:
        """Whether the method is left to the recipe that `from` names."""
        return self.from_ is not None and "method" not in self.model_fields_set

    @property
    def methods(self) -> tuple[str, ...]:
        """The merge methods, one or more."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def ranges(self) -> dict[str, Range]:
        """The ranges a person gave, by parameter; each is meant for every method that has the parameter."""
        given = {(field.alias or name): getattr(self, name) for name, field in type(self).model_fields.items()}
        return {name: bounds for name, bounds in given.items() if name in RANGES and bounds is not None}


class TaskEntry(_Section):
    """One task; a plain name stands for `{task: name}`."""

    task: str = Field(min_length=1, description="An lm-eval task name, or the path of a task folder or YAML file.")
    expert: str = Field(default="", description="Domain tasks: the expert measured here. Default: every expert.")
    items: int | None = Field(
        default=None, ge=1, le=MOST_ITEMS, description="Items the search scores. Default: evals.items."
    )
    holdout_items: Holdout | None = Field(
        default=None,
        description="Items that judge the front: a number, a share of all (0.3) or rest. Default: evals.holdout_items.",
    )
    shots: int | None = Field(
        default=None,
        ge=0,
        le=MOST_SHOTS,
        description="Worked examples before each item. Default: the task's own num_fewshot.",
    )
    metric: str = Field(default="", description="One of the task's metrics. Default: its first.")


def _read_task(value: object) -> object:
    return {"task": value} if isinstance(value, str) else value


Tasks = tuple[Annotated[TaskEntry, BeforeValidator(_read_task, json_schema_input_type=str | TaskEntry)], ...]


class EvalsSection(_Section):
    """How good it is: what the expert should have learned, and what it may have forgotten."""

    domain: Tasks = Field(min_length=1, description="Tasks of the expert's domain.")
    general: Tasks = Field(min_length=1, description="Tasks of general ability.")
    items: int = Field(default=100, ge=1, le=MOST_ITEMS, description="Items of each task that the search scores.")
    holdout_items: Holdout = Field(
        default=100,
        description="Other items that judge the front: a number, a share of each task's items (0.3), or rest.",
    )
    chat_template: bool = Field(default=False, description="Wrap each item in the base's chat template.")
    allow_task_code: bool = Field(default=False, description="Allow tasks that run code; trust them as you trust code.")
    token_budget: Budget = Field(
        default="auto",
        description="Batch size: tokens in one forward pass; auto: 2048 on a CPU, more on a GPU with room.",
    )
    dtype: Literal["auto", "bf16", "float32"] = Field(
        default="auto", description="Number format of the scoring; auto: the base's own."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Chooses the items of each suite.")


class SearchSection(_Section):
    """The search."""

    trials: int = Field(
        default=40, ge=1, le=MOST_ITEMS, description="Distinct finished trials, the anchors among them."
    )
    sampler: Literal["auto", "tpe", "nsga2", "gp", "random"] = Field(default="auto", description="Optuna's sampler.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the sampler.")
    timeout: float | None = Field(
        default=None, gt=0, le=MOST_MINUTES, description="Minutes after which no trial is started."
    )
    trial_timeout: float | None = Field(
        default=None, gt=0, le=MOST_MINUTES, description="Minutes one trial may take (with workers)."
    )
    max_attempts: int = Field(default=2, ge=1, le=10, description="Times a trial is tried when its worker dies.")
    storage: str | None = Field(default=None, description="Optuna RDB URL. Default: SQLite in the run folder.")


class WorkersSection(_Section):
    """Who scores."""

    count: int = Field(
        default=1, ge=0, le=MOST_WORKERS, description="Worker processes; 0: in this process, without Ray."
    )
    threads: Threads = Field(default="auto", description="CPU threads of each worker.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where a worker's model lives.")
    ray_address: str | None = Field(default=None, description="A Ray cluster to join. Default: a local one of our own.")


class Study(_Section):
    """A whole study, as typed and checked."""

    name: str = Field(pattern=NAME, description="Name of the run's folder: letters, digits, dot, dash, underscore.")
    models: Models
    space: SpaceSection = SpaceSection()
    evals: EvalsSection
    search: SearchSection = SearchSection()
    workers: WorkersSection = WorkersSection()
    runs: str = Field(default="runs", min_length=1, description="Folder in which the run's folder is made.")

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------------------------


def read_study(path: Path | str, overrides: Sequence[str] = ()) -> Study:
    """The study in a file, with relative paths made absolute from the file's folder.

    Args:
        path: the YAML file.
        overrides: values set by hand, such as "search.trials=40".

    Raises:
        StudyFileError: names every key that is wrong.
    """
    path = Path(path)
    document = read_yaml(path)
    for override in overrides:
        _set(document, override)
    study = _validated(document, path, overrides)
    return _with_absolute_paths(study, path)


def dump_study(study: Study) -> str:
    """The resolved study file, every default written out; a password in the storage's URL is masked."""
    document = study.model_dump(mode="json", by_alias=True) | {"search": _masked_search(study)}
    if study.space.from_ is not None:  # what the recipe decides stays open
        document["space"] = study.space.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return dump_yaml(document)


def stored_storage(run: Path) -> str | None:
    """The storage URL in a run folder's study file; None where the study is in the folder itself.

    Raises:
        StudyFileError: the URL has a password, which is not kept in the folder.
    """
    search = read_yaml(run / "study.yaml").get("search") if (run / "study.yaml").is_file() else None
    storage = search.get("storage") if isinstance(search, dict) else None
    if storage is not None and not isinstance(storage, str):
        raise StudyFileError(f"{run / 'study.yaml'}: search.storage must be a text; given {shown(storage)}")
    if storage and "***" in storage:
        raise StudyFileError(
            f"{run}: the study is at {storage}; give its whole URL in MERGEFRONT_STORAGE or by --storage"
        )
    return storage or None


def study_schema() -> dict[str, Any]:
    """JSON Schema of a study file, for editors."""
    schema = Study.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mergefront study file"}


def schema_text() -> str:
    """The text of the committed schema file."""
    return json.dumps(study_schema(), indent=2) + "\n"


def task_specs(study: Study) -> tuple[TaskSpec, ...]:
    """What the study asks of each task, domain tasks first."""
    evals = study.evals
    return tuple(
        TaskSpec(
            name=entry.task,
            role=role,
            expert=entry.expert,
            search_items=evals.items if entry.items is None else entry.items,
            holdout_items=_items(evals.holdout_items if entry.holdout_items is None else entry.holdout_items),
            shots=entry.shots,
            metric=entry.metric,
        )
        for role, entries in (("domain", evals.domain), ("general", evals.general))
        for entry in entries
    )


def _items(given: int | float | Literal["rest"]) -> int | float:
    return REST if given == "rest" else given


def _masked_search(study: Study) -> dict[str, Any]:
    storage = study.search.storage
    return study.search.model_dump(mode="json") | {"storage": storage and masked_url(storage)}


def _set(document: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into a document that has just been read."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip(". "):
        raise StudyFileError(f'--set: must be key=value, such as "search.trials=40"; given {shown(override)}')
    try:
        override.encode("utf-8")
    except UnicodeEncodeError:
        raise StudyFileError(f"--set: must be UTF-8 text; given {shown(override)}") from None
    *parents, last = key.strip().split(".")
    if len(parents) >= MOST_PARTS:
        raise StudyFileError(f"--set: a key may have {MOST_PARTS} parts; given {len(parents) + 1}")
    place: Any = document
    for depth, part in enumerate(parents):
        if isinstance(place, dict):
            place = place.setdefault(part, {})
            if place is None:
                empty = ".".join(parents[: depth + 1])
                raise StudyFileError(f"{_named(override)}: {shortened(empty)} is empty in the study file")
        else:
            place = place[_entry(place, part, override)]
    value = parse_yaml(text, _named(override))
    place[last if isinstance(place, dict) else _entry(place, last, override)] = value


def _entry(place: Any, part: str, override: str) -> int:
    """The index that a part of a key is in a list."""
    if isinstance(place, list) and part.isdecimal() and len(part) < 10 and int(part) < len(place):
        return int(part)
    rule = f"has {len(place)} entries, counted from 0" if isinstance(place, list) else f"is the value {shown(place)}"
    raise StudyFileError(f"{_named(override)}: {shown(part)} cannot be set there: the key before it {rule}")


def _named(override: str) -> str:
    return f"--set {redacted(shortened(override))}"


def _validated(document: dict[str, Any], path: Path, overrides: Sequence[str]) -> Study:
    try:
        # JSON is the strict mode in which a list may stand for a tuple.
        study = Study.model_validate_json(json.dumps(document), by_alias=True, by_name=False)
        problems = list(_contradictions(study))
    except ValidationError as error:
        problems = [_problem(entry) for entry in _own_findings(error)]
    problems = list(_odd_texts(document, ())) or problems
    if not problems:
        return study
    lines = [f"{_origin(key, path, overrides)}: {shortened(key) or 'the file'}: {said}" for key, said in problems]
    raise StudyFileError("\n".join(lines))


def _odd_texts(value: object, place: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(key path, problem) of every text that is no name, path or URL: it would reach file system and terminal."""
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            yield ".".join(place), f"must have {LONGEST_TEXT:,} characters at most; given {shown(value)}"
        elif CONTROL.search(value):
            yield ".".join(place), f"must not hold control characters; given {shown(value)}"
        elif TOKEN.search(value):  # it would be part of every recipe, and so of every export
            yield ".".join(place), "must not hold an access token (hf_…); put it in HF_TOKEN, outside the study"
    elif isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _odd_texts(entry, (*place, str(key)))


def _own_findings(error: ValidationError) -> list[Any]:
    """The findings, without "too short" for a list that is short because its entries are wrong."""
    found = error.errors(include_url=False)
    places = [entry["loc"] for entry in found]

    def follows(entry: Any) -> bool:
        loc = entry["loc"]
        return entry["type"] == "too_short" and any(len(p) > len(loc) and p[: len(loc)] == loc for p in places)

    return [entry for entry in found if not follows(entry)]


def _origin(key: str, path: Path, overrides: Sequence[str]) -> str:
    """Where the value at a key comes from: the override that set it or made its section, or the file."""
    for override in reversed(overrides):
        target = override.partition("=")[0].strip()
        if f"{key}.".startswith(f"{target}.") or (target.startswith(f"{key}.") and key not in read_yaml(path)):
            return _named(override)
    return str(path)


def _problem(entry: Any) -> tuple[str, str]:
    """(key path, rule and what was given and the mend) of one pydantic finding."""
    path = [part for part in entry["loc"] if part != "[key]"]
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
    here = _keys_at(tuple(parents))
    wrong = LM_EVAL_WORDS.get(wrong, wrong)
    close = difflib.get_close_matches(wrong, here, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    elsewhere = [f"{section}.{wrong}" for section in Study.model_fields if wrong in _keys_at((section,))]
    if elsewhere:
        return f'did you mean "{elsewhere[0]}"?'
    return f"the keys here are {', '.join(here)}"


def _keys_at(path: Sequence[str]) -> list[str]:
    """The keys a person may write at this place."""
    model: type[BaseModel] = Study
    for part in path:
        if part.isdecimal():
            continue  # an entry of a list has the list's model
        found = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
        if found is None:
            return []
        model = found
    if model is ShapeEntry:
        return ["curve", "blocks"]
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _contradictions(study: Study) -> Iterator[tuple[str, str]]:
    """(key path, problem) of everything that is well typed and cannot be meant."""
    if not study.space.method_is_the_recipes:  # else what does not fit is found with the recipe
        yield from _range_problems(study.space)
    experts = list(study.models.experts)
    for spec in () if study.space.method_is_the_recipes else map(METHODS.__getitem__, study.space.methods):
        if spec.unsearchable:
            yield "space.method", f"{spec.name} cannot be searched: {spec.unsearchable}"
        if spec.max_experts is not None and len(experts) > spec.max_experts:
            yield "space.method", f"{spec.name} takes at most {spec.max_experts} expert(s); given {len(experts)}"
        if len(experts) < spec.min_experts:
            yield "space.method", f"{spec.name} needs {spec.min_experts} experts; given {len(experts)}"
    if len(set(study.space.modules)) < len(study.space.modules):
        yield "space.modules", f"must not name a module twice; given {list(study.space.modules)}"
    yield from _task_problems(study, experts)
    if study.search.storage is not None and (problem := _storage_problem(study.search.storage)):
        yield "search.storage", f"{problem}; given {masked_url(study.search.storage)!r}"
    if study.name.endswith("."):
        yield "name", f"must not end with a dot; given {study.name!r}"
    if study.workers.ray_address is not None and study.workers.count == 0:
        yield "workers.ray_address", "needs workers: workers.count is 0, which means in this process"
    if study.workers.ray_address is not None and (problem := address_problem(study.workers.ray_address)):
        yield "workers.ray_address", f"must be HOST:PORT, or auto: {problem}; given {study.workers.ray_address!r}"


def _storage_problem(url: str) -> str:
    from optimizer.runs.study_url import storage_problem  # brings SQLAlchemy, which few studies need

    return storage_problem(url)


def _range_problems(space: SpaceSection) -> Iterator[tuple[str, str]]:
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


def _task_problems(study: Study, experts: Sequence[str]) -> Iterator[tuple[str, str]]:
    for i, entry in enumerate(study.evals.domain):
        if entry.expert and entry.expert not in experts:
            close = difflib.get_close_matches(entry.expert, experts, n=1, cutoff=0.5)
            mend = f'did you mean "{close[0]}"?' if close else f"the experts are {', '.join(experts)}"
            yield f"evals.domain.{i}.expert", f"must be an expert of this study; given {entry.expert!r}; {mend}"
    measured = {entry.expert for entry in study.evals.domain}
    if "" not in measured and (unmeasured := [name for name in experts if name not in measured]):
        yield "evals.domain", f"must measure every expert; no task is for {', '.join(unmeasured)}"
    for i, entry in enumerate(study.evals.general):
        if entry.expert:
            yield f"evals.general.{i}.expert", f"only a domain task belongs to an expert; given {entry.expert!r}"
    seen: set[str] = set()
    for role in ("domain", "general"):
        for i, entry in enumerate(getattr(study.evals, role)):
            if entry.task in seen:
                yield f"evals.{role}.{i}.task", f"a task may stand once in a study; given {entry.task!r} again"
            seen.add(entry.task)


def _with_absolute_paths(study: Study, path: Path) -> Study:
    """The study with every path made absolute from the folder of its file; a database's from here, as in any URL."""

    def absolute(key: str, given: str) -> str:
        return str(resolved_path(given, folder, where=f"{path}: {key}", error=StudyFileError))

    def model(key: str, given: str) -> str:
        """A folder's absolute path; a hub id (`name/model`, where there is no such folder) as it stands."""
        looks_like_path = given.startswith((".", "/", "~")) or given.count("/") > 1
        found = absolute(key, given)
        return found if looks_like_path or Path(found).is_dir() else given

    folder = path.resolve().parent
    models = study.models.model_copy(
        update={
            "base": model("models.base", study.models.base),
            "experts": {name: model(f"models.experts.{name}", source) for name, source in study.models.experts.items()},
        }
    )
    tasks = {
        role: tuple(
            entry.model_copy(update={"task": absolute(f"evals.{role}.{i}.task", entry.task)})
            if _is_path(entry.task)
            else entry
            for i, entry in enumerate(entries)
        )
        for role, entries in (("domain", study.evals.domain), ("general", study.evals.general))
    }
    evals = study.evals.model_copy(update=tasks)
    start = study.space.from_ and absolute("space.from", study.space.from_)
    space = study.space.model_copy(update={"from_": start} if start else {})
    runs = absolute("runs", study.runs)
    search = study.search.model_copy(update={"storage": _absolute_url(study.search.storage)})
    update = {"models": models, "space": space, "evals": evals, "search": search, "runs": runs}
    return study.model_copy(update=update)


def _absolute_url(url: str | None) -> str | None:
    if url is None:
        return None
    from optimizer.runs.study_url import absolute_url

    return absolute_url(url)


def _is_path(task: str) -> bool:
    """A path has a slash or ends with .yaml; anything else is a task's name in lm-eval."""
    return "/" in task or task.endswith((".yaml", ".yml"))
