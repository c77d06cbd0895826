"""Gradients by merge weights along base -> expert, as they are kept and drawn; `workers.sensitivity` measures them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from search_spaces import group_of

Objective = Literal["domain", "general"]
Table = tuple[tuple[float, ...], ...]

OBJECTIVES: tuple[Objective, Objective] = ("domain", "general")


def sensitivity_file(run: Path, expert: str) -> Path:
    """Give the file of a run folder that holds an expert's sensitivities."""
    return run / f"sensitivities-{expert}.json"


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """dL/dw of every tensor, at P points between base (weight 0) and expert (1), for the mean domain and general loss.

    A task's loss is as in `evals.losses`; an objective's is the mean over its tasks. Below 0: more weight helps.

    Args:
        expert: its name; other experts have weight 0.
        tensors: N names, in the order of the checkpoint.
        points, shares: (P,) where on the path, and what each counts in the integral (Gauss-Legendre).
        domain, general: (P, N).
        domain_change, general_change: measured loss of the expert minus that of the base.
        items: how many were read.
        candidates: the cost, as a multiple of reading those items once; a step backward counts three times.
        seconds: what it took.
    """

    expert: str
    tensors: tuple[str, ...]
    points: tuple[float, ...]
    shares: tuple[float, ...]
    domain: Table
    general: Table
    domain_change: float
    general_change: float
    items: int
    candidates: float
    seconds: float

    def by_tensor(self, objective: Objective) -> dict[str, float]:
        """Average dL/dw over the path."""
        means = np.array(self.shares) @ np.array(getattr(self, objective))
        return dict(zip(self.tensors, means.tolist(), strict=True))

    def by_group(self, objective: Objective) -> dict[str, float]:
        """Sum the averages over the tensors of each layer group."""
        found: dict[str, float] = {}
        for tensor, value in self.by_tensor(objective).items():
            found[group_of(tensor)] = found.get(group_of(tensor), 0.0) + value
        return found

    def change(self, objective: Objective) -> float:
        """Return the measured loss of the expert minus that of the base."""
        return float(getattr(self, f"{objective}_change"))

    def error(self, objective: Objective) -> float:
        """Compare the sum of all averages with the measured change: the difference as a share of the change."""
        total, measured = math.fsum(self.by_tensor(objective).values()), self.change(objective)
        return abs(total - measured) / abs(measured) if measured else abs(total)

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Sensitivities:
        """Read what `to_json` wrote."""
        found = json.loads(text)
        for name, value in found.items():
            if isinstance(value, list):
                found[name] = tuple(tuple(row) if isinstance(row, list) else row for row in value)
        return cls(**found)
