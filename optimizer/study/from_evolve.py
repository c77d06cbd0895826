"""A configuration of mergekit-evolve as a study file.

What has a counterpart is written in a study's words, with a comment where a word means less or more here. What has none
is refused by its name: a study that silently searched something else would be worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from evals.documents import DocumentError, checked_path, read_json, resolved_path
from optimizer.errors import StudyFileError
from optimizer.strict_yaml import dump_scalar, dump_yaml, read_yaml, shown
from optimizer.study.new_study import GENERAL, expert_name, run_name, source_from
from optimizer.study.section import MOST_ITEMS
from optimizer.study.task_entry import MOST_SHOTS
from search_spaces.kinds import kind_name
from search_spaces.mergekit.settings import SWITCHES

KEYS = (
    "genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template", "fewshot_as_multiturn",
)  # fmt: skip
GENOME_KEYS = (
    "models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize",
    "allow_negative_weights", "filters", "smooth",
)  # fmt: skip
TASK_KEYS = ("name", "weight", "metric")
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")
# Filters that are a whole kind of module, and the kind; mergekit looks for them in a tensor's name.
MODULES = {
    "attn": "attn", "self_attn": "attn", "attention": "attn", "mlp": "mlp", "feed_forward": "mlp",
    "embed_tokens": "embed", "lm_head": "head",
}  # fmt: skip


def study_from_evolve(path: Path, out: Path, general: Sequence[str] = (), include: Sequence[str] = ()) -> str:
    """Write the text of a study file at `out` for a mergekit-evolve configuration.

    Args:
        path: the configuration; paths of models in it start at the current folder, as mergekit reads them.
        general: tasks of general ability, for which mergekit-evolve has no word; empty for two to start with.
        include: folders in which tasks are known by name, what it is given as --task-search-path.

    Raises:
        StudyFileError: a key that has no counterpart, or is none of mergekit-evolve's.
    """
    return "\n".join(_Conversion(path, out, general, include).lines()) + "\n"


class _Conversion:
    def __init__(self, path: Path, out: Path, general: Sequence[str], include: Sequence[str]) -> None:
        self.path, self.out, self.general, self.include = path, out, general, include
        self.document = read_yaml(path, anchors=True)
        self._only(self.document, KEYS, "")
        self.genome = self._mapping("genome", self.document.get("genome"))
        self._only(self.genome, GENOME_KEYS, "genome.")
        self.method = self.genome.get("merge_method")
        if self.method not in METHODS:
            self._refuse("genome.merge_method", f"must be one of {', '.join(METHODS)}", self.method)
        self.base, self.experts = self._models()

    def lines(self) -> Iterator[str]:
        yield f"# From {dump_scalar(self.path.name)}, a configuration of mergekit-evolve."
        yield "# Look at it with `mergefront check FILE`, run it with `mergefront search FILE`."
        yield "# Relative paths start at this file's folder."
        name = run_name(self.out, list(self.experts))
        yield dump_yaml({"name": name, "models": {"base": self.base, "experts": self.experts}})
        yield dump_yaml({"space": self._space()}).rstrip()
        if self.genome.get("normalize") is None and self.method in ("ties", "dare_ties"):
            yield "# The sum of deltas is not divided by the weights (normalize), which would take their meaning away."
        yield ""
        yield "# mergekit-evolve adds its tasks up. Here they are the domain, and what a merge forgets is measured too:"
        yield "# put under general what must be kept, and move there what is no skill of an expert."
        if self.document.get("limit") is None:
            yield "# Without a limit it scores every item of a task; here 100 of each, and 100 others judge the front."
        yield dump_yaml({"evals": self._evals()})
        yield "# mergekit-evolve: --max-fevals"
        yield dump_yaml({"search": {"trials": 100}}).rstrip()

    def _models(self) -> tuple[str, dict[str, str]]:
        models = self.genome.get("models")
        if not isinstance(models, list) or not models:
            self._refuse("genome.models", "must be a list of models", models)
        listed = [self._source(f"genome.models.{i}", model) for i, model in enumerate(models)]
        given = self.genome.get("base_model")
        if given is None and self.method != "slerp":
            self._refuse("genome.base_model", "must name the base that the experts were trained from", None)
        base = listed[0] if given is None else self._source("genome.base_model", given)
        others = [source for source in dict.fromkeys(listed) if source != base]
        if not others:
            self._refuse("genome.models", "must hold a model besides the base", models)
        names = [expert_name(source) for source in others]
        if len(set(names)) < len(names):
            names = [f"{name[:28]}-{i}" for i, name in enumerate(names, start=1)]
        if self.genome.get("tokenizer_source") not in (None, "base", given):
            self._refuse("genome.tokenizer_source", "must be the base's", self.genome["tokenizer_source"])
        folder = self.out.resolve().parent
        sources = {name: source_from(source, folder) for name, source in zip(names, others, strict=True)}
        return source_from(base, folder), sources

    def _source(self, key: str, given: object) -> str:
        if not isinstance(given, str) or not given or "+" in given or "@" in given:
            self._refuse(key, "must be a folder or a hub id, without revision and adapter", given)
        checked_path(given, where=f"{self.path}: {key}", error=StudyFileError)
        return given

    def _space(self) -> dict[str, Any]:
        if self._flag("genome.normalize", False) and self.method != "linear":
            mend = "remove it: the weights of a study are not divided by their sum"
            self._refuse("genome.normalize", "has no counterpart", True, mend)
        scale = "t" if self.method == "slerp" else "weight"
        low = -1.0 if self._flag("genome.allow_negative_weights", False) and scale == "weight" else 0.0
        shape = self._shape()
        return {"method": self.method, "shape": shape, "modules": self._modules(), scale: [low, 1.0]} | (
            {"density": [0.1, 1.0]} if self.method in ("ties", "dare_ties") else {}
        )

    def _shape(self) -> str | dict[str, int]:
        step, smooth = self.genome.get("layer_granularity", 0), self._flag("genome.smooth", False)
        if type(step) is not int or step < 0:
            self._refuse("genome.layer_granularity", "must be a whole number", step)
        if step == 0:
            return "uniform"
        layers = self._layers()
        if layers % step:
            self._refuse("genome.layer_granularity", f"must divide the base's {layers} layers", step)
        blocks = layers // step
        if blocks == 1:
            return "uniform"
        if smooth:
            return {"curve": blocks}
        return "layers" if step == 1 else {"blocks": blocks}

    def _layers(self) -> int:
        from optimizer.checkpoints.configs import LAYER_COUNT_KEYS

        folder = resolved_path(
            self.base, self.out.resolve().parent, where=f"{self.path}: genome.base_model", error=StudyFileError
        )
        file = folder / "config.json"
        try:
            config = read_json(file)
            count = next((config[key] for key in LAYER_COUNT_KEYS if key in config), None)
            if type(count) is not int or count < 1:
                raise DocumentError(f"given {shown(count)}")
        except (DocumentError, TypeError) as error:
            raise StudyFileError(
                f"{self.path}: genome.layer_granularity: the base's layers must be counted, and {file} does not tell "
                f"them ({error}); name the base by its folder, or set layer_granularity to 0 and write space.shape"
            ) from None
        return count

    def _modules(self) -> list[str] | dict[str, list[str] | None]:
        """Return whole kinds as words; where a filter is finer, each as a kind of its own in evolve's order."""
        filters = self.genome.get("filters") or []
        if not isinstance(filters, list):
            self._refuse("genome.filters", "must be a list of words", filters)
        for i, word in enumerate(filters):
            if not isinstance(word, str) or not word or filters.index(word) < i:
                self._refuse(f"genome.filters.{i}", "must be a part of tensor names, and there once", word)
        if any(word not in MODULES for word in filters):
            return {kind_name(word): [word] for word in filters}
        kinds = {MODULES[word] for word in filters}
        if kinds & {"attn", "mlp"}:
            kinds |= {"attn", "mlp"}  # what no filter names has a weight of its own too
        return [kind for kind in ("attn", "mlp", "embed", "head") if kind in kinds]

    def _evals(self) -> dict[str, Any]:
        for key in ("shuffle", "random_init"):
            if self._flag(key, False):
                self._refuse(key, "has no counterpart: a study's items and anchors are fixed by its seeds", True)
        chat, shots = self._flag("apply_chat_template", True), self._count("num_fewshot", 0, MOST_SHOTS)
        turns = {} if self._flag("fewshot_as_multiturn", True) else {"fewshot_as_multiturn": False}
        tasks = self.document.get("tasks")
        if not isinstance(tasks, list) or not tasks:
            self._refuse("tasks", "must be a list of tasks", tasks)
        domain = [self._task(f"tasks.{i}", task, shots) for i, task in enumerate(tasks)]
        limit = self._count("limit", 1, MOST_ITEMS)
        items = {} if limit is None else {"items": limit, "holdout_items": limit}
        folder = self.out.resolve().parent
        general = [source_from(task, folder) for task in self.general or GENERAL]
        folders = {"include": [source_from(given, folder) for given in self.include]} if self.include else {}
        return {"domain": domain, "general": general, **folders, **items, "chat_template": chat, **turns}

    def _task(self, key: str, given: object, shots: int | None) -> dict[str, Any]:
        task = {"name": given} if isinstance(given, str) else self._mapping(key, given)
        self._only(task, TASK_KEYS, f"{key}.")
        if not isinstance(task.get("name"), str) or not task["name"]:
            self._refuse(f"{key}.name", "must be a task's name", task.get("name"))
        weight = task.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            mend = "a metric's direction is known, so that none counts against itself; remove it"
            self._refuse(f"{key}.weight", "must be a number above 0", weight, mend)
        if not isinstance(task.get("metric", ""), str):
            self._refuse(f"{key}.metric", "must be a metric's name", task["metric"])
        metric, _, chosen = task.get("metric", "acc,none").partition(",")
        return (
            {"task": task["name"], "metric": metric if chosen in ("", "none") else f"{metric},{chosen}"}
            | ({} if shots is None else {"shots": shots})
            | ({"weight": float(weight)} if weight != 1.0 else {})
        )

    def _mapping(self, key: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            self._refuse(key, "must hold keys and values", value)
        return value

    def _flag(self, key: str, default: bool) -> bool:
        """Return what stands under a key that is true or false, of the document or of its genome."""
        section = self.genome if key.startswith("genome.") else self.document
        given = section.get(key.removeprefix("genome."))
        given = SWITCHES.get(given.lower(), given) if isinstance(given, str) else given
        if given is not None and not isinstance(given, bool):
            self._refuse(key, "must be true or false", given)
        return default if given is None else given

    def _count(self, key: str, least: int, most: int) -> int | None:
        given = self.document.get(key)
        if given is not None and (type(given) is not int or not least <= given <= most):
            between = f", {least} or more" if most == MOST_ITEMS else f" from {least} to {most}"
            self._refuse(key, f"must be a whole number{between}", given)
        return given

    def _only(self, value: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
        for key in value:
            if key not in known:
                self._refuse(f"{prefix}{key}", f"is not known; the keys here are {', '.join(known)}", value[key])

    def _refuse(self, key: str, rule: str, given: object, mend: str = "") -> NoReturn:
        raise StudyFileError(f"{self.path}: {key}: {rule}; given {shown(given)}" + (f"; {mend}" if mend else ""))
