"""What this package raises: a name, a number or a document that no search space or recipe can hold."""

from __future__ import annotations

LONGEST = 400  # characters of what was given, in a message


class SpaceError(ValueError):
    """A tensor name, setting, range or mergekit document breaks a rule.

    The message has up to four parts: the rule, what was given, where, and the mend.
    """

    def __init__(self, rule: str, *, given: object = None, where: str = "", mend: str = "") -> None:
        parts = [rule]
        if given is not None:
            parts.append(f"given: {shown(given)}")
        if where:
            parts.append(f"where: {where}")
        if mend:
            parts.append(f"mend: {mend}")
        super().__init__("; ".join(parts))


def shown(given: object) -> str:
    """Say what was given, in at most LONGEST characters."""
    try:
        text = str(given)
    except (ValueError, RecursionError):  # a whole number of more than 4,300 digits; lists in lists in lists
        text = f"a {type(given).__name__} too long to be shown"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
