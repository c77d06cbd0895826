"""The schema that editors read is the one that the reader checks by, and knows every method and range."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from optimizer.strict_yaml import read_yaml
from optimizer.study.schema import RANGES, SCHEMA_FILE, Study, schema_text, study_schema
from optimizer.study.study_file import read_study
from search_spaces.parameters import METHODS

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))


def test_the_committed_schema_is_fresh() -> None:
    fix = 'python -c "from optimizer.study.schema import *; SCHEMA_FILE.write_text(schema_text())"'
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), f"run: {fix}"


def test_the_schema_knows_every_method() -> None:
    one, several = study_schema()["$defs"]["SpaceSection"]["properties"]["method"]["anyOf"]
    assert set(one["enum"]) == set(several["items"]["enum"]) == set(METHODS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid_by_schema_and_by_reader(path: Path) -> None:
    jsonschema.validate(read_yaml(path), study_schema())
    assert isinstance(read_study(path), Study)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


def test_the_schema_refuses_what_the_reader_refuses() -> None:
    document = read_yaml(EXAMPLES[0])
    jsonschema.validate(document, study_schema())
    for section, key, value in (("search", "trails", 3), ("space", "shape", {"curve": 1}), ("workers", "count", -1)):
        wrong = json.loads(json.dumps(document))
        wrong[section][key] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, study_schema())


def test_a_range_can_be_given_for_each_number_that_may_vary_from_place_to_place() -> None:
    spaces = [spec for spec in METHODS.values() if not spec.unsearchable]
    varying = {number.name for spec in spaces for number in spec.parameters if number.scope != "recipe"}
    assert set(RANGES) == varying - {"sum"}  # read from a mergekit document, not searched
