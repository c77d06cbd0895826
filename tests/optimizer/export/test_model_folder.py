"""An exported folder loads, is the merge bit for bit, and can be made again from what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimizer.checkpoints.opening import open_checkpoint
from optimizer.errors import MergeError
from optimizer.export import model_folder as export
from optimizer.export.card import model_card, public_name
from optimizer.export.commands import merge_recipe
from optimizer.export.model_folder import export_model
from optimizer.merging.merge import Sources, merged_tensor
from search_spaces import METHODS, Recipe, Setting
from search_spaces.mergekit.reader import from_mergekit
from tests.pico import pico_expert, pico_llama

pytestmark = pytest.mark.slow  # whole studies are run


def weighted(method: str, experts: dict[str, str], base: Path, *values: tuple[str, str, str, float]) -> Recipe:
    return Recipe(method, str(base), tuple(experts.items()), tuple(Setting(*value) for value in values))


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    base = pico_llama(tmp_path / "models" / "Base model")
    return base, {name: str(pico_expert(base, tmp_path / "models" / name, seed=i)) for i, name in enumerate("ab", 1)}


def test_an_export_loads_and_is_the_merge(models: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    base, experts = models
    recipe = weighted("linear", experts, base, ("weight", "a", "", 0.25), ("weight", "b", "layer.01.mlp", 0.5))
    sources = Sources.open(base, experts)
    out = export_model(recipe, sources, tmp_path / "out", scores={"law": {"candidate": 0.5}}, card="By hand.")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, merged_tensor(name, sources, recipe)), name
    assert AutoTokenizer.from_pretrained(out)("ab").input_ids == AutoTokenizer.from_pretrained(base)("ab").input_ids


def test_what_mergekit_has_no_word_for_is_exported_without_its_document(
    models: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    base, experts = models
    out = export_model(
        weighted("sce", experts, base, ("weight", "", "", 0.5)), Sources.open(base, experts), tmp_path / "o"
    )
    assert not (out / "mergekit.yaml").exists()
    assert "mergekit's sce has no weight, which is 1 there" in (out / "README.md").read_text()


def test_an_export_copies_the_bases_files_byte_for_byte(models: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    base, experts = models
    (base / "LICENSE.txt").write_text("free")
    (base / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (base / "README.md").write_text("the base's own card")
    (base / "training_args.bin").write_bytes(b"pickle")
    out = export_model(weighted("linear", experts, base), Sources.open(base, experts), tmp_path / "out")
    written = {path.name for path in out.iterdir()}
    ours = {"README.md", "recipe.json", "mergekit.yaml", "model.safetensors"}
    assert written - ours == {path.name for path in base.iterdir()} - ours - {"training_args.bin"}
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in written - ours)
    assert (out.stat().st_mode & 0o777) == 0o755


def test_an_export_says_how_to_make_it_again(models: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    base, experts = models
    recipe = weighted("ties", experts, base, ("weight", "a", "", 0.25), ("density", "b", "", 0.5))
    out = export_model(recipe, Sources.open(base, experts), tmp_path / "out")
    assert Recipe.from_json((out / "recipe.json").read_text()) == recipe
    names = open_checkpoint(base).names
    again = from_mergekit(yaml.safe_load((out / "mergekit.yaml").read_text()), names, base_dtype="bfloat16")
    for expert in experts:
        assert again.value("weight", expert=expert, group="embed") == recipe.value("weight", expert=expert)
        assert again.value("density", expert=expert, group="embed") == recipe.value("density", expert=expert)
    rebuilt = export_model(recipe, Sources.open(base, experts), tmp_path / "again")
    assert (rebuilt / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


RANDOM = [method for method, spec in METHODS.items() if spec.random]


@pytest.mark.parametrize("method", [*RANDOM, "ties", "linear"])
def test_an_export_is_made_again_to_the_bit_from_its_mergekit_document(method: str, tmp_path: Path) -> None:
    base = pico_llama(tmp_path / "base")
    # the folders have one name, and sort in another order than the experts: a sum and a mask hang on names
    experts = {
        name: str(pico_expert(base, tmp_path / f"expert-{4 - i}/final", seed=i)) for i, name in enumerate("abc", 1)
    }
    weights = [("weight", name, "layer.01.mlp", 0.1 * i) for i, name in enumerate("abc", 1)]
    density = [("density", "", "", 0.6), ("density", "b", "head", 0.5)] if method != "linear" else []
    recipe = weighted(method, experts, base, *weights, ("weight", "", "", 0.3), *density)
    first = export_model(recipe, Sources.open(base, experts), tmp_path / "1")
    second = merge_recipe(first / "mergekit.yaml", tmp_path / "2")
    third = merge_recipe(second / "mergekit.yaml", tmp_path / "3")
    fourth = merge_recipe(second / "recipe.json", tmp_path / "4")
    for again in (second, third, fourth):
        assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
        assert (again / "config.json").read_bytes() == (first / "config.json").read_bytes()
    card = (first / "README.md").read_text()
    assert "all that `mergefront merge` needs to make it again, to the bit" in card
    assert ("mergekit draws random masks of its own" in card) is (method in RANDOM)


def test_a_base_of_two_dtypes_keeps_both_when_it_is_made_again(tmp_path: Path) -> None:
    base = pico_llama(tmp_path / "base")
    expert = pico_expert(base, tmp_path / "law")
    for folder in (base, expert):
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = weighted("linear", {"law": str(expert)}, base, ("weight", "", "", 0.3))
    first = export_model(recipe, Sources.open(base, {"law": str(expert)}), tmp_path / "1")
    again = merge_recipe(first / "mergekit.yaml", tmp_path / "2")
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert open_checkpoint(again).dtype("model.norm.weight") == torch.float32


def test_the_card_has_front_matter_recipe_and_scores_and_no_local_path(
    models: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    base, experts = models
    recipe = weighted("linear", experts, base, ("weight", "a", "embed", 0.125))
    scores = {"law|<b>": {"candidate": 0.5, "base": 1 / 3}, "facts": {"base": 0.25}}
    card = model_card(recipe, Sources.open(base, experts), title="x`\n<script>", scores=scores, card="By *hand*.")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["Base-model", "a", "b"]
    assert str(tmp_path) not in card
    assert "<script>" not in card
    assert "<b>" not in card
    for line in ("By *hand*.", "| embed | 0.125 |", "| law&#124;&lt;b&gt; | 0.5 | 0.3333 |", "| facts |  | 0.25 |"):
        assert line in card
    assert "In every group: b weight 1, sum 1." in card


def test_the_card_has_no_row_for_a_group_whose_tensors_all_have_weights_of_their_own(
    models: tuple[Path, dict[str, str]],
) -> None:
    base, experts = models
    sources = Sources.open(base, experts)
    own = {name: 0.5 + i / 100 for i, name in enumerate(sources.base.names) if ".mlp." not in name or ".1." in name}
    recipe = weighted("linear", experts, base, *(("weight", "a", name, value) for name, value in own.items()))
    card = model_card(recipe, sources, title="x", scores={}, card="")
    rows = [line.split(" | ")[0].strip("| ") for line in card.splitlines()]
    assert own.keys() <= set(rows)
    assert "layer.00.mlp" in rows
    assert not {"embed", "layer.00.attn", "layer.01.attn", "head"} & set(rows)


def test_a_hub_id_is_named_in_full_and_a_folder_by_its_last_part(models: tuple[Path, dict[str, str]]) -> None:
    checkpoint = open_checkpoint(models[0])
    assert public_name(checkpoint) == "Base-model"
    object.__setattr__(checkpoint, "source", "org/model-1.0")
    assert public_name(checkpoint) == "org/model-1.0"


def test_a_failing_export_leaves_nothing(
    models: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "copy_files", fail)
    with pytest.raises(MergeError, match="No space left"):
        export_model(weighted("linear", models[1], models[0]), Sources.open(*models), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


# Parity with mergekit


LAYERED = [("weight", "a", f"layer.{i:02d}.{kind}", w) for i, k in enumerate((0.2, 0.9)) for kind, w in
           (("attn", k), ("mlp", k / 2))]  # fmt: skip
PARITY = {
    "linear": [("weight", "b", "", 0.3), *LAYERED],
    "task_arithmetic": [("weight", "b", "", -0.3), ("lambda", "", "", 0.8), *LAYERED],
    "slerp": [("t", "", "", 0.4), ("t", "", "layer.01.attn", 0.9), ("t", "", "embed", 0.1)],
    "ties": [("density", "a", "", 0.4), ("density", "b", "", 0.7), ("weight", "b", "", 0.5), *LAYERED],
    "ties, not normalised": [("normalize", "", "", 0.0), ("density", "a", "", 0.4), *LAYERED],
}


def exported(case: str, folder: Path, *, tied: bool) -> tuple[Path, Path]:
    """Export a case of float32 models; return the model folder, and its mergekit document asking for bfloat16."""
    scale = 0.02 if tied else 0.5  # slerp follows a line for the one, an arc for the other
    # float32 sources have no equal magnitudes, of which mergekit may keep any
    base = pico_llama(folder / "base", dtype="float32", tied=tied)
    experts = {name: str(pico_expert(base, folder / name, seed=i, scale=scale)) for i, name in enumerate("ab", 1)}
    method = case.split(",")[0]
    if method == "slerp":
        del experts["b"]
    recipe = weighted(method, experts, base, *PARITY[case])
    out = export_model(recipe, Sources.open(base, experts), folder / "ours")
    document = yaml.safe_load((out / "mergekit.yaml").read_text())
    (folder / "bf16.yaml").write_text(yaml.safe_dump({**document, "out_dtype": "bfloat16"}))
    return out, folder / "bf16.yaml"


def assert_same_model(ours_at: Path, theirs_at: Path) -> None:
    ours, theirs = open_checkpoint(ours_at), open_checkpoint(theirs_at)
    assert ours.names == theirs.names
    for name in ours.names:
        one, other = ours.tensor(name).bfloat16().double(), theirs.tensor(name).double()
        step = torch.maximum(one.abs(), other.abs()) * 2**-7 + 1e-7  # the gap between neighbours in bfloat16
        assert ((one - other).abs() <= step).all(), name
        assert (one == other).double().mean() > 0.98, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PARITY)
@pytest.mark.parametrize("tied", [True, False])
def test_mergekit_makes_the_same_model_from_our_yaml(case: str, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    ours, document = exported(case, tmp_path, tied=tied)
    config = MergeConfiguration.model_validate(yaml.safe_load(document.read_text()))
    run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True))
    assert_same_model(ours, tmp_path / "theirs")


def test_mergekit_run_as_its_users_run_it_makes_the_same_model(tmp_path: Path) -> None:
    folder = os.environ.get("MERGEKIT_BIN")  # of another environment
    if not folder:
        pytest.importorskip("mergekit")
    command = Path(folder or Path(sys.executable).parent) / "mergekit-yaml"
    ours, document = exported("ties", tmp_path, tied=False)
    subprocess.run([command, document, tmp_path / "theirs", "--quiet"], check=True, timeout=300)
    assert_same_model(ours, tmp_path / "theirs")
