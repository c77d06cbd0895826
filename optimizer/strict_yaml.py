"""Strict YAML: what a person types, read without surprises and written so that any reader gives it back unchanged.

Plain values only, by YAML 1.2's rules; no tags, no duplicate keys, no anchors but in mergekit's documents. The only
module that imports PyYAML for files of ours (`evals.task_files` does for lm-eval's).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evals.documents import DEEPEST, MOST_DIGITS, read_text
from optimizer.errors import StudyFileError
from optimizer.masking import redacted

LARGEST_FILE = 1_000_000  # bytes; a study file is a page
MOST_VALUES = 100_000  # of a YAML document, keys among them: seconds of reading
MERGE_TAG = "tag:yaml.org,2002:merge"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class _Loader(yaml.SafeLoader):
    """Plain values only, read by YAML 1.2's rules: `no` is a word, `012` is a word, `1e-3` is a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own name
    depth = values = 0
    takes_anchors = False

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None and not self.takes_anchors:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            mend = "write the value out, or put it in quotes"
            raise _refused(event, f'anchors and aliases are refused; given "{sign}{shortened(event.anchor)}"; {mend}')
        if getattr(event, "tag", None) is not None:
            tag = shortened(event.tag.replace("tag:yaml.org,2002:", "!!"))
            raise _refused(event, f"tags are refused; given {tag}; write the plain value")
        if self.depth > DEEPEST:
            raise _refused(event, f"lists and mappings may lie {DEEPEST} deep in each other; these lie deeper")
        self.values += 1
        if self.values > MOST_VALUES:
            raise _refused(event, f"a document may hold {MOST_VALUES:,} keys and values; this one holds more")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _refused(node, "a text holds half of a surrogate pair; remove it") from None
        return text

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        digits = self.construct_scalar(node)
        if len(digits) > MOST_DIGITS:
            raise _refused(node, f"a whole number may have {MOST_DIGITS} digits; given one of {len(digits):,}")
        return int(digits)

    def construct_real(self, node: yaml.ScalarNode) -> float:
        number = self.construct_yaml_float(node)
        if math.isinf(number) and not node.value.endswith(".inf"):
            raise _refused(node, f"a number must fit 64 bits; given {shortened(node.value)}")
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE_TAG:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refused(key_node, f"a key must be a word; given {shown(key)}; put it in quotes")
            if key in seen:
                raise _refused(key_node, f"the key {shown(key)} stands twice in one mapping; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refused(at: yaml.Event | yaml.Node, rule: str) -> StudyFileError:
    assert at.start_mark is not None, "what is read from text has a place"
    return StudyFileError(f"line {at.start_mark.line + 1}: {rule}")


class _Dumper(yaml.SafeDumper):
    """Never writes an alias, and quotes every text that `_Loader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = re.compile(
    r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$|^[-+]?\.inf$|^\.nan$"
)
for _tag, _pattern, _first in (
    ("null", re.compile(r"^(~|null|)$"), ["~", "n", ""]),
    ("bool", re.compile(r"^(true|false)$"), list("tf")),
    ("int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_real)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _AnchoredLoader(_Loader):
    """Reads anchors and merge keys too, as long as the document is of bounded size with every alias written out."""

    takes_anchors = True

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _require_bounded(node, {})
        return node


def _require_bounded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the values of a node with aliases written out; a few lines of aliases of aliases may stand for any number.

    Raises:
        StudyFileError: there are too many, or an alias stands within what it stands for.
    """
    known = sizes.get(id(node))
    if known == 0:
        raise _refused(node, "an alias stands within what it stands for; write the value out")
    if known is None:
        sizes[id(node)] = 0
        parts = node.value if isinstance(node.value, list) else []
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        sizes[id(node)] = known = 1 + sum(_require_bounded(child, sizes) for child in children)
    if known > MOST_VALUES:
        raise _refused(node, f"with aliases written out, a document may hold {MOST_VALUES:,} keys and values")
    return known


_AnchoredLoader.add_implicit_resolver(MERGE_TAG, re.compile(r"^<<$"), ["<"])


def parse_yaml(text: str, where: str, *, anchors: bool = False) -> Any:
    """Return the value of one YAML document: safe types, no duplicate keys; `where` names it in errors.

    Args:
        anchors: read anchors, aliases and merge keys, which are refused otherwise.
    """
    try:
        return yaml.load(text, Loader=_AnchoredLoader if anchors else _Loader)  # both are SafeLoaders
    except StudyFileError as error:
        raise StudyFileError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise StudyFileError(f"{where}: {line}not plain YAML: {problem}") from None


def read_yaml(path: Path | str, *, anchors: bool = False) -> dict[str, Any]:
    """Read the mapping in a YAML file of ours or of mergekit, whose documents may have anchors.

    Raises:
        StudyFileError: the file is missing, no regular file, too large, not UTF-8, not plain YAML, or not a mapping.
    """
    text = read_text(path, limit=LARGEST_FILE, error=StudyFileError)
    document = parse_yaml(text, str(path), anchors=anchors)
    if not isinstance(document, dict):
        raise StudyFileError(f"{path}: must hold keys and values; given {shown(document)}")
    return document


def dump_yaml(document: Mapping[str, Any]) -> str:
    """Write YAML text that `read_yaml` and any other reader give back unchanged."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, width=110)


def dump_scalar(text: str) -> str:
    """Write one text as YAML on one line, in quotes only where it needs them."""
    style = '"' if CONTROL.search(text) else None
    return yaml.dump(text, Dumper=_Dumper, width=10_000, default_style=style).removesuffix("\n").removesuffix("\n...")


def dump_line(entry: Mapping[str, str | int]) -> str:
    """Write one flat mapping as YAML on one line."""
    return yaml.dump(
        dict(entry), Dumper=_Dumper, width=10_000, default_flow_style=True, sort_keys=False, allow_unicode=True
    ).removesuffix("\n")


def shown(value: object) -> str:
    """Return a value as an error message shows it: short, and without secrets."""
    return shortened(redacted(repr(value)))


def shortened(text: str) -> str:
    """Cut a text to 80 characters."""
    return text if len(text) <= 80 else text[:77] + "..."
