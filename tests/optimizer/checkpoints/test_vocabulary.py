"""An expert with more tokens than its base, or with its tokens on other rows, is merged by the base's tokens."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimizer.checkpoints.checkpoint import Checkpoint
from optimizer.checkpoints.compare import compare
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.vocabulary import match_rows
from optimizer.errors import CheckpointError
from optimizer.export.model_folder import export_model
from optimizer.merging.merge import Sources, merged_tensor
from optimizer.views.plan import model_rows
from search_spaces import Recipe, Setting
from search_spaces.mergekit.reader import from_mergekit
from tests.pico import pico_expert, pico_llama

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW = ["<lemma>", "<proof>"]
HALF = {"parameters": {"weight": 0.5}}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_llama(tmp_path / "base", tied=False)


@pytest.fixture
def expert(base: Path, tmp_path: Path) -> Path:
    """Two tokens more, and rows up to a multiple of 8: 264."""
    folder = pico_expert(base, tmp_path / "expert")
    add_tokens(folder, NEW)
    resize(folder, 264)
    return folder


def add_tokens(folder: Path, tokens: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))


def resize(folder: Path, rows: int) -> None:
    """Give embeddings and head so many rows, the new ones random."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name in (EMBEDDINGS, HEAD):
        more = torch.randn(max(0, rows - len(tensors[name])), tensors[name].shape[1], generator=generator)
        tensors[name] = torch.cat([tensors[name], more.to(tensors[name].dtype)])[:rows].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))


