"""The outcome files of a run folder, one for each trial and suite: written whole, read where they are sound."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evals.bank import LEAST_DRAWN
from evals.outcomes import OUTCOME_COLUMNS, SEARCH, SENTINEL, Outcome, TaskInfo
from optimizer.errors import RunError
from optimizer.runs.atomic_file import write_atomically
from optimizer.strict_yaml import shortened

FRAME_COLUMNS = ("trial", *OUTCOME_COLUMNS)
SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "suite": pa.string(),
        "item": pa.string(),
        "value": pa.float64(),
        "weight": pa.float64(),
        "loglikelihoods": pa.list_(pa.float64()),
        "truncated": pa.bool_(),
        "lengths": pa.list_(pa.int64()),
        "broken_off": pa.bool_(),
        "right": pa.list_(pa.int64()),
        "inclusion": pa.float64(),
        "answer": pa.string(),
        "statistic": pa.string(),
        "parts": pa.list_(pa.float64()),
        "cluster": pa.string(),
    }
)
# unknown to earlier versions
TEXTS = pa.dictionary(pa.int32(), pa.string())  # how they are read
KINDS = [TEXTS if pa.types.is_string(field.type) else field.type for field in SCHEMA]
LATER_COLUMNS = ("lengths", "broken_off", "right", "inclusion", "answer", "statistic", "parts", "cluster")
TEXT_COLUMNS = ("task", "suite", "item", "statistic", "cluster")
ANSWER = "answer"  # a text of any length
MOST_VALUES, LONGEST_TEXT = 50_000_000, 4096  # of a column; bytes
MOST_ANSWERED = 250_000_000  # bytes of all that was written
MOST_STAMPED = 2**28  # bytes of a file
LARGEST = 1e30  # of a value or a weight: sums, squares and ratios of such numbers are finite
FACTS = ("trial", "suite", "recipe")  # an outcomes file's metadata


def outcomes_path(folder: Path, trial: int, suite: str) -> Path:
    """Give the place of a trial's outcomes on a suite."""
    return folder / "outcomes" / f"{trial:05d}-{suite}.parquet"


def write_outcomes(folder: Path, trial: int, suite: str, digest: str, outcomes: Iterable[Outcome]) -> Path:
    """Write one trial's outcomes; they are on the disk, whole, when this returns.

    Args:
        digest: the recipe's digest, kept with the rows so that a resumed search can trust them.
    """
    rows = list(outcomes)
    assert all(row.suite == suite for row in rows), f"outcomes of another suite than {suite}"
    columns = {name: [getattr(row, name) for row in rows] for name in OUTCOME_COLUMNS}
    metadata = {"recipe": digest, "trial": str(trial), "suite": suite}
    table = pa.table(columns, schema=SCHEMA).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    # a model's numbers seldom repeat: so they are read in half the time of zstd with dictionaries, a tenth larger
    pq.write_table(table, sink, compression="lz4", use_dictionary=[*TEXT_COLUMNS, ANSWER], write_page_checksum=True)
    target = outcomes_path(folder, trial, suite)
    _make_place(target)
    write_atomically(target, sink.getvalue())
    return target


def stamp_of(path: Path) -> str:
    """Tell a file's bytes apart from all others: their number and sha256; empty where there is no such file."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_STAMPED:
            return ""
        content = path.read_bytes()
    except OSError:
        return ""
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}"


def read_outcomes(path: Path) -> pd.DataFrame:
    """Read a stored outcomes file: columns trial and OUTCOME_COLUMNS; null where an earlier version had none.

    Raises:
        RunError: the file is missing, damaged, or no outcomes file.
    """
    table = _outcomes_table(path)
    return outcomes_frame(table, int(_facts(table)["trial"]))


def outcomes_frame(table: pa.Table, trial: int) -> pd.DataFrame:
    """Return one trial's outcomes as readers use them: columns trial and OUTCOME_COLUMNS."""
    texts = {field.name: pa.string() for field in table.schema if pa.types.is_dictionary(field.type)}
    plain = pa.schema([field.with_type(texts.get(field.name, field.type)) for field in table.schema])
    frame = table.cast(plain).select(list(OUTCOME_COLUMNS)).to_pandas()
    frame[ANSWER] = frame[ANSWER].astype(object).where(frame[ANSWER].notna(), None)
    for name in ("cluster", "statistic"):
        frame[name] = frame[name].fillna("")
    frame.insert(0, "trial", trial)
    return frame


