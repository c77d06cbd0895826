"""The one door to lm-eval: reads tasks, splits their items, builds requests, and turns answers into outcomes.

lm-eval stays the definition of tasks and metrics; its runner, its HFLM and its caches are not used. Order of use:
`load_tasks` (no model), `Harness.prepare` (a tokenizer), then `Harness.score` (an engine) for every candidate.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import jinja2
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.registry import metric_registry
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evals.errors import ScoreError, TaskError
from evals.outcomes import HOLDOUT, REST, SEARCH, SUITES, Outcome, TaskInfo, TaskSpec
from evals.packing import plant
from evals.rows import Rows, read_rows
from evals.task_files import find_task_file, make_paths_absolute, require_sound, task_files_below
from evals.templates import Sandbox
from evals.tokens import Encoder, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from evals.engine import Engine

ROLLING_METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
NOT_A_NUMBER = ("likelihood",)  # lm-eval averages it, but each item's is a pair
GREEDY_KEYS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"})  # last three: unused


Chances = dict[tuple[int, str], float]  # of guessing right, by member of a group and item hash


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a task: its content hash, the member of the group it is from, and lm-eval's document."""

    hash: str
    member: int
    doc: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task, or a group of tasks that count as one, with its items split."""

    info: TaskInfo
    members: tuple[ConfigurableTask, ...]
    filter: str
    shots: tuple[int, ...]  # of each member
    shots_from: str  # study, task or "": nobody asks for any
    items: Mapping[str, tuple[Item, ...]]  # by suite
    notes: tuple[str, ...] = ()  # what a person might not expect


@dataclass(slots=True)
class _Prepared:
    """A suite's requests, by kind; `askers` are lm-eval's instances that wait for the answers, in the same order."""

    items: list[tuple[LoadedTask, Item, list[Instance]]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    pair_askers: list[Instance] = field(default_factory=list)
    texts: list[tuple[int, ...]] = field(default_factory=list)
    text_askers: list[Instance] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    prompt_askers: list[Instance] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)  # tokens that are predicted, by the asker's id
    prefix: int = 0
    scored: dict[int, tuple[list[Pair], list[int]]] = field(default_factory=dict)

    def all_pairs(self, length: int) -> tuple[list[Pair], list[int]]:
        """The pairs and the windows of the texts, for a model of that length; how many windows each text has."""
        if length not in self.scored:
            windows = [_windows(text, self.prefix, length) for text in self.texts]
            self.scored[length] = [*self.pairs, *chain.from_iterable(windows)], [*map(len, windows)]
        return self.scored[length]


class Harness:
    """The tasks of a study, their items in two disjoint suites, and the way from a model to outcomes."""

    def __init__(self, tasks: Sequence[LoadedTask], *, seed: int, chat_template: bool) -> None:
        self.tasks = tuple(tasks)
        self._seed = seed
        self._chat_template = chat_template
        self._prepared: dict[str, _Prepared] = {}

    @property
    def infos(self) -> tuple[TaskInfo, ...]:
        """What was found, in the order the tasks were asked for."""
        return tuple(task.info for task in self.tasks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person might not expect of the tasks, a sentence each."""
        return tuple(note for task in self.tasks for note in task.notes)

    def suite_hash(self, suite: str) -> dict[str, list[str]]:
        """Item hashes of a suite by task, in the order they are scored."""
        return {task.info.name: [item.hash for item in task.items[suite]] for task in self.tasks}

    def prepare(self, tokenizer: PreTrainedTokenizerBase, suite: str) -> None:
        """Build and tokenise a suite's requests, once for all candidates."""
        encoder = Encoder(tokenizer)
        prepared = _Prepared(prefix=encoder.prefix)
        for task in self.tasks:
            for item in task.items[suite]:
                try:
                    asked = self._instances(task, item, tokenizer)
                    _add(prepared, asked, encoder)
                except Exception as error:  # templates, examples and task code raise whatever they like
                    raise TaskError(f"task {task.info.name}, item {item.hash}: {_said(error)}") from error
                prepared.items.append((task, item, asked))
        self._prepared[suite] = prepared

    def score(self, engine: Engine, suite: str) -> list[Outcome]:
        """One outcome per item of a suite, from the model as it is now.

        Raises:
            ScoreError: the model gives numbers that are not finite.
        """
        if suite not in self._prepared:
            self.prepare(engine.tokenizer, suite)
        prepared = self._prepared[suite]
        pairs, counts = prepared.all_pairs(engine.max_length)
        scores = engine.loglikelihoods(pairs)
        _answer(prepared.pair_askers, scores[: len(prepared.pairs)])
        windows = iter(score for score, _ in scores[len(prepared.pairs) :])
        _answer(prepared.text_askers, [math.fsum(islice(windows, count)) for count in counts])
        written = engine.generate(prepared.prompts)
        _answer(prepared.prompt_askers, [answer.text for answer in written])
        answers = dict(zip(map(id, prepared.prompt_askers), written, strict=True))
        cut = _cut(prepared, engine.max_length)
        lengths = prepared.lengths | {asker: answer.tokens for asker, answer in answers.items()}
        broken_off = {asker for asker, answer in answers.items() if not answer.ended}
        return [
            replace(
                _outcome(task, suite, item, asked),
                lengths=tuple(lengths[id(instance)] for instance in asked),
                truncated=any(id(instance) in cut for instance in asked),
                broken_off=any(id(instance) in broken_off for instance in asked),
            )
            for task, item, asked in prepared.items
        ]

    def request_hashes(self) -> dict[str, dict[str, str]]:
        """For each prepared suite and task, 16 hex digits of all that is asked: items, shots, templates, limits."""
        return {
            suite: {
                task.info.name: _hash(
                    repr([i.args for owner, _, asked in prepared.items if owner is task for i in asked])
                )
                for task in self.tasks
            }
            for suite, prepared in sorted(self._prepared.items())
        }

    def requests(self, suite: str) -> list[Instance]:
        """What a prepared suite asks, as lm-eval's own instances in the order of the items."""
        return [instance for _, _, asked in self._prepared[suite].items for instance in asked]

    def pairs(self, suite: str, max_length: int) -> list[Pair]:
        """What a prepared suite reads in order to score it: all but the prompts of answers that are written."""
        return self._prepared[suite].all_pairs(max_length)[0]

    def describe(self) -> list[dict[str, Any]]:
        """A row per task for people: what it is, and the tokens a candidate reads by suite (None: not prepared)."""
        return [
            {
                "task": task.info.name,
                "role": task.info.role,
                "expert": task.info.expert,
                "kind": task.info.output_type,
                "metric": task.info.metric,
                "chance": task.info.chance,
                "shots": _range(task.shots),
                "shots_from": task.shots_from,
                **{f"{suite}_items": len(task.items[suite]) for suite in SUITES},
                **{f"{suite}_tokens": self._tokens(task, suite) for suite in SUITES},
            }
            for task in self.tasks
        ]

    def _instances(self, task: LoadedTask, item: Item, tokenizer: PreTrainedTokenizerBase) -> list[Instance]:
        member = task.members[item.member]
        member.set_fewshot_seed(_number(f"{self._seed}:{item.hash}"))  # an item's shots do not depend on its neighbours
        context = member.fewshot_context(
            doc=item.doc,
            num_fewshot=task.shots[item.member],
            apply_chat_template=self._chat_template,
            fewshot_as_multiturn=self._chat_template,
            chat_template=partial(_chat, tokenizer) if self._chat_template else None,
            gen_prefix=member.doc_to_prefix(item.doc),
        )
        asked = member.construct_requests(
            doc=item.doc,
            ctx=context,
            metadata=(task.info.name, 0, 1),
            apply_chat_template=self._chat_template,
        )
        return asked if isinstance(asked, list) else [asked]

    def _tokens(self, task: LoadedTask, suite: str) -> int | None:
        """About how many tokens a candidate reads; exact but for texts longer than the model's context."""
        if suite not in self._prepared:
            return None
        prepared = self._prepared[suite]
        mine = {id(instance) for owner, _, asked in prepared.items if owner is task for instance in asked}
        pairs = [p for p, asker in zip(prepared.pairs, prepared.pair_askers, strict=True) if id(asker) in mine]
        texts = [t for t, asker in zip(prepared.texts, prepared.text_askers, strict=True) if id(asker) in mine]
        prompts = [p for p, asker in zip(prepared.prompts, prepared.prompt_askers, strict=True) if id(asker) in mine]
        return (
            len(plant(dict(enumerate(pairs))))
            + sum(map(len, texts))
            + sum(len(p.tokens) + p.max_new_tokens for p in prompts)
        )


