// Draws each figure at the width there is, and in the colours a screen asks for; on paper in light ones.
const figures = JSON.parse(document.getElementById("figures").textContent);
const narrow = matchMedia("(max-width: 760px)"), dark = matchMedia("(prefers-color-scheme: dark)");
const PAPER_WIDTH = 660;  // pixels: between the margins of A4 and of letter
const LETTER = 8;  // pixels, with some to spare
let onPaper = false;

function recoloured(value) {
  if (typeof value === "string") return Object.hasOwn(figures.dark, value) ? figures.dark[value] : value;
  if (Array.isArray(value)) return value.map(recoloured);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, recoloured(part)]));
}

function characters(label) {  // of an escaped label
  return label.match(/&[^;]+;|[^]/gu) ?? [];
}

function cut(label, most) {  // in the middle: names differ at their ends
  const all = characters(label), half = Math.floor(most / 2);
  return all.length > most ? [...all.slice(0, half), "…", ...all.slice(1 - half)].join("") : label;
}

function inLines(title, most) {
  const lines = [""];
  for (const word of title.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length >= most) lines.push("");
    lines.push(`${lines.pop()} ${word}`.trim());
  }
  return lines.join("<br>");
}

function fewerTicks(axis) {  // both ends and every third between, with room beside the ends
  const {tickvals, ticktext} = axis, last = tickvals.length - 1;
  const kept = tickvals.map((_, i) => i).filter((i) => i === 0 || i === last || (i > 1 && i < last - 1 && i % 3 === 1));
  Object.assign(axis, {tickvals: kept.map((i) => tickvals[i]), ticktext: kept.map((i) => ticktext[i])});
}

const squeeze = {  // what a figure gives up where there is little room
  front({layout}) {
    layout.height = 430;
    const [left, right] = layout.xaxis.range;
    for (const note of layout.annotations.filter((note) => note.showarrow)) {
      const isLeft = note.x - left < (right - left) / 2;  // a label runs towards the middle
      const [name, below] = note.text.split("<br>");  // the knee's has two lines: it goes below the front
      const place = {xanchor: isLeft ? "left" : "right", ax: isLeft ? 12 : -12, ay: below ? 40 : 0.6 * note.ay};
      Object.assign(note, place, {text: cut(name, 26)});
    }
  },
  weights({layout}) {
    layout.height *= 0.9;
    for (const axis of Object.keys(layout).filter((key) => key.startsWith("xaxis"))) fewerTicks(layout[axis]);
  },
  retention({data, layout}) {  // a task's name and figures stand above its bar
    const names = layout.yaxis.ticktext, most = layout.width / LETTER;
    const isLong = (note, i) => characters(names[i]).length + note.text.length > most;
    const tall = layout.annotations.some(isLong);
    layout.annotations.forEach((note, i) => Object.assign(note, {
      text: `${cut(names[i], most)}${tall ? "<br>" : "  "}<b>${note.text}</b>`,
      x: 0, xanchor: "left", align: "left", y: i + 0.2, yanchor: "bottom", bgcolor: "rgba(255,255,255,0.85)",
    }));
    for (const bars of data) bars.width = 0.3;
    layout.height = 130 + (tall ? 76 : 58) * names.length;
    Object.assign(layout.yaxis, {showticklabels: false, range: [-0.5, names.length - 0.1]});
    Object.assign(layout.margin, {l: 4, r: 4});
  },
  hypervolume({layout}) { layout.height = 340; },
  sensitivities({data, layout}) {  // one for each expert: the figure's name goes on with the expert's
    for (const axis of Object.keys(layout).filter((key) => key.startsWith("xaxis"))) fewerTicks(layout[axis]);
    for (const axis of Object.keys(layout).filter((key) => key.startsWith("yaxis"))) {
      const kinds = data[0].y;
      Object.assign(layout[axis], {tickvals: kinds, ticktext: kinds.map((kind) => cut(kind, 15))});
    }
    for (const note of layout.annotations) Object.assign(note, {text: inLines(note.text, 24), align: "left"});
    for (const map of data) Object.assign(map.colorbar, {thickness: 8, title: undefined, nticks: 4, xpad: 4});
  },
};

function squeezed(id, figure) {
  const {layout} = figure;
  layout.font.size = 12;
  Object.assign(layout.margin, {l: 8, r: 8, b: 8});
  for (const key of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
    const {title} = layout[key];
    if (title?.text) layout[key].title = {...title, text: inLines(title.text, layout.width / LETTER), font: {size: 13}};
  }
  for (const note of layout.annotations ?? []) note.font = {...note.font, size: 12};
  squeeze[id.split("-")[0]]?.(figure);
}

function draw(id, stored) {
  const figure = structuredClone(stored), {layout} = figure, place = document.getElementById(id);
  const words = {h2: layout.title.text, p: layout.title.subtitle.text};
  for (const [tag, text] of Object.entries(words)) place.querySelector(tag).textContent = text;
  const top = (layout.annotations ?? []).some(({yref, y}) => yref === "paper" && y >= 1) ? 40 : 10;  // a panel's title
  layout.height -= layout.margin.t - top;
  layout.margin.t = top;
  delete layout.title;
  layout.width = onPaper ? PAPER_WIDTH : place.clientWidth;
  if (narrow.matches || onPaper) squeezed(id, figure);
  const shown = dark.matches && !onPaper ? recoloured(figure) : figure;
  Plotly.newPlot(place.querySelector(".figure"), shown.data, shown.layout, {displayModeBar: false});
}

function drawChosen() {
  for (const id of ["weights", "retention"]) draw(id, figures[id][document.getElementById("choice").value]);
}

function drawAll() {
  for (const id of ["front", "hypervolume", ...Object.keys(figures.sensitivities)]) {
    draw(id, figures[id] ?? figures.sensitivities[id]);
  }
  drawChosen();
  document.querySelector("#front .figure").on("plotly_click", (event) => {
    const trial = String(event.points[0].customdata);
    if (!Object.hasOwn(figures.weights, trial)) return;
    document.getElementById("choice").value = trial;
    drawChosen();
  });
}

if (figures.front) {
  drawAll();
  document.getElementById("choice").addEventListener("change", drawChosen);
  dark.addEventListener("change", drawAll);
  let width = innerWidth, soon = 0;  // a phone's bars come and go: that is no new width
  addEventListener("resize", () => {
    clearTimeout(soon);
    if (innerWidth !== width) soon = setTimeout(() => { width = innerWidth; drawAll(); }, 100);
  });
  addEventListener("beforeprint", () => { onPaper = true; drawAll(); });
  addEventListener("afterprint", () => { onPaper = false; drawAll(); });
}
