"""Models at URLs that fsspec reads (s3://, gs://, https://, file://): copied to this machine where a person says so.

The only door to fsspec. A copy has the files that a hub id would bring, weights as safetensors and what describes them;
it is compared with the listing, and takes its name only when it is whole. From there on it is a folder like any other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from optimizer.checkpoints.hub import FETCHED, NOT_FETCHED, own_cache
from optimizer.errors import CheckpointError
from optimizer.masking import redacted
from optimizer.room import require_room

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
CHUNK = 16 * 2**20  # bytes that are read at once
KINDS = "s3://bucket/folder, gs://bucket/folder, https://host/folder or file:///folder"


def is_url(source: str) -> bool:
    """Tell whether a source is a URL."""
    return URL.match(source) is not None


def url_problem(url: str) -> str:
    """Say what is wrong with a URL as it is written; empty where it may lead to a model's folder."""
    scheme, _, rest = url.partition("://")
    if "::" in url:
        return f"a URL names one folder, such as {KINDS}, not a chain of file systems"
    if "?" in rest or "@" in rest.partition("/")[0]:
        return "a URL must hold no user, password or query: it stands in every recipe; give these in the environment"
    if not rest.strip("/") or (scheme != "memory" and not rest.strip("/").partition("/")[2] and scheme != "file"):
        return f"a URL names a model's folder, such as {KINDS}"
    return ""


def copy_of(url: str) -> Path | None:
    """Find the copy of a URL's folder on this machine; None where there is none. Nothing is fetched."""
    folder = place_of(url)
    return folder.resolve() if folder.is_dir() else None


def place_of(url: str) -> Path:
    """Give the folder that is, or would be, the copy of a URL's: mergefront/urls in $XDG_CACHE_HOME or ~/.cache."""
    url = url.rstrip("/")
    name = re.sub(r"[^\w.-]+", "-", PurePosixPath(url).name)[:40].strip("-.") or "model"
    return own_cache("urls") / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def copied(sources: Iterable[str], tell: Callable[[str], None]) -> dict[str, Path]:
    """Copy the folders of those sources that are URLs to this machine; a copy that is there is compared by its listing.

    Args:
        tell: is told of each what will be fetched, before it is.

    Returns:
        The copy of each, by URL.

    Raises:
        CheckpointError: a URL cannot be read, holds no model, breaks off, or has changed since it was copied.
        UnavailableError: the disk has no room.
    """
    from optimizer.checkpoints.new_folder import new_folder  # here: a study file is read without safetensors

    found = {}
    for url in dict.fromkeys(filter(is_url, sources)):
        out, listed = place_of(url), listing(url)
        if out.is_dir():
            _require_same(url, listed, out)
        else:
            size = sum(listed.values())
            tell(f"fetching {url}: {len(listed)} files of {size / 1e9:,.2f} GB ({', '.join(sorted(listed))}) to {out}")
            out.parent.mkdir(parents=True, exist_ok=True)
            require_room(out.parent, size)
            with new_folder(out) as draft:
                for name in listed:
                    copy_file(url, name, listed[name], draft / name)
        found[url] = out
    return found


def listing(url: str) -> dict[str, int]:
    """List what a URL's folder holds of a model: bytes by name.

    Raises:
        CheckpointError: it cannot be read, or holds no weights as safetensors.
    """
    system, root = _opened(url)
    try:
        system.invalidate_cache()
        entries = system.ls(root, detail=True)
        files = {PurePosixPath(e["name"]).name: e for e in entries if e["type"] == "file"}
        wanted = {
            name: entry
            for name, entry in sorted(files.items())
            if any(fnmatch(name, p) for p in FETCHED) and not any(fnmatch(name, p) for p in NOT_FETCHED)
        }
        sizes = {n: e["size"] if e["size"] is not None else system.info(e["name"])["size"] for n, e in wanted.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no folder {url}; look at its name") from error
    except Exception as error:  # each file system has errors of its own
        raise CheckpointError(f"{url} cannot be listed ({_told(error)}); {_environment(url)}") from error
    if not any(name.endswith(".safetensors") for name in sizes):
        there = ", ".join(sorted(files)[:8]) or "no files"
        raise CheckpointError(f"{url} holds no model: a model has .safetensors files; there is {there}")
    unknown = [name for name, size in sizes.items() if size is None]
    if unknown:
        raise CheckpointError(f"{url} does not say how large {unknown[0]} is, so a copy could not be checked")
    return sizes


def copy_file(url: str, name: str, size: int, to: Path) -> None:
    """Copy one file of a URL's folder.

    Raises:
        CheckpointError: it cannot be read, or is not as large as was listed.
    """
    with to.open("wb") as stream:
        for chunk in _chunks(url, name, size):
            stream.write(chunk)
        if stream.tell() != size:
            raise CheckpointError(
                f"{url}/{name} has {stream.tell():,} bytes, and {size:,} were listed: it broke off, or was changed "
                "meanwhile; nothing of it was kept. Do the same again"
            )


def _chunks(url: str, name: str, size: int) -> Iterator[bytes]:
    system, root = _opened(url)
    done = 0
    try:
        with system.open(f"{root.rstrip('/')}/{name}", "rb") as remote:
            while chunk := remote.read(CHUNK):
                done += len(chunk)
                yield chunk
    except Exception as error:
        raise CheckpointError(
            f"{url}/{name} broke off after {done:,} of {size:,} bytes ({_told(error)}); nothing of it was kept. Do the "
            "same again"
        ) from error


def _opened(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the folder's path in it."""
    if problem := url_problem(url):
        raise CheckpointError(f"{problem}; given {redacted(url)}")
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    try:
        system, root = url_to_fs(url.rstrip("/"))
    except ImportError as error:
        package = (getattr(error.__cause__, "name", None) or scheme).partition(".")[0]
        raise CheckpointError(
            f"{scheme}:// needs a package that is not here: pip install {package} ({error})"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{url} cannot be opened ({_told(error)}); a URL is like {KINDS}") from error
    return system, str(root)


def _require_same(url: str, listed: dict[str, int], copy: Path) -> None:
    have = {file.name: file.stat().st_size for file in copy.iterdir()}
    if have != listed:
        odd = sorted(set(have.items()) ^ set(listed.items()))[0][0]
        there, here = listed.get(odd), have.get(odd)
        raise CheckpointError(
            f"{url} has changed since it was copied: {odd} has {there} bytes there, {here} in {copy}. Remove that "
            "folder to have it fetched anew; a run of what it held cannot go on then"
        )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _environment(url: str) -> str:
    scheme = url.partition("://")[0]
    return f"is the name right, and does the environment hold what fsspec's {scheme} needs to sign in?"
