"""Tokenizers beside each other: where two differ, and which rows of an expert's embeddings stand for the base's tokens.

Asked by `checkpoints` when an expert is opened on its base, and when the two are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from evals.documents import read_bytes
from optimizer.checkpoints.headers import read_json
from optimizer.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
LARGEST = 100_000_000  # bytes of a file of tokens
MOST_TOKENS = 1 << 31
SHOWN = 5  # tokens listed in one message


def match_rows(base: Path, expert: Path, *, rows: int, given: int) -> torch.Tensor | None:
    """Find the row of the expert's embeddings and head for each row of the base's, by the tokens of tokenizer.json.

    A row without a token (padding) stands for the expert's row of the same number where that has no token either;
    elsewhere the base's own row stays, since a token of the expert's is not the base's.

    Args:
        base, expert: folders.
        rows, given: of the base's embeddings and of the expert's.

    Returns:
        The expert's row for each of the base's, -1 where that one stays  # (rows,)
        None where all rows stand for themselves, or a tokenizer.json to match them by is missing.

    Raises:
        CheckpointError: the expert lacks a token of the base, or two tokens share a row in one of them only.
    """
    ours, theirs = base / TOKENIZER_FILE, expert / TOKENIZER_FILE
    if not (ours.is_file() and theirs.is_file()) or (rows == given and same_bytes(ours, theirs)):
        return None
    one, other = _ids(ours, read_json(ours, limit=LARGEST)), _ids(theirs, read_json(theirs, limit=LARGEST))
    if rows == given and one == other:
        return None
    taken = {*one.values(), *other.values()}
    index = [i if i < given and i not in taken else -1 for i in range(rows)]
    at_row: dict[int, str] = {}  # a token of the base, by its row there
    at_found: dict[int, str] = {}  # and by its row in the expert
    for token, row in one.items():
        if row >= rows:  # known to the tokenizer, but without a row in the base
            continue
        found = other.get(token)
        if found is None or found >= given:
            what = "lacks it" if found is None else f"has it as {found}, beyond the {given} rows of its embeddings"
            raise CheckpointError(
                f"an expert has all tokens of the base, and {theirs} {what}: {token!r}, which is {row} in {ours}"
            )
        for clash in (at_row.setdefault(row, token), at_found.setdefault(found, token)):
            if (one[clash], other[clash]) != (row, found):
                raise CheckpointError(
                    f"tokens are matched one to one, and two clash: {token!r} is {row} in {ours} and {found} in "
                    f"{theirs}, {clash!r} is {one[clash]} and {other[clash]}"
                )
        index[row] = found
    return torch.tensor(index)


def tokenizer_mismatches(base: Path, expert: Path, *, is_matched: bool) -> Iterator[str]:
    """Compare what turns text into token ids; an expert without tokenizer files uses the base's.

    Args:
        is_matched: rows were matched by tokenizer.json: the ids may differ, and the expert may have tokens of its own
            and merges that lead to them.
    """
    files = () if is_matched else ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
    for name in files:
        if (base / name).is_file() and (expert / name).is_file() and not same_bytes(base / name, expert / name):
            yield f"{name} differs"
    ours, theirs = base / TOKENIZER_FILE, expert / TOKENIZER_FILE
    if ours.is_file() and theirs.is_file() and not same_bytes(ours, theirs):
        yield from _json_mismatches(ours, theirs, is_matched=is_matched)
    ours, theirs = base / "tokenizer_config.json", expert / "tokenizer_config.json"
    if ours.is_file() and theirs.is_file():
        one, other = read_json(ours), read_json(theirs)
        for key in ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token"):
            if key in one and key in other and _token_text(one[key]) != _token_text(other[key]):
                yield f"tokenizer_config.json: {key} is {one[key]!r} in the base and {other[key]!r} in the expert"


def _json_mismatches(our_file: Path, their_file: Path, *, is_matched: bool) -> Iterator[str]:
    ours, theirs = read_json(our_file, limit=LARGEST), read_json(their_file, limit=LARGEST)
    one, other = _ids(our_file, ours), _ids(their_file, theirs)
    differing = sorted(token for token in one.keys() | other.keys() if one.get(token) != other.get(token))
    if differing and not is_matched:
        shown = ", ".join(f"{t!r} is {one.get(t)} / {other.get(t)}" for t in differing[:SHOWN])
        yield f"tokenizer.json: {len(differing)} tokens have other ids (base / expert): {shown}"
    merges = [merge for merge in _merges(their_file, theirs) if not is_matched or "".join(merge) in one]
    if _merges(our_file, ours) != merges:
        yield "tokenizer.json: the merges differ"
    for key in ("normalizer", "pre_tokenizer"):
        if ours.get(key) != theirs.get(key):
            yield f"tokenizer.json: {key} differs"


def _ids(file: Path, tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return the row of each token of a tokenizer.json, added ones among them."""
    vocabulary = _model(file, tokenizer).get("vocab", {})
    try:
        if isinstance(vocabulary, list):  # Unigram: pairs of piece and score, the id is the place
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        ids = {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: vocab and added_tokens must give each token an id; given otherwise") from error
    for token, row in ids.items():
        if type(token) is not str or type(row) is not int or not 0 <= row < MOST_TOKENS:
            raise CheckpointError(
                f"{file}: a token is a text with an id from 0 to {MOST_TOKENS - 1:,}; given {token!r:.80}: {row!r:.80}"
            )
    return ids


def same_bytes(one: Path, other: Path) -> bool:
    """Tell whether two files of tokens hold the same."""
    if one.stat().st_size != other.stat().st_size:
        return False
    return read_bytes(one, limit=LARGEST, error=CheckpointError) == read_bytes(
        other, limit=LARGEST, error=CheckpointError
    )


def _merges(file: Path, tokenizer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    merges = _model(file, tokenizer).get("merges") or []
    try:
        pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
        if all(isinstance(part, str) for pair in pairs for part in pair):
            return pairs
    except TypeError:
        pass
    raise CheckpointError(f"{file}: merges must be a list of pairs of texts")


def _model(file: Path, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    model = tokenizer.get("model", {})
    if not isinstance(model, dict):
        raise CheckpointError(f"{file}: model must be an object with a vocab; given {model!r:.80}")
    return model


def _token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
