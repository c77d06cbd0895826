"""A study file is read strictly, and every refusal says where, what was given and what would be right."""

from __future__ import annotations

import os
from pathlib import Path

import jsonschema
import pytest

from evals.outcomes import REST, SPARE, TaskSpec
from optimizer.errors import StudyFileError
from optimizer.strict_yaml import LARGEST_FILE, read_yaml
from optimizer.study.new_study import commented_study, new_study
from optimizer.study.schema import Study, study_schema
from optimizer.study.space import space_of
from optimizer.study.study_file import dump_study, read_study, stored_storage
from optimizer.study.tasks import task_specs
from search_spaces import SpaceError
from search_spaces.parameters import METHODS
from tests.search_spaces.names import llama

TENSORS = [f"model.layers.{i}.{part}.weight" for i in range(6) for part in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.fixture
def good() -> str:
    return commented_study("./base", {"clinical": "./expert"}, name="first", domain=["./tasks/notes.yaml"])


def written(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(StudyFileError) as caught:
        read_study(written(folder, text), overrides)
    return str(caught.value).replace(str(folder) + "/", "")


# --- reading ---


def test_a_new_study_is_read_with_absolute_paths(tmp_path: Path, good: str) -> None:
    (tmp_path / "base").mkdir()
    study = read_study(written(tmp_path, good))
    assert study.models.base == str(tmp_path / "base")
    assert study.evals.domain[0].task == str(tmp_path / "tasks/notes.yaml")
    assert study.evals.general[0].task == "arc_easy"
    assert study.run_path == tmp_path / "runs/first"
    assert study.search.trials == 40


TASK_FILE = "task: {name}\ndataset_path: json\n"


def test_tasks_of_a_folder_are_known_by_name(tmp_path: Path, good: str) -> None:
    for place, name in (("a/one", "sums"), ("b", "both"), ("b", "arc_easy")):
        (tmp_path / "tasks" / place).mkdir(parents=True, exist_ok=True)
        text = TASK_FILE.format(name=name) if name != "both" else "group: both\ntask: [sums]\n"
        (tmp_path / "tasks" / place / f"{name}.yaml").write_text(text)
    (tmp_path / "tasks/part.yaml").write_text("doc_to_text: x\n")
    text = good.replace("- ./tasks/notes.yaml", "- sums\n    - {task: both, items: 5}").replace(
        "  items: 30", "  include: tasks\n  items: 30"
    )
    study = read_study(written(tmp_path, text))
    found = [str(Path(entry.source).relative_to(tmp_path)) for entry in study.evals.domain]
    assert found == ["tasks/a/one/sums.yaml", "tasks/b/both.yaml"]
    assert study.evals.general[0].source == str(tmp_path / "tasks/b/arc_easy.yaml")
    assert study.evals.general[1].source == "hellaswag"
    again = read_study(written(tmp_path, dump_study(study)))
    assert again == study
    (tmp_path / "tasks/b/sums.yaml").write_text(TASK_FILE.format(name="sums"))
    assert "evals.include: tasks below tasks have different names" in refusal(tmp_path, text)
    assert "evals.include: a folder of tasks is a folder: there is none at" in refusal(
        tmp_path, text.replace("include: tasks", "include: [tasks/a, nowhere]")
    )
    twice = text.replace("include: tasks", "include: [tasks/a, tasks/b]")
    assert "evals.include: tasks have different names; sums is in" in refusal(tmp_path, twice)


def test_a_hub_id_stays_and_an_existing_folder_does_not(tmp_path: Path, good: str) -> None:
    text = good.replace("./base", "org/model")
    assert read_study(written(tmp_path, text)).models.base == "org/model"
    (tmp_path / "org/model").mkdir(parents=True)
    assert read_study(written(tmp_path, text)).models.base == str(tmp_path / "org/model")


def test_dump_and_read_is_the_same_study(tmp_path: Path, good: str) -> None:
    study = read_study(written(tmp_path, good), ["space.shape=layers", "search.timeout=1e-3", "workers.threads=2"])
    assert study.search.timeout == 0.001
    assert read_study(written(tmp_path, dump_study(study))) == study


def test_overrides_are_yaml_scalars_at_dotted_paths(tmp_path: Path, good: str) -> None:
    overrides = ["search.trials=7", "space.weight=[-1, 1e+0]", "search.timeout=null", "models.experts.second=./x"]
    study = read_study(written(tmp_path, good), [*overrides, "evals.general.0=winogrande", "search.trials=8"])
    assert study.search.trials == 8
    assert study.space.weight == (-1.0, 1.0)
    assert study.models.experts["second"] == str(tmp_path / "x")
    assert study.evals.general[0].task == "winogrande"


def test_a_password_is_not_written_to_the_run_folder(tmp_path: Path, good: str) -> None:
    study = read_study(written(tmp_path, good), ["search.storage=postgresql://me:secret@host/db"])
    assert study.search.storage == "postgresql://me:secret@host/db"
    assert "secret" not in dump_study(study)
    written(tmp_path, dump_study(study))
    with pytest.raises(StudyFileError, match="MERGEFRONT_STORAGE"):
        stored_storage(tmp_path)


def test_tasks_take_the_sections_items_unless_they_have_their_own(tmp_path: Path, good: str) -> None:
    text = good.replace(
        "- arc_easy",
        "- {task: arc_easy, items: 7, bank: 60, holdout_items: rest, certify_items: spare, shots: 2, metric: acc}",
    )
    notes, arc, hellaswag = task_specs(read_study(written(tmp_path, text), ["evals.items=40"]))
    assert notes == TaskSpec(
        str(tmp_path / "tasks/notes.yaml"),
        "domain",
        search_items=40,
        bank_items=200,
        holdout_items=100,
        certify_items=0.2,
    )
    assert arc == TaskSpec(
        "arc_easy",
        "general",
        search_items=7,
        bank_items=60,
        holdout_items=REST,
        certify_items=SPARE,
        shots=2,
        metric="acc",
    )
    assert hellaswag.search_items == 40


def test_a_sentinel_is_a_task_without_search_items(tmp_path: Path, good: str) -> None:
    text = good.replace("  items: 30", "  sentinel: [./pairs, {task: copa, holdout_items: 0.5}]\n  items: 30")
    study = read_study(written(tmp_path, text))
    *others, pairs, copa = task_specs(study)
    assert "sentinel" not in {spec.role for spec in others}
    assert pairs == TaskSpec(str(tmp_path / "pairs"), "sentinel", search_items=0, holdout_items=100)
    assert copa == TaskSpec("copa", "sentinel", search_items=0, holdout_items=0.5)
    assert read_study(written(tmp_path, dump_study(study))) == study
    jsonschema.validate(read_yaml(tmp_path / "study.yaml"), study_schema())


def test_shots_that_are_not_given_are_left_to_the_task(tmp_path: Path, good: str) -> None:
    """And a study file that an earlier version wrote out, with shots: 0 in every task, still means none."""
    text = good.replace("- arc_easy", "- {task: arc_easy, shots: 0}")
    study = read_study(written(tmp_path, text))
    for read in (study, read_study(written(tmp_path, dump_study(study)))):
        assert [spec.shots for spec in task_specs(read)] == [None, 0, None]
    jsonschema.validate(read_yaml(tmp_path / "study.yaml"), study_schema())


def test_holdout_items_may_be_a_share(tmp_path: Path, good: str) -> None:
    specs = task_specs(read_study(written(tmp_path, good.replace("holdout_items: 100", "holdout_items: 0.25"))))
    assert {spec.holdout_items for spec in specs} == {0.25}


@pytest.mark.parametrize("shape", ["uniform", "slope", "layers", "{curve: 3}", "{blocks: 2}"])
def test_every_shape_makes_a_space(tmp_path: Path, good: str, shape: str) -> None:
    study = read_study(written(tmp_path, good), [f"space.shape={shape}"])
    space = space_of(study, TENSORS)
    assert space.shape.kind in shape
    assert dict(space.ranges)["weight"] == (0.0, 1.0)


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if not spec.unsearchable])
def test_every_method_makes_a_space_of_its_own_ranges(tmp_path: Path, good: str, method: str) -> None:
    second = METHODS[method].min_experts > 1
    text = good.replace("  weight: [0, 1]", "  #").replace(
        "expert\n", "expert\n    law: ./law\n" if second else "expert\n"
    )
    space = space_of(read_study(written(tmp_path, text), [f"space.method={method}"]), TENSORS)
    assert set(space.ranges) == {
        parameter.name for parameter in METHODS[method].parameters if parameter.is_searched(experts=1)
    }


