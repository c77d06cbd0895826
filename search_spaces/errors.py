"""What this package raises: a name, a number or a document that no search space or recipe can hold."""

from __future__ import annotations


class SpaceError(ValueError):
    """A tensor name, setting, range or mergekit document breaks a rule.

    The message has up to four parts: the rule, what was given, where, and the mend.
    """

    def __init__(self, rule: str, *, given: object = None, where: str = "", mend: str = "") -> None:
        parts = [rule]
        if given is not None:
            parts.append(f"given: {given}")
        if where:
            parts.append(f"where: {where}")
        if mend:
            parts.append(f"mend: {mend}")
        super().__init__("; ".join(parts))