def load_tasks(specs: Sequence[TaskSpec], *, seed: int, chat_template: bool, allow_task_code: bool) -> Harness:
    """Read tasks and split their items; loads no model.

    Args:
        seed: chooses which items are search and which holdout items, and the shots of each.
        chat_template: wrap prompts in the tokenizer's chat template.
        allow_task_code: trust task files as Python code is trusted.

    Raises:
        TaskError: a task cannot be read, measured or split as asked.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if not isinstance(lm_eval.utils.env, Sandbox):
        lm_eval.utils.env = Sandbox(lm_eval.utils.env)
    tasks: list[LoadedTask] = []
    for spec in specs:
        task = _load(spec, seed=seed, allow_task_code=allow_task_code)
        if task.info.name in {other.info.name for other in tasks}:
            raise TaskError(f"task names must differ: {task.info.name} is there twice")
        tasks.append(task)
    return Harness(tasks, seed=seed, chat_template=chat_template)


# --- reading ---------------------------------------------------------------------------------------------------------


def _load(spec: TaskSpec, *, seed: int, allow_task_code: bool) -> LoadedTask:
    if spec.search_items < 1 or (spec.holdout_items <= 0 and spec.holdout_items != REST):
        raise TaskError(f"each suite needs items: task {spec.name} has {spec.search_items} and {spec.holdout_items}")
    try:
        name, loaded = _lm_eval_tasks(spec.name, allow_task_code=allow_task_code)
    except Exception as error:  # lm-eval and datasets raise whatever their libraries do
        member = _half_built(error)
        if member is None and isinstance(error, TaskError):
            raise
        raise TaskError(f"task {spec.name} cannot be read: {_why(error, member)}") from error
    try:
        return _measured(spec, name, loaded, seed=seed, allow_task_code=allow_task_code)
    except TaskError:
        raise
    except Exception as error:  # settings of another kind than lm-eval expects
        raise TaskError(f"task {spec.name} cannot be used: {_said(error)}") from error


def _measured(spec: TaskSpec, name: str, loaded: Any, *, seed: int, allow_task_code: bool) -> LoadedTask:
    members = tuple(loaded["tasks"].values())
    for member in members:
        _require_usable(member, spec, allow_task_code=allow_task_code)
    metric, chosen_filter, higher = _metric(name, members, spec.metric)
    if len(members) > 1:
        _require_pooled(name, loaded.get("groups", {}).values())
    items, choices = _items(name, members)
    _require_measured(name, members, metric, items)
    shots = tuple(_shots(member, spec) for member in members)
    suites = _split(name, items, members, spec, shots, seed)
    chosen = [choices[item.member, item.hash] for suite in SUITES for item in suites[suite]]
    accuracy = metric in ACCURACIES and members[0].OUTPUT_TYPE == "multiple_choice"
    info = TaskInfo(
        name=name,
        role=spec.role,
        expert=spec.expert,
        output_type=members[0].OUTPUT_TYPE,
        metric=metric,
        higher_is_better=higher,
        chance=math.fsum(chosen) / len(chosen) if accuracy else 0.0,
        search_items=len(suites[SEARCH]),
        holdout_items=len(suites[HOLDOUT]),
    )
    shots_from = ("task" if any(shots) else "") if spec.shots is None else "study"
    notes = _notes(name, members[0], metric, spec.metric)
    return LoadedTask(info, members, chosen_filter, shots, shots_from, suites, notes)


def _half_built(error: BaseException) -> ConfigurableTask | None:
    """The task that lm-eval was making when it failed, and which no exception names."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is ConfigurableTask.__init__.__code__:
            return cast(ConfigurableTask, frame.f_locals["self"])
    return None


