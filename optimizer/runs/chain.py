"""Which recipes a certificate tests, and in which order: from the surest to the most skilled.

Fixed-sequence testing: each is tested at the whole error, and the first that fails ends the chain, so that the chain as
a whole errs no more often than one test. Source: Laufer-Goldshtein et al., "Efficiently controlling multiple risks with
Pareto Testing" (ICLR 2023); Angelopoulos et al., "Learn then Test" (2110.01052).
"""

from __future__ import annotations

from dataclasses import dataclass

from evals.objectives import draw_objectives
from evals.outcomes import HOLDOUT
from optimizer.errors import NoPointError
from optimizer.runs.certificates import Question, exactly
from optimizer.runs.scored import ScoredRun
from optimizer.runs.trial import Role


@dataclass(frozen=True, slots=True)
class Link:
    """One recipe of a chain.

    Args:
        sure: the share of resamplings of the holdout items in which it does what is asked.
        domain, forgetting: as measured on the holdout items.
    """

    trial: int
    sure: float
    domain: float
    forgetting: float


def chain_of(run: ScoredRun, question: Question) -> list[Link]:
    """Choose the front's points that do what is asked by the holdout items, the surest first.

    A point that is less sure than another and has no more of the domain's gain is left out: were it certified, nobody
    would take it.

    Raises:
        NoPointError: there is none.
    """
    if run.outcomes(HOLDOUT).empty:
        raise NoPointError(
            f"no point of run {run.name} is scored on holdout items yet; let `mergefront search` end first"
        )
    draws = draw_objectives(run.scale(HOLDOUT))
    kept = draws.samples["forgetting"] <= question.max_forgetting
    if question.min_gain is not None:
        kept = kept & (draws.samples["domain"] >= question.min_gain)
    links = []
    for trial in run.front().index:
        if trial not in draws.trials or run.kinds[trial].role is Role.BASE:
            continue
        column = draws.column(trial)
        domain, forgetting = (float(draws.points[name][column]) for name in ("domain", "forgetting"))
        if forgetting <= question.max_forgetting and domain >= max(question.min_gain or 0.0, 0.0):
            links.append(Link(int(trial), float(kept[:, column].mean()), domain, forgetting))
    if not links:
        gain = "" if question.min_gain is None else f" and keeps {exactly(question.min_gain)} of the domain gain"
        raise NoPointError(
            f"no point of run {run.name}'s front forgets at most {exactly(question.max_forgetting)}{gain} on the "
            "holdout items, so there is none to certify, and nothing was spent"
        )
    chain: list[Link] = []
    for link in sorted(links, key=lambda link: (-link.sure, link.forgetting, link.trial)):
        if not chain or link.domain > chain[-1].domain:
            chain.append(link)
    return chain
