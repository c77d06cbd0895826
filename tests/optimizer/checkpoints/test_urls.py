"""Models at URLs: copied only where a person says so, checked, whole or not at all."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file

from optimizer import room
from optimizer.checkpoints.opening import open_checkpoint
from optimizer.checkpoints.urls import copied, copy_of, is_url, listing, place_of, url_problem
from optimizer.errors import CheckpointError, StudyFileError, UnavailableError, WorkerError
from optimizer.study.study_file import read_study
from optimizer.workers.staging import Listing, LocalSources, SourceServer
from tests.optimizer.small_study import write_study
from tests.optimizer.test_cli import call
from tests.pico import pico_llama


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this machine's copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/mergefront/urls"


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


class Unsteady(MemoryFileSystem):
    """A store whose connection breaks after some bytes, or whose files lose some on the way."""

    protocol = "unsteady"
    breaks_after: int | None = None
    keeps: int | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("unsteady://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = MemoryFileSystem._open(self, path, mode, **options)
        if mode != "rb" or not path.endswith(".safetensors"):
            return file
        return Line(file.getvalue()[: self.keeps], self.breaks_after)


class Line(io.BytesIO):
    """Bytes that come over a connection, which breaks after so many of them."""

    def __init__(self, content: bytes, breaks_after: int | None) -> None:
        super().__init__(content)
        self.breaks_after = breaks_after

    def read(self, size: int | None = -1) -> bytes:
        if self.breaks_after is None:
            return super().read(size)
        if self.tell() >= self.breaks_after:
            raise ConnectionResetError("the peer hung up")
        return super().read(self.breaks_after)


@pytest.fixture
def unsteady(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> type[Unsteady]:
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    monkeypatch.setattr(Unsteady, "breaks_after", None)
    monkeypatch.setattr(Unsteady, "keeps", None)
    return Unsteady


def put(folder: Path, url: str) -> None:
    fsspec.filesystem("memory").put(f"{folder}/", f"/{url.partition('://')[2]}/", recursive=True)


def test_a_url_is_told_from_a_path_and_from_a_hub_id() -> None:
    assert all(map(is_url, ("s3://b/m", "file:///m", "memory://m", "abfs://c/m", "S3://b/m")))
    assert not any(map(is_url, ("org/model", "/a/b", "./a", "C:/models", "a:b/c", "~/m", "://m")))


@pytest.mark.parametrize(
    "url", ["s3://", "s3://bucket", "s3://bucket/", "s3://key:secret@bucket/m", "https://u@host/m", "https://host/m?t=x",
            "simplecache::s3://b/m", "file://", "memory:///"],
)  # fmt: skip
def test_a_url_that_names_no_folder_or_holds_a_secret_is_refused(url: str, tmp_path: Path) -> None:
    assert url_problem(url)
    study = write_study(tmp_path)
    if is_url(url):
        with pytest.raises(StudyFileError, match=r"models\.experts\.clinical: a URL"):
            read_study(study, [f"models.experts.clinical={url!r}"])
        for refuse in (listing, open_checkpoint):
            with pytest.raises(CheckpointError, match="a URL") as caught:
                refuse(url)
            assert "secret" not in str(caught.value)
    assert "secret" not in str(call("check", study, "--set", f"models.base={url!r}").output)


def test_nothing_is_copied_unless_asked_for(cache: Path, memory: MemoryFileSystem, tmp_path: Path) -> None:
    study = write_study(tmp_path)
    put(tmp_path / "expert", "memory://models/law")
    memory.pipe("/models/law/modeling_own.py", b"print()")
    memory.pipe("/models/law/pytorch_model.bin", b"pickle")
    memory.pipe("/models/law/onnx/model.safetensors", b"other")
    words = ["check", study, "--set", "models.experts.clinical=memory://models/law"]
    refused = call(*words)
    assert refused.exit_code == 2
    said = " ".join(refused.stdout.split())
    assert "models.experts.clinical: there is no copy of memory://models/law on this machine" in said
    assert "give --download to check or search" in said
    assert not cache.exists()
    there = call(*words, "--download")
    assert there.exit_code == 0, there.output
    names = sorted(path.name for path in (tmp_path / "expert").iterdir())
    assert f"fetching memory://models/law: {len(names)} files of 0.00 GB ({', '.join(names)}) to" in there.stdout
    (copy,) = cache.iterdir()
    assert sorted(path.name for path in copy.iterdir()) == names
    assert all((copy / name).read_bytes() == (tmp_path / "expert" / name).read_bytes() for name in names)
    assert call(*words).exit_code == 0
    memory.store.clear()
    assert call(*words).exit_code == 0  # the copy is enough
    done = call("search", *words[1:])
    assert done.exit_code == 0, done.output


def test_a_base_and_an_adapter_may_lie_at_urls(tmp_path: Path) -> None:
    base = pico_llama(tmp_path / "models/base")
    adapter = tmp_path / "models/adapter"
    adapter.mkdir()
    text = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}'
    (adapter / "adapter_config.json").write_text(text)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)},
        adapter / "adapter_model.safetensors",
    )
    urls = [f"file://{folder}" for folder in (base, adapter)]
    copies = copied(urls, lambda line: None)
    opened = open_checkpoint(urls[0])
    assert opened.folder == copies[urls[0]].resolve() == copy_of(urls[0])
    assert opened.fingerprint == open_checkpoint(base).fingerprint
    expert = open_checkpoint(urls[1], base=opened)
    assert expert.is_adapter
    assert expert.fingerprint == open_checkpoint(adapter, base=open_checkpoint(base)).fingerprint
    shutil.rmtree(tmp_path / "models")
    assert torch.equal(open_checkpoint(urls[0] + "/").tensor("model.norm.weight"), opened.tensor("model.norm.weight"))


@pytest.mark.parametrize("how", ["breaks", "short", "full"])
def test_what_breaks_off_leaves_nothing_behind(
    how: str, cache: Path, unsteady: type[Unsteady], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(pico_llama(tmp_path / "base"), "unsteady://models/base")
    size = (tmp_path / "base/model.safetensors").stat().st_size
    error: type[Exception] = CheckpointError
    if how == "breaks":
        monkeypatch.setattr(unsteady, "breaks_after", 1000)
        words = (
            rf"model\.safetensors broke off after 1,000 of {size:,} bytes \(ConnectionResetError: the peer hung up\)"
        )
    elif how == "short":
        monkeypatch.setattr(unsteady, "keeps", 5000)
        words = rf"model\.safetensors has 5,000 bytes, and {size:,} were listed"
    else:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(room.os, "posix_fallocate", full)
        error, words = UnavailableError, "no space"
    with pytest.raises(error, match=words):
        copied(["unsteady://models/base"], lambda line: None)
    assert [*cache.iterdir()] == []
    assert copy_of("unsteady://models/base") is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    assert copied(["unsteady://models/base"], lambda line: None)
    open_checkpoint("unsteady://models/base")


def test_a_folder_that_changed_since_is_told_and_not_mixed(memory: MemoryFileSystem, tmp_path: Path) -> None:
    put(pico_llama(tmp_path / "base"), "memory://models/base")
    copied(["memory://models/base"], lambda line: None)
    before = open_checkpoint("memory://models/base").fingerprint
    told: list[str] = []
    copied(["memory://models/base"], told.append)
    assert told == []  # nothing is fetched twice
    memory.pipe("/models/base/config.json", b"{}")
    with pytest.raises(
        CheckpointError, match=r"memory://models/base has changed since it was copied: config\.json has 2"
    ):
        copied(["memory://models/base"], told.append)
    assert open_checkpoint("memory://models/base").fingerprint == before


def test_urls_that_lead_nowhere_are_named(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder memory://models/none"):
        listing("memory://models/none")
    memory.pipe("/models/pickles/pytorch_model.bin", b"")
    with pytest.raises(CheckpointError, match=r"holds no model: .* there is pytorch_model\.bin"):
        listing("memory://models/pickles")
    with pytest.raises(
        CheckpointError, match=r"nosuch://b/m cannot be opened \(ValueError: Protocol not known: nosuch"
    ):
        listing("nosuch://b/m")
    theirs = builtins.__import__

    def without_s3fs(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "s3fs":
            raise ModuleNotFoundError("No module named 's3fs'", name="s3fs")
        return theirs(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_s3fs)
    with pytest.raises(CheckpointError, match=r"s3:// needs a package that is not here: pip install s3fs"):
        listing("s3://bucket/model")


def test_a_machine_of_a_cluster_reads_a_url_by_itself_and_compares_it_with_the_drivers_copy(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://models/base"
    put(pico_llama(tmp_path / "base"), url)
    copied([url], lambda line: None)
    listed = Listing.of_model(place_of(url).resolve())
    server = SourceServer({url: listed}, tmp_path / "derived")
    asked: list[str] = []

    def ask(method: str, *arguments: Any) -> Any:
        asked.append(method)
        return getattr(server, method)(*arguments)

    assert LocalSources(ask, tmp_path / "same").find(url) == url  # the driver's own disk has the copy
    elsewhere = tmp_path / "elsewhere"
    found = Path(LocalSources(ask, tmp_path / "node", elsewhere).find(url))
    assert asked == ["listing", "listing"]  # and no bytes of the driver's
    assert found.is_relative_to(tmp_path / "node")
    assert open_checkpoint(found).fingerprint == open_checkpoint(url).fingerprint
    content = bytearray(memory.cat("/models/base/model.safetensors"))
    content[-1] ^= 1
    memory.pipe("/models/base/model.safetensors", bytes(content))
    with pytest.raises(WorkerError, match=r"memory://models/base did not arrive as it is on the driver's machine"):
        LocalSources(ask, tmp_path / "other", elsewhere).find(url)
    memory.rm("/models/base/model.safetensors")
    with pytest.raises(WorkerError, match=rf"{os.uname().nodename}: memory://models/base/model\.safetensors broke off"):
        LocalSources(ask, tmp_path / "third", elsewhere).find(url)
    assert not [path for name in ("other", "third") for path in (tmp_path / name).iterdir() if path.is_dir()]


def test_an_experts_name_is_that_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("init", "s3://models/base", "s3://models/law", "--out", "study.yaml")
    assert done.exit_code == 0, done.output
    study = read_study("study.yaml")
    assert (study.models.base, study.models.experts) == ("s3://models/base", {"law": "s3://models/law"})
