"""Torn and hostile files: each is refused with its name, before memory is taken for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from optimizer.checkpoints.headers import read_header
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.errors import CheckpointError
from tests.optimizer.checkpoints.edits import safetensors


@pytest.mark.parametrize("cut", [1, 5, 40_000])
def test_a_file_cut_short_says_so(cut: int, base: Path) -> None:
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size - cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not .* cut short: .* download or copy it again"):
        open_checkpoint(base)


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_a_file_cut_within_its_header_says_so(size: int, base: Path) -> None:
    os.truncate(base / "model.safetensors", size)
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(base)


def test_bytes_after_the_last_tensor_are_refused(base: Path) -> None:
    with (base / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(CheckpointError, match="4 bytes follow its last tensor"):
        open_checkpoint(base)


def test_a_git_lfs_pointer_is_recognised(base: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (base / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(base)


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, tuple[Any, str]] = {
    "not utf-8": (b"\xff\xfe", "not JSON"),
    "not json": (b"{", "not JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "lie deeper"),
    "a list": ([], "not a JSON object"),
    "blanks first": (b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "not a JSON object"),
    "metadata number": (
        {"__metadata__": {"a": 1}, "a": tensor()},
        r"__metadata__ must hold texts by name; given \{'a': 1",
    ),
    "metadata text": ({"__metadata__": "pt", "a": tensor()}, "__metadata__ must hold texts by name; given 'pt'"),
    "long number": (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000), "may have 300 digits"),
    "large number": ({"a": tensor(shape=[10**250] * 1000)}, "whole numbers of 63 bits"),
    "many dimensions": ({"a": tensor(shape=[2**62] * 500_000)}, "500,000 dimensions, the limit is 32"),
    "long name": ({"a" * 5000: tensor()}, "a tensor's name may have 500 characters; given 'aaaa"),
    "no name": ({"": tensor()}, "a tensor's name may have 500 characters"),
    "half a character": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "half of a surrogate pair"),
    "duplicate": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', "key 'a' stands twice"),
    "no shape": ({"a": {"dtype": "F32"}}, "'a' needs exactly"),
    "a number": ({"a": 3}, "'a' needs exactly"),
    "unknown dtype": ({"a": tensor("F4")}, "'a' is of dtype 'F4'"),
    "dtype list": ({"a": tensor([])}, "'a' is of dtype"),
    "negative": ({"a": tensor(shape=[-2])}, "whole numbers"),
    "float shape": ({"a": tensor(shape=[2.0])}, "whole numbers"),
    "bool shape": ({"a": tensor(shape=[True])}, "whole numbers"),
    "overflow": ({"a": tensor(shape=[2**62, 8])}, "do not hold shape"),
    "three offsets": ({"a": tensor(offsets=[0, 4, 8])}, "do not hold shape"),
    "backwards": ({"a": tensor(offsets=[8, 0])}, "do not hold shape"),
    "hole": ({"a": tensor("F32", [1], [4, 8])}, "'a' leaves a hole"),
    "overlap": ({"a": tensor("F32", [1], [0, 4]), "b": tensor("U8", [6], [2, 8])}, "'b' overlaps"),
    "beyond": ({"a": tensor("F32", [4], [0, 16])}, "cut short"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    header, words = HOSTILE[case]
    file = safetensors(tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "words"), [(0, "not a JSON object"), (99_000_000, "limit"), (2**40, "limit"), (999, "cut")]
)
def test_a_header_length_that_lies_is_refused(size: int, words: str, tmp_path: Path) -> None:
    file = safetensors(tmp_path / "x.safetensors", {"a": tensor()}, length=size)
    with pytest.raises(CheckpointError, match=words):
        read_header(file)


def test_an_honest_header_is_read(tmp_path: Path) -> None:
    file = safetensors(
        tmp_path / "x.safetensors", {"__metadata__": {"a": "b"}, "e": tensor("U8", [0], [0, 0]), "a": tensor()}
    )
    entries = read_header(file).entries
    assert {name: (entry.shape, entry.bytes) for name, entry in entries.items()} == {"e": ((0,), 0), "a": ((2,), 8)}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_read(name: str, base: Path) -> None:
    (base / "model.safetensors").rename(base / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pickle"):
        open_checkpoint(base)
