"""mergekit-evolve's configurations become studies, or are refused by the key that has no counterpart."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from optimizer.cli import app
from optimizer.errors import StudyFileError
from optimizer.study.from_evolve import study_from_evolve
from optimizer.study.schema import Study
from optimizer.study.space import space_of
from optimizer.study.study_file import read_study
from tests.pico import pico_llama
from tests.search_spaces.names import llama

GENOME = """
genome:
  models: [./law, org/code]
  merge_method: dare_ties
  base_model: ./base
  layer_granularity: 2
  filters: [self_attn, mlp, lm_head]
  allow_negative_weights: true
tasks:
  - {name: spartqa_train, weight: 1.0, metric: "acc_norm,none"}
  - other_task
  - {name: sums, metric: "exact_match,strict-match"}
limit: 70
num_fewshot: 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pico_llama(tmp_path / "base", layers=4)
    (tmp_path / "law").mkdir()
    return tmp_path


def converted(folder: Path, text: str, *changes: tuple[str, str]) -> Study:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / "genome.yml").write_text(text)
    (folder / "study.yaml").write_text(study_from_evolve(Path("genome.yml"), folder / "study.yaml"))
    return read_study(folder / "study.yaml")


def test_a_genome_becomes_a_study(folder: Path) -> None:
    study = converted(folder, GENOME)
    assert study.models.base == str(folder / "base")
    assert study.models.experts == {"law": str(folder / "law"), "code": "org/code"}
    assert (study.space.method, study.space.modules) == ("dare_ties", ("attn", "mlp", "head"))
    assert study.space.ranges == {"weight": (-1.0, 1.0), "density": (0.1, 1.0)}
    asked = [(entry.task, entry.metric, entry.shots) for entry in study.evals.domain]
    assert asked == [
        ("spartqa_train", "acc_norm", 3),
        ("other_task", "acc", 3),
        ("sums", "exact_match,strict-match", 3),
    ]
    assert (study.evals.items, study.evals.holdout_items, study.evals.chat_template) == (70, 70, True)
    for line, shots in (("num_fewshot: 0", 0), ("num_fewshot: null", None)):  # null: each task's own number
        none = converted(folder, GENOME, ("num_fewshot: 3", line))
        assert [entry.shots for entry in none.evals.domain] == [shots] * 3
    weighty = converted(folder, GENOME, ("weight: 1.0", "weight: 0.5"))
    assert [entry.weight for entry in weighty.evals.domain] == [0.5, 1, 1]
    single = converted(folder, GENOME, ("limit: 70", "limit: 70\nfewshot_as_multiturn: no"))
    assert (study.evals.fewshot_as_multiturn, single.evals.fewshot_as_multiturn) == (True, False)
    space = space_of(study, llama(4, tied=False))
    assert space.shape.kind == "blocks"
    assert [name for name in space.distributions() if name.startswith("law.weight")] == [
        f"law.weight.{place}" for place in ("attn.block.0", "attn.block.1", "mlp.block.0", "mlp.block.1", "head")
    ]


def test_finer_filters_become_kinds_in_their_order(folder: Path) -> None:
    study = converted(folder, GENOME, ("[self_attn, mlp, lm_head]", "[q_proj, self_attn, mlp.up]"))
    assert study.space.modules == {"q_proj": ("q_proj",), "self_attn": ("self_attn",), "mlp_up": ("mlp.up",)}
    space = space_of(study, llama(4, tied=False))
    assert [name for name in space.distributions() if name.endswith("block.1") and name.startswith("law.")] == [
        f"law.weight.{kind}block.1" for kind in ("", "q_proj.", "self_attn.", "mlp_up.")
    ]


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (("layer_granularity: 2", "layer_granularity: 2\n  smooth: true"), {"curve": 2}),
        (("layer_granularity: 2", "layer_granularity: 1"), "layers"),
        (("layer_granularity: 2", "layer_granularity: 4"), "uniform"),
        (("  layer_granularity: 2\n", ""), "uniform"),
    ],
)
def test_groups_of_layers_become_a_shape(change: tuple[str, str], shape: object, folder: Path) -> None:
    assert converted(folder, GENOME, change).space.model_dump()["shape"] == shape


