"""The one door for files a person hands over: a regular file, of a stated size, UTF-8, and JSON that cannot surprise.

Whatever the file system or the parser objects to becomes one kind of error, which the caller names: it says the file,
what was given, the limit and the mend. Nothing here waits (on a pipe), grows (on a device) or recurses without end.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

LARGEST = 16_000_000  # bytes of a file of settings or of a list of tensors
DEEPEST = 64  # lists and mappings in each other
MOST_DIGITS = 300  # of a whole number: any such number is also a float
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on every Linux file system
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # where there might be one, in JSON text


class DocumentError(ValueError):
    """A file or path that a person handed over cannot be used; the message says which, why, and the mend."""


def checked_path(given: str | Path, *, where: str = "", error: type[Exception] = DocumentError) -> Path:
    """Return a path a person typed, with ~ expanded, that the file system can hold; nothing need exist there.

    Args:
        where: the file and key it stands at, for the message.
        error: the kind of error to raise, made from one message.
    """
    text = os.fspath(given)
    at = f"{where}: " if where else ""
    if "\0" in text:
        raise error(f"{at}a path must not hold a NUL character; given {_shown(text)}")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise error(
            f"{at}no user of this machine has the home folder {_shown(text)}; write the path out, or ./~ for a name"
        ) from None
    try:
        sizes = [len(os.fsencode(part)) for part in (*path.parts, str(path))]
    except UnicodeEncodeError:
        raise error(f"{at}a path must be text that can be written in UTF-8; given {_shown(text)}") from None
    if max(sizes[:-1], default=0) > LONGEST_NAME or sizes[-1] > LONGEST_PATH:
        raise error(
            f"{at}a path may have {LONGEST_NAME} bytes in each name and {LONGEST_PATH:,} in all; given "
            f"{_shown(text)}, of {sizes[-1]:,} bytes"
        )
    return path


def resolved_path(given: str | Path, folder: Path, *, where: str = "", error: type[Exception] = DocumentError) -> Path:
    """Return the absolute path that `given` means in a file of this folder; arguments and errors as `checked_path`."""
    path = checked_path(folder / checked_path(given, where=where, error=error), where=where, error=error)
    try:
        return path.resolve()
    except (OSError, RuntimeError) as problem:  # a loop of links is a RuntimeError
        raise error(f"{where}{': ' if where else ''}{path} leads nowhere: {problem}") from None


def read_bytes(path: str | Path, *, limit: int = LARGEST, error: type[Exception] = DocumentError) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Args:
        error: the kind of error to raise, made from one message: there is no such file, it is a folder, pipe, device or
            socket, it may not be read, or it is larger.
    """
    checked_path(path, error=error)
    try:
        kind, size, content = _content(path, limit)
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as problem:
        if problem.errno != errno.ENXIO:  # how a socket answers
            raise error(f"{path}: cannot be read: {problem.strerror or problem}") from None
        kind = stat.S_IFSOCK
    if kind != stat.S_IFREG:
        raise error(f"{path}: must be a regular file; given {KINDS.get(kind, 'something else')}")
    if size > limit:
        raise error(f"{path}: may hold {limit:,} bytes; given {size:,}")
    return content


def _content(path: str | Path, limit: int) -> tuple[int, int, bytes]:
    """Return a file's kind, its size (above the limit: at least one more), and its content unless it is too large."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # opening a pipe waits for its writer else
    try:
        facts = os.fstat(descriptor)
        kind = stat.S_IFMT(facts.st_mode)
        if kind != stat.S_IFREG or facts.st_size > limit:
            return kind, facts.st_size, b""
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)  # the size may be untrue, as in /proc
        return kind, len(content), content
    finally:
        os.close(descriptor)


def read_text(path: str | Path, *, limit: int = LARGEST, error: type[Exception] = DocumentError) -> str:
    """Read a regular UTF-8 file of at most `limit` bytes; errors as `read_bytes`, and for another encoding."""
    try:
        return read_bytes(path, limit=limit, error=error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: must be UTF-8 text; byte {problem.start} is not") from None


def read_json(
    path: str | Path,
    *,
    limit: int = LARGEST,
    unique: bool = False,
    finite: bool = False,
    deepest: int = DEEPEST,
    error: type[Exception] = DocumentError,
) -> Any:
    """Read the JSON value in a regular file; see `read_text` and `parse_json`."""
    text = read_text(path, limit=limit, error=error)
    return parse_json(text, str(path), unique=unique, finite=finite, deepest=deepest, error=error)


def parse_json(
    text: str,
    where: str,
    *,
    unique: bool = False,
    finite: bool = False,
    deepest: int = DEEPEST,
    error: type[Exception] = DocumentError,
) -> Any:
    """Parse JSON text. Whole numbers fit a float, floats do not overflow, texts can be written in UTF-8.

    Args:
        where: the file (and line) the text comes from, for the message.
        unique: refuse a key that stands twice in one object.
        finite: refuse NaN and Infinity, which JSON itself does not have.
        deepest: lists and objects in each other.
        error: the kind of error to raise, made from one message.
    """

    def refuse(rule: str) -> NoReturn:
        raise _Refusal(f"{where}: {rule}")

    def constant(word: str) -> float:
        if finite:
            refuse(f"numbers must be finite; given {word}")
        return float(word.replace("Infinity", "inf"))

    try:
        value = json.loads(
            text,
            parse_int=_whole(refuse),
            parse_float=_real(refuse),
            parse_constant=constant,
            object_pairs_hook=_unique(refuse) if unique else None,
        )
        if LONE_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _Refusal as refusal:
        raise error(str(refusal)) from None
    except json.JSONDecodeError as problem:
        raise error(f"{where}: not JSON: line {problem.lineno}, column {problem.colno}: {problem.msg}") from None
    except UnicodeEncodeError:
        raise error(f"{where}: a text holds half of a surrogate pair (\\ud800 to \\udfff); remove it") from None
    except RecursionError:
        raise error(_too_deep(where, deepest)) from None
    if _is_deeper(value, deepest):
        raise error(_too_deep(where, deepest))
    return value


class _Refusal(Exception):
    """What a hook of the parser found, on its way out of the parser."""


def _whole(refuse: Callable[[str], NoReturn]) -> Callable[[str], int]:
    def read(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            refuse(f"a whole number may have {MOST_DIGITS} digits; given one of {len(digits):,}")
        return int(digits)

    return read


def _real(refuse: Callable[[str], NoReturn]) -> Callable[[str], float]:
    def read(digits: str) -> float:
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            refuse(f"a number must fit 64 bits; given {_shown(digits)}")
        return number

    return read


def _unique(refuse: Callable[[str], NoReturn]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def read(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                refuse(f"the key {_shown(key)} stands twice in one object; remove one")
            table[key] = value
        return table

    return read


def _is_deeper(value: Any, deepest: int) -> bool:
    """Tell whether more than so many lists and mappings lie in each other; level by level, without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(deepest):
        if not level:
            return False
        inner = (entry for outer in level for entry in (outer.values() if isinstance(outer, dict) else outer))
        level = [entry for entry in inner if isinstance(entry, dict | list)]
    return bool(level)


def _too_deep(where: str, deepest: int) -> str:
    return f"{where}: lists and objects may lie {deepest} deep in each other; these lie deeper"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:60]}...")