def reverse(folder: Path) -> None:
    """Lay the tokens that are not special, and their rows, out in reverse."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    rows = [0, 1, 2, *range(len(vocabulary) - 1, 2, -1)]
    content["model"]["vocab"] = {token: rows[i] for token, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tensors = load_file(folder / "model.safetensors")
    for name in (EMBEDDINGS, HEAD):
        tensors[name][: len(rows)] = tensors[name][: len(rows)][rows].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def opened(base: Path, expert: Path) -> tuple[Checkpoint, Checkpoint]:
    one = open_checkpoint(base)
    other = open_checkpoint(expert, base=one)
    assert compare(one, other) == []
    return one, other


def test_rows_of_new_tokens_and_padding_are_left_out_without_a_copy(base: Path, expert: Path) -> None:
    one, other = opened(base, expert)
    assert (other.is_matched, other.left_out) == (True, 5)
    for name in (EMBEDDINGS, HEAD):
        stored = load_file(expert / "model.safetensors")[name]
        assert other.kind(name) == one.kind(name)
        assert other.size(name) == one.size(name)
        assert other.tensor(name).equal(stored[:259])
        assert other.read_anew().tensor(name).equal(stored[:259])
        assert other.tensor(name).untyped_storage().nbytes() == stored.nbytes  # a view of the map
    assert other.bytes == one.bytes


def test_rows_are_found_by_token_wherever_they_lie(base: Path, expert: Path) -> None:
    straight = open_checkpoint(expert, base=open_checkpoint(base))
    wanted = {name: straight.tensor(name).clone() for name in straight.names}
    reverse(expert)
    _, other = opened(base, expert)
    assert other.fingerprint != straight.fingerprint
    for name, tensor in wanted.items():
        assert other.tensor(name).equal(tensor)
        assert other.read_anew().tensor(name).equal(tensor)


def test_a_row_without_a_token_in_the_base_stays_the_base_s_own(base: Path, expert: Path) -> None:
    resize(base, 264)  # the expert gave rows 259 and 260 of the padding to its tokens
    one, other = opened(base, expert)
    assert other.left_out == 2
    stored = load_file(expert / "model.safetensors")[HEAD]
    assert other.tensor(HEAD)[259:261].equal(one.tensor(HEAD)[259:261])
    assert other.tensor(HEAD)[:259].equal(stored[:259])
    assert other.tensor(HEAD)[261:].equal(stored[261:])
    resize(expert, 261)  # and has less padding than the base
    one, other = opened(base, expert)
    assert other.read_anew().tensor(HEAD)[259:].equal(one.tensor(HEAD)[259:])


def test_padding_alone_is_left_out(base: Path, tmp_path: Path) -> None:
    padded = pico_expert(base, tmp_path / "padded")
    resize(padded, 320)
    assert opened(base, padded)[1].left_out == 61


@given(st.permutations(range(6)), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_every_row_carries_its_token(order: list[int], new: int, padding: int) -> None:
    tokens = [f"t{i}" for i in range(6)]
    places = {tokens[place]: i for i, place in enumerate(order)} | {f"n{i}": 6 + i for i in range(new)}
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        for path, vocabulary in ((one, {token: i for i, token in enumerate(tokens)}), (other, places)):
            path.mkdir()
            (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        index = match_rows(one, other, rows=6, given=6 + new + padding)
    if index is None:
        assert list(order) == list(range(6))
        assert new + padding == 0
    else:
        assert index.tolist() == [places[token] for token in tokens]


def write_vocabulary(folder: Path, tokens: dict[str, int]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    return folder


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({"a": 0, "b": 1}, {"a": 0, "c": 1}, r"other/tokenizer\.json lacks it: 'b', which is 1 in .*one/tokenizer"),
        ({"a": 0, "b": 1}, {"a": 0, "b": 7}, "has it as 7, beyond the 3 rows"),
        ({"a": 0, "b": 1}, {"a": 0, "b": 0}, "two clash: 'b' is 1 in .* and 0 in .*, 'a' is 0 and 0"),
        ({"a": 0, "b": 0}, {"a": 0, "b": 2}, "two clash: 'b' is 0 in .* and 2 in .*, 'a' is 0 and 0"),
    ],
)
def test_tokens_that_cannot_be_matched_are_named(
    ours: dict[str, int], theirs: dict[str, int], words: str, tmp_path: Path
) -> None:
    one, other = write_vocabulary(tmp_path / "one", ours), write_vocabulary(tmp_path / "other", theirs)
    with pytest.raises(CheckpointError, match=words):
        match_rows(one, other, rows=2, given=3)


def test_without_a_tokenizer_nothing_is_matched(base: Path, expert: Path) -> None:
    (expert / "tokenizer.json").unlink()
    one = open_checkpoint(base)
    found = "\n".join(compare(one, open_checkpoint(expert, base=one)))
    assert "matched by tokenizer.json, which both folders must hold" in found
    assert "vocab_size is 259 in the base and 264 in the expert" in found


def test_merges_may_lead_to_new_tokens_only(base: Path, expert: Path) -> None:
    content = json.loads((expert / "tokenizer.json").read_text())
    content["model"]["vocab"]["ab"] = 261
    content["model"]["merges"] = [["a", "b"]]
    (expert / "tokenizer.json").write_text(json.dumps(content))
    assert opened(base, expert)[1].left_out == 5
    ours = json.loads((base / "tokenizer.json").read_text())
    ours["model"]["vocab"]["ab"] = 259  # known to both, merged by one
    (base / "tokenizer.json").write_text(json.dumps(ours))
    one = open_checkpoint(base)
    assert "the merges differ" in "\n".join(compare(one, open_checkpoint(expert, base=one)))


def recipe_of(base: Path, expert: Path, weight: float = 0.5) -> Recipe:
    return Recipe("task_arithmetic", str(base), (("law", str(expert)),), (Setting("weight", "", "", weight),))


def test_a_merge_keeps_the_base_s_vocabulary_and_says_so(base: Path, expert: Path, tmp_path: Path) -> None:
    reverse(expert)
    sources = Sources.open(base, {"law": str(expert)})
    out = export_model(recipe_of(base, expert), sources, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(out)) == 259
    for name in (EMBEDDINGS, HEAD):
        halfway = torch.lerp(sources.base.tensor(name), sources.experts["law"].tensor(name), 0.5)
        assert model.state_dict()[name].equal(halfway)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "tokenizer_source: base" in (out / "mergekit.yaml").read_text()
    assert "law (5 left out)" in (out / "README.md").read_text()


@pytest.mark.parametrize("method", ["ties", "slerp", "breadcrumbs", "nearswap", "linear"])
def test_every_method_sees_the_matched_rows(method: str, base: Path, expert: Path, tmp_path: Path) -> None:
    plain = pico_expert(base, tmp_path / "plain")
    reverse(expert)
    parameters = {
        "ties": {"weight": 0.5, "density": 0.3}, "slerp": {}, "breadcrumbs": {"weight": 1.0, "density": 0.5},
        "nearswap": {}, "linear": {"weight": 0.5},
    }[method]  # fmt: skip
    shared = {"t": 0.3} if method in ("slerp", "nearswap") else {}
    names = open_checkpoint(base).names

    def merged(source: Path) -> dict[str, torch.Tensor]:
        model = {"model": str(source), "parameters": parameters}
        models = [{"model": str(base)}, model] if method != "linear" else [{"model": str(base), **HALF}, model]
        document = {"merge_method": method, "base_model": str(base), "models": models, "parameters": shared}
        recipe = from_mergekit(document, names, base_dtype="bfloat16", expert_names={str(source): "law"})
        sources = Sources.open(base, {"law": str(source)})
        return {name: merged_tensor(name, sources, recipe) for name in names}

    ours, wanted = merged(expert), merged(plain)
    assert all(ours[name].equal(wanted[name]) for name in names)


def test_check_says_how_many_rows_are_left_out(base: Path, expert: Path) -> None:
    one, other = opened(base, expert)
    rows = list(model_rows({"base": one, "law": other}))
    assert "5 rows of its own left out" in rows[1][1]
    assert rows[0][2:] == rows[1][2:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reversed_", [False, True])
def test_mergekit_with_the_base_s_tokenizer_gives_the_same(
    reversed_: bool, base: Path, expert: Path, tmp_path: Path
) -> None:
    if reversed_:
        reverse(expert)
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    document = {
        "merge_method": "task_arithmetic", "base_model": str(base), "tokenizer_source": "base", "dtype": "float32",
        "models": [{"model": str(expert), "parameters": {"weight": 0.5}}],
    }  # fmt: skip
    options = MergeOptions(quiet=True)
    run_merge(MergeConfiguration.model_validate(document), str(tmp_path / "theirs"), options)
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    sources = Sources.open(base, {"law": str(expert)})
    for name in sources.base.names:
        ours = merged_tensor(name, sources, recipe_of(base, expert))
        torch.testing.assert_close(ours, theirs[name].bfloat16(), rtol=2**-7, atol=1e-6)