def _why(error: Exception, member: ConfigurableTask | None) -> str:
    """What stood in the way of a task; lm-eval tries the first item while it makes one, without saying so."""
    unreachable = isinstance(error, ConnectionError) or str(error).startswith("Couldn't find cache")
    if unreachable and member is not None:
        names = [member.DATASET_PATH, *([member.DATASET_NAME] if member.DATASET_NAME else [])]
        given = ", ".join(map(repr, names))
        return (
            f"its data ({given}) is not on this machine and the hub cannot be reached; on a machine with a network set "
            f'HF_DATASETS_CACHE to a new folder and run `python -c "import datasets; datasets.load_dataset({given})"`, '
            "copy the folder here, and set HF_DATASETS_CACHE to it and HF_HUB_OFFLINE=1; or make a task of a local "
            "file of JSON lines"
        )
    docs = getattr(member, "task_docs", None)
    if docs is not None and member is not None and hasattr(member, "multiple_input"):
        if not len(docs):
            return "no item is left of its data"
        try:
            _content(member, docs[0])
        except TaskError as own:
            return str(_blamed(member, 0, own))
    return _said(error)


@lru_cache(maxsize=1)
def _built_in() -> TaskManager:
    return TaskManager()  # reads some 14,000 files: once per process


def _lm_eval_tasks(source: str, *, allow_task_code: bool) -> tuple[str, Any]:
    """A task's name and what lm-eval makes of it: its members, and its groups."""
    if not ("/" in source or "\\" in source or source.endswith((".yaml", ".yml")) or Path(source).is_dir()):
        manager = _built_in()
        if source not in manager.task_index:
            close = difflib.get_close_matches(source, manager.task_index, n=3)
            mend = f"did you mean {' or '.join(close)}? A" if close else "a"
            raise TaskError(f"no task, group or tag {source!r} in lm-eval; {mend} path needs a slash: ./{source}")
        return source, manager.load([source])
    path = find_task_file(source)
    require_sound(path, metrics=frozenset(metric_registry), allow_code=allow_task_code)
    config = load_yaml(path, resolve_func=False)
    name = config.get("group") or config.get("task")
    if not isinstance(name, str):
        raise TaskError(f"{path}: a task file names a task or a group")
    manager = TaskManager(include_defaults=False)
    index = _tasks_of(path, config)
    manager.task_index.update(index)
    for member in _needed(index, name, path):
        _settle(index[member], allow_task_code=allow_task_code)
    return name, manager.load([name])


