"""Items that share a passage are resampled, tested and certified together; simulated with a known truth."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from evals.certificates import Part, play, start_of, verdicts
from evals.engine import Engine
from evals.errors import TaskError
from evals.flips import flips, mcnemar
from evals.guards import CUT, WRITTEN, Guards
from evals.lm_harness import Harness
from evals.objectives import Scale, _resampled_scores, draw_objectives, interval
from evals.outcomes import CERTIFY, HOLDOUT, REST, SEARCH, SPARE, SUITES, Outcome, TaskInfo
from evals.score_table import Table, summed, table_from, table_of
from evals.task_rows import joined, rows_of
from tests.evals.conftest import load, write_task

Array = NDArray[np.float64]
ALIKE = 0.5  # correlation of what makes two answers of a passage right


def alike(rng: np.random.Generator, shape: tuple[int, ...], sizes: list[int]) -> Array:
    """Normal numbers (..., n), correlated within passages of these sizes."""
    shared = np.repeat(rng.normal(size=(*shape, len(sizes))), sizes, axis=-1)
    return np.sqrt(ALIKE) * shared + np.sqrt(1 - ALIKE) * rng.normal(size=(*shape, sum(sizes)))


def codes(sizes: list[int]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("sizes", [[5] * 40, [1] * 30 + [2] * 30 + [12] * 10])
def test_intervals_hold_the_truth_where_items_share_passages(sizes: list[int]) -> None:
    """500 studies of a task that is answered at 70 %: with passages 95 % intervals hold it, without them too seldom."""
    rng, level, held = np.random.default_rng(0), -0.5244, {True: 0, False: 0}
    for study in range(500):
        values = (alike(rng, (1,), sizes) > level).astype(float).T  # (n, 1)
        table = Table(np.array([0]), values, np.ones(len(values)), clusters=codes(sizes))
        for together in held:
            samples = _resampled_scores(table if together else replace(table, clusters=None), 200, (study, 0))
            (low,), (high,) = interval(samples)
            held[together] += low <= 0.7 <= high
    assert held[True] / 500 > 0.9  # a percentile bootstrap of 40 passages is a little short
    assert held[False] / 500 < 0.85


def test_standard_errors_are_of_passages() -> None:
    rng, sizes = np.random.default_rng(1), [3] * 50
    studies = (alike(rng, (2000,), sizes) > 0).astype(float)
    truth = studies.mean(axis=1).std()
    table = Table(np.arange(2000), studies.T, np.ones(150), clusters=codes(sizes))
    assert table.stderr().mean() == pytest.approx(truth, rel=0.05)
    assert replace(table, clusters=None).stderr().mean() < 0.85 * truth
    single = replace(table, clusters=np.arange(150))
    assert single.stderr() == pytest.approx(replace(table, clusters=None).stderr())


def rows(values: dict[int, list[float]], clusters: list[str] | None, task: str = "quiz") -> pd.DataFrame:
    frames = [
        pd.DataFrame({"trial": trial, "task": task, "suite": SEARCH, "item": [f"{i:03d}" for i in range(len(found))],
                      "value": found, "weight": 1.0})
        for trial, found in values.items()
    ]  # fmt: skip
    made = pd.concat(frames, ignore_index=True)
    return made if clusters is None else made.assign(cluster=clusters * len(values))


def test_what_an_earlier_version_kept_counts_item_by_item() -> None:
    tasks = [TaskInfo(name, role, "", "multiple_choice", "acc", True, 0.25, 8, 8)
             for name, role in (("quiz", "domain"), ("other", "general"))]  # fmt: skip
    rng = np.random.default_rng(2)
    values = {0: [1.0, 0, 0, 1, 1, 0, 1, 1], 1: [1.0, 1, 1, 1, 1, 0, 1, 0], 2: rng.integers(0, 2, 8).tolist()}

    def drawn(clusters: list[str] | None) -> Array:
        both = pd.concat([rows(values, clusters), rows(values, clusters, "other")])
        return draw_objectives(Scale(both, tasks, SEARCH, 0, {"x": 1}), replicates=50).samples["forgetting"]

    earlier = drawn(None)
    assert (drawn([""] * 8) == earlier).all()
    assert (drawn(list("abcdefgh")) == earlier).all()
    assert (drawn(["a", "a", "", "b", "b", "", "", "c"]) != earlier).any()
    mixed = pd.concat([rows({0: values[0]}, None), rows({1: values[1]}, list("aabbccdd"))])  # taken up by this version
    assert table_of(mixed, "quiz").clusters is not None


def test_what_shares_nothing_stands_for_itself() -> None:
    table = table_of(rows({0: [0.0] * 6}, ["p", "", "q", "p", "", "q"]), "quiz")
    assert table.clusters is not None
    assert summed(np.ones(6), table.clusters).tolist() == [2.0, 1.0, 2.0, 1.0]
    assert table.by_cluster(np.arange(6.0)).tolist() == [3.0, 1.0, 7.0, 4.0]


def test_flips_and_guards_count_passages() -> None:
    base, merge = [1.0] * 12, [0.0] * 10 + [1.0] * 2
    clusters = ["a"] * 5 + ["b"] * 5 + ["c", "d"]
    task = TaskInfo("quiz", "general", "", "multiple_choice", "acc", True, 0.25, 12, 0)
    (row,) = flips(Scale(rows({0: base, 1: merge}, clusters), [task], SEARCH, 0, {"x": 1}), 1).to_dict("records")
    assert (row["lost"], row["p"]) == (10, mcnemar(2, 0))
    written = replace(task, output_type=WRITTEN)
    frame = rows({0: base}, clusters).assign(broken_off=False, answer=None, lengths=[(3,)] * 12)
    cut = frame.assign(broken_off=[value == 0 for value in merge])
    found = Guards(frame, [written]).of(cut).set_index("guard").loc[CUT]
    assert (found["share"], found["worse"], found["p"]) == (pytest.approx(10 / 12), 2, pytest.approx(0.25))


# --- certificates ---


def part(sizes: list[int]) -> Part:
    """A limit of 10 % on four-choice questions that the base answers at 75 %."""
    return Part("quiz", sum(sizes), base=1.8, candidate=-2.0, experts={}, constant=0.05, most=1.85, is_bounded=False,
                sizes=tuple(sizes))  # fmt: skip


def test_the_mean_of_units_is_that_of_items_and_none_is_above_the_largest() -> None:
    one, rng = part([1, 4, 2, 1, 7]), np.random.default_rng(3)
    losses = rng.uniform(-2, one.most, 15)
    units = one.unit_losses(losses)
    assert len(units) == one.units == 5
    assert units.mean() == pytest.approx(losses.mean())
    assert one.unit_losses(np.full(15, one.most)).max() == pytest.approx(one.unit_most)
    assert one.unit_losses(losses[:6]) == pytest.approx(units[:2])
    assert one.unit_losses(losses[:7]) == pytest.approx(units[:3])
    assert [one.items_of(k) for k in range(6)] == [0, 1, 5, 7, 8, 15]
    assert replace(one, sizes=()).unit_losses(losses) is losses


@pytest.mark.parametrize("sizes", [[5] * 100, [1] * 60 + [3] * 60 + [15] * 20], ids=["alike", "of many sizes"])
def test_false_certificates_are_as_rare_as_asked(sizes: list[int]) -> None:
    """400 studies of merges that forget exactly 10 %: what they lose comes by passages."""
    delta, studies, rng = 0.1, 400, np.random.default_rng(4)
    one = part(list(rng.permutation(sizes)))
    base = rng.random((studies, one.items)) < 0.75
    lost = alike(rng, (studies,), list(one.sizes)) < -1.4051  # 8 % of the right ones
    won = alike(rng, (studies,), list(one.sizes)) < -1.7507  # 4 % of the wrong ones: 5 points less of the base's 50
    losses = one.base * base + one.candidate * np.where(base, ~lost, won) + one.constant
    assert losses.mean() == pytest.approx(0.0, abs=0.01)

    def share_certified(of: Part) -> float:
        units = np.array([of.unit_losses(row) for row in losses])
        game = play(units, most=of.unit_most, start=start_of(0.05, float(units.var()), delta))
        won, _ = verdicts(units, game.capital, delta, rounds=of.units, most=of.unit_most)
        return float((won == 1).mean())

    assert share_certified(one) <= delta
    assert share_certified(replace(one, sizes=())) > delta  # bet on as if they shared nothing


# --- tasks ---


def passages(number: int, each: int) -> list[dict[str, Any]]:
    return [
        {
            "passage": f"text {p}",
            "question": f"{p} {i} is what?",
            "choices": ["yes", "no", "maybe", "never"],
            "gold": i % 4,
        }
        for p in range(number)
        for i in range(each)
    ]


def clusters_of_parts(harness: Harness) -> dict[str, set[str]]:
    return {suite: {item.cluster for item in harness.tasks[0].items[suite]} for suite in (*SUITES, CERTIFY)}


@pytest.mark.parametrize("holdout", [20, 0.3, REST])
@pytest.mark.parametrize("certify", [15, SPARE])
def test_a_named_column_keeps_what_is_shared_in_one_part(tmp_path: Path, holdout: float, certify: int) -> None:
    folder = write_task(tmp_path / "t", passages(25, 4))
    harness = load(folder, search=18, holdout=holdout, certify_items=certify, group_by="passage")
    parts = clusters_of_parts(harness)
    assert not parts[SEARCH] & parts[HOLDOUT]
    assert not parts[CERTIFY] & (parts[SEARCH] | parts[HOLDOUT])
    assert harness.infos[0].search_items == 18
    assert harness.infos[0].holdout_items == {20: 20, 0.3: 30}.get(holdout, harness.infos[0].holdout_items)
    assert parts[CERTIFY] or holdout == REST
    assert any("passages or documents" in note for note in harness.notes)


def test_a_known_column_is_found_and_changes_no_item(tmp_path: Path, engine: Engine) -> None:
    found = load(write_task(tmp_path / "found" / "t", passages(20, 3)), search=12, holdout=20)
    plain = [{"unknown" if key == "passage" else key: value for key, value in row.items()} for row in passages(20, 3)]
    without = load(write_task(tmp_path / "without" / "t", plain), search=12, holdout=20)
    for suite in SUITES:
        assert found.suite_hash(suite) == without.suite_hash(suite)
    assert clusters_of_parts(without)[SEARCH] == {""}
    outcomes = found.score(engine, SEARCH)
    assert {len(outcome.cluster) for outcome in outcomes} == {16}
    assert 2 <= len({outcome.cluster for outcome in outcomes}) < 12
    named = load(tmp_path / "without" / "t", search=12, holdout=20, group_by="unknown")
    assert {o.cluster for o in named.score(engine, SEARCH)} <= clusters_of_parts(found)[SEARCH] | set.union(
        *clusters_of_parts(found).values(), {i.cluster for i in named.tasks[0].items[SEARCH]}
    )


def test_certify_items_of_a_passage_stand_together(tmp_path: Path) -> None:
    harness = load(write_task(tmp_path / "t", passages(25, 4)), search=18, holdout=20, certify_items=30,
                   group_by="passage")  # fmt: skip
    order, sizes = harness.certify_order()
    assert sorted(order["t"]) == sorted(harness.suite_hash(CERTIFY)["t"])
    cluster = {item.hash: item.cluster for item in harness.tasks[0].items[CERTIFY]}
    runs = [cluster[item] for item in order["t"]]
    assert sum(a != b for a, b in pairwise(runs)) + 1 == len(set(runs)) == len(sizes["t"])
    assert sum(sizes["t"]) == 30
    row = harness.describe()[0]
    assert (row["certify_items"], row["certify_largest"]) == (30, max(sizes["t"]))
    single = load(write_task(tmp_path / "s", [row | {"passage": str(i)} for i, row in enumerate(passages(25, 4))]),
                  search=18, holdout=20, certify_items=30)  # fmt: skip
    assert single.certify_order() == (single.suite_hash(CERTIFY), {})


def test_a_column_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", passages(25, 4))
    with pytest.raises(TaskError, match="group_by must be a column of its items: 'page' given, choices, gold, passage"):
        load(folder, search=18, group_by="page")
    with pytest.raises(TaskError, match=r"must tell 10 groups of items or more from each other.*'gold' tells 4"):
        load(folder, search=18, group_by="gold")
    few = write_task(tmp_path / "few", passages(5, 20))  # five passages tell no spread, so none is looked for unasked
    assert clusters_of_parts(load(few, search=18, holdout=20))[SEARCH] == {""}


def test_rows_that_are_at_hand_share_as_a_frame_does() -> None:
    def outcomes(trial: int, clusters: list[str]) -> list[Outcome]:
        rng = np.random.default_rng(trial)
        return [
            Outcome("quiz", SEARCH, f"{i:03d}", float(rng.integers(2)), 1.0, (), False, cluster=name)
            for i, name in enumerate(clusters)
        ]

    earlier, now = outcomes(0, [""] * 6), outcomes(1, ["p", "", "q", "p", "", "q"])
    parts = [rows_of(0, earlier, is_bank=False)["quiz"], rows_of(1, now, is_bank=False)["quiz"]]
    assert parts[0].clusters is None
    table = table_from(joined(parts), "quiz")
    assert table.clusters is not None
    assert table.clusters.tolist() == [0, 1, 2, 0, 3, 2]
    frame = pd.concat([
        pd.DataFrame([{name: getattr(row, name) for name in ("task", "item", "value", "weight", "cluster")}
                      | {"trial": trial} for row in made])
        for trial, made in enumerate((earlier, now))
    ])  # fmt: skip
    assert table_of(frame, "quiz").stderr() == pytest.approx(table.stderr())
    assert table_from(joined(parts[:1]), "quiz").clusters is None
