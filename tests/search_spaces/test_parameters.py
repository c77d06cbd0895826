from __future__ import annotations

import math
import pickle

import pytest

from search_spaces import METHODS, Parameter, SpaceError

PARAMETERS = [parameter for spec in METHODS.values() for parameter in spec.parameters]


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda p: p.name)
def test_defaults_and_ranges_lie_in_the_domain(parameter: Parameter) -> None:
    for value in (parameter.default, parameter.low, parameter.high):
        assert parameter.allows(value)
    assert parameter.low <= parameter.high
    assert not parameter.allows(math.nan)
    assert not parameter.allows(math.inf)


def test_each_method_has_a_scale_that_reaches_base_and_expert() -> None:
    for name, spec in METHODS.items():
        scale = spec.parameter(spec.scale)
        assert spec.name == name
        assert scale is not None
        assert (scale.low, scale.high) == (0.0, 1.0)
        assert scale.scope in ("expert", "group")
        assert spec.parameter("nothing") is None


def test_domains_have_the_right_ends() -> None:
    ends = {p.domain: [p.allows(v) for v in (-0.1, 0.0, 0.5, 1.0, 1.1)] for p in PARAMETERS}
    assert ends["real"] == [True] * 5
    assert ends["unit"] == [False, True, True, True, False]
    assert ends["share"] == [False, False, True, True, False]
    assert ends["switch"] == [False, True, False, True, False]
    assert ends["size"] == [False, True, True, True, True]
    assert ends["count"] == [False, True, False, True, False]


def test_an_error_has_four_parts_and_survives_a_process_boundary() -> None:
    error = SpaceError("the rule", given=3, where="a.b", mend="write 4")
    assert str(error) == "the rule; given: 3; where: a.b; mend: write 4"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(SpaceError("the rule")) == "the rule"
