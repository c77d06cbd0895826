"""Guards of written answers: what goes wrong with a merge's texts and no metric need see.

Each guard marks answers of a trial and of the base on the same items, and asks whether the merge has more marks than
noise explains. Needs numpy and pandas only, so that guards are recomputed from a run folder wherever it is read.

Source: DeFineMed (2604.19394): merging brought mixed languages and wordiness that multiple choice cannot see.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evals.outcomes import TaskInfo
from evals.score_table import clusters_of, summed
from evals.task_rows import clusters_in

WRITTEN = "generate_until"  # lm-eval's output type of tasks whose answers are written
CUT, EMPTY, LOOPING, LANGUAGE, LONGER, SHORTER = "cut", "empty", "looping", "other language", "longer", "shorter"
LEVEL = 0.01  # how often a trial whose answers are as the base's is flagged, at most: by all its guards together
GRAM, LOOP, LEAST_LOOP = 8, 0.5, 24  # characters; share of an answer's grams that stood there before; characters
RARE, FOREIGN = 0.01, 0.2  # of the base's letters: a script it does not write; of an answer's: what marks it
FAMILIAR = 0.6  # of the usual share of trigrams that other answers of the base have: below it is another language
LEAST_LETTERS, LEAST_PROFILE = 20, 2_000  # of an answer, of all the base's: fewer tell no language
FACTOR, LEAST_TOKENS = 2.0, 10  # much longer: so many times as many tokens, and so many more
COLUMNS = ("task", "guard", "items", "share", "base_share", "worse", "better", "p", "is_flagged")
Marks = NDArray[np.bool_]


class Guards:
    """The base's written answers, and what those of other trials are held against."""

    def __init__(self, rows: pd.DataFrame, tasks: Sequence[TaskInfo]) -> None:
        """Take the base's outcomes of any suites: columns as of `Outcome`."""
        written = [task.name for task in tasks if task.output_type == WRITTEN]
        self._bases = {name: _Base(found) for name in written if len(found := rows[rows["task"] == name])}

    @property
    def is_needed(self) -> bool:
        """Whether there is an answer to guard."""
        return bool(self._bases)

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Compare a trial's answers with the base's on the items that both have.

        For each guard: the share of the trial's answers that it marks and of the base's, the items where it marks the
        trial's alone (worse) and the base's alone (better; both of passages that have more of one, where items share
        passages), and how often chance splits them so (an exact one-sided
        sign test, which is McNemar's). Flagged where p is below `LEVEL` over the number of guards (Bonferroni).

        Args:
            rows: one trial's outcomes of any suites: columns as of `Outcome`.

        Returns:
            A frame of `COLUMNS`; without guards that the outcomes say nothing of, as those of earlier versions.
        """
        found = []
        for name, base in self._bases.items():
            found += [(name, *row) for row in base.compared(rows[rows["task"] == name])]
        frame = pd.DataFrame(found, columns=list(COLUMNS[:-1]))
        return frame.assign(is_flagged=frame["p"] < LEVEL / max(1, len(frame)))


@dataclass(frozen=True, slots=True, eq=False)
class _Usual:
    """What is usual for the base: scripts it writes, how often it wrote each trigram, and the share of an answer's
    trigrams that its other answers have (the median; NaN where there is too little text to tell)."""

    scripts: frozenset[str]
    trigrams: Counter[str]
    familiar: float


class _Base:
    """The base's answers to one task."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self._rows = rows.set_index(["suite", "item"])

    def compared(self, rows: pd.DataFrame) -> list[tuple[str, int, float, float, int, int, float]]:
        """Return each guard's row but for the task and whether it is flagged."""
        other = rows.set_index(["suite", "item"])
        common = self._rows.index.intersection(other.index)
        if not len(common):
            return []
        mine, theirs = self._rows.loc[common], other.loc[common]
        pairs: dict[str, tuple[Marks, Marks]] = {}
        if mine["broken_off"].notna().all() and theirs["broken_off"].notna().all():
            pairs[CUT] = mine["broken_off"].to_numpy(bool), theirs["broken_off"].to_numpy(bool)
        if mine["answer"].notna().all() and theirs["answer"].notna().all():
            own, made = mine["answer"].tolist(), theirs["answer"].tolist()
            pairs[EMPTY] = _marked(own, is_empty), _marked(made, is_empty)
            pairs[LOOPING] = _marked(own, is_looping), _marked(made, is_looping)
            at = self._rows.index.get_indexer(common)
            pairs[LANGUAGE] = self._foreign[at], np.array([_is_foreign(t, self._usual) for t in made])
        if mine["lengths"].notna().all() and theirs["lengths"].notna().all():
            before, after = (np.array([sum(n) for n in side["lengths"]]) for side in (mine, theirs))
            longer, shorter = _much_longer(after, before), _much_longer(before, after)
            pairs[LONGER], pairs[SHORTER] = (shorter, longer), (longer, shorter)
        codes = clusters_of(clusters_in(self._rows.loc[common]), np.arange(len(common)), len(common))
        rows_of = []
        for guard, (base, merge) in pairs.items():
            net = merge.astype(float) - base
            net = net if codes is None else summed(net, codes)  # by passage, where items share one
            worse, better = int((net > 0).sum()), int((net < 0).sum())
            of_base = float(base.mean()) if guard not in (LONGER, SHORTER) else 0.0  # no answer is longer than itself
            rows_of.append((guard, len(common), float(merge.mean()), of_base, worse, better, sign_test(worse, better)))
        return rows_of

    @cached_property
    def _usual(self) -> _Usual:
        answers = self._rows["answer"].tolist()
        letters = Counter(script for text in answers for script in _scripts(text))
        known = frozenset(script for script, n in letters.items() if n >= RARE * letters.total())
        trigrams = Counter[str]()
        for text in answers:
            trigrams.update(_trigrams(text))
        usual = _Usual(known, trigrams, math.nan)
        shares = [_familiar(text, usual, is_own=True) for text in answers]
        told = [share for share in shares if not math.isnan(share)]
        if letters.total() < LEAST_PROFILE or not told:
            return usual
        return _Usual(known, trigrams, float(np.median(told)))

    @cached_property
    def _foreign(self) -> Marks:
        return np.array([_is_foreign(text, self._usual, is_own=True) for text in self._rows["answer"]], dtype=bool)


def sign_test(worse: int, better: int) -> float:
    """Compute how often at least so many of worse + better fair coins fall on one side: 1 where there is none."""
    number = worse + better
    logs = [
        math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1) - number * math.log(2)
        for k in range(worse, number + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def is_empty(text: str) -> bool:
    """Tell whether an answer says nothing."""
    return not text.strip()


def is_looping(text: str) -> bool:
    """Tell whether an answer repeats itself: of its runs of `GRAM` characters more than `LOOP` stood there before.

    Source: Welleck et al., "Neural text generation with unlikelihood training" (1908.04319), seq-rep-n, by characters,
    so that it holds for scripts without spaces.
    """
    said = " ".join(text.split())
    if len(said) < LEAST_LOOP:
        return False
    grams = [said[i : i + GRAM] for i in range(len(said) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) > LOOP


def _much_longer(lengths: NDArray[np.int64], others: NDArray[np.int64]) -> Marks:
    return np.asarray((lengths > FACTOR * others) & (lengths >= others + LEAST_TOKENS))


def _marked(texts: Sequence[str], is_marked: Callable[[str], bool]) -> Marks:
    return np.array([is_marked(text) for text in texts], dtype=bool)


def _is_foreign(text: str, usual: _Usual, *, is_own: bool = False) -> bool:
    """Tell whether an answer is in another script or language than the base's answers.

    Args:
        is_own: it is one of the base's, and is held against the others.
    """
    scripts = Counter(_scripts(text))
    if usual.scripts and sum(n for script, n in scripts.items() if script not in usual.scripts) > (
        FOREIGN * scripts.total()
    ):
        return True
    return _familiar(text, usual, is_own=is_own) < FAMILIAR * usual.familiar  # NaN: False


def _familiar(text: str, usual: _Usual, *, is_own: bool) -> float:
    """Compute the share of an answer's trigrams that the base's (other) answers have; NaN where it is too short."""
    own = Counter(_trigrams(text))
    if own.total() < LEAST_LETTERS:
        return math.nan
    return sum(n for gram, n in own.items() if usual.trigrams[gram] > (n if is_own else 0)) / own.total()


def _trigrams(text: str) -> list[str]:
    words = " ".join(re.findall(r"[^\W\d_]+", text.casefold()))
    return [f" {words} "[i : i + 3] for i in range(len(words))]


def _scripts(text: str) -> list[str]:
    """Give the script of each letter."""
    return [_script(letter) for letter in text if letter.isalpha()]


@lru_cache(maxsize=20_000)
def _script(letter: str) -> str:
    """Name a letter's script as Unicode names the letter: `CYRILLIC` of CYRILLIC SMALL LETTER A."""
    return unicodedata.name(letter, "").split(" ")[0]