def joined_frame(tables: Mapping[int, pa.Table]) -> pd.DataFrame:
    """Return the outcomes of many trials as readers use them: as `outcomes_frame`, in a quarter of the room. Lists are
    left to Arrow, and texts of few values are categories.

    Args:
        tables: as of `sound_outcomes`, by trial.
    """
    if not tables:
        return pd.DataFrame(columns=list(FRAME_COLUMNS))
    table = pa.concat_tables([found.select(list(OUTCOME_COLUMNS)) for found in tables.values()]).unify_dictionaries()
    for name in ("item", ANSWER):
        table = table.set_column(OUTCOME_COLUMNS.index(name), name, table[name].cast(pa.large_string()))
    frame = table.to_pandas(types_mapper=lambda kind: pd.ArrowDtype(kind) if pa.types.is_list(kind) else None)
    for name in ("cluster", "statistic"):
        known = frame[name].cat
        frame[name] = (frame[name] if "" in known.categories else known.add_categories([""])).fillna("")
    if (is_there := frame[ANSWER].notna()).any():
        frame[ANSWER] = frame[ANSWER].astype(object).where(is_there, None)
    frame.insert(0, "trial", np.repeat([*tables], [len(found) for found in tables.values()]))
    return frame


def outcomes_of(frame: pd.DataFrame) -> list[Outcome]:
    """Return a frame's rows as outcomes."""
    given = frame[list(OUTCOME_COLUMNS)].to_dict("records")
    return [Outcome(**{str(name): _plain(value) for name, value in row.items()}) for row in given]


def _plain(value: Any) -> Any:
    return tuple(value.tolist()) if isinstance(value, np.ndarray) else value


def sound_outcomes(folder: Path, trial: int, suite: str, *, digest: str, tasks: Sequence[TaskInfo]) -> pa.Table:
    """Read one trial's stored outcomes, where they are whole and its own.

    Args:
        digest: of the trial's recipe.
        tasks: the run's, with the number of their items.

    Returns:
        A table of SCHEMA, but for its texts, which are of dictionaries.

    Raises:
        RunError: there are none, or they cannot be used; the file is named.
    """
    path = outcomes_path(folder, trial, suite)
    table = _outcomes_table(path)
    for name, known in {"trial": str(trial), "suite": suite, "recipe": digest}.items():
        if (found := _facts(table)[name]) != known:
            raise RunError(f"{path} is of {name} {found!r}, not {known!r}")
    promised = {
        task.name: task.search_items if suite == SEARCH else task.holdout_items
        for task in tasks
        if not (suite == SEARCH and task.role == SENTINEL)
    }
    counts = {row["values"]: row["counts"] for row in table["task"].value_counts().to_pylist()}
    drawn = _drawn(path, table, tasks) if suite == SEARCH else {}
    if counts != promised | drawn or table["suite"].unique().to_pylist() != [suite]:
        raise RunError(f"{path} must hold {_items(promised)} of the {suite} suite; it holds {_items(counts)}")
    numbers = pa.chunked_array([*table["value"].chunks, *table["weight"].chunks])
    if not pc.all(pc.is_finite(numbers)).as_py():
        raise RunError(f"{path} holds values that are not finite")
    sizes = pc.abs(numbers)
    if not pc.all(
        pc.or_(pc.equal(sizes, 0.0), pc.and_(pc.less(sizes, LARGEST), pc.greater(sizes, 1 / LARGEST)))
    ).as_py():
        raise RunError(f"{path} holds values beyond {LARGEST:g} or below {1 / LARGEST:g}: their sums are not finite")
    return table


