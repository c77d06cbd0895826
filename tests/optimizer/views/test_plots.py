"""Each figure is drawn both ways from a toy run; names stay text."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from evals.outcomes import SUITES
from optimizer.run import Run, open_run
from optimizer.runs.run_folder import RunFolder
from optimizer.views import canvas, front_plot, plots
from optimizer.views.pictures import picture
from search_spaces.groups import kind_of, layer_of
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # whole studies are run

EVIL = '<img src=x onerror="alert(1)"> $x$'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(toy_run(tmp_path_factory.mktemp("runs") / "toy", trials=12))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "made"
    return open_run(toy_run(path, trials=12, derived=("regmean 0.2", "fisher 0.4"), learned=(0.6, 0.3)))


def lines_of(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.mode == "lines"]


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
    figure = front_plot.front(points, knee=run.knee(), suite="holdout")
    for trace in (trace for trace in figure.data if trace.mode == "markers"):
        for values, axis in ((trace.x, figure.layout.xaxis), (trace.y, figure.layout.yaxis)):
            assert all(axis.range[0] < value < axis.range[1] for value in values)


def test_points_derived_and_learned_have_marks_and_a_path_of_their_own(made: Run) -> None:
    figure, points = made.plot_front(), made.points()
    shown = {trace.name: trace for trace in figure.data if trace.showlegend}
    symbols = {trace.marker.symbol for name, trace in shown.items() if name != "searched"}  # those are small and pale
    assert len(symbols) == len(shown) - 1, "told apart without colour"
    for name in ("derived", "learned"):
        trials = points.index[points["kind"].str.startswith(name)]
        assert list(shown[name].customdata) == trials.tolist()
        assert all(
            f"trial {t}</b> {points['kind'][t]}" in text for t, text in zip(trials, shown[name].text, strict=True)
        )
    learned = points[points["kind"].str.startswith("learned")].sort_values("kind")
    path = pd.concat([points.loc[[0]], learned, points.loc[[1]]])
    assert any(list(trace.y) == pytest.approx((100 * path["domain"]).tolist()) for trace in lines_of(figure))
    judged = named(figure, "front, unseen items")
    assert set(learned.index[learned["front"]]) <= set(judged.customdata)
    assert picture(figure)._repr_png_()


def test_without_learned_points_there_is_no_path(run: Run) -> None:
    assert all(trace.line.color != canvas.WINE or not len(trace.x) for trace in lines_of(run.plot_front()))
    assert run.plot_front().layout.height == canvas.HEIGHT


def test_the_search_begins_at_its_first_trial_and_learned_ones_are_marked_on_the_way(made: Run, run: Run) -> None:
    kinds = made.points()["kind"]
    figure = made.plot_hypervolume()
    assert figure.layout.shapes[0].x0 == kinds.index[kinds == "search"][0] - 0.5
    growth = made.hypervolume().set_index("trial")["hypervolume"]
    learned = kinds.index[kinds.str.startswith("learned")]
    assert list(named(figure, "learned").x) == learned.tolist()
    assert list(named(figure, "learned").y) == growth[learned].tolist()
    assert not any(trace.showlegend for trace in run.plot_hypervolume().data)
    assert picture(figure)._repr_png_()


def test_a_run_without_search_has_no_beginning_of_it(tmp_path: Path) -> None:
    assert not open_run(toy_run(tmp_path / "toy", trials=0)).plot_hypervolume().layout.shapes


def test_kinds_of_a_studys_own_have_lines_of_their_own() -> None:
    places = {"embed": 0.1, "embed.qk": 0.2, "layer.00.attn": 0.3, "layer.00.qk": 0.4, "layer.01.attn": 0.5,
              "layer.01.router": 0.6, "head": 0.7}  # fmt: skip
    rows = [(g, kind_of(g), -1 if (n := layer_of(g)) is None else n, "law", w) for g, w in places.items()]
    frame = pd.DataFrame(rows, columns=["group", "kind", "layer", "expert", "weight"])
    figure = plots.weights(frame, title="t", subtitle="s")
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}
    assert lines["qk"] == ([-1, 0], [0.2, 0.4])
    assert lines["router"] == ([1], [0.6])
    assert lines["embeddings"] == ([-1], [0.1])
    assert lines["head"] == ([2], [0.7])
    symbols = [trace.marker.symbol for trace in figure.data]
    assert len(set(zip(symbols, [trace.marker.color for trace in figure.data], strict=True))) == len(symbols)


def test_weights_of_tensors_are_said_to_be_means(made: Run, run: Run) -> None:
    learned = int(made.lessons().index[0])
    assert "mean of a module's tensors" in made.plot_weights(learned).layout.title.subtitle.text
    assert "a line for each kind of module" in run.plot_weights(run.knee()).layout.title.subtitle.text


def test_a_pictures_legend_is_no_wider_than_the_picture(made: Run) -> None:
    still = picture(made.plot_front()).figure
    still.canvas.draw()
    (axes,) = still.axes
    assert axes.get_legend().get_window_extent().x1 <= still.bbox.x1


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
    assert size["width"] == canvas.WIDTH


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
