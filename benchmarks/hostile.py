"""What `fuzz.py` feeds the command line: a small world of sound files,
    and strategies that craft one case of each kind.

A case is plain JSON, so that it can be kept and replayed: the files to put in place of sound ones, statements for the
study's database, and the words of the command line.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

Case = dict[str, Any]  # target, argv, files {path: content}, sql [[statement, arguments]]
Draw = Callable[[Any], Any]

LONG = "x" * 300
TEXTS = ["", " ", "x", "base", "clinical", "skill", ".", "..", "-", "--", "a\0b", "\x1b]0;title\x07",
    "\x1b[2J", "\x9b31m", "\u202ex", "~nobody-here/x", "~", LONG, f"./{LONG}", "x/" * 3000, "/dev/zero",
    "/dev/full/x", "none/x", "no/such", "a=b", "{{ 1/0 }}", "{{ 'a'*10**9 }}",
    "{% for i in range(10**9) %}x{% endfor %}", "\ud800", "null", "1e-3", "0x10", "[bold]x[/]",
    "<img onerror=x>", "é", "\u2028", "a\nb", "a\tb", "%s%n", "$x$", "a|b", "`x`", "../x", "./base",
    "./expert", "./skill/skill.yaml", "layer.99.attn", "sqlite:///none/x.db",
    "postgresql://u:p@127.0.0.1:1/x", "mysql://x", "://", "127.0.0.1:1", "ray://127.0.0.1:1", "auto"]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 7, 64, 65, 1000, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1.0, 1.5, 1e308,
    -1e308, 5e-324, 1e-3, float("nan"), float("inf"), float("-inf")]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


OTHERS = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": 1},
    {"a": {"b": 1}},
    [1, 2],
    [0, 1e400],
    ["x"] * 500,
    nested(100),
]
odd = st.sampled_from([*TEXTS, *NUMBERS, *OTHERS]).map(deepcopy) | st.integers() | st.floats() | st.text(max_size=12)
YAML_WORDS = ["!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!timestamp 2001-99-99",
    "!!int x", "!!bool x", "!!float x", "!!python/object/apply:os.system [x]", "!function a.b", "!own x",
    "&a [*a]", "&a [x, x]", "*a", "<<: {a: 1}", "[" * 3000, "{" * 3000, "- " * 3000, "? " * 50,
    "9" * 5000, "1" + "0" * 400, "1e999", "-1e999", ".nan", ".inf", "\0", "\x1b]0;x\x07", "'", '"',
    '"\\ud800"', '"\\0"', '"\\x1b[31m"', "\t", "---\n", "...\n", "%YAML 9.9\n", "\ufeff", "|\n", ">9\n",
    ": ", "- ", "~nobody-here/x", "2001-01-01", "0o17", "0x1F", "1_000", "1:30", "yes", "=", "<<", "@",
    "`", "%", "\r", "\u2028", "\x85"]  # fmt: skip
JSON_WORDS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "1" + "0" * 400, "[" * 100_000,
    '{"a":' * 3000, '"\\ud800"', "\0", "\ufeff", '"\\u0000"', '"\\u001b[31m"', ",", "}", "]", '"', "{}",
    "[]", "null", "-", "1.", "//", "'x'"]  # fmt: skip


# --- documents, changed ----------------------------------------------------------------------------------------------


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def changed(draw: Draw, document: Any, most: int = 3) -> Any:
    """A copy with some values replaced (by others of their kind or not), removed, added, moved or doubled."""
    document = deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, *range(1, most + 1)]))):
        found = places(document)
        if not found:
            return draw(odd)
        holder, key = draw(st.sampled_from(found))
        action = draw(st.sampled_from(["near", "near", "near", "replace", "replace", "remove", "add", "move", "wrap"]))
        if action == "near":
            holder[key] = draw(near(holder[key]))
        elif action == "replace":
            holder[key] = draw(odd)
        elif action == "remove":
            del holder[key]
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(TEXTS) | st.text(max_size=5))] = draw(odd)
        elif action == "move":
            other, place = draw(st.sampled_from(found))
            holder[key] = deepcopy(other[place]) if place in _keys(other) else None
        else:
            holder[key] = draw(st.sampled_from([[holder[key]], {"a": holder[key]}, [holder[key], holder[key]]]))
    return document


def near(value: Any) -> st.SearchStrategy[Any]:
    """Other values of a value's kind, which go further before they are refused."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        return st.sampled_from([value + 1, value - 1, 2 * value, 0, 1, -1, 3, 63, 1024, 2**31, 10**9, 10**12])
    if isinstance(value, float):
        return st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 1e-9, 1e9, 1e300, 3]) | st.floats(allow_nan=False)
    if isinstance(value, str):
        return st.sampled_from([value.upper(), value[1:], f"{value}x", f"{value}.0", value.replace("/", "."), *TEXTS])
    if isinstance(value, list):
        return st.sampled_from([value[::-1], value[1:], value * 2, value * 300, []])
    return odd


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def spliced(draw: Draw, text: str, words: Sequence[str]) -> str:
    """The text, once in three times with something put in, cut off, doubled or taken out."""
    action = draw(st.sampled_from(["", "", "", "", "insert", "instead", "cut", "double", "without"]))
    at, upto = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
    word = draw(st.sampled_from(words) | st.text(max_size=4))
    return {
        "": text,
        "insert": text[:at] + word + text[at:],
        "instead": text[:at] + word + text[min(upto, at + 20) :],
        "cut": text[:at],
        "double": text[:upto] + text[at:upto] + text[upto:],
        "without": text[:at] + text[upto:],
    }[action]