def test_slerp_goes_from_its_first_model(folder: Path) -> None:
    text = "genome: {models: [./base, ./law], merge_method: slerp}\ntasks: [a]\napply_chat_template: false"
    study = converted(folder, text)
    assert (study.models.base, list(study.models.experts)) == (str(folder / "base"), ["law"])
    assert study.space.ranges == {"t": (0.0, 1.0)}
    assert not study.evals.chat_template


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("limit: 70", "limits: 70", "limits: is not known; the keys here are genome, tasks, limit"),
        ("merge_method: dare_ties", "merge_method: della", "genome.merge_method: must be one of linear.*'della'"),
        ("base_model: ./base", "bas_model: ./base", "genome.bas_model: is not known"),
        ("  base_model: ./base\n", "", "genome.base_model: must name the base"),
        ("[./law, org/code]", "[./base]", "genome.models: must hold a model besides the base"),
        ("[./law, org/code]", "[./law+lora]", r"genome.models.0: must be a folder or a hub id.*'./law\+lora'"),
        (
            "merge_method: dare_ties",
            "merge_method: dare_ties\n  normalize: true",
            "genome.normalize: has no counterpart",
        ),
        ("filters: [self_attn, mlp", "filters: [mlp, mlp", "genome.filters.1: must be a part .* once; given 'mlp'"),
        ("layer_granularity: 2", "layer_granularity: 3", "genome.layer_granularity: must divide the base's 4 layers"),
        ("base_model: ./base", "base_model: org/base", "the base's layers must be counted.*space.shape"),
        ("layer_granularity: 2", "tokenizer_source: union", "genome.tokenizer_source: must be the base's"),
        ("weight: 1.0", "weight: -1.0", r"tasks.0.weight: must be a number above 0; given -1.0; .*remove it"),
        ("weight: 1.0", "weight: x", "tasks.0.weight: must be a number above 0; given 'x'"),
        ("weight: 1.0", "weights: 1.0", "tasks.0.weights: is not known"),
        ("limit: 70", "shuffle: true", "shuffle: has no counterpart"),
        ("limit: 70", "random_init: true", "random_init: has no counterpart"),
        ("self_attn, mlp", "[self_attn], mlp", "genome.filters.0: must be a part of tensor names"),
        ("limit: 70", "limit: 0.5", "limit: must be a whole number, 1 or more; given 0.5"),
        ("limit: 70", "limit: [70]", "limit: must be a whole number, 1 or more"),
        ("num_fewshot: 3", "num_fewshot: three", "num_fewshot: must be a whole number from 0 to 64; given 'three'"),
        ("num_fewshot: 3", "num_fewshot: -1", "num_fewshot: must be a whole number from 0 to 64; given -1"),
        ("limit: 70", "apply_chat_template: nay", "apply_chat_template: must be true or false; given 'nay'"),
        ("limit: 70", "fewshot_as_multiturn: 0", "fewshot_as_multiturn: must be true or false; given 0"),
        ("limit: 70", "shuffle: 1", "shuffle: must be true or false; given 1"),
        ("allow_negative_weights: true", "allow_negative_weights: 1", "genome.allow_negative_weights: must be true"),
        ("allow_negative_weights: true", "normalize: x", "genome.normalize: must be true or false; given 'x'"),
        ("layer_granularity: 2", "layer_granularity: 2\n  smooth: x", "genome.smooth: must be true or false"),
        ('metric: "acc_norm,none"', "metric: 3", "tasks.0.metric: must be a metric's name; given 3"),
        ("name: sums", "name: ''", "tasks.2.name: must be a task's name"),
        ("base_model: ./base", "base_model: ~nobody-by-this-name/x", "genome.base_model: no user of this machine"),
        ("./law", "x" * 300, "genome.models.0: a path may have 255 bytes"),
        ("./law", '"a\\0"', "genome.models.0: a path must not hold a NUL character"),
        ("merge_method: dare_ties", f"merge_method: {'x' * 5000}", "must be one of .*; given 'x{40,80}'?\\.\\.\\."),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(old: str, new: str, message: str, folder: Path) -> None:
    with pytest.raises(StudyFileError, match=f"genome.yml: .*{message}"):
        converted(folder, GENOME, (old, new))


@pytest.mark.parametrize(
    "config",
    ["[]", "[" * 100_000, '{"num_hidden_layers": "x"}', '{"num_hidden_layers": [4]}', '{"num_hidden_layers": 0}',
     '{"num_hidden_layers": 1e400}', '{"num_hidden_layers": ' + "9" * 5000 + "}", '{"num_hidden_layers": 4.5}', "\xff"],
)  # fmt: skip
def test_a_base_that_does_not_tell_its_layers_is_refused(folder: Path, config: str) -> None:
    (folder / "base/config.json").write_text(config, encoding="latin-1")
    with pytest.raises(StudyFileError, match=r"genome\.layer_granularity: the base's layers must be counted"):
        converted(folder, GENOME)


def test_a_file_name_that_is_no_run_name_is_not_taken_for_one(folder: Path) -> None:
    (folder / "genome\nname: x.yml").write_text(GENOME)
    text = study_from_evolve(Path("genome\nname: x.yml"), folder / "a study.yaml")
    (folder / "a study.yaml").write_text(text)
    assert read_study(folder / "a study.yaml").name == "law-code"


def test_the_command_writes_it(folder: Path) -> None:
    (folder / "genome.yml").write_text(GENOME)
    run = CliRunner().invoke
    made = run(app, ["init", "--from-evolve", "genome.yml", "--out", "evolved.yaml", "--general", "piqa"])
    assert made.exit_code == 0, made.output
    study = read_study(folder / "evolved.yaml")
    assert study.name == "evolved"
    assert [entry.task for entry in study.evals.general] == ["piqa"]
    assert run(app, ["init", "--from-evolve", "genome.yml", "--out", "evolved.yaml"]).exit_code == 2
    assert "only --general and --out" in run(app, ["init", "a", "b", "--from-evolve", "genome.yml"]).output
    assert "name the base" in run(app, ["init", "a"]).output
