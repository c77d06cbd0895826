"""The check reads headers and tasks only, says what will run, and gathers everything that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from optimizer.errors import RunError, StudyFileError
from optimizer.run_study import fingerprint
from optimizer.search.plan import Plan, count_tokens, make_plan, require_own_names, require_sound
from optimizer.study.study_file import read_study
from optimizer.views.plan import _kind_rows, _odd_rows, print_plan
from search_spaces.space import Space
from tests.optimizer.small_study import write_study
from tests.search_spaces.names import llama


@pytest.fixture(scope="module")
def study_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


def plan_of(path: Path, *overrides: str) -> Plan:
    plan = make_plan(read_study(path, overrides))
    count_tokens(plan)
    return plan


def printed(plan: Plan) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plan(plan, console)
    return console.export_text()


def test_a_sound_study_is_told_in_full_and_fits(study_path: Path) -> None:
    plan = plan_of(study_path)
    ready = require_sound(plan)
    text = printed(plan)
    assert plan.problems == []
    assert ready.models == list(plan.models.values())
    assert max(len(line) for line in text.splitlines()) <= 80
    for words in (
        "6: embed, layer.00.attn",
        "4: clinical.weight.attn.slope.0",
        "base, expert:clinical, uniform",
    ):
        assert words in " ".join(text.split())
    for words in ("skill", "manners", "bits_per_byte", "tokens a trial", "very roughly", "no problems found"):
        assert words in text


def test_it_says_how_many_shots_a_task_has_and_who_asks_for_them(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    rows = [json.dumps({"q": f"{i}", "c": ["yes", "no"], "g": i % 2}) for i in range(20)]
    for name, own in (("plain", ""), ("shown", "num_fewshot: 3\n"), ("set", "num_fewshot: 3\n")):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: g\n"
            f"{own}metric_list: [{{metric: acc}}]\n"
        )
    tasks = "./plain.yaml, ./shown.yaml, {task: ./set.yaml, shots: 1}"
    text = printed(plan_of(path, f"evals.general=[{tasks}]", "evals.holdout_items=4"))
    lines = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if "general" in line}
    assert "acc 0.50 0 4 4" in lines["plain"]
    assert "acc 0.50 3 (task) 4 4" in lines["shown"]
    assert "acc 0.50 1 (study) 4 4" in lines["set"]


def test_it_notes_what_a_person_might_not_expect(study_path: Path) -> None:
    changed = printed(plan_of(study_path, "evals.general=[{task: ./manners/manners.yaml, metric: word_perplexity}]"))
    assert "note: task manners is scored in bits_per_byte, not in word_perplexity" in " ".join(changed.split())
    assert "note:" not in printed(plan_of(study_path))


def test_every_problem_is_found_at_once(study_path: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("task: odd\ndataset_path: json\n")
    plan = plan_of(
        study_path,
        "models.experts.lost=./nowhere",
        "space.shape={curve: 9}",
        f"evals.domain=[{tmp_path}/odd.yaml, ./none/none.yaml]",
    )
    keys = [problem.split(":")[0] for problem in plan.problems]
    assert keys == ["models.experts.lost", "space", "evals", "evals"]
    with pytest.raises(StudyFileError, match=r"(?s)nowhere.*shape.*odd.*none"):
        require_sound(plan)
    assert "4 problems" in printed(plan)


def test_mismatches_of_an_expert_are_all_listed(study_path: Path, tmp_path: Path) -> None:
    expert = tmp_path / "expert"
    expert.mkdir()
    source = study_path.parent / "expert"
    for file in source.iterdir():
        (expert / file.name).write_bytes(file.read_bytes())
    tensors = load_file(expert / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    plan = plan_of(study_path, f"models.experts.clinical={expert}")
    text = "\n".join(plan.problems)
    assert "models.experts.clinical: model.norm.weight has shape (32,)" in text
    assert "rms_norm_eps" in text


def test_without_a_base_the_rest_is_still_looked_at(study_path: Path) -> None:
    plan = plan_of(study_path, "models.base=./nowhere", "evals.items=1000")
    assert [problem.split(":")[0] for problem in plan.problems] == ["models.base", "evals", "evals"]
    assert plan.space is None
    assert "3 problems" in printed(plan)


def test_kinds_and_prompts_are_part_of_the_fingerprint_where_there_are_any(study_path: Path) -> None:
    plain = fingerprint(require_sound(plan_of(study_path)))
    assert not any(key.startswith("kind ") for key in plain["space"])
    assert not {"system_instruction", "fewshot_as_multiturn"} & set(plain["evals"])
    found = [
        fingerprint(require_sound(plan_of(study_path, f"space.modules={{qk: [{pattern}]}}")))["space"]
        for pattern in ("q_proj", "k_proj")
    ]
    assert found[0]["parameters"] == found[1]["parameters"]
    assert [space["kind qk"] for space in found] == ["q_proj", "k_proj"]
    told = fingerprint(require_sound(plan_of(study_path, "evals.system_instruction=Be brief.")))
    assert told["evals"] == plain["evals"] | {"system_instruction": "Be brief."}


def test_the_fingerprint_holds_what_a_score_depends_on_and_nothing_else(study_path: Path) -> None:
    same = fingerprint(require_sound(plan_of(study_path)))
    assert json.loads(json.dumps(same)) == same
    unscored = ("search.trials=99", "workers.count=2", "search.sampler=tpe")
    assert fingerprint(require_sound(plan_of(study_path, *unscored))) == same
    assert {"requests", "versions", "items"} < same.keys()
    for change in (
        "evals.seed=1",
        "evals.dtype=float32",
        "evals.items=5",
        "space.shape=uniform",
        "space.weight=[0, 2]",
    ):
        assert fingerprint(require_sound(plan_of(study_path, change))) != same, change


def test_another_owner_of_an_import_name_is_named() -> None:
    require_own_names(lambda: {"evals": ["mergefront"], "numpy": ["numpy"]})
    with pytest.raises(RunError, match=r"'evals'.*openai-evals is installed.*pip uninstall openai-evals"):
        require_own_names(lambda: {"evals": ["mergefront", "openai-evals"]})


WHICH = "which transformers cannot use"


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("base/config.json", b'"use_cache": true', b'"use_cache": "x"', f"use_cache is 'x', {WHICH}"),
        ("base/config.json", b'"num_attention_heads": 4', b'"num_attention_heads": 0', "num_attention_heads is 0"),
        ("expert/config.json", b'"use_cache": true', b'"use_cache": "x"', f"use_cache is 'x', {WHICH}"),
        ("expert/model.safetensors", b'{"format":"pt"}', b'{"format": 1 }', "__metadata__ must hold texts by name"),
        ("base/tokenizer_config.json", b"{", b'{"added_tokens_decoder": 3, ', f"its tokenizer, {WHICH}"),
    ],
)  # fmt: skip
def test_what_a_search_would_die_of_is_a_problem_that_names_its_file(
    study_path: Path, file: str, old: bytes, new: bytes, words: str
) -> None:
    path = study_path.parent / file
    content = path.read_bytes()
    assert old in content
    grown = (len(new) - len(old)) if path.suffix == ".safetensors" else 0
    changed = content.replace(old, new, 1)
    if grown:
        changed = (int.from_bytes(content[:8], "little") + grown).to_bytes(8, "little") + changed[8:]
    path.write_bytes(changed)
    try:
        problems = plan_of(study_path).problems
    finally:
        path.write_bytes(content)
    assert len(problems) == 1
    assert words in problems[0]
    assert str(path.parent) in problems[0]


def test_what_each_kind_of_modules_covers_is_listed() -> None:
    tensors = [*llama(3, tied=False)]
    space = Space.build(
        "linear", "b", experts={"law": "l"}, tensors=tensors, shape="uniform", modules=("qk", "ends"), ranges={},
        patterns={"qk": ["q_proj", "k_proj"], "ends": ["embed_tokens", "lm_head"]},
    )  # fmt: skip
    assert list(_kind_rows(space, tensors)) == [
        ("kind qk", "q_proj, k_proj: 6 tensors in 3 layers"),
        ("kind ends", "embed_tokens, lm_head: 2 tensors in embed, head"),
    ]


def test_towers_and_parts_that_no_rule_places_are_listed() -> None:
    layer = "model.layers.3."
    names = [f"{layer}layer_scalar", f"{layer}mlp.up_proj.weight", "model.visual.merger.weight", "score.weight"]
    assert list(_odd_rows(names)) == [
        ("towers", "1 tensor for images or sound, which stay the base's: model.visual"),
        ("other parts", "layer_scalar: the weight of their layer's mlp"),
        ("other parts", "score.weight: the weight of the head"),
    ]
    assert not list(_odd_rows([f"{layer}mlp.up_proj.weight", "model.norm.weight"]))