def test_a_list_of_methods_makes_a_choice_and_a_list_of_one_does_not(tmp_path: Path, good: str) -> None:
    several = read_study(written(tmp_path, good), ["space.method=[ties, task_arithmetic]", "space.density=[0.5, 1]"])
    space = space_of(several, TENSORS)
    assert space.methods == ("ties", "task_arithmetic")
    assert "ties.clinical.density" in space.distributions()
    assert read_study(written(tmp_path, dump_study(several))) == several
    alone = space_of(read_study(written(tmp_path, good), ["space.method=[ties]"]), TENSORS)
    assert list(alone.distributions()) == list(
        space_of(read_study(written(tmp_path, good), ["space.method=ties"]), TENSORS).distributions()
    )


def test_kinds_of_a_studys_own_have_weights_of_their_own(tmp_path: Path, good: str) -> None:
    study = read_study(written(tmp_path, good.replace("modules: [attn, mlp]", "modules: {qk: [q_proj], attn, mlp}")))
    assert study.space.modules == {"qk": ("q_proj",), "attn": None, "mlp": None}
    assert read_study(written(tmp_path, dump_study(study))) == study
    tensors = [*TENSORS, *(name.replace("q_proj", "o_proj") for name in TENSORS)]
    space = space_of(study, tensors)
    assert "clinical.weight.qk.curve.0" in space.distributions()
    assert space.size == 12
    plain = space_of(read_study(written(tmp_path, good)), tensors)
    assert space.recipe(space.anchors()[1].params).kinds == (("qk", ("q_proj",)),)
    assert plain.recipe(plain.anchors()[1].params).kinds == ()


