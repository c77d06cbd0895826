"""Sources for machines that lack the driver's disk: they travel there once, and derived experts travel back.

A `SourceServer` on the driver's machine lists and reads what a study names. On each machine `LocalSources` looks
whether a source lies under the same path with the same content, as on a shared disk; otherwise it is copied in chunks,
compared with its listing, and then found by all workers of the machine and by later runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.checkpoints.contents import content_of
from optimizer.checkpoints.new_folder import new_folder
from optimizer.checkpoints.urls import copy_file, is_url
from optimizer.errors import CheckpointError, WorkerError
from optimizer.workers.worker import Worker, WorkerSpec
from search_spaces.recipe import Recipe

if TYPE_CHECKING:
    from optimizer.runs.sensitivities import Sensitivities
    from optimizer.workers.orders import Derivation, Learned, Lesson
    from optimizer.workers.pool import Only
    from optimizer.workers.worker import Evaluation

CHUNK = 16 * 2**20  # bytes that travel at once
OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth")  # beside the safetensors

Ask = Callable[..., Any]  # (method of the server, its arguments) -> the answer


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one source on the driver's machine.

    Args:
        place: what the source stands for: a model's folder, a task's file or folder.
        files: absolute path, bytes, and digest of the content (`content_of`) of each.
    """

    place: str
    files: tuple[tuple[str, int, str], ...]

    @classmethod
    def of(cls, place: Path, files: Sequence[Path]) -> Listing:
        """List files as they are now.

        Raises:
            CheckpointError: one cannot be read.
        """
        found = ((str(file), content_of(file)) for file in files)
        return cls(str(place), tuple((name, content.size, content.digest) for name, content in found))

    @classmethod
    def of_model(cls, folder: Path) -> Listing:
        """List a model's folder: its safetensors, config and tokenizer, no weights of other formats."""
        files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
        return cls.of(folder, [file for file in files if file.suffix not in OTHER_WEIGHTS])

    @property
    def digest(self) -> str:
        """Name the source on any machine: 16 hex digits."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def is_at(self, root: Path) -> bool:
        """Tell whether every file lies below a folder, with this content."""
        return all(_holds(below(root, name), size, digest) for name, size, digest in self.files)


def below(root: Path, path: str) -> Path:
    """Return where an absolute path lies in a tree that mirrors another machine's disk."""
    return root.joinpath(*Path(path).parts[1:])


def _holds(file: Path, size: int, digest: str) -> bool:
    try:
        return file.stat().st_size == size and content_of(file).digest == digest
    except (OSError, CheckpointError):
        return False


class SourceServer:
    """Gives out the files of the sources it was told of, and takes derived experts. Lives on the driver's machine.

    Args:
        listings: by source, as the study names it.
        derived: the folder of derived experts.
    """

    def __init__(self, listings: Mapping[str, Listing], derived: Path) -> None:
        self._listings, self._derived = dict(listings), derived
        self._drafts: dict[str, tuple[ExitStack, Path]] = {}

    def listing(self, source: str) -> Listing | None:
        """List a source; None where it is a name that each machine looks up by itself."""
        if source not in self._listings and (folder := Path(source)).parent == self._derived and folder.is_dir():
            self._listings[source] = Listing.of_model(folder)
        return self._listings.get(source)

    def read(self, source: str, file: str, start: int) -> bytes:
        """Read the next chunk of one of a source's files."""
        assert any(file == name for name, _, _ in self._listings[source].files), "only what was listed is given out"
        with Path(file).open("rb") as stream:
            stream.seek(start)
            return stream.read(CHUNK)

    def begin(self, name: str) -> str | None:
        """Start to take a derived expert, and return the word for it; None where it is there."""
        folder = self._derived / Path(name).name
        if folder.is_dir():
            return None
        stack = ExitStack()
        word = secrets.token_hex(8)
        self._drafts[word] = stack, stack.enter_context(new_folder(folder))
        return word

    def take(self, word: str, file: str, chunk: bytes) -> None:
        """Add to a file of the expert that was begun."""
        with (self._drafts[word][1] / Path(file).name).open("ab") as stream:
            stream.write(chunk)

    def finish(self, word: str) -> None:
        """Give the expert its name, whole."""
        self._drafts.pop(word)[0].close()