def _drawn(path: Path, table: pa.Table, tasks: Sequence[TaskInfo]) -> dict[str, int]:
    """Count the items of each task that were drawn from its bank, where no more than these are there."""
    inclusion = pc.fill_null(table["inclusion"], 1.0)
    if not pc.all(pc.and_(pc.greater(inclusion, 0.0), pc.less_equal(inclusion, 1.0))).as_py():
        raise RunError(f"{path} holds an inclusion that is no probability")
    if not any(task.drawn_items for task in tasks):
        return {}
    found = table.filter(pc.less(inclusion, 1.0))["task"].value_counts().to_pylist()
    some = {row["values"] for row in found}
    counts = {row["values"]: row["counts"] for row in table["task"].value_counts().to_pylist()}
    return {
        task.name: counts[task.name]
        for task in tasks
        if task.drawn_items and task.name in some and LEAST_DRAWN <= counts[task.name] < task.search_items
    }


def _outcomes_table(path: Path) -> pa.Table:
    """Read a stored outcomes file as `sound_outcomes` gives it, with what it says of itself as metadata."""
    if not path.is_file():
        raise RunError(f"{path} is {'not a file' if os.path.lexists(path) else 'missing'}")
    try:
        about = pq.read_metadata(path)
        _require_small(path, about)
        # as a dictionary, a long text of many rows is held once
        texts = [name for name in (*TEXT_COLUMNS, ANSWER) if name in about.schema.names]
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=texts) as file:
            table = file.read(use_threads=False)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RunError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    _require_short_texts(path, table)
    for field in SCHEMA:
        if field.name in LATER_COLUMNS and field.name not in table.column_names:
            kind = TEXTS if pa.types.is_string(field.type) else field.type
            table = table.append_column(field.name, pa.nulls(len(table), kind))
    facts = table.schema.metadata or {}
    missing = [name for name in FACTS if name.encode() not in facts]
    known = sorted(name for name in table.column_names if name in SCHEMA.names)
    if missing or known != sorted(SCHEMA.names) or table.select(SCHEMA.names).schema.types != KINDS:
        raise RunError(
            f"{path} is not an outcomes file of this program: it has other columns, or no {', '.join(FACTS)}"
        )
    if any(table[name].null_count for name in SCHEMA.names if name not in LATER_COLUMNS):
        raise RunError(f"{path} lacks some of its values")
    return table


def _require_small(path: Path, about: pq.FileMetaData) -> None:
    """Refuse what would take the machine's memory: a few bytes can say a value a billion times."""
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    values = max((group.column(i).num_values for group in groups for i in range(group.num_columns)), default=0)
    most = max(values, about.num_rows)
    if most > MOST_VALUES:
        raise RunError(f"{path} may hold {MOST_VALUES:,} values in a column; it holds {most:,}")


def _require_short_texts(path: Path, table: pa.Table) -> None:
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            sizes = [pc.binary_length(chunk.dictionary).cast(pa.int64()) for chunk in table[i].chunks]
            if field.name == ANSWER:
                used = (pair for pair in zip(sizes, table[i].chunks, strict=True) if len(pair[0]))
                written = sum(pc.sum(size.take(chunk.indices)).as_py() or 0 for size, chunk in used)
                if written > MOST_ANSWERED:
                    raise RunError(f"{path} may hold answers of {MOST_ANSWERED:,} bytes; it holds {written:,}")
            elif (longest := max((pc.max(size).as_py() or 0 for size in sizes), default=0)) > LONGEST_TEXT:
                raise RunError(f"{path} may hold texts of {LONGEST_TEXT:,} bytes; it holds one of {longest:,}")


def _facts(table: pa.Table) -> dict[str, str]:
    return {name: table.schema.metadata[name.encode()].decode(errors="replace") for name in FACTS}


def _items(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} items of {shortened(task)}" for task, number in counts.items()) or "nothing"


def _make_place(target: Path) -> None:
    """Have the outcomes' folder there, and a folder that bears a file's name out of the way, beside it."""
    try:
        target.parent.mkdir(exist_ok=True)
        if target.is_dir():
            target.rename(target.with_name(f"{target.name}.moved"))
    except OSError as error:
        raise RunError(f"outcomes cannot be written to {target}: {error.strerror}; move away what is there") from error
