"""What `check` prints: the models, the space, the tasks and the cost of a study, and every problem."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from evals.certificates import ABILITY, CHANGED, DELTA, items_for, smallest_limit
from optimizer.runs.limits import Limits
from optimizer.search.cost import Cost, cost_of, count_numbers
from optimizer.search.derived import said
from optimizer.search.prepared import derivations
from optimizer.search.samplers import WITHOUT_LIMITS
from optimizer.views.plain_table import table
from optimizer.words import count, percent, printable
from search_spaces.groups import PASSED, group_of, is_placed, kind_of, layer_of, split_name
from search_spaces.kinds import place_tensors

if TYPE_CHECKING:
    from rich.console import Console

    from evals.lm_harness import Harness
    from optimizer.checkpoints.checkpoint import Checkpoint
    from optimizer.search.plan import Plan
    from optimizer.study.schema import SearchSection, Study
    from search_spaces.choice import Choice
    from search_spaces.space import Space

EXAMPLE = 0.05  # a limit on forgetting, to say what it takes


def print_plan(plan: Plan, console: Console) -> None:
    """Print models, space, tasks, cost and problems; a part that could not be read is left out."""
    if plan.base is not None:
        console.print(
            table(
                "Models",
                ["", "source", "numbers", "size", "dtype"],
                _model_rows(plan, plan.base),
                right=["numbers", "size"],
            )
        )
    if plan.space is not None:
        names = plan.base.names if plan.base is not None else ()
        rows = [*_space_rows(plan.space), *_kind_rows(plan.space, names), *_odd_rows(names)]
        console.print(table("Search space", ["", ""], rows))
    if plan.harness is not None:
        numbers = ["chance", "shots", "search items", "holdout items"]
        columns = ["task", "role", "metric", *numbers]
        console.print(table("Tasks", columns, _task_rows(plan.harness), right=numbers))
        for note in plan.harness.notes:
            console.print(Text(f"note: {note}"), soft_wrap=True)
        console.print(table("Certificates", ["", ""], _power_rows(plan.harness)))
    console.print(table("Search", ["", ""], _search_rows(plan.study.search)))
    cost = cost_of(plan)
    if cost is not None:
        console.print(table("Cost", ["", ""], _cost_rows(plan, cost)))
    if not plan.problems:
        console.print("no problems found", highlight=False)
        return
    console.print(Text(f"{count(len(plan.problems), 'problem')}:", style="bold"))
    for problem in plan.problems:
        console.print(Text(printable(f"- {problem}")), soft_wrap=True)


def _model_rows(plan: Plan, base: Checkpoint) -> Iterator[tuple[str, ...]]:
    """Yield a row for each model, those to be derived too."""
    derived = plan.study.models.derived
    known = {name: model for name, model in plan.experts.items() if name not in derived}
    yield from model_rows({"base": base, **known})
    yield from ((name, said(entry), "", "", "") for name, entry in derived.items())


def model_rows(models: Mapping[str, Checkpoint]) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table of models for each: name, source, count of numbers, size and dtypes."""
    from optimizer.checkpoints.gguf import kept_folder  # brings torch

    for name, model in models.items():
        dtypes = sorted({str(model.dtype(tensor)).removeprefix("torch.") for tensor in model.names})
        kind = " (adapter)" if model.is_adapter else ""
        if model.folder.is_relative_to(kept_folder()):
            kind = f" (GGUF, dequantised in {model.folder})"
        if model.is_matched:
            kind = f" (matched to the base's tokens; {count(model.left_out, 'row')} of its own left out)"
        yield name, model.source + kind, _millions(count_numbers(model)), _size(model.bytes), ", ".join(dtypes)