RECIPE = """
merge_method: ties
base_model: {folder}/base
models: [{{model: {folder}/expert, parameters: {{weight: [0.2, 0.7], density: 0.4}}}}]
parameters: {{normalize: false}}
"""


def from_recipe(folder: Path, good: str, recipe: str = RECIPE, space: str = "{from: recipe.yaml}") -> Study:
    for name in ("base", "expert"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.format(folder=folder))
    head, _, rest = good.partition("space:")
    return read_study(written(folder, f"{head}space: {space}\n\nevals:{rest.partition('evals:')[2]}"))


def test_a_study_starts_from_a_recipe(tmp_path: Path, good: str) -> None:
    study = from_recipe(tmp_path, good)
    space = space_of(study, TENSORS)
    assert (space.methods, space.shape.kind, space.modules) == (("ties",), "slope", ())
    assert list(space.distributions()) == [
        f"clinical.{name}" for name in ("weight.slope.0", "weight.slope.1", "density")
    ]
    *_, last = space.anchors()
    assert last.name == "from recipe.yaml"
    assert list(last.params.values()) == pytest.approx([0.2, 0.7, 0.4])
    again = read_study(written(tmp_path, dump_study(study)))
    assert space_of(again, TENSORS).distributions() == space.distributions()
    (tmp_path / "recipe.json").write_text(space.recipe(last.params).to_json())
    ours = from_recipe(tmp_path, good, space="{from: recipe.json, shape: layers}")
    assert space_of(ours, TENSORS).anchors()[-1].name == "from recipe.json"
    assert space_of(ours, TENSORS).shape.kind == "layers"


SLERP = """
slices: [{{sources: [{{model: {folder}/base, layer_range: [0, 6]}}, {{model: {folder}/expert, layer_range: [0, 6]}}]}}]
merge_method: slerp
base_model: {folder}/base
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
    - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}
    - {{value: 0.5}}
dtype: bfloat16
"""


