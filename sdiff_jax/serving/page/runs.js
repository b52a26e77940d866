// Runs while they train: progress, time left, curves, and grids of samples.
import {$, ask, make, say} from "/app.js";

const EVERY = 2000; // milliseconds
const shown = new Map();

export function setUpRuns() {
  $("#tab-runs").addEventListener("opened", refresh);
  setInterval(() => { if (!$("#runs").hidden && !document.hidden) refresh(); }, EVERY);
}

async function refresh() {
  try {
    const {runs} = await (await ask("/v1/runs")).json();
    $("#no-runs").hidden = runs.length > 0;
    for (const run of runs) update(run);
  } catch (error) {
    say(error.message, true);
  }
}

function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.round(seconds)} s`;
}

function summary(run) {
  const parts = [`step ${run.step.toLocaleString()} of ${run.total.toLocaleString()}`];
  if (run.finished) parts.push("finished");
  else if (run.age !== null && run.age > 120) parts.push(`nothing new for ${duration(run.age)}`);
  else if (run.left !== null) parts.push(`${duration(run.left)} left`);
  if (run.speed) parts.push(`${Math.round(run.speed).toLocaleString()} samples/s`);
  return parts.join(", ");
}

function create(run) {
  const metric = make("select", {"aria-label": `Metric of ${run.name}`});
  const range = make("input", {type: "range", min: 0, value: 0, "aria-label": `Grid of ${run.name}`});
  const card = {run, metric, range, text: make("span"), progress: make("progress", {"aria-label": `Progress of ${run.name}`}),
    chart: make("div"), image: make("img", {alt: ""}), caption: make("figcaption"), faults: make("p", {class: "error"})};
  const figure = make("figure", {}, card.image, range, card.caption);
  const article = make("article", {"aria-label": run.name},
    make("header", {}, make("h3", {}, `${run.name}: ${run.kind} on ${run.data}`), card.text),
    card.progress, make("div", {class: "body"}, make("div", {}, metric, card.chart), figure), card.faults);
  card.figure = figure;
  metric.addEventListener("change", () => draw(card));
  range.addEventListener("input", () => { card.follows = false; grid(card); });
  card.follows = true;
  $("#run-list").append(article);
  shown.set(run.run, card);
  return card;
}

function update(run) {
  const card = shown.get(run.run) ?? create(run);
  card.run = run;
  card.text.textContent = summary(run);
  card.progress.max = Math.max(run.total, 1);
  card.progress.value = run.step;
  card.faults.textContent = run.faults.join("; ");
  const names = Object.keys(run.curves);
  if (card.metric.options.length !== names.length) {
    card.metric.replaceChildren(...names.map((name) => make("option", {}, name)));
    if (names.includes("loss")) card.metric.value = "loss";
  }
  card.figure.hidden = !run.grids.length;
  card.range.max = Math.max(run.grids.length - 1, 0);
  if (card.follows) card.range.value = card.range.max;
  draw(card);
  grid(card);
}

/** Draws a curve; positive values over more than a decade are drawn as logarithms. */
function draw(card) {
  const points = card.run.curves[card.metric.value] ?? [];
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  if (points.length < 2) return card.chart.replaceChildren();
  const values = points.map((p) => p[1]);
  const low = Math.min(...values);
  const high = Math.max(...values);
  const log = low > 0 && high > 10 * low;
  const scale = (v) => (log ? Math.log(v) : v);
  const y = (v) => 150 - (140 * (scale(v) - scale(low))) / (scale(high) - scale(low) || 1);
  const last = points.at(-1)[0];
  const x = (step) => 60 + (500 * step) / (last || 1);
  svg.setAttribute("viewBox", "0 0 570 175");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label",
    `${card.metric.value}: ${values.at(-1).toPrecision(3)} at step ${last}, ` +
    `from ${low.toPrecision(3)} to ${high.toPrecision(3)}`);
  const add = (tag, attributes, text = "") => {
    const element = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    svg.append(element);
  };
  for (const value of [low, high]) {
    add("line", {x1: 60, x2: 560, y1: y(value), y2: y(value)});
    add("text", {x: 0, y: y(value) + 4}, value.toPrecision(3));
  }
  add("text", {x: 60, y: 172}, "0");
  add("text", {x: 560, y: 172, "text-anchor": "end"}, `step ${last.toLocaleString()}`);
  add("path", {d: points.map(([s, v], k) => `${k ? "L" : "M"}${x(s).toFixed(1)} ${y(v).toFixed(1)}`).join("")});
  card.chart.replaceChildren(svg);
}

async function grid(card) {
  const {run} = card;
  const index = Number(card.range.value);
  const name = run.grids[index];
  if (!name || card.grid === name) return;
  card.grid = name;
  const content = await (await ask(`/v1/runs/${run.run}/grids/${index}`)).blob();
  if (card.url) URL.revokeObjectURL(card.url);
  card.url = URL.createObjectURL(content);
  card.image.src = card.url;
  const step = Number(name.split("_").at(-1));
  card.image.alt = `Samples of ${run.name} at step ${step}`;
  card.caption.textContent = `samples at step ${step.toLocaleString()}`;
}