def _tasks_of(path: Path, config: dict[str, Any]) -> dict[str, Entry]:
    """The task or group of a file, and for a group all tasks below its folder, by name."""
    index: dict[str, Entry] = {}
    TaskIndex.process_cfg(config, path, index)
    for other in task_files_below(path.parent) if isinstance(config.get("task"), list) else ():
        if other.resolve() == path:
            continue
        try:
            require_sound(other, metrics=frozenset(), allow_code=True)  # whether it is plain is asked where it is used
            TaskIndex.process_cfg(load_yaml(other, resolve_func=False), other, index)
        except Exception:  # no task: missed, if it is needed, by its name
            continue
    return index


def _needed(index: Mapping[str, Entry], name: str, path: Path) -> list[str]:
    """A task or group and all it is made of."""
    needed, waiting = list[str](), [name]
    while waiting:
        found = waiting.pop()
        if found in needed:
            continue
        needed.append(found)
        config = index[found].cfg or {}
        members = [*index[found].tags] if index[found].kind is Kind.TAG else config.get("task")
        for member in members if isinstance(members, list) else ():
            if isinstance(member, str) and member not in index:
                raise TaskError(
                    f"{path}: task: no readable task file below {path.parent} is of a task, group or tag {member!r}, "
                    f"which {found} names"
                )
            own = str(member.get("task") or member.get("group")) if isinstance(member, dict) else str(member)
            waiting += [own] if own in index else []
    return needed


def _settle(entry: Entry, *, allow_task_code: bool) -> None:
    """Check one task file, and give lm-eval its settings with data files found and read."""
    if entry.yaml_path is None:
        return
    require_sound(entry.yaml_path, metrics=frozenset(metric_registry), allow_code=allow_task_code)
    config = load_yaml(entry.yaml_path, resolve_func=allow_task_code)
    entry.cfg = _with_rows(make_paths_absolute(config, entry.yaml_path))
    entry.yaml_path = None


