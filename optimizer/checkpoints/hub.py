"""Models on the hub: found in the local cache, and fetched into it only where a person says so. The only door to a hub.

What is fetched are weights as safetensors and what describes them; no pickle and no code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from optimizer.errors import CheckpointError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
NOT_FETCHED = ("*/*", "*.bin.index.json")  # other formats lie in folders of a repository


def own_cache(kind: str) -> Path:
    """Give the folder in which copies of a kind are kept: in mergefront in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mergefront" / kind


def is_hub_id(source: str) -> bool:
    """Tell whether a source is a hub id, and no path that is there."""
    is_path = source.startswith((".", "/", "~")) or Path(source).exists()
    return not is_path and bool(HUB_ID.fullmatch(source))


def cached(source: str) -> Path | None:
    """Find the folder of a hub id in the local cache; None where it is not there. Nothing is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True)).resolve()
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None


def fetched(sources: Iterable[str]) -> dict[str, Path]:
    """Put the models among some sources that are hub ids into the local cache; what is there already is looked up.

    Returns:
        The folder of each, by id.

    Raises:
        CheckpointError: the hub cannot be reached, does not have it, or wants a token.
    """
    from huggingface_hub import snapshot_download

    found = {}
    for source in dict.fromkeys(filter(is_hub_id, sources)):
        try:
            folder = snapshot_download(source, allow_patterns=[*FETCHED], ignore_patterns=[*NOT_FETCHED])
        except Exception as error:  # the hub's client has errors of its own and those of two others
            told = " ".join(str(error).split())
            raise CheckpointError(
                f"{source} cannot be downloaded from the hub ({type(error).__name__}: {told:.300}); a private or gated "
                "model needs a token in HF_TOKEN"
            ) from error
        found[source] = Path(folder)
    return found
