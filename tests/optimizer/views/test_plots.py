"""Each figure is drawn both ways from a toy run; names stay text."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import pytest

from evals.outcomes import SUITES
from optimizer.run import Run, open_run
from optimizer.runs.run_folder import RunFolder
from optimizer.views import plots
from optimizer.views.pictures import picture
from tests.toy_run import toy_run

EVIL = '<img src=x onerror="alert(1)"> $x$'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12))


def figures(run: Run) -> dict[str, go.Figure]:
    knee = run.knee()
    return {
        "front": run.plot_front(),
        "weights": run.plot_weights(knee),
        "hypervolume": run.plot_hypervolume(),
        "retention": run.plot_retention(knee),
    }


def named(figure: go.Figure, name: str) -> go.Scatter:
    return next(trace for trace in figure.data if trace.name == name)


def test_front_shows_every_point_once(run: Run) -> None:
    figure, points = run.plot_front(), run.points()
    marks = [
        trace for trace in figure.data if trace.mode == "markers" and trace.name not in ("knee", "front, unseen items")
    ]
    shown = [trial for trace in marks for trial in trace.customdata]
    assert sorted(shown) == sorted(points.index)
    judged = named(figure, "front, unseen items")
    assert list(judged.y) == pytest.approx((100 * points.loc[list(judged.customdata), "holdout_domain"]).tolist())
    assert judged.error_y.array is not None
    assert named(figure, "front").error_y.array is None


def test_every_mark_is_inside_the_axes_also_where_holdout_items_say_otherwise(run: Run) -> None:
    points = {suite: run.points(suite) for suite in SUITES}
    far = points["holdout"].index[points["holdout"]["front"]][-1]
    points["holdout"].loc[far, ["forgetting", "domain"]] = -0.5, 2.5
    figure = plots.front(points, knee=run.knee(), suite="holdout")
    for trace in (trace for trace in figure.data if trace.mode == "markers"):
        for values, axis in ((trace.x, figure.layout.xaxis), (trace.y, figure.layout.yaxis)):
            assert all(axis.range[0] < value < axis.range[1] for value in values)


def test_without_holdout_the_intervals_are_on_the_search_figures(tmp_path: Path) -> None:
    figure = open_run(toy_run(tmp_path / "toy", trials=12, holdout=False)).plot_front()
    assert named(figure, "front").error_y.array is not None
    assert "the items the search used" in figure.layout.title.subtitle.text


def test_hypervolume_states_its_reference_point(run: Run) -> None:
    subtitle = run.plot_hypervolume().layout.title.subtitle.text
    assert f"reference point: forgetting {100 * run.reference()['forgetting']:.0f} %" in subtitle
    assert "domain gain 0 %" in subtitle


def test_retention_writes_each_figure_beside_its_bar(run: Run) -> None:
    figure = run.plot_retention(run.knee())
    assert [note.y for note in figure.layout.annotations] == [0, 1, 2, 3, 4]
    assert list(figure.layout.yaxis.ticktext)[-1] == "clinical_questions"


@pytest.mark.parametrize("name", ["front", "weights", "hypervolume", "retention"])
def test_every_figure_has_a_picture(run: Run, name: str, tmp_path: Path) -> None:
    still = picture(figures(run)[name])
    still.save(tmp_path / "still.png")
    assert (tmp_path / "still.png").read_bytes().startswith(b"\x89PNG")
    png, size = still._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert size["width"] == plots.WIDTH


def test_pictures_hold_the_same_numbers(run: Run) -> None:
    figure = run.plot_front()
    drawn = [list(line.get_xdata()) for line in picture(figure).figure.axes[0].lines]
    for trace in figure.data:
        wanted = [float("nan") if x is None else x for x in trace.x]
        assert any(x == pytest.approx(wanted, nan_ok=True) for x in drawn if len(x) == len(wanted)), trace.name


def test_several_experts_have_a_panel_each(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=8, experts=("clinical", "legal")))
    weights = run.plot_weights(run.knee())
    still = picture(weights)
    assert [axes.get_title(loc="right") for axes in still.figure.axes] == ["expert clinical", "expert legal"]
    assert not [trace for trace in run.plot_front().data if trace.line.shape == "hv"]
    assert picture(run.plot_front())
    assert picture(run.plot_retention(run.knee()))


def test_a_task_of_two_experts_has_a_labelled_bar_for_each(tmp_path: Path) -> None:
    run = open_run(toy_run(tmp_path / "toy", trials=4, experts=("clinical", "legal"), shared=True))
    labels = run.plot_retention(run.knee()).layout.yaxis.ticktext
    assert list(reversed(labels))[:4] == [f"{t} ({e})" for t in ("questions", "notes") for e in ("clinical", "legal")]


def test_names_are_inert(run: Run) -> None:
    frame = run.retention(run.knee()).assign(task=EVIL)
    labels = plots.retention(frame, title="x").layout.yaxis.ticktext
    assert all("<" not in label for label in labels)
    assert picture(plots.retention(frame, title="x"))._repr_png_()


def test_no_finished_trial_gives_an_empty_figure(tmp_path: Path) -> None:
    run = open_run(RunFolder.create_or_resume(tmp_path / "toy", "", {}, tasks=()).path)
    assert run.plot_front().layout.annotations[0].text == "no finished trial yet"
    assert picture(run.plot_front())


def test_modules_that_are_alike_share_a_line(run: Run) -> None:
    uniform = int(run.points().index[run.points()["kind"] == "uniform a=0.50"][0])
    assert [trace.name for trace in run.plot_weights(uniform).data] == [
        "embeddings",
        "head",
        "attention and feed-forward",
    ]
    assert len(run.plot_weights(run.knee()).data) == 4