def test_the_usual_pattern_of_slerp_is_a_start(tmp_path: Path, good: str) -> None:
    study = from_recipe(tmp_path, good, SLERP)
    tensors = [*llama(6, tied=False)]
    space = space_of(study, tensors)
    assert (space.methods, space.shape.kind, space.shape.n) == (("slerp",), "curve", 5)
    assert space.modules == ("self_attn", "mlp_only")
    assert space.size == 15
    start = space.recipe(space.anchors()[-1].params)
    given = [start.value("t", group=f"model.layers.5.{name}.weight") for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert given == pytest.approx([1, 0])
    norms = ("model.layers.5.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight")
    assert [start.value("t", group=name) for name in norms] == pytest.approx([0.5] * 3)
    own = space_of(
        from_recipe(tmp_path, good, SLERP, "{from: recipe.yaml, modules: {a: [self_attn], m: [mlp]}}"), tensors
    )
    assert own.size == 15
    with pytest.raises(SpaceError, match="has numbers for single ones"):
        space_of(from_recipe(tmp_path, good, SLERP, "{from: recipe.yaml, modules: [attn, mlp]}"), tensors)


def test_a_recipe_may_be_a_point_of_one_of_several_methods(tmp_path: Path, good: str) -> None:
    space = space_of(from_recipe(tmp_path, good, space="{from: recipe.yaml, method: [linear, ties]}"), TENSORS)
    assert space.methods == ("linear", "ties")
    assert space.anchors()[-1].params["method"] == "ties"


@pytest.mark.parametrize(
    ("recipe", "space", "message"),
    [
        (RECIPE, "{from: none.yaml}", "none.yaml does not exist"),
        (RECIPE, "{from: none.json}", "none.json does not exist"),
        (
            RECIPE,
            "{from: recipe.yaml, method: linear}",
            "must hold the method.*given linear, needed ties",
        ),
        (RECIPE, "{from: recipe.yaml, shape: uniform}", "holds the recipe it starts from"),
        (
            RECIPE.replace("/expert,", "/other,"),
            "{from: recipe.yaml}",
            "must merge the experts of the study, clinical",
        ),
        (RECIPE.replace("false", "true"), "{from: recipe.yaml}", "write normalize: false in the recipe"),
    ],
)
def test_a_recipe_that_is_no_start_is_refused(recipe: str, space: str, message: str, tmp_path: Path, good: str) -> None:
    study = from_recipe(tmp_path, good, recipe, space)
    with pytest.raises((StudyFileError, SpaceError), match=message):
        space_of(study, TENSORS)


# --- refusing ---


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("trials: 40", "trails: 40", 'yaml: search.trails: there is no such key; given 40; did you mean "trials"'),
        ("name: first", "name: first\ntrials: 3", 'trials: .* no such key; given 3; did you mean "search.trials"'),
        ("- ./tasks/notes.yaml", "- {task: x, itmes: 3}", 'evals.domain.0.itmes: .*; given 3; did you mean "items"?'),
        ("sampler: auto", "sampler: tpa", "search.sampler: must be 'auto', 'tpe', .*; given 'tpa'"),
        ("trials: 40", "trials: 0", "search.trials: must be greater than or equal to 1; given 0"),
        ("holdout_items: 100", "holdout_items: 0", "evals.holdout_items: must be a whole .*, or the word rest"),
        ("holdout_items: 100", "holdout_items: 1.0", "must be a whole number, 1 or more, a share such as 0.3, or"),
        ("holdout_items: 100", "batch_size: 8", 'evals.batch_size: .*; given 8; did you mean "token_budget"?'),
        ("holdout_items: 100", "limit: 8", 'evals.limit: .*; given 8; did you mean "items"?'),
        ("trials: 40", "trials: yes", "search.trials: must be a valid integer; given 'yes'"),
        ("trials: 40", "trials: true", "search.trials: must be a valid integer; given True"),
        ("trials: 40", "trials: 4.0", "search.trials: must be a valid integer; given 4.0"),
        ("trials: 40", "trials: 012", "search.trials: must be a valid integer; given '012'"),
        ("method: task_arithmetic", "method: tise", "there is no merge method 'tise'; did you mean .ties"),
        ("method: task_arithmetic", "method: [ties, ties]", "space.method: must not name a method twice"),
        ("method: task_arithmetic", "method: []", "space.method: must be a merge method or a list of them"),
        ("method: task_arithmetic", "method: [linear, slerp]\n  lambda: [0, 1]", "linear or slerp has no lambda"),
        ("method: task_arithmetic", "method: [ties, arcee_fusion]", "space.method: arcee_fusion cannot be searched"),
        ("method: task_arithmetic", "method: model_stock", "space.method: model_stock needs 2 experts; given 1"),
        ("[0, 1]", "[0.1, 1]", r"space.weight: must hold 0 \(the base\); given \[0.1, 1\]"),
        ("[0, 1]", "[0, 0.9]", r"space.weight: must hold 1 \(the expert\); given \[0, 0.9\]"),
        ("[0, 1]", "[0, .nan]", "space.weight.1: must be a finite number; given nan"),
        ("[0, 1]", "[0]", "space.weight.1: must be given"),
        ("[0, 1]", "[0, one]", "space.weight.1: must be a valid number; given 'one'"),
        ("{curve: 4}", "{curve: 1}", "space.shape: curve must be a whole number from 2 to 64; given"),
        ("{curve: 4}", "wavy", "space.shape: must be uniform, slope, layers, .*; given 'wavy'"),
        ("[attn, mlp]", "[attn, attn]", "space.modules: must not name a module twice"),
        ("[attn, mlp]", "[attn, qk]", "space.modules.1: must be 'embed', 'attn'.*; given 'qk'"),
        ("[attn, mlp]", "{qk: }", "space.modules: the kind 'qk' must have parts of tensor names, {qk: "),
        ("[attn, mlp]", "{mlp: [up_proj]}", "space.modules: a kind must have a name of its own, .*this one is 'mlp'"),
        ("[attn, mlp]", "{qk: [q, q]}", "space.modules: the kind 'qk' must have different parts"),
        ("[attn, mlp]", "{qk: ['']}", "space.modules.qk.0: .*at least 1 char"),
        ("[attn, mlp]", "{qk: q_proj}", "space.modules.qk: must be a valid (array|list|tuple)"),
        ("weight: [0, 1]", "density: [0.1, 1]", "space.density: task_arithmetic has no density"),
        ("task_arithmetic ", "ties\n  density: [0.1, 0.9]", "space.density: must hold 1; given"),
        ("task_arithmetic ", "slerp", "space.weight: slerp has no weight; .*; it has t"),
        ("name: first", "name: ../first", "name: must be letters, digits, .*; given '../first'"),
        ("name: first", "name: 2024", "name: must be a valid string; given 2024"),
        ("name: first", "nam: first", "name: must be given\n.*nam: there is no such key"),
        ("clinical:", "cli.nical:", "an expert's name must be letters"),
        ("- ./tasks/notes.yaml", "- {task: x, expert: clinicl}", "evals.domain.0.expert: .*; did you mean .clinical"),
        ("- arc_easy", "- {task: arc_easy, expert: clinical}", "evals.general.0.expert: only a domain task"),
        ("- arc_easy", "- hellaswag", "evals.general.1.task: a task may stand once"),
        ("  items: 30", "  sentinel: [hellaswag]\n  items: 30", "evals.sentinel.0.task: a task may stand once"),
        (
            "  items: 30",
            "  sentinel: [x, {task: y, items: 5}]\n  items: 30",
            "evals.sentinel.1.items: the search scores no item of a sentinel task; given 5; say holdout_items",
        ),
        (
            "  items: 30",
            "  sentinel: [{task: y, weight: 2}]\n  items: 30",
            "evals.sentinel.0.weight: a sentinel task counts in no objective; given 2; leave it out",
        ),
        ("- arc_easy", "- {task: arc_easy, weight: 0}", "evals.general.0.weight"),
        (
            "  items: 30",
            "  sentinel: [{task: y, expert: clinical}]\n  items: 30",
            "evals.sentinel.0.expert: only a domain task belongs to an expert; given 'clinical'",
        ),
        ("- arc_easy", "- {task: x, bank: 30}", "evals.general.0.bank: must be more than .*; given 30, and 30 items"),
        ("- arc_easy", "- {task: x, items: 200}", "evals.bank: must .* 200 items; .* give the task bank: 0"),
        ("  items: 30", "  sentinel: [{task: y, bank: 9}]\n  items: 30", "evals.sentinel.0.bank: .* no bank; given 9"),
        ("  bank: 200", "  # bank: 200", "search.racing: needs a bank of items to race on; given true; say evals.bank"),
        ("- arc_easy", "- {items: 3}", "evals.general.0: must name one of task, text.*; given none of them"),
        ("- arc_easy", "- {task: x, text: y}", "evals.general.0: must name one of .*; given task: 'x' and text: 'y'"),
        ("- arc_easy", "- wiki.txt", "evals.general.0: a plain text is no task; .*; write {text: wiki.txt}"),
        ("- arc_easy", "- {text: wiki, shots: 2}", "evals.general.0: a text is read as it is .* no shots; given 2"),
        ("- arc_easy", "- {kl_to_base: wiki, group_by: page}", "a text is read as it is and has no group_by; given"),
        ("- ./tasks/notes.yaml", "- {kl_to_base: x}", "evals.domain.0.kl_to_base: how far .*; for a domain say text"),
        ("- arc_easy", "- {text: x}\n    - {text: x}", "evals.general.1.text: a text may stand once"),
        ("    - ./tasks/notes.yaml", "    []", "evals.domain: must have at least 1 item"),
        ("holdout_items: 100", "token_budget: 8", "evals.token_budget: must be .*, 16 or more, or the word"),
        ("threads: auto", "threads: 0", "workers.threads: must be .*, 1 or more, or the word auto; given 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_name(tmp_path: Path, good: str, old: str, new: str, message: str) -> None:
    assert old in good
    assert_matches(message, refusal(tmp_path, good.replace(old, new)))


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(StudyFileError, match=f"(?s){pattern}"):
        raise StudyFileError(text)


def test_every_problem_is_named_at_once(tmp_path: Path, good: str) -> None:
    text = refusal(tmp_path, good.replace("trials: 40", "trials: -1").replace("mlp]", "mpl]"))
    assert [line.split(": ")[1] for line in text.splitlines()] == ["space.modules.1", "search.trials"]


def test_every_expert_needs_a_domain_task(tmp_path: Path, good: str) -> None:
    text = good.replace("./tasks/notes.yaml", "{task: x, expert: clinical}")
    text = text.replace("  experts:", "  experts:\n    legal: ./legal")
    assert "no task is for legal" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "search.trails=3",
            '--set search.trails=3: search.trails: there is no such key; given 3; did you mean "trials"?',
        ),
        ("serch.trials=3", '--set serch.trials=3: serch: there is no such key; .*; did you mean "search"?'),
        ("search.trials=no", "--set search.trials=no: search.trials: must be a valid integer; given 'no'"),
        ("search.trials", "--set: must be key=value"),
        ("name.x=3", "--set name.x=3: 'x' cannot be set there: the key before it is the value 'first'"),
        ("evals.domain.7.items=3", "'7' cannot be set there: the key before it has 1 entries"),
        ("search.trials=[", "--set search.trials=.: line 1: not plain YAML"),
    ],
)
def test_a_wrong_override_is_refused_as_in_the_file(tmp_path: Path, good: str, override: str, message: str) -> None:
    assert_matches(message, refusal(tmp_path, good, override))