def yaml_text(draw: Draw, document: Any, most: int = 3) -> dict[str, str]:
    made = yaml.safe_dump(changed(draw, document, most), sort_keys=False, allow_unicode=draw(st.booleans()))
    return {"text": spliced(draw, made, YAML_WORDS)}


def json_text(draw: Draw, document: Any, most: int = 3) -> dict[str, str]:
    return {"text": spliced(draw, json.dumps(changed(draw, document, most)), JSON_WORDS)}


def raw(content: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(content).decode()}


def damaged_bytes(draw: Draw, content: bytes) -> dict[str, str]:
    """Bytes cut short, changed in places, or followed by others."""
    content = content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content
    changed_bytes = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        if changed_bytes:
            changed_bytes[draw(st.integers(0, len(changed_bytes) - 1))] = draw(st.integers(0, 255))
    return raw(bytes(changed_bytes) + draw(st.binary(max_size=8)))


# --- the world -------------------------------------------------------------------------------------------------------

EVOLVE = """\
genome: {models: [./base, ./expert], base_model: ./base, merge_method: ties, layer_granularity: 1,
    filters: [self_attn]}
tasks: [{name: skill, weight: 1.0, metric: "acc,none"}, other]
limit: 4
num_fewshot: 2
apply_chat_template: false
"""
MERGE = """\
merge_method: ties
base_model: ./base
models:
  - model: ./expert
    parameters: {weight: [{filter: self_attn, value: [0, 1]}, {value: 0.5}], density: 0.8}
parameters: {normalize: false, lambda: 1.0}
dtype: bfloat16
"""
STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: ./base, layer_range: [0, 2]}]
  - sources: [{model: ./expert, layer_range: [1, 2], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}}]