class LocalSources:
    """Where the driver's sources lie on this machine.

    Args:
        ask: of the server.
        root: the folder in which this machine keeps what it copied.
        disk: what stands for the root of the driver's disk here.
    """

    def __init__(self, ask: Ask, root: Path, disk: Path = Path("/")) -> None:
        self._ask, self.root, self._disk = ask, root, disk
        self._found: dict[str, str] = {}

    def find(self, source: str) -> str:
        """Return where a source lies here, once it is copied where it has to be.

        Raises:
            MergeError: it cannot be written here.
            WorkerError: what arrived is not what was listed.
        """
        if source not in self._found:
            listing: Listing | None = self._ask("listing", source)
            at_home = listing is None or listing.is_at(self._disk)
            self._found[source] = source if listing is None or at_home else str(self._copied(source, listing))
        return self._found[source]

    def _copied(self, source: str, listing: Listing) -> Path:
        tree = self.root / listing.digest
        with _alone(tree.with_suffix(".lock")):  # one of this machine's workers copies, the others wait for it
            if not tree.is_dir():
                with new_folder(tree) as draft:
                    for name, size, _ in listing.files:
                        to = below(draft, name)
                        to.parent.mkdir(parents=True, exist_ok=True)
                        if is_url(source):  # which each machine reads by itself
                            self._read(source, Path(name).name, size, to)
                        else:
                            self._copy(source, name, size, to)
                    if not listing.is_at(draft):
                        raise WorkerError(f"{source} did not arrive as it is on the driver's machine; was it changed?")
        return below(tree, listing.place)

    def _copy(self, source: str, name: str, size: int, to: Path) -> None:
        with to.open("wb") as stream:
            while stream.tell() < size and (chunk := self._ask("read", source, name, stream.tell())):
                stream.write(chunk)

    def _read(self, url: str, name: str, size: int, to: Path) -> None:
        try:
            copy_file(url, name, size, to)
        except CheckpointError as error:
            raise WorkerError(f"{platform.node()}: {error}") from error

    def give(self, made: Path, name: str) -> None:
        """Give a derived expert to the driver's machine, where it is not there yet."""
        word = self._ask("begin", name)
        if word is not None:
            for file in sorted(made.iterdir()):
                with file.open("rb") as stream:
                    for chunk in iter(lambda: stream.read(CHUNK), b""):
                        self._ask("take", word, file.name, chunk)
            self._ask("finish", word)
        self._found[name] = str(made)


class StagedWorker:
    """A worker whose sources are the driver's paths, wherever they lie on this machine.

    Args:
        spec: as the driver has it.
        staging: the folder in which this machine keeps what it copied; None: one in its temporary folder.
        ask: of the driver's `SourceServer`.
    """

    def __init__(self, spec: WorkerSpec, staging: str | None, ask: Ask) -> None:
        self._sources = LocalSources(ask, Path(staging) if staging else own_temporary())
        here = self._sources.find
        self._worker = Worker(
            replace(
                spec,
                base=here(spec.base),
                experts=tuple((name, here(source)) for name, source in spec.experts),
                tasks=tuple(replace(task, name=here(task.name)) for task in spec.tasks),
            )
        )

    def evaluate(self, recipe: str, suite: str, only: Only | None = None) -> Evaluation:
        return self._worker.evaluate(self._here(recipe), suite, only)

    def learn(self, lesson: Lesson) -> Learned:
        theirs = Recipe.from_json(lesson.start)
        learned = self._worker.learn(replace(lesson, start=self._here(lesson.start)))
        recipe = replace(Recipe.from_json(learned.recipe), base=theirs.base, experts=theirs.experts)
        return replace(learned, recipe=recipe.to_json())

    def derive(self, path: Derivation) -> list[Path]:
        shared = path.folder.parent.is_dir()  # the folder of runs is seen from here
        if path.texts is not None:
            general, domain = (Path(self._sources.find(str(text))) for text in path.texts)
            path = replace(path, texts=(general, domain))
        made = self._worker.derive(path if shared else replace(path, folder=self._sources.root / "derived"))
        for folder in made:
            self._sources.give(folder, str(path.folder / folder.name))
        return [path.folder / folder.name for folder in made]

    def sensitivities(self, expert: str, *, items: int) -> Sensitivities:
        return self._worker.sensitivities(expert, items=items)

    def _here(self, recipe: str) -> str:
        theirs, here = Recipe.from_json(recipe), self._sources.find
        experts = tuple((name, here(source)) for name, source in theirs.experts)
        return replace(theirs, base=here(theirs.base), experts=experts).to_json()


def own_temporary() -> Path:
    """Make or find this user's folder for copies in the temporary folder, which nobody else may fill.

    Raises:
        WorkerError: another user has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"mergefront-sources-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise WorkerError(f"{folder} belongs to another user; remove it, or name another folder: workers.staging")
    return folder


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