# --- texts, paths and numbers of any size ---


def test_a_file_without_an_end_is_refused_at_once(tmp_path: Path, good: str) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, kind in (("/dev/zero", "a device"), (tmp_path / "pipe.yaml", "a pipe")):
        with pytest.raises(StudyFileError, match=f"must be a regular file; given {kind}"):
            read_study(path)
        study = read_study(written(tmp_path, good), [f"space.from={path}"])
        with pytest.raises(StudyFileError, match=f"must be a regular file; given {kind}"):
            space_of(study, TENSORS)


def test_a_recipe_to_start_from_is_a_document_of_a_stated_size(tmp_path: Path, good: str) -> None:
    (tmp_path / "recipe.json").write_text(" " * (LARGEST_FILE + 1))
    study = read_study(written(tmp_path, good), ["space.from=recipe.json"])
    with pytest.raises(StudyFileError, match=r"recipe.json: may hold 1,000,000 bytes; given 1,000,001"):
        space_of(study, TENSORS)


LONG = "x" * 300


@pytest.mark.parametrize("key", ["models.base", "models.experts.clinical", "evals.domain.0.task", "runs", "space.from"])
def test_a_path_that_no_file_can_have_is_refused_by_its_key(tmp_path: Path, good: str, key: str) -> None:
    good = good.replace("- ./tasks/notes.yaml", "- {task: notes}")
    for path, rule in (
        (f"./{LONG}", "a path may have 255 bytes in each name"),
        ("~nobody-by-this-name/x", "no user of this machine has the home folder"),
    ):
        assert_matches(f"study.yaml: {key}: {rule}", refusal(tmp_path, good, f"{key}={path}"))
    assert_matches(
        f"{key}: must not hold control characters; given 'a.x00b'",
        refusal(tmp_path, good, f'{key}="a\\0b"'),
    )