dtype: bfloat16
"""
CHOICE = """\
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def build_world(folder: Path) -> None:
    """Write sound models, tasks, a study, recipes and a finished run."""
    import torch
    from safetensors.torch import save_file

    from tests import toy_run as toy
    from tests.optimizer.small_study import write_study

    write_study(folder, items=2)
    (folder / "choice").mkdir()
    rows = [{"question": f"{i} and {i}?", "choices": [str(2 * i), "none", "x"], "gold": i % 3} for i in range(6)]
    (folder / "choice/choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "choice/choice.yaml").write_text(CHOICE)
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    save_file(
        {f"{stem}A.weight": torch.ones(2, 32), f"{stem}B.weight": torch.ones(32, 2)},
        adapter / "adapter_model.safetensors",
    )
    _write_sharded(folder / "base", folder / "sharded")
    for name, text in {"evolve": EVOLVE, "merge": MERGE, "stack": STACK}.items():
        (folder / f"{name}.yaml").write_text(text)
    recipe = { "method": "ties", "base": "./base", "experts": [["clinical", "./expert"]],
        "settings": [["weight", "clinical", "layer.00.attn", 0.5], ["density", "", "", 0.8], ["lambda",
        "", "", 1.0]], }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    sizes, toy.ITEMS = toy.ITEMS, {"search": 12, "holdout": 12}
    try:
        toy.toy_run(folder / "run", trials=3)
    finally:
        toy.ITEMS = sizes


def _write_sharded(base: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def lay_out(world: Path, workspace: Path, case: Case) -> None:
    """A copy of the world, no file shared with it, with the case's files in place."""
    shutil.copytree(world, workspace, symlinks=True, copy_function=shutil.copyfile)
    for name, content in case["files"].items():
        path = workspace / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        _put(path, content)
    if case.get("sql"):
        with closing(sqlite3.connect(workspace / "run/study.db")) as connection:
            connection.execute("PRAGMA foreign_keys=OFF")
            for statement, arguments in case["sql"]:
                connection.execute(statement, arguments)
            connection.commit()


def _put(path: Path, content: Mapping[str, Any]) -> None:
    ((kind, value),) = content.items()
    if kind == "text":
        path.write_text(value, encoding="utf-8", errors="surrogatepass", newline="")
    elif kind == "base64":
        path.write_bytes(base64.b64decode(value))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(value)
    elif kind == "size":
        with path.open("wb") as file:
            file.truncate(value)
    else:
        assert kind == "none", kind


# --- the targets -----------------------------------------------------------------------------------------------------


class Targets:
    """One strategy for each kind of file or word that a person hands over."""

    def __init__(self, world: Path) -> None:
        self.world = world
        made = {name.removeprefix("_case_"): getattr(self, name) for name in dir(self) if name.startswith("_case_")}
        self.cases: dict[str, Callable[[Draw], Case]] = made

    def strategy(self, target: str) -> st.SearchStrategy[Case]:
        @st.composite
        def build(draw: Draw) -> Case:
            case = self.cases[target](draw)
            return {"target": target, "files": {}, "sql": [], **case}

        return build()

    def _yaml(self, name: str) -> Any:
        return yaml.safe_load((self.world / name).read_text())

    def _json(self, name: str) -> Any:
        return json.loads((self.world / name).read_text())

    def _study(self, draw: Draw, **changes: Any) -> dict[str, str]:
        """A sound study with some values at dotted keys."""
        document = self._yaml("study.yaml")
        for key, value in changes.items():
            *parents, last = key.split("__")
            place = document
            for part in parents:
                place = place[part]
            place[last] = value
        return {"text": yaml.safe_dump(document, sort_keys=False)}

    def _case_study(self, draw: Draw) -> Case:
        argv = draw(st.sampled_from([["check"], ["check"], ["search", "--workers", "0", "--set=search.trials=1"]]))
        return {"argv": [*argv, "study.yaml"], "files": {"study.yaml": yaml_text(draw, self._yaml("study.yaml"))}}

    def _case_set(self, draw: Draw) -> Case:
        document = self._yaml("study.yaml")
        keys = ["name", "runs", "models", "models.base", "models.experts.clinical", "space.from",
            "space.method", "space.shape", "space.weight", "space.lambda", "evals.domain.0",
            "evals.general.0.task", "evals.items", "evals.holdout_items", "evals.domain.0.metric",
            "evals.seed", "evals.dtype", "search.storage", "search.sampler", "search.trials",
            "search.timeout", "workers.ray_address", "workers.threads", "workers.device", *document,
            "a.b.c", "", "."]  # fmt: skip
        key = draw(st.sampled_from(keys) | st.text(max_size=6))
        value = draw(odd.map(lambda x: x if isinstance(x, str) else json.dumps(x)) | st.sampled_from(YAML_WORDS))
        word = draw(st.sampled_from([f"{key}={value}", f"{key}={value}", key, f"{key}{value}"]))
        return {"argv": ["check", "study.yaml", "--set", _typed(word)]}

    def _case_recipe(self, draw: Draw) -> Case:
        files = {"recipe.json": json_text(draw, self._json("recipe.json"))}
        if draw(st.booleans()):
            return {"argv": ["merge", "recipe.json", "out"], "files": files}
        return {"argv": ["check", "study.yaml", "--set=space.from=recipe.json"], "files": files}

    def _case_mergekit(self, draw: Draw) -> Case:
        name = draw(st.sampled_from(["merge.yaml", "stack.yaml"]))
        files = {name: yaml_text(draw, self._yaml(name))}
        if draw(st.integers(0, 3)):
            return {"argv": ["merge", name, "out"], "files": files}
        return {"argv": ["check", "study.yaml", f"--set=space.from={name}"], "files": files}

    def _case_evolve(self, draw: Draw) -> Case:
        files = {"evolve.yaml": yaml_text(draw, self._yaml("evolve.yaml"))}
        return {"argv": ["init", "--from-evolve", "evolve.yaml", "--out", "made.yaml"], "files": files}

    def _case_config(self, draw: Draw) -> Case:
        folder = draw(st.sampled_from(["base", "expert"]))
        name = draw(
            st.sampled_from(["config.json"] * 4 + ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
        )
        path = f"{folder}/{name}"
        document = self._json(path) if (self.world / path).exists() else {"max_length": 3}
        extra = draw(st.sampled_from(["", "", "use_cache", "rope_scaling", "rope_parameters", "auto_map",
            "quantization_config", "layer_types", "sliding_window", "attention_bias", "head_dim",
            "text_config", "num_experts", "model_type"]))  # fmt: skip
        if extra and isinstance(document, dict):
            document[extra] = draw(odd)
        argv = draw(st.sampled_from([["check", "study.yaml"], ["check", "study.yaml"], ["merge",
            "merge.yaml", "out"], ["search", "study.yaml", "--workers=0", "--set=search.trials=1"]]))  # fmt: skip
        return {"argv": argv, "files": {path: json_text(draw, document)}}

    def _case_index(self, draw: Draw) -> Case:
        index = "model.safetensors.index.json"
        files = {f"sharded/{index}": json_text(draw, self._json(f"sharded/{index}"))}
        return {"argv": ["check", "study.yaml", "--set=models.experts.clinical=./sharded"], "files": files}

    def _case_header(self, draw: Draw) -> Case:
        path = draw(
            st.sampled_from(["base/model.safetensors", "expert/model.safetensors", "adapter/adapter_model.safetensors"])
        )
        content = (self.world / path).read_bytes()
        if draw(st.booleans()):
            files = {path: damaged_bytes(draw, content)}
        else:
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size]) | {
                "__metadata__": draw(st.sampled_from([{}, {"format": "pt"}]) | odd)
            }
            text = json_text(draw, header)["text"].encode("utf-8", "surrogatepass")
            length = draw(st.sampled_from([len(text)] * 5 + [0, 1, 2**62, 2**64 - 1, 99_000_000]))
            files = {path: raw(length.to_bytes(8, "little") + text + content[8 + size :])}
        expert = ["--set=models.experts.clinical=./adapter"] if path.startswith("adapter") else []
        argv = draw(st.sampled_from([["check", "study.yaml"], ["check", "--full", "study.yaml"],
            ["search", "study.yaml", "--workers=0", "--set=search.trials=1"]]))  # fmt: skip
        return {"argv": [*argv, *expert], "files": files}

    def _case_adapter(self, draw: Draw) -> Case:
        files = {"adapter/adapter_config.json": json_text(draw, self._json("adapter/adapter_config.json"))}
        return {"argv": ["check", "study.yaml", "--set=models.experts.clinical=./adapter"], "files": files}

    def _case_task(self, draw: Draw) -> Case:
        name = draw(st.sampled_from(["skill", "choice"]))
        document = self._yaml(f"{name}/{name}.yaml")
        extra = draw(st.sampled_from(["", "", "include", "fewshot_split", "num_fewshot",
            "generation_kwargs", "filter_list", "process_docs", "doc_to_choice", "group", "repeats",
            "description", "fewshot_config", "target_delimiter", "metadata", "should_decontaminate",
            "doc_to_decontamination_query", "dataset_name", "tag", "output_type", "custom_dataset"]))  # fmt: skip
        if extra:
            document[extra] = draw(odd)
        files = {f"{name}/{name}.yaml": yaml_text(draw, document)}
        return {"argv": ["check", "study.yaml", f"--set=evals.domain.0=./{name}/{name}.yaml"], "files": files}

    def _case_rows(self, draw: Draw) -> Case:
        name = draw(st.sampled_from(["skill", "choice"]))
        path = f"{name}/{name}.jsonl"
        rows = [json.loads(line) for line in (self.world / path).read_text().splitlines()]
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(rows) - 1))
            rows[at] = changed(draw, rows[at], 2)
        lines = [json.dumps(row) for row in rows]
        text = spliced(
            draw, json.dumps(rows) if draw(st.booleans()) else "\n".join(lines), [*JSON_WORDS, "\n", "\r", "\x0b"]
        )
        command = draw(st.sampled_from([["check"], ["check"], ["search", "--workers=0", "--set=search.trials=1"]]))
        argv = [*command, "study.yaml", f"--set=evals.domain.0=./{name}/{name}.yaml"]
        return {"argv": argv, "files": {path: {"text": text}}}

    def _case_run(self, draw: Draw) -> Case:
        name = draw(st.sampled_from(["tasks.json", "tasks.json", "study.yaml", "front.json"]))
        if name == "tasks.json":
            files = {"run/tasks.json": json_text(draw, self._json("run/tasks.json"))}
        elif name == "study.yaml":
            document = self._yaml("run/study.yaml")
            document.setdefault("search", {})["storage"] = draw(st.none() | odd)
            files = {"run/study.yaml": yaml_text(draw, document)}
        else:
            files = {"run/front.json": json_text(draw, {"points": []})}
        return {"argv": self._reader(draw), "files": files}

    def _case_database(self, draw: Draw) -> Case:
        if draw(st.integers(0, 4)) == 0:
            files = {"run/study.db": damaged_bytes(draw, (self.world / "run/study.db").read_bytes())}
            return {"argv": self._reader(draw), "files": files}
        columns = [("trial_user_attributes", "value_json"), ("trial_user_attributes", "value_json"),
            ("trial_user_attributes", "key"), ("trial_params", "distribution_json"), ("trial_params",
            "param_value"), ("trial_params", "param_name"), ("trials", "state"), ("trials", "number"),
            ("trials", "datetime_start"), ("trial_values", "value"), ("trial_values", "value_type"),
            ("trial_values", "objective"), ("studies", "study_name"), ("study_directions", "direction"),
            ("version_info", "schema_version"), ("study_user_attributes", "value_json"),
            ("trial_system_attributes", "value_json"), ("trials", "study_id")]  # fmt: skip
        sql = []
        for _ in range(draw(st.integers(1, 2))):
            table, column = draw(st.sampled_from(columns))
            where = draw(
                st.sampled_from(
                    [
                        "",
                        "",
                        "WHERE rowid % 5 = 1",
                        "WHERE key = 'recipe'",
                        "WHERE key = 'kind'",
                        "WHERE key = 'seconds'",
                    ]
                )
            )
            where = where if "key" not in where or table == "trial_user_attributes" else ""
            sql.append([f"UPDATE OR IGNORE {table} SET {column} = ? {where}", [_stored(draw, column)]])
        if draw(st.integers(0, 5)) == 0:
            gone = draw(st.sampled_from(sorted({table for table, _ in columns})))
            sql = [[draw(st.sampled_from([f"DELETE FROM {gone}", f"DROP TABLE {gone}"])), []]]
        return {"argv": self._reader(draw), "sql": sql}

    def _case_outcomes(self, draw: Draw) -> Case:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = sorted(path.name for path in (self.world / "run/outcomes").iterdir())
        name = draw(st.sampled_from(names))
        path = f"run/outcomes/{name}"
        content = (self.world / path).read_bytes()
        if draw(st.integers(0, 2)) == 0:
            return {"argv": self._reader(draw), "files": {path: damaged_bytes(draw, content)}}
        table = pq.read_table(io.BytesIO(content))
        column = draw(st.sampled_from(table.column_names))
        at = table.column_names.index(column)
        action = draw(
            st.sampled_from(["without", "twice", "strings", "nulls", "odd", "metadata", "empty", "rows", "names"])
        )
        if action == "without":
            table = table.drop_columns([column])
        elif action == "twice":
            table = table.append_column(column, table[column])
        elif action == "metadata":
            given = draw(
                st.sampled_from(
                    [None, {}, {b"trial": b"x"}, {b"trial": b"9" * 5000}, {b"trial": b"3", b"recipe": b"\xff"}]
                )
            )
            table = table.replace_schema_metadata(given)
        elif action == "empty":
            table = table.slice(0, 0)
        elif action == "rows":
            table = pa.concat_tables([table] * draw(st.integers(2, 5)))
        elif action == "names":
            table = table.rename_columns([f"{n}\x1b" if n == column else n for n in table.column_names])
        else:
            value = {
                "strings": "x",
                "nulls": None,
                "odd": draw(st.sampled_from([float("nan"), float("inf"), -1.0, 1e308, 0, "\x1b[2J"])),
            }
            table = table.set_column(at, column, pa.array([value[action]] * len(table)))
        sink = io.BytesIO()
        pq.write_table(table, sink)
        target = draw(
            st.sampled_from([path, path, path, "run/outcomes/99999-search.parquet", "run/outcomes/x-search.parquet"])
        )
        return {"argv": self._reader(draw), "files": {target: raw(sink.getvalue())}}

    def _case_kinds(self, draw: Draw) -> Case:
        """Something else than the file that should be there."""
        place = draw(st.sampled_from(["study.yaml", "merge.yaml", "recipe.json", "evolve.yaml",
            "base/config.json", "base/tokenizer.json", "base/model.safetensors",
            "sharded/model-1.safetensors", "sharded/model.safetensors.index.json", "expert/config.json",
            "skill/skill.yaml", "skill/skill.jsonl", "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors", "run/tasks.json", "run/study.yaml", "run/study.db",
            "run/study.db-wal", "run/lock", "run/log.txt", "run/front.json", "run/report.html",
            "run/outcomes", "run/outcomes/00000-search.parquet", "run", "base", "out", "runs",
            "made.yaml"]))  # fmt: skip
        kind = draw(st.sampled_from([{"pipe": 1}, {"folder": 1}, {"link": "/dev/zero"}, {"link": "loop"},
            {"link": place.split("/")[-1]}, {"link": "none"}, {"size": 0}, {"size": 2_000_000},
            {"size": 5_000_000_000}, {"none": 1}, {"text": "\xff\xfe"}, {"text": "\0"},
            {"text": "version https://git-lfs.github.com/spec/v1"}]))  # fmt: skip
        argv = draw(st.sampled_from([["check", "study.yaml"], ["merge", "merge.yaml", "out"], ["merge",
            "recipe.json", "out"], ["init", "--from-evolve", "evolve.yaml", "--out", "made.yaml"],
            ["check", "study.yaml", "--set=space.from=recipe.json"], ["check", "study.yaml",
            "--set=models.experts.clinical=./sharded"], ["search", "study.yaml", "--workers=0",
            "--set=search.trials=1"], ["check", "study.yaml", "--set=models.experts.clinical=./adapter"],
            *(["status", "run"], ["front", "run"], ["report", "run"])]))  # fmt: skip
        return {"argv": argv, "files": {place: kind}}

    def _case_words(self, draw: Draw) -> Case:
        word = st.sampled_from(
            [*filter(lambda text: "\0" not in text, TEXTS), "run", "study.yaml", "0", "3", "99999", "-1", "9" * 5000]
        )
        command = draw(st.sampled_from(["init", "check", "status", "front", "show", "export", "report", "merge", "x"]))
        options = {
            "init": ["--out", "--domain", "--general", "--from-evolve", "--force"],
            "check": ["--set", "--full"],
            "show": ["--json", "--storage"],
            "export": ["--trial", "--knee", "--max-forgetting", "--sure", "--out"],
        }.get(command, ["--json", "--storage"])
        first = {"init": ["./base", "./expert"], "check": ["study.yaml"], "merge": ["merge.yaml"]}.get(command, ["run"])
        words = draw(st.lists(word | st.sampled_from(options), max_size=4))
        return {"argv": [command, *(first if draw(st.integers(0, 3)) else []), *map(_typed, words)]}

    def _reader(self, draw: Draw) -> list[str]:
        return draw(st.sampled_from([["status", "run"], ["status", "run", "--json"], ["front", "run"],
            ["front", "run", "--json"], ["show", "run", "0"], ["show", "run", "9", "--json"], ["show",
            "run", "1"], ["export", "run", "--knee"], ["report", "run"], ["export", "run",
            "--max-forgetting", "0.2", "--sure", "0.5"]]))  # fmt: skip


def _typed(word: str) -> str:
    """A word as a shell can hand it over: no NUL, and bytes that are no UTF-8 as Python shows them."""
    return word.replace("\0", "").encode("utf-8", "replace").decode()


def _stored(draw: Draw, column: str) -> Any:
    """A value for a column of the study's database, as SQLite can store it."""
    value = draw(
        odd | st.sampled_from(["COMPLETE", "RUNNING", "FAIL", "WAITING", "PRUNED", "MINIMIZE", "INF_POS", "2001-01-01"])
    )
    if column.endswith("_json"):
        return spliced(draw, json.dumps(value), JSON_WORDS).encode("utf-8", "replace").decode().replace("\0", "")
    if isinstance(value, int) and abs(value) >= 2**63:
        value = str(value)
    if isinstance(value, list | dict):
        value = json.dumps(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
