"""The schema of a study file: its keys, their types and their limits, as frozen models.

It and the modules whose parts it is made of, `derived`, `section` and `task_entry`, are the only ones with pydantic.
`study.schema.json` is written from it, for editors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_serializer,
)

from evals.outcomes import Chat
from optimizer.study.derived import AnchorsSection, DerivedEntry
from optimizer.study.forms import (
    METHODS_SCHEMA,
    MODULES,
    MODULES_SCHEMA,
    MOST_POINTS,
    SHAPE_SCHEMA,
    SHAPES,
    TAGS,
    form_of_modules,
    read_kinds,
    read_methods,
)
from optimizer.study.section import MOST_ITEMS, Certify, Gpus, Holdout, Section, count_or
from optimizer.study.task_entry import Tasks
from optimizer.workers.orders import STEPS, By, Loss
from search_spaces.shape import LEAST, WORDS, Kind

MOST_WORKERS, MOST_MINUTES = 1024, 1e7  # beyond any machine
SCHEMA_FILE = Path(__file__).with_name("study.schema.json")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # becomes a folder
EXPERT_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"  # becomes part of a parameter's name, which is split at dots
MOST_LEARNED, MOST_STEPS = 100, 10_000
Range = tuple[float, float]
Finding = dict[str, Any]  # of pydantic


Threads = Annotated[int | Literal["auto"], *count_or("auto", most=MOST_WORKERS)]
Budget = Annotated[int | Literal["auto"], *count_or("auto", least=16)]


ExpertName = Annotated[str, Field(pattern=EXPERT_NAME)]


class Models(Section):
    """The checkpoints: each a folder, the folder of a LoRA adapter, a hub id, or the URL of a folder (s3://…)."""

    base: str = Field(min_length=1, description="The checkpoint all experts were trained from.")
    experts: dict[ExpertName, Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="Name of each expert and its checkpoint, or a LoRA adapter on the base."
    )
    derived: dict[ExpertName, DerivedEntry] = Field(
        default={}, description="Name of each expert that the search makes first, by a closed form, and of what."
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all experts, those to be made too."""
        return (*self.experts, *self.derived)


class ShapeEntry(Section):
    """How weights may vary with depth; typed as a word or as `{curve: 4}`."""

    kind: Kind
    n: int = 0

    @model_serializer(mode="wrap")
    def _as_typed(self, _: SerializerFunctionWrapHandler) -> str | dict[str, int]:
        return {self.kind: self.n} if self.n else self.kind


def _read_shape(value: object) -> object:
    if isinstance(value, ShapeEntry):
        return value
    if value in WORDS:
        return {"kind": value}
    if isinstance(value, dict) and len(value) == 1:
        ((kind, n),) = value.items()
        if kind in LEAST and type(n) is int and LEAST[kind] <= n <= MOST_POINTS:
            return {"kind": kind, "n": n}
        if kind in LEAST:
            raise ValueError(f"{kind} must be a whole number from {LEAST[kind]} to {MOST_POINTS}")
    raise ValueError(f"must be {SHAPES}")


Word = Annotated[str, Field(min_length=1)]
Modules = Annotated[
    Annotated[tuple[Literal[MODULES], ...], Tag(TAGS[0])]  # type: ignore[valid-type]
    | Annotated[dict[str, tuple[Word, ...] | None], BeforeValidator(read_kinds), Tag(TAGS[1])],
    Discriminator(form_of_modules),
    WithJsonSchema(MODULES_SCHEMA),
]


class SpaceSection(Section):
    """What may vary."""

    from_: str | None = Field(
        default=None,
        alias="from",
        min_length=1,
        description="A recipe.json or mergekit YAML file to start from: it is scored first, and what is not given here "
        "(method, shape, modules, ranges) is what its numbers need.",
    )
    method: Annotated[str | tuple[str, ...], BeforeValidator(read_methods), WithJsonSchema(METHODS_SCHEMA)] = (
        "task_arithmetic"
    )
    shape: Annotated[ShapeEntry, BeforeValidator(_read_shape), WithJsonSchema(SHAPE_SCHEMA)] = ShapeEntry(
        kind="curve", n=4
    )
    modules: Modules = ("attn", "mlp")
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
    def takes_method_from_recipe(self) -> bool:
        """Whether the method is left to the recipe that `from` names."""
        return self.from_ is not None and "method" not in self.model_fields_set

    @property
    def methods(self) -> tuple[str, ...]:
        """The merge methods, one or more."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def ranges(self) -> dict[str, Range]:
        """The ranges a person gave, by parameter; each is meant for every method that has the parameter."""
        given = {name: getattr(self, attribute) for name, attribute in RANGES.items()}
        return {name: bounds for name, bounds in given.items() if bounds is not None}


# Each parameter that may have a range, and its attribute.
RANGES = {
    field.alias or name: name for name, field in SpaceSection.model_fields.items() if field.annotation == Range | None
}


class EvalsSection(Section):
    """How good it is: what the expert should have learned, and what it may have forgotten."""

    domain: Tasks = Field(min_length=1, description="Tasks of the expert's domain.")
    general: Tasks = Field(min_length=1, description="Tasks of general ability.")
    sentinel: Tasks = Field(
        default=(),
        description="Tasks of another form than the general ones, never seen by the search: scored at the end, in no "
        "objective, to tell ability that was kept from a form that was learned. They take no items and no expert.",
    )
    items: int = Field(default=100, ge=1, le=MOST_ITEMS, description="Items of each task that the search scores.")
    bank: int | None = Field(
        default=None, ge=1, le=MOST_ITEMS, description="Items that anchors are scored on; others on `items` of them."
    )
    holdout_items: Holdout = Field(
        default=100,
        description="Other items that judge the front: a number, a share of each task's items (0.3), or rest.",
    )
    certify_items: Certify = Field(
        default="spare",
        description="Items that nothing looks at before a certificate: a number, a share of each task's items, or "
        "spare (a fifth, of those that neither the other two nor worked examples use); fewer where fewer are left.",
    )
    include: str | tuple[str, ...] = Field(
        default=(), description="Folders of task files, which may then be named by their `task` or `group`."
    )
    chat_template: bool = Field(default=False, description="Wrap each item in the base's chat template.")
    system_instruction: str = Field(
        default="", description="Stands before each item, as the system's turn where there is a chat template."
    )
    fewshot_as_multiturn: bool = Field(
        default=True, description="With a chat template: worked examples are turns of the conversation; else one turn."
    )
    allow_task_code: bool = Field(default=False, description="Allow tasks that run code; trust them as you trust code.")
    token_budget: Budget = Field(
        default="auto",
        description="Batch size: tokens in one forward pass; auto: 2048 on a CPU, more on a GPU with room.",
    )
    dtype: Literal["auto", "bf16", "float32"] = Field(
        default="auto", description="Number format of the scoring; auto: the base's own."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Chooses the items of each suite.")

    @property
    def chat(self) -> Chat:
        """How prompts are wrapped."""
        return Chat(self.chat_template, self.system_instruction, self.fewshot_as_multiturn)

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders in which tasks are looked for by name."""
        return (self.include,) if isinstance(self.include, str) else self.include

    @property
    def roles(self) -> dict[str, Tasks]:
        """The tasks by role."""
        return {"domain": self.domain, "general": self.general, "sentinel": self.sentinel}


class LearnedEntry(Section):
    """Anchors whose weights are learned by gradients; typed as their number alone or as a mapping."""

    count: int = Field(default=5, ge=0, le=MOST_LEARNED, description="Learned anchors, from less domain to more.")
    by: By = Field(default="tensor", description="What has a weight of its own.")
    loss: Loss = Field(
        default="labels", description="Learn from the items' answers, or from what expert and base say to the items."
    )
    steps: int = Field(default=STEPS, ge=1, le=MOST_STEPS, description="Steps of each lesson.")

    @model_serializer(mode="wrap")
    def _as_typed(self, handler: SerializerFunctionWrapHandler) -> int | dict[str, Any]:
        return handler(self) if self.model_fields_set - {"count"} else self.count


def _read_learned(value: object) -> object:
    return {"count": value} if type(value) is int else value


class PatienceEntry(Section):
    """An end for want of progress."""

    trials: int = Field(ge=1, le=MOST_ITEMS, description="Searched trials that are looked back on.")
    gain: float = Field(
        default=0.0, ge=0, lt=1, description="End where they added no more than this share to the hypervolume."
    )


class SearchSection(Section):
    """The search."""

    trials: int = Field(
        default=40, ge=1, le=MOST_ITEMS, description="Distinct finished trials, the anchors among them."
    )
    learned: Annotated[LearnedEntry, BeforeValidator(_read_learned, json_schema_input_type=int | LearnedEntry)] = Field(
        default=LearnedEntry(), description="Anchors among the trials whose weights are learned by gradients; 0: none."
    )
    racing: bool = Field(
        default=False,
        description="With evals.bank: a candidate that is beaten after evals.items stops, one near the front gets "
        "more.",
    )
    sampler: Literal["auto", "tpe", "gp", "front", "nsga2", "nsga3", "cmaes", "random", "qmc"] = Field(
        default="auto",
        description="Who proposes the next weights. front widens the front; cmaes climbs gain less forgetting.",
    )
    max_forgetting: float | None = Field(
        default=None, ge=0, lt=1, description="The most a merge may forget, a share (0.05 is 5 %): the sampler's limit."
    )
    floors: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default={}, description="The most it may forget of single general tasks, by name: {arc_easy: 0.01}."
    )
    candidates: float | None = Field(
        default=None,
        gt=0,
        le=MOST_ITEMS,
        description="What the search may cost at most, in candidates: lessons, derived experts and banks count too. "
        "Those it does not pay for are left out.",
    )
    patience: PatienceEntry | None = Field(
        default=None, description="End when the last trials added little: {trials: 20, gain: 0.01}."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the sampler.")
    timeout: float | None = Field(
        default=None, gt=0, le=MOST_MINUTES, description="Minutes after which no trial is started."
    )
    trial_timeout: float | None = Field(
        default=None, gt=0, le=MOST_MINUTES, description="Minutes one trial may take (with workers)."
    )
    max_attempts: int = Field(default=2, ge=1, le=10, description="Times a trial is tried when its worker dies.")
    storage: str | None = Field(default=None, description="Optuna RDB URL. Default: SQLite in the run folder.")


class WorkersSection(Section):
    """Who scores."""

    count: int = Field(
        default=1, ge=0, le=MOST_WORKERS, description="Worker processes; 0: in this process, without Ray."
    )
    threads: Threads = Field(default="auto", description="CPU threads of each worker.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="Where a worker's model lives.")
    gpus: Gpus = Field(
        default="auto", description="GPUs of each worker: its model is spread over 2 or more; two workers share at 0.5."
    )
    ray_address: str | None = Field(default=None, description="A Ray cluster to join. Default: a local one of our own.")
    staging: str | None = Field(
        default=None,
        pattern="^/",
        description="Folder in which a machine of that cluster keeps models and tasks that it lacks; an absolute path.",
    )


class Study(Section):
    """A whole study, as typed and checked."""

    name: str = Field(pattern=NAME, description="Name of the run's folder: letters, digits, dot, dash, underscore.")
    models: Models
    space: SpaceSection = SpaceSection()
    evals: EvalsSection
    anchors: AnchorsSection = AnchorsSection()
    search: SearchSection = SearchSection()
    workers: WorkersSection = WorkersSection()
    runs: str = Field(default="runs", min_length=1, description="Folder in which the run's folder is made.")

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name


def study_schema() -> dict[str, Any]:
    """Return the JSON Schema of a study file, for editors."""
    schema = Study.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mergefront study file"}


def schema_text() -> str:
    """Return the text of the committed schema file."""
    return json.dumps(study_schema(), indent=2) + "\n"


def validate(document: Mapping[str, Any]) -> Study | list[Finding]:
    """Return the study in a document, or what breaks the schema: of each, its place (loc), type, msg and input."""
    try:
        # JSON is the strict mode in which a list may stand for a tuple.
        return Study.model_validate_json(json.dumps(document), by_alias=True, by_name=False)
    except ValidationError as error:
        return [dict(finding) for finding in error.errors(include_url=False)]