@pytest.mark.parametrize(
    "key",
    ["name", "search.storage", "workers.ray_address", "evals.general.0.metric", "evals.domain.0.expert", "runs"],
)
@pytest.mark.parametrize("text", ['"a\\0"', '"\\e[31m"', '"a\\nb"', '"\\x9b"'])
def test_no_text_of_a_study_holds_control_characters(tmp_path: Path, good: str, key: str, text: str) -> None:
    good = good.replace("- arc_easy", "- {task: arc_easy}").replace("- ./tasks/notes.yaml", "- {task: notes}")
    assert_matches(f"{key}: must not hold control characters; given ", refusal(tmp_path, good, f"{key}={text}"))


def test_no_text_of_a_study_holds_a_token(tmp_path: Path, good: str) -> None:
    token = "hf_" + "a" * 34
    for key in ("models.base", "models.experts.clinical"):
        said = refusal(tmp_path, good, f"{key}=/models/{token}/x")
        assert_matches(f"{key}: must not hold an access token", said)
        assert token not in said


def test_no_text_of_a_study_is_a_book(tmp_path: Path, good: str) -> None:
    said = refusal(tmp_path, good, f"search.storage={'x' * 5000}")
    assert_matches("search.storage: must have 4,096 characters at most; given 'xxx", said)
    assert len(said) < 400
    assert_matches("there is no such key", refusal(tmp_path, good, f'"a\x1b{LONG}"=1'))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"evals.general.{'9' * 5000}=1", "cannot be set there: the key before it has 2 entries"),
        (f"{'a.' * 5000}a=1", "--set: a key may have 16 parts; given 5001"),
        ("\udcff=1", "--set: must be UTF-8 text"),
        ("name=\udcff", "--set: must be UTF-8 text"),
        (f"search.trials={'9' * 5000}", "a whole number may have 300 digits; given one of 5,000"),
        ("search.trials=!!binary aGk=", "tags are refused; given !!binary"),
        ("evals={}", "--set evals={}: evals.domain: must be given"),
        ("evals=[]", "--set evals=..: evals: must"),
        ("=", "--set: must be key=value"),
    ],
)
def test_a_hostile_override_is_refused_in_few_words(tmp_path: Path, good: str, override: str, message: str) -> None:
    said = refusal(tmp_path, good, override)
    assert_matches(message, said)
    assert len(said) < 500


