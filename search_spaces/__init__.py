"""What may vary in a merge: tensor names -> layer groups -> distributions -> recipe.

Spaces are imported from `search_spaces.space`: they need Optuna, and those who only read or apply a recipe do not.
"""

from __future__ import annotations

from search_spaces.errors import SpaceError
from search_spaces.groups import group_of, group_tensors
from search_spaces.parameters import METHODS, MethodSpec, Parameter
from search_spaces.recipe import Recipe, Setting

__all__ = ["METHODS", "MethodSpec", "Parameter", "Recipe", "Setting", "SpaceError", "group_of", "group_tensors"]
