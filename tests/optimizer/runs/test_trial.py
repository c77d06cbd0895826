from __future__ import annotations

import math

import pandas as pd
import pytest

from optimizer.runs.trial import BASE, SEARCHED, Role, TrialKind, fitted, roles_of
from search_spaces.shape import Shape
from tests.optimizer.fakes import space_of

ROLES = {
    "base": (Role.BASE, "base"),
    "expert:clinical": (Role.EXPERT, "expert clinical"),
    "uniform a=0.25": (Role.UNIFORM, "uniform a=0.25"),
    "slope 0.00->1.00": (Role.SLOPE, "slope 0.00->1.00"),
    "from recipe.json": (Role.START, "from recipe.json"),
    "from a\nb": (Role.START, "from a\\nb"),
    "derived regmean 0.4": (Role.DERIVED, "derived regmean 0.4"),
    "learned p=0.60": (Role.LEARNED, "learned p=0.60"),
    "between 9 and 14": (Role.BETWEEN, "between 9 and 14"),
    "search": (Role.SEARCHED, "search"),
}


@pytest.mark.parametrize("stored", ROLES)
def test_a_kind_is_read_from_its_stored_text_and_said_on_one_line(stored: str) -> None:
    kind = TrialKind.of({"kind": stored})
    assert (kind.role, kind.label) == ROLES[stored]
    assert kind.stored == str(kind) == stored
    assert kind.is_anchor == (not stored.startswith(("search", "between")))
    assert kind.has_params == (not stored.startswith(("derived", "learned", "between")))
    assert kind.is_reference == stored.startswith(("base", "expert"))


def test_what_lies_between_a_learned_trial_and_another_was_fitted_too() -> None:
    kinds = ["base", "derived fisher 0.4", "learned p=0.60", "between 0 and 1", "between 1 and 2", "between 3 and 4"]
    assert TrialKind.between(14, 9) == TrialKind("between 9 and 14")
    assert TrialKind("between 9 and 14").between_trials == (9, 14)
    assert fitted({n: TrialKind(kind) for n, kind in enumerate(kinds)}) == {2, 4, 5}


def test_a_trial_without_a_kind_is_searched() -> None:
    assert TrialKind.of({}) == SEARCHED


def test_an_experts_kind_gives_its_name_back() -> None:
    assert TrialKind.expert("law").expert_name == "law"
    assert (BASE.expert_name, SEARCHED.expert_name) == ("", "")


def test_a_learned_kind_says_its_preference() -> None:
    assert TrialKind("learned p=0.60").preference == 0.6
    assert TrialKind("learned clinical p=1").preference == 1.0
    for other in ("learned", "learned p=much", "derived regmean 0.4", "from p=0.5", "search"):
        assert math.isnan(TrialKind(other).preference)


def test_every_anchor_of_a_space_has_a_role() -> None:
    kinds = [TrialKind(anchor.name) for anchor in space_of(("code", "law"), Shape("slope")).anchors()]
    assert [kind.role for kind in kinds[:3]] == [Role.BASE, Role.EXPERT, Role.EXPERT]
    assert {kind.role for kind in kinds[3:]} == {Role.UNIFORM, Role.SLOPE}


def test_roles_stand_under_the_index_of_their_kinds() -> None:
    roles = roles_of(pd.Series(["base", "search"], index=[4, 7]))
    assert roles[roles == Role.SEARCHED].index.tolist() == [7]
    assert len(roles_of(pd.Series([], dtype=str))) == 0
