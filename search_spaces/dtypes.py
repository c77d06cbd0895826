"""What `dtype` and `out_dtype` of a mergekit document mean here: the dtype a merge is stored in.

mergekit combines tensors in `dtype` and stores them in `out_dtype`, else in `dtype`, else in the dtype they came in.
Here a merge is computed in float32, whatever they say, and rounded once to the dtype that is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.errors import SpaceError

STORED_DTYPES = ("float32", "bfloat16", "float16")


def stored_dtype(document: Mapping[str, object], base_dtype: str) -> str:
    """Read which dtype a document asks for; empty where it asks for none, or for the one that the base has.

    Args:
        base_dtype: dtype of all the base's floating tensors, such as `bfloat16`; empty where they differ.

    Raises:
        SpaceError: a dtype that a merge cannot be stored in, or be computed in (float64).
    """
    asked = ""
    for key in ("dtype", "out_dtype"):
        given = document.get(key)
        if given is None:
            continue
        asked = given.removeprefix("torch.") if isinstance(given, str) else ""
        if asked not in STORED_DTYPES:
            rule = f"{key} is one of {', '.join(STORED_DTYPES)}: a merge is computed in float32 and rounded once"
            raise SpaceError(rule, given=given, where=key, mend=f"write {key}: float32, or leave it out")
    return "" if asked == base_dtype else asked