def _space_rows(space: Space | Choice) -> Iterator[tuple[str, str]]:
    dimensions = space.distributions()
    anchors = [anchor.name for anchor in space.anchors()]
    shape, modules = space.shape, ", ".join(space.modules)
    yield "method", ", ".join(space.methods)
    yield "shape", f"{shape.kind} {shape.n or ''}".strip() + (f", of its own for {modules}" if modules else "")
    yield "groups", f"{len(space.groups)}: {_shortened(space.groups)}"
    yield "dimensions", f"{len(dimensions)}: {_shortened(list(dimensions))}"
    yield "anchors", f"{len(anchors)}: {', '.join(anchors)}"


def _task_rows(harness: Harness) -> Iterator[tuple[object, ...]]:
    for row in harness.describe():
        role = f"{row['role']} ({row['expert']})" if row["expert"] else row["role"]
        shots = f"{row['shots']} ({row['shots_from']})" if row["shots_from"] else row["shots"]
        search = f"{row['drawn_items']} of {row['search_items']}" if row["drawn_items"] else row["search_items"]
        numbers = f"{row['chance']:.2f}", shots, search, row["holdout_items"]
        yield row["task"], role, row["metric"], *numbers


def _power_rows(harness: Harness) -> Iterator[tuple[str, str]]:
    """Yield what certificates of forgetting the study's items are enough for, at the usual confidence."""
    rows = [row for row in harness.describe() if row["role"] == "general"]
    items = {row["task"]: row["certify_items"] // row["certify_largest"] for row in rows}
    yield "items", ", ".join(map(_certify_items, rows))
    if not all(items.values()):
        yield "limits", "none: each general task needs items for it"
        return
    least, sure = percent(smallest_limit(items, DELTA)), percent(1 - DELTA)
    yield "limits", f"about {least} of forgetting or more, at {sure} confidence"
    yield percent(EXAMPLE), f"takes about {items_for(EXAMPLE, len(items), DELTA):,} items of each"
    yield (
        "for",
        (
            f"questions, a base {percent(ABILITY)} above chance, and a merge that forgets nothing and answers "
            f"{percent(CHANGED)} of them otherwise"
        ),
    )


def _certify_items(row: Mapping[str, Any]) -> str:
    items, largest = row["certify_items"], row["certify_largest"]
    told = f" (up to {largest} about one passage: they may tell no more than {items // largest})"
    return f"{items} of {row['task']}{told if largest > 1 else ''}"


def _search_rows(search: SearchSection) -> Iterator[tuple[str, str]]:
    """Yield who proposes, what it may not pass, and when it ends."""
    limits = Limits(search.max_forgetting, search.floors)
    yield "sampler", search.sampler
    if limits:
        blind = f"; {search.sampler} draws without regard to them" if search.sampler in WITHOUT_LIMITS else ""
        yield "limits", limits.text() + blind
    ends = [count(search.trials, "trial")]
    ends += [f"{search.candidates:g} candidates' cost"] if search.candidates is not None else []
    ends += [f"{search.timeout:g} minutes"] if search.timeout is not None else []
    if search.patience is not None:
        last = count(search.patience.trials, "trial")
        ends.append(f"no more than {percent(search.patience.gain)} of hypervolume won in {last}")
    yield "ends after", ", or ".join(ends)


def _cost_rows(plan: Plan, cost: Cost) -> Iterator[tuple[str, str]]:
    workers = max(1, plan.study.workers.count)
    own, mapped = _size(cost.resident_bytes), _size(cost.mapped_bytes)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = workers * cost.resident_bytes + cost.mapped_bytes
    verdict = ", TOO LITTLE" if need > have else ""
    yield (
        "memory",
        f"{workers} x {own} of models, {mapped} of files, shared; this machine has {_size(have)}{verdict}",
    )
    if cost.learning_bytes:
        yield (
            "",
            f"{_size(cost.learning_bytes)} more for activations while a worker learns; what does not fit is recomputed",
        )
    yield from _gpu_rows(plan, cost)
    for suite, tokens in cost.tokens.items():
        yield f"{suite} suite", f"about {tokens:,} tokens a trial"
    if cost.prepared:
        text = f"about as much as {cost.prepared:.0f} trials"
        yield "learned, derived", text + (f", and {_size(cost.disk_bytes)} of disk" if cost.disk_bytes else "")
    if left_out := _left_out(plan.study, cost):
        candidates = plan.study.search.candidates
        yield "left out", f"{left_out}: {candidates:g} candidates do not pay for it (search.candidates)"
    yield "time", f"very roughly {_hours(cost.hours)} for {plan.study.search.trials} trials and the holdout"


def _left_out(study: Study, cost: Cost) -> str:
    """Name the derived anchors and lessons that the study asks for and its candidates do not pay for."""
    forms = study.anchors.derived if len(study.models.experts) == 1 else ()
    parts = [kind.label for kind in derivations(forms) if kind not in cost.derived]
    lessons = study.search.learned.count
    if cost.lessons < lessons:
        parts.append(f"{lessons - cost.lessons} of {count(lessons, 'learned point')}")
    return ", ".join(parts)


def _gpu_rows(plan: Plan, cost: Cost) -> Iterator[tuple[str, str]]:
    """Yield how a candidate lies on GPUs, where the study says how many a worker has."""
    gpus = plan.study.workers.gpus
    if gpus == "auto" or gpus == 1:
        return
    from optimizer.checkpoints.devices import least_memory
    from optimizer.merging.merge import DEVICE_ROOM  # both bring torch

    here = least_memory() if plan.study.workers.ray_address is None else 0
    if gpus < 1:
        need, text = round(1 / gpus) * cost.resident_bytes, f"{round(1 / gpus)} workers share one"
        yield "GPUs", f"{text}: {_size(cost.resident_bytes)} of models for each{_verdict(need, here, DEVICE_ROOM)}"
    elif cost.on_gpus:
        held = ", ".join(map(_size, cost.on_gpus))
        text = f"a candidate is spread over {len(cost.on_gpus)}: {held} on each in turn"
        yield "GPUs", text + _verdict(max(cost.on_gpus), here, DEVICE_ROOM)
        if cost.learning_on_gpu:
            yield "", f"{_size(cost.learning_on_gpu)} more on one of them while a worker learns"


def _verdict(need: int, here: int, room: int) -> str:
    """Say what a GPU of this machine has, and whether models and what scoring takes fit; nothing where it has none."""
    if not here:
        return ""
    return f"; a GPU here has {_size(here)}{', TOO LITTLE' if need + room > here else ''}"


def _kind_rows(space: Space | Choice, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what each kind of modules that is finer than a group covers."""
    places = place_tensors(names, space.kinds) if names and space.kinds else {}
    for kind, patterns in space.kinds:
        inside = [place for place in places if kind_of(place) == kind]
        layers = sum(layer_of(place) is not None for place in inside)
        where = [count(layers, "layer")] if layers else []
        where += sorted({place.split(".")[0] for place in inside if layer_of(place) is None})
        tensors = count(sum(len(places[place]) for place in inside), "tensor")
        yield f"kind {kind}", f"{', '.join(patterns)}: {tensors} in {', '.join(where)}"


def _odd_rows(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what becomes of tensors that are in no group, and of those in one for want of a rule."""
    passed = [name for name in names if group_of(name) == PASSED]
    if passed:
        towers = sorted({".".join(name.split(".")[:2]) for name in passed})
        yield (
            "towers",
            f"{count(len(passed), 'tensor')} for images or sound, which stay the base's: {_shortened(towers)}",
        )
    where: dict[str, set[str]] = {}
    for name in names:
        if not is_placed(name):
            stack, layer, rest = split_name(name)
            place = "the head" if layer is None else "their layer's mlp"
            where.setdefault(place, set()).add(stack if layer is None else rest)
    for place, parts in where.items():
        yield "other parts", f"{_shortened(sorted(parts))}: the weight of {place}"


def _shortened(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _hours(hours: float) -> str:
    minutes = 60 * hours
    if minutes < 1:
        return "less than a minute"
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
