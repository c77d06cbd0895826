"""The report as a browser lays it out: on a desk and on a phone, by day and by night, and on its way to paper."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from optimizer.run import open_run
from optimizer.runs.sensitivities import Sensitivities, sensitivity_file
from optimizer.views.report import report_html
from tests.toy_run import toy_run

pytestmark = pytest.mark.slow  # a browser is started

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
FLAGS = ("headless", "no-sandbox", "disable-gpu", *QUIET, "window-size=1400,1000", "virtual-time-budget=20000")
CASES = (("one", 390, "dark"), ("one", 1280, "light"), ("two", 390, "light"), ("two", 1280, "dark"))
LONG = ("clinical-notes-and-guidelines", "case_law_of_three_countries")

# Shows each page in a frame of each width and scheme, and writes down what does not hold there.
MEASURE = """
const box = (element) => element.getBoundingClientRect();
const meet = (a, b) => a.right > b.left + 1 && b.right > a.left + 1 && a.bottom > b.top + 1 && b.bottom > a.top + 1;
const light = (color) => {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
  const [r, g, b] = parts.map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);

function faults(view, page) {
  const found = [], root = page.documentElement;
  if (root.scrollWidth > view.innerWidth) found.push(`the page is ${root.scrollWidth} wide`);
  for (const text of page.querySelectorAll("h1, h2, p, li, td div, .card b, .card span, label, select, code"))
    if (box(text).right > view.innerWidth + 1 && !text.closest(".scroll, pre"))
      found.push(`cut off: ${text.textContent}`);
  const ground = light(view.getComputedStyle(page.querySelector("section")).backgroundColor);
  for (const figure of page.querySelectorAll(".figure")) {
    const place = box(figure), legend = figure.querySelector(".legend");
    if (!figure.querySelector(".main-svg")) found.push("a figure is not drawn");
    for (const text of figure.querySelectorAll("svg text")) {
      const {left, right, top, bottom, width} = box(text);
      if (!width) continue;
      if (left < place.left - 1 || right > place.right + 1 || top < place.top - 1 || bottom > place.bottom + 1)
        found.push(`out of its figure: ${text.textContent}`);
      if (contrast(light(view.getComputedStyle(text).fill), ground) < 4.5) found.push(`pale: ${text.textContent}`);
    }
    const inside = figure.querySelectorAll(".gtitle, .xtitle, .ytitle, .annotation text");
    for (const text of legend ? [...inside, ...page.querySelectorAll("h2, figcaption p")] : [])
      if (meet(box(legend), box(text))) found.push(`the legend covers: ${text.textContent}`);
    const ticks = [...figure.querySelectorAll(".xtick text, .x2tick text")];
    ticks.forEach((tick, i) => ticks.slice(i + 1).forEach((other) => {
      if (box(tick).width && meet(box(tick), box(other))) found.push(`${tick.textContent} covers ${other.textContent}`);
    }));
    const titles = [...figure.querySelectorAll(".xtitle, .ytitle")];
    for (const title of titles)
      for (const tick of figure.querySelectorAll(".xtick text, .ytick text"))
        if (meet(box(title), box(tick))) found.push(`${title.textContent} covers ${tick.textContent}`);
  }
  return found;
}

async function measured(name, page, width, scheme) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0; color-scheme: ${scheme}`;
  frame.srcdoc = page;
  const loaded = new Promise((resolve) => frame.addEventListener("load", resolve));
  document.body.append(frame);
  await loaded;
  const view = frame.contentWindow, inside = frame.contentDocument;
  const titles = [...inside.querySelectorAll("h2")].map((title) => title.textContent);
  const result = {name, width, scheme, titles, faults: faults(view, inside)};
  result.ground = light(view.getComputedStyle(inside.body).backgroundColor);
  if (view.Plotly) {
    view.dispatchEvent(new Event("beforeprint"));
    result.paper = [...inside.querySelectorAll(".figure .main-svg")].map((svg) => svg.getAttribute("width"));
    result.ink = light(view.getComputedStyle(inside.querySelector(".figure .xtitle")).fill);
    view.dispatchEvent(new Event("afterprint"));
    result.after = faults(view, inside);
    frame.style.width = `${width - 60}px`;
    view.dispatchEvent(new Event("resize"));  // a page without a screen may wait long for it
    await new Promise((resolve) => setTimeout(resolve, 400));
    result.resized = faults(view, inside);
  }
  frame.remove();
  return result;
}

(async () => {
  const results = [];
  for (const [name, width, scheme] of cases) results.push(await measured(name, pages[name], width, scheme));
  document.body.textContent = JSON.stringify(results);
})();
"""


def sensitivities(expert: str) -> Sensitivities:
    """Those of a model with thirty layers, all alike."""
    kinds = ("input_layernorm", "post_attention_layernorm", "mlp.down_proj", "self_attn.q_proj")
    inside = [f"model.layers.{layer}.{kind}.weight" for layer in range(30) for kind in kinds]
    tensors = ("model.embed_tokens.weight", *inside, "model.norm.weight")
    rows = (tuple(-0.001 for _ in tensors), tuple(0.002 for _ in tensors))
    return Sensitivities(expert, tensors, (0.5,), (1.0,), rows[:1], rows[1:], -0.122, 0.244, 9, 30.0, 1.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a browser says of each page at each width, by day and by night."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "one": toy_run(folder / "toy", trials=12, derived=("regmean 0.2",), learned=(0.3, 0.6)),
        "two": toy_run(folder / "a-run-whose-name-is-as-long-as-it-may-be-and-has-no-space", trials=6, experts=LONG),
    }
    sensitivity_file(runs["one"], "clinical").write_text(sensitivities("clinical").to_json())
    pages = json.dumps({name: report_html(open_run(path)) for name, path in runs.items()}).replace("<", "\\u003c")
    outer = folder / "outer.html"
    script = f"const pages = {pages}, cases = {json.dumps(CASES)};{MEASURE}"
    outer.write_text(f"<!doctype html><meta charset=utf-8><body><script>{script}</script>", encoding="utf-8")
    command = [
        CHROMIUM,
        *(f"--{flag}" for flag in FLAGS),
        "--dump-dom",
        f"--user-data-dir={folder / 'profile'}",
        outer.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<body>(\[.*\])\s*</body>", done.stdout, flags=re.DOTALL)
    assert body, done.stdout[-2000:] + done.stderr[-2000:]
    results: list[dict[str, Any]] = json.loads(html.unescape(body[1]))
    assert [(r["name"], r["width"], r["scheme"]) for r in results] == list(CASES)
    return results


def test_nothing_is_cut_off_or_covered_at_any_width(measured: list[dict[str, Any]]) -> None:
    faults = {(r["name"], r["width"], r["scheme"]): r["faults"] for r in measured if r["faults"]}
    assert not faults, json.dumps({str(key): value[:5] for key, value in faults.items()}, indent=1)


def test_figures_have_their_titles_in_the_page(measured: list[dict[str, Any]]) -> None:
    for result in measured:
        assert "What each gain in the domain costs" in result["titles"]
        assert "How the search grew the front" in result["titles"]
        assert all(result["titles"])


def test_the_page_follows_the_dark_scheme_and_paper_is_light_and_narrow(measured: list[dict[str, Any]]) -> None:
    for result in measured:
        assert (result["ground"] < 0.05) == (result["scheme"] == "dark")
        assert result["ink"] < 0.05
        assert all(0 < float(width) <= 680 for width in result["paper"])
        assert result["after"] == [], "what was drawn for paper stays on the screen"
        assert result["resized"] == [], "a narrower window cuts it off"
