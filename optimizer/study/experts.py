"""A study with other experts than a person typed: those that are made before its search, or what stands for them."""

from __future__ import annotations

from collections.abc import Mapping

from optimizer.study.schema import Study


def with_experts(study: Study, experts: Mapping[str, str]) -> Study:
    """Return the study with these experts, name to source, in place of its own."""
    return study.model_copy(update={"models": study.models.model_copy(update={"experts": dict(experts)})})


def standing_in(study: Study) -> Study:
    """Return the study with the expert that each derived one is made from in its place."""
    models = study.models
    standing = {name: models.experts[entry.from_] for name, entry in models.derived.items()}
    return with_experts(study, {**models.experts, **standing}) if standing else study
