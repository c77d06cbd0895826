from __future__ import annotations

from collections.abc import Callable

import pytest

from search_spaces.errors import SpaceError
from search_spaces.groups import (
    PASSED,
    flow_order,
    group_at,
    group_of,
    group_tensors,
    is_placed,
    kind_of,
    layer_count,
    layer_of,
    split_name,
)
from tests.search_spaces.names import ALL, gpt2, llama

Names = Callable[[int], dict[str, str]]


@pytest.mark.parametrize("names", ALL.values(), ids=ALL.keys())
def test_every_tensor_of_a_known_architecture_has_its_group(names: Names) -> None:
    for name, group in names(12).items():
        assert group_of(name) == group, name


@pytest.mark.parametrize("names", ALL.values(), ids=ALL.keys())
def test_groups_partition_the_names_in_the_order_data_flows(names: Names) -> None:
    given = names(12)
    groups = group_tensors(reversed(list(given)))
    assert sorted(name for tensors in groups.values() for name in tensors) == sorted(given)
    inner = [f"layer.{i:02d}.{kind}" for i in range(12) for kind in ("attn", "mlp")]
    assert list(groups) == ["embed", *inner, "head"]


def test_a_prefix_of_the_whole_model_changes_no_group() -> None:
    bare = {name.removeprefix("transformer."): group for name, group in gpt2().items()}
    assert {name: group_of(name) for name in bare} == bare


def test_a_group_says_its_kind_and_layer() -> None:
    assert (kind_of("layer.07.mlp"), layer_of("layer.07.mlp")) == ("mlp", 7)
    assert (kind_of("head"), layer_of("head")) == ("head", None)
    assert group_of("model.layers.117.mlp.up_proj.weight") == "layer.117.mlp"
    assert sorted(["layer.117.mlp", "head", "layer.20.attn", "embed"], key=flow_order)[1] == "layer.20.attn"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.mamba.A_log", "layer.03.attn"),
        ("model.layers.3.pre_ff_layernorm.weight", "layer.03.mlp"),
        ("backbone.layers.3.mixer.in_proj.weight", "layer.03.attn"),
        ("backbone.layers.3.norm.weight", "layer.03.attn"),
        ("model.layers.3.conv.conv.weight", "layer.03.attn"),
        ("model.layers.3.operator_norm.weight", "layer.03.attn"),
        ("model.layers.3.linear_attn.in_proj_qkvz.weight", "layer.03.attn"),
        ("model.embedding_norm.weight", "head"),
        ("model.embed_tokens_per_layer.weight", "embed"),
    ],
)
def test_what_mixes_tokens_stands_where_attention_does(name: str, group: str) -> None:
    assert group_of(name) == group
    assert is_placed(name)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.layer_scalar", "layer.03.mlp"),
        ("model.layers.3.altup.correction_coefs.weight", "layer.03.mlp"),
        ("model.altup_projections.0.weight", "head"),  # a number, but of no layer
        ("score.weight", "head"),
    ],
)
def test_what_no_rule_knows_goes_with_its_layer_or_the_head(name: str, group: str) -> None:
    assert group_of(name) == group
    assert not is_placed(name)


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "model.visual.blocks.1.mlp.linear_fc1.weight",
        "multi_modal_projector.linear_1.weight",
        "model.embed_audio.embedding_projection.weight",
    ],
)
def test_what_reads_images_or_sound_is_in_no_group(name: str) -> None:
    assert group_of(name) == PASSED
    assert split_name(name)[1] is None
    assert group_tensors([*llama(), name]) == group_tensors(llama())
    with pytest.raises(SpaceError, match="passed through as the base has it"):
        group_at(name)


@pytest.mark.parametrize("group", ["layer.7.attn", "layer.007.attn", "layer.07", "layers.07.attn", "Head", ""])
def test_a_misspelt_group_is_refused(group: str) -> None:
    with pytest.raises(SpaceError, match=r"layer\.NN\.attn"):
        kind_of(group)


def test_two_stacks_and_gaps_are_refused() -> None:
    encoder = "encoder.layers.0.self_attn.q_proj.weight"
    with pytest.raises(SpaceError, match=r"one stack of layers.*encoder"):
        group_tensors([*llama(), encoder])
    with pytest.raises(SpaceError, match="no tensor with a layer index"):
        group_tensors(["model.norm.weight"])
    with pytest.raises(SpaceError, match=r"without a gap.*\[0, 2\]"):
        group_tensors(name for name in llama() if ".1." not in name)
    with pytest.raises(SpaceError, match="no layer"):
        layer_count(["embed", "head"])
