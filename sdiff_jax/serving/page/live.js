// The window of a parallel sampler, pass by pass, and the race with the sequential one.
import {$, ask, conditions, digits, make, png, say} from "/app.js";

const SLOW_SECONDS = 7; // duration of the sequential sampler in slow motion
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let models = [];

export function setUpLive(watched) {
  models = watched;
  $("#live").hidden = !models.length;
  for (const model of models) $("#of-model").append(make("option", {}, model.name));
  $("#race").addEventListener("click", race);
}

/** Calls `each` with the name and the data of every event of a stream. */
async function events(answer, each) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const [, name, data] = part.match(/^event: (\w+)\ndata: (.*)$/s) ?? [];
      if (name) each(name, JSON.parse(data));
    }
  }
}

/** Shows a pass: preview, finished steps, and the band of steps in work. */
function showPass(start, pass) {
  const side = $(`#${pass.mode}`);
  $("img", side).src = png(pass.png);
  $("img", side).alt = `Preview after ${pass.begin} of ${start.steps} steps`;
  const percent = (k) => `${(100 * k) / start.steps}%`;
  $(".done", side).style.width = percent(pass.begin);
  $(".band", side).style.left = percent(pass.begin);
  $(".band", side).style.width = percent(pass.end - pass.begin);
  const at = pass.end - pass.begin > 1
    ? `steps ${pass.begin + 1} to ${pass.end}` : `step ${pass.end}`;
  $("figcaption", side).textContent =
    `Pass ${pass.pass}: ${at} of ${start.steps}, ${digits(pass.ms)} ms`;
  side.dataset.pass = pass.pass;
  if (pass.mode === "parallel") {
    document.querySelectorAll("#stairs g, #film li").forEach((row) =>
      row.classList.toggle("later", Number(row.dataset.pass) > pass.pass));
  }
}

function showDone(start, done, alone) {
  const side = $(`#${done.mode}`);
  $("img", side).src = png(done.png);
  $("img", side).alt = `Image after ${start.steps} steps, ${done.mode}`;
  $(".done", side).style.width = "100%";
  $(".band", side).style.width = "0";
  $("figcaption", side).textContent =
    `${done.passes} passes, ${done.evaluations} evaluations, ${digits(done.ms)} ms` +
    (alone ? `; ${digits(alone)} ms without previews` : "");
  side.dataset.finished = "yes";
}

/** Adds a row to the staircase: the steps of a pass, finished and in work. */
function addStair(start, pass) {
  const svg = $("#stairs");
  const width = 640 / start.steps;
  const y = 16 * (pass.pass - 1);
  const group = document.createElementNS(svg.namespaceURI, "g");
  group.dataset.pass = pass.pass;
  const rect = (kind, from, to) => {
    const element = document.createElementNS(svg.namespaceURI, "rect");
    const values = {x: 56 + from * width, y, width: Math.max((to - from) * width - 1, 0), height: 13, class: kind};
    for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
    group.append(element);
  };
  rect("finished", 0, pass.begin);
  rect("work", pass.begin, pass.end);
  const text = document.createElementNS(svg.namespaceURI, "text");
  text.setAttribute("y", y + 10);
  text.textContent = `pass ${pass.pass}`;
  group.append(text);
  svg.append(group);
  svg.setAttribute("viewBox", `0 0 700 ${y + 16}`);
  const image = make("img", {src: png(pass.png), alt: `Preview of pass ${pass.pass}`});
  const item = make("li", {"data-pass": pass.pass}, image, `pass ${pass.pass}`);
  $("#film").append(item);
}

function clear() {
  $("#stairs").replaceChildren();
  $("#film").replaceChildren();
  $("#verdict").textContent = "";
  for (const side of ["#parallel", "#sequential"]) {
    delete $(side).dataset.finished;
    $("figcaption", $(side)).textContent = "";
    $(".done", $(side)).style.width = $(".band", $(side)).style.width = "0";
  }
}

async function race() {
  const model = models.find((m) => m.name === $("#of-model").value);
  $("#race").disabled = true;
  clear();
  say("");
  const found = {passes: [], done: {}, alone: {}};
  try {
    const body = {...conditions(model), seed: Number($("#seed").value)};
    await events(await ask("/v1/watch", body), (name, data) => {
      if (name === "start") found.start = data;
      if (name === "pass") {
        found.passes.push(data);
        if (data.mode === "parallel") addStair(found.start, data);
        showPass(found.start, data);
      }
      if (name === "done") {
        found.done[data.mode] = data;
        showDone(found.start, data);
      }
      if (name === "alone") found.alone[data.mode] = data.ms;
      if (name === "error") throw new Error(data.message);
    });
    await replay(found);
  } catch (error) {
    say(error.message, true);
  } finally {
    $("#race").disabled = false;
  }
}

/** Shows both from a common start, by the times that each had alone on the device. */
async function replay({start, passes, done, alone}) {
  const factor = $("#speed").value === "1" ? 1
    : Math.max(1, (1e3 * SLOW_SECONDS) / done.sequential.ms);
  for (const mode of ["parallel", "sequential"]) {
    delete $(`#${mode}`).dataset.finished;
    showPass(start, passes.find((pass) => pass.mode === mode));
  }
  $("#verdict").textContent = factor > 1 ? `Slowed ${Math.round(factor)} times.` : "";
  const all = [...passes.map((pass) => [pass.ms, () => showPass(start, pass)]),
    ...Object.values(done).map((d) => [d.ms, () => showDone(start, d, alone[d.mode])])];
  all.sort((a, b) => a[0] - b[0]);
  const begin = performance.now();
  for (const [ms, show] of all) {
    const wait = begin + factor * ms - performance.now();
    if (wait > 0 && !calm.matches) await new Promise((resolve) => setTimeout(resolve, wait));
    show();
  }
  const {parallel, sequential} = done;
  const ratio = alone.sequential / alone.parallel;
  $("#verdict").textContent =
    `${parallel.passes} passes in place of ${sequential.passes} steps: ` +
    (ratio >= 1 ? `${ratio.toFixed(1)} times as fast` : `${(1 / ratio).toFixed(1)} times as slow`) +
    ` (${digits(alone.parallel)} ms against ${digits(alone.sequential)} ms without previews).`;
}
