from __future__ import annotations

from hypothesis import settings

settings.register_profile(
    "mergefront", deadline=None, max_examples=40
)  # machines are shared: no time limit per example
settings.load_profile("mergefront")