def _with_rows(config: dict[str, Any]) -> dict[str, Any]:
    """Settings whose JSON files are read by us: exact messages, and no Arrow cache for workers to share and lock."""
    if isinstance(config.get("task"), list):
        members = [_with_rows(member) if isinstance(member, dict) else member for member in config["task"]]
        return {**config, "task": members}
    options = config.get("dataset_kwargs") or {}
    if config.get("dataset_path") != "json" or set(options) != {"data_files"}:
        return config
    files = options["data_files"]
    splits = files if isinstance(files, dict) else {"train": files}
    named = {config.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")}
    examples = config.get("fewshot_config")
    named = (named | {examples.get("split") if isinstance(examples, dict) else None}) - {None}
    if not named <= set(splits):
        missing = ", ".join(sorted(map(str, named - set(splits))))
        raise TaskError(f"task {config.get('task')}: no split {missing} in data_files, which has {', '.join(splits)}")
    rows = {
        split: [row for path in ([given] if isinstance(given, str) else given) for row in read_rows(Path(path))]
        for split, given in splits.items()
    }
    kept = {key: value for key, value in config.items() if key not in ("dataset_path", "dataset_kwargs")}
    return {**kept, "custom_dataset": Rows(rows)}


# --- what is measured ------------------------------------------------------------------------------------------------


def _require_usable(member: object, spec: TaskSpec, *, allow_task_code: bool) -> None:
    if not isinstance(member, ConfigurableTask):
        raise TaskError(f"task {spec.name} is a Python class: only tasks made from YAML are supported")
    if getattr(member, "MULTIMODAL", False):
        raise TaskError(f"task {spec.name} needs images or sound")
    if getattr(member, "UNSAFE_CODE", False) and not allow_task_code:
        raise TaskError(f"task {spec.name} runs code that models write; set evals.allow_task_code to allow it")
    if spec.shots and member.OUTPUT_TYPE == "loglikelihood_rolling":
        raise TaskError(f"task {spec.name} scores whole texts and takes no shots: {spec.shots} asked for")
    if member.OUTPUT_TYPE == "generate_until":
        options = normalize_gen_kwargs(member.config.generation_kwargs)
        strange = sorted(set(options) - GREEDY_KEYS)
        if options["do_sample"] or strange or member.config.repeats != 1:
            what = "sampling" if options["do_sample"] else ", ".join(strange) or f"repeats: {member.config.repeats}"
            raise TaskError(f"answers must be greedy, to be the same twice: task {spec.name} asks for {what}")


def _metric(name: str, members: Sequence[ConfigurableTask], wanted: str) -> tuple[str, str, bool]:
    """The metric that is measured, the filter before it, and whether higher is better."""
    first = members[0]
    if any(member.OUTPUT_TYPE != first.OUTPUT_TYPE for member in members):
        raise TaskError(f"group {name} mixes kinds of tasks; name its tasks one by one")
    metric, _, chosen = wanted.partition(",")
    filters = [ensemble.name for ensemble in first._filters]
    if chosen and chosen not in filters:
        raise TaskError(f"task {name} has no filter {chosen!r}: {', '.join(filters)}")
    chosen = chosen or filters[0]
    if first.OUTPUT_TYPE == "loglikelihood_rolling":
        if metric and metric not in ROLLING_METRICS:
            raise TaskError(f"texts are scored in bits_per_byte: metric {metric!r} given for task {name}")
        return "bits_per_byte", chosen, False
    usable = [m for m, how in first.aggregation().items() if how is mean and m not in NOT_A_NUMBER]
    if not usable or (metric and metric not in usable):
        found = ", ".join(first.aggregation())
        raise TaskError(
            f"a metric must be a mean over items: task {name} has {found}, of which usable: "
            f"{', '.join(usable) or 'none'}{f'; {metric!r} given' if metric else ''}"
        )
    metric = metric or usable[0]
    if any(member.aggregation().get(metric) is not mean for member in members):
        raise TaskError(f"group {name}: metric {metric} is not in all of its tasks")
    return metric, chosen, bool(first.higher_is_better()[metric])


def _require_measured(
    name: str, members: Sequence[ConfigurableTask], metric: str, items: Mapping[str, list[Item]]
) -> None:
    """Let each task make metrics of an answer, since what it lists need not be what it gives."""
    one_each = {item.member: item for found in items.values() for item in found}
    for m, item in one_each.items():
        member = members[m]
        if member.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            continue  # the others' metrics are named by lm-eval, or need an answer of the model's
        number = 1
        if member.OUTPUT_TYPE == "multiple_choice":
            number = len(member.doc_to_choice(item.doc)) * (2 if "acc_mutual_info" in member.aggregation() else 1)
        given = member.process_results(item.doc, [(-1.0, False)] * number)
        if metric not in given:
            raise TaskError(
                f"a metric must be one that the task gives: task {name} lists {metric!r} and gives "
                f"{', '.join(map(str, given)) or 'none'}; name one of these as metric, or give it by process_results"
            )


def _notes(name: str, member: ConfigurableTask, metric: str, asked: str) -> tuple[str, ...]:
    listed = asked.partition(",")[0] or next(iter(member.aggregation()), metric)
    if metric != "bits_per_byte" or listed == metric:
        return ()
    return (f"task {name} is scored in {metric}, not in {listed}: on the same texts both order models alike",)


def _require_pooled(name: str, groups: Iterable[Any]) -> None:
    if any(not rule.weight_by_size for group in groups for rule in group.aggregate_metric_list or ()):
        raise TaskError(f"group {name} weighs its tasks alike whatever their size; name its tasks one by one")


# --- items -----------------------------------------------------------------------------------------------------------


def _items(name: str, members: Sequence[ConfigurableTask]) -> tuple[dict[str, list[Item]], Chances]:
    """Items by content (one for each member that has it), and the chance of guessing each right."""
    items: dict[str, list[Item]] = {}
    chances: Chances = {}
    for m, member in enumerate(members):
        for n, doc in enumerate(member.task_docs):
            try:
                content, chance = _content(member, doc)
            except TaskError as error:
                raise TaskError(f"task {name}, {_blamed(member, n, error)}") from error
            item = Item(content if len(members) == 1 else _hash(f"{member.task_name}:{content}"), m, doc)
            if (m, item.hash) not in chances:
                chances[m, item.hash] = chance
                items.setdefault(content, []).append(item)
    return items, chances


def _content(member: ConfigurableTask, doc: Mapping[str, Any]) -> tuple[str, float]:
    """The hash of what a model sees and is asked, whatever the item's other columns, and the chance of guessing."""
    text, target = _field(member.doc_to_text, doc), _field(member.doc_to_target, doc)
    choices = _field(member.doc_to_choice, doc) if member.config.doc_to_choice is not None else None
    content = _hash(json.dumps([text, choices, target], ensure_ascii=False, default=str))
    if member.OUTPUT_TYPE != "multiple_choice":
        return content, 0.0
    gold = text if member.multiple_input else target
    right = {_index(answer, choices) for answer in (gold if isinstance(gold, list) else [gold])}
    return content, len(right) / len(choices or [])


def _field(read: Callable[[Mapping[str, Any]], Any], doc: Mapping[str, Any]) -> Any:
    try:
        return read(doc)
    except Exception as error:  # templates and task code raise whatever they like
        raise TaskError(f"{read.__name__}: {_said(error)}") from error


def _index(answer: object, choices: object) -> int:
    """Which choice an answer is; lm-eval would score a wrong index as never right."""
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise TaskError(
            "doc_to_choice: an item needs two or more choices that are texts and not empty: "
            f"{_short(repr(choices))} given; put numbers in quotes, and leave the item out where a choice is empty"
        )
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return answer
    raise TaskError(
        f"doc_to_target: the right answer must be one of the {len(choices)} choices: {_short(repr(answer))} given; "
        f"name a choice, or give its place, 0 to {len(choices) - 1}"
    )


def _blamed(member: ConfigurableTask, n: int, error: TaskError) -> TaskError:
    """The error of an item with its line, or that of the item which made this one wrong."""
    rows, split = member.config.custom_dataset, member.config.test_split or member.config.validation_split
    if not isinstance(rows, Rows) or member.config.process_docs is not None:
        return TaskError(f"item {n + 1}: {error}")
    place = rows.splits[split][n].place
    if _problem(member, rows.as_written(split, n)) is not None:
        return TaskError(f"item {n + 1}: {error}; {place}")
    for k, row in enumerate(rows.splits[split]):  # one number with a point makes all numbers of its column such
        own = _problem(member, rows.as_written(split, k)) if float in map(type, row.values.values()) else None
        if own is not None:
            return TaskError(f"item {k + 1}: {own}; {row.place}")
    return TaskError(f"item {n + 1}: {error}; {place}")


def _problem(member: ConfigurableTask, doc: Mapping[str, Any]) -> TaskError | None:
    try:
        _content(member, doc)
    except TaskError as error:
        return error
    return None


def _split(
    name: str,
    items: Mapping[str, list[Item]],
    members: Sequence[ConfigurableTask],
    spec: TaskSpec,
    shots: Sequence[int],
    seed: int,
) -> dict[str, tuple[Item, ...]]:
    """Search items from one end of a seeded order of contents, holdout items from the other, shots from between."""
    order = sorted(items, key=lambda content: _hash(f"{seed}:{content}"))
    left = len(order) - spec.search_items
    if spec.holdout_items == REST:
        holdout = left - max(_reserved(*needed, items) for needed in zip(members, shots, strict=True))
    elif isinstance(spec.holdout_items, float):
        holdout = round(spec.holdout_items * len(order))
    else:
        holdout = spec.holdout_items
    if holdout < 1 or holdout > left:
        asked = "the rest" if spec.holdout_items == REST else str(holdout)
        raise TaskError(
            f"too few items: task {name} has {len(order)} different items, {spec.search_items} search and {asked} "
            "holdout items asked for, and none may be both; lower items or holdout_items, in evals or for this task"
        )
    chosen = {SEARCH: order[: spec.search_items], HOLDOUT: order[len(order) - holdout :]}
    used = {content for contents in chosen.values() for content in contents}
    for member, number in zip(members, shots, strict=True):
        if number:
            _keep_shots(name, member, used, number)
    return {suite: tuple(i for content in contents for i in items[content]) for suite, contents in chosen.items()}


def _keep_shots(name: str, member: ConfigurableTask, used: set[str], shots: int) -> None:
    """Leave a task only worked examples that no suite scores."""
    pool = [doc for doc in member.sampler.df if _content_of_shot(member, doc) not in used]
    needed = _examples(member, shots)
    if len(pool) < needed:
        raise TaskError(
            f"shots come from items that no suite scores: task {name} has {len(pool)} such items, {needed} needed; "
            "ask for fewer shots, or for fewer items"
        )
    member.sampler.replace_df(pool)


def _reserved(member: ConfigurableTask, shots: int, items: Mapping[str, list[Item]]) -> int:
    """How many of the items must be left to the shots, where there are too few examples elsewhere."""
    if not shots:
        return 0
    outside = {_content_of_shot(member, doc) for doc in member.sampler.df} - set(items)
    return shots + 1 if len(outside) < _examples(member, shots) else 0


def _examples(member: ConfigurableTask, shots: int) -> int:
    """How many examples so many shots need: lm-eval draws one more where an item might be among its own examples."""
    draws_one_more = member.fewshot_cfg.split == member.config.test_split
    return shots + (draws_one_more and not isinstance(member.sampler, FirstNSampler))


def _shots(member: ConfigurableTask, spec: TaskSpec) -> int:
    """The study's number of worked examples, or else the task's own; lm-eval puts none before a whole text."""
    if spec.shots is not None:
        return spec.shots
    own = member.config.num_fewshot or 0
    if type(own) is not int or own < 0:
        raise TaskError(f"task {spec.name}: num_fewshot must be a whole number, 0 or more; given {_short(own)}")
    return 0 if member.OUTPUT_TYPE == "loglikelihood_rolling" else own


def _range(numbers: Sequence[int]) -> int | str:
    """One number, or the least and the largest of several."""
    low, high = min(numbers), max(numbers)
    return low if low == high else f"{low} to {high}"


def _content_of_shot(member: ConfigurableTask, doc: Mapping[str, Any]) -> str:
    try:
        return _content(member, doc)[0]
    except Exception:  # an example of another shape than the items is none of them
        return ""


# --- requests and answers --------------------------------------------------------------------------------------------


def _add(prepared: _Prepared, asked: Sequence[Instance], encoder: Encoder) -> None:
    for instance in asked:
        if instance.request_type == "loglikelihood":
            prepared.pairs.append(encoder.pair(*instance.args))
            prepared.pair_askers.append(instance)
            prepared.lengths[id(instance)] = len(prepared.pairs[-1].continuation)
        elif instance.request_type == "loglikelihood_rolling":
            prepared.texts.append(encoder.text(*instance.args))
            prepared.text_askers.append(instance)
            prepared.lengths[id(instance)] = len(prepared.texts[-1])
            if not prepared.texts[-1]:
                raise TaskError("a text must have a token")
        else:
            text, options = instance.args
            options = normalize_gen_kwargs(options)
            prompt = Prompt(encoder.text(text), tuple(options["until"]), options["max_gen_toks"])
            prepared.prompts.append(prompt)
            prepared.prompt_askers.append(instance)


def _windows(text: tuple[int, ...], prefix: int, length: int) -> tuple[Pair, ...]:
    """The pieces in which lm-eval predicts every token of a text once, each after as much context as fits."""
    windows = get_rolling_token_windows(list(text), prefix_token=prefix, max_seq_len=length, context_len=1)
    pieces = map(make_disjoint_window, windows)
    return tuple(Pair(tuple(context), tuple(tokens), asks_greedy=False) for context, tokens in pieces)


def _answer(askers: Sequence[Instance], answers: Sequence[object]) -> None:
    for instance, answer in zip(askers, answers, strict=True):
        instance.resps = [answer]


def _cut(prepared: _Prepared, length: int) -> set[int]:
    """Ids of the instances whose context the model cannot read whole."""
    pairs = zip(prepared.pairs, prepared.pair_askers, strict=True)
    prompts = zip(prepared.prompts, prepared.prompt_askers, strict=True)
    return {id(asker) for pair, asker in pairs if len(pair.context) + len(pair.continuation) > length + 1} | {
        id(asker) for prompt, asker in prompts if len(prompt.tokens) + prompt.max_new_tokens > length
    }


def _outcome(task: LoadedTask, suite: str, item: Item, asked: list[Instance]) -> Outcome:
    member = task.members[item.member]
    next(ensemble for ensemble in member._filters if ensemble.name == task.filter).apply(asked)
    answers = [instance.filtered_resps[task.filter] for instance in asked]
    try:
        metrics = member.process_results(item.doc, answers)
    except Exception as error:  # metrics and task code raise whatever they like
        raise TaskError(f"task {task.info.name}, item {item.hash}: {task.info.metric}: {_said(error)}") from error
    if task.info.output_type == "loglikelihood_rolling":
        loglikelihood, size = _bytes(member, item, metrics, answers[0])
        value, weight = -loglikelihood / math.log(2), float(size)
        loglikelihoods: tuple[float, ...] = (float(answers[0]),)
    else:
        if task.info.metric not in metrics:
            raise TaskError(
                f"task {task.info.name}, item {item.hash}: there is no {task.info.metric} among its metrics"
            )
        value, weight = float(metrics[task.info.metric]), 1.0
        loglikelihoods = () if task.info.output_type == "generate_until" else tuple(float(a[0]) for a in answers)
    if not math.isfinite(value):
        raise ScoreError(f"task {task.info.name}, item {item.hash}: {task.info.metric} is {value}")
    return Outcome(task.info.name, suite, item.hash, value, weight, loglikelihoods, truncated=False)


def _bytes(member: ConfigurableTask, item: Item, metrics: Mapping[str, Any], loglikelihood: float) -> tuple[float, int]:
    """A text's log-likelihood in nats and its size in bytes, which a task may count in its own way."""
    for name in ("bits_per_byte", "byte_perplexity"):
        if name in metrics:
            return metrics[name]
    return loglikelihood, member.count_bytes(member.doc_to_target(item.doc))


def _chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """A conversation as lm-eval renders it: without the system message where a template refuses one."""

    def render(kept: list[dict[str, str]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                kept,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    try:
        return render(messages)
    except jinja2.TemplateError:
        return render([message for message in messages if message["role"] != "system"])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _number(text: str) -> int:
    return int(_hash(text), 16)


def _said(error: Exception) -> str:
    """An exception's message; a foreign one's after its kind."""
    return str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {_short(error)}"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}…"