@pytest.mark.parametrize(
    "key",
    ["search.trials", "search.timeout", "search.trial_timeout", "evals.items", "evals.holdout_items",
     "evals.token_budget", "workers.threads", "workers.count", "evals.general.0.items"],
)  # fmt: skip
def test_no_number_of_a_study_is_beyond_all_machines(tmp_path: Path, good: str, key: str) -> None:
    good = good.replace("- arc_easy", "- {task: arc_easy}")
    assert_matches(f"{key}: must be .*; given", refusal(tmp_path, good, f"{key}=1{'0' * 250}"))


# --- new studies ---


def test_a_new_study_names_experts_after_their_folders(tmp_path: Path) -> None:
    (tmp_path / "models/Clinical v1.2").mkdir(parents=True)
    (tmp_path / "studies").mkdir()
    out = tmp_path / "studies/study.yaml"
    out.write_text(new_study(out, "org/base", [str(tmp_path / "models/Clinical v1.2"), "law=org/legal"]))
    study = read_study(out)
    assert study.name == "Clinical-v1-2-law"
    assert study.models.base == "org/base"
    assert study.models.experts == {"Clinical-v1-2": str(tmp_path / "models/Clinical v1.2"), "law": "org/legal"}
    assert "../models/Clinical v1.2" in out.read_text()


def test_a_new_study_needs_different_and_plain_names(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match="different names"):
        new_study(tmp_path / "s.yaml", "b", ["a/x", "b/x"])
    with pytest.raises(StudyFileError, match="an expert's name must be"):
        new_study(tmp_path / "s.yaml", "b", ["a b=x"])


def test_of_very_many_problems_the_first_are_told_and_the_others_counted(tmp_path: Path, good: str) -> None:
    told = refusal(tmp_path, good, f"space.modules={['elsewhere'] * 500}").splitlines()
    assert len(told) == 21
    assert "space.modules.0" in told[0]
    assert told[-1] == "study.yaml: 480 more problems; mend these first"
