// The page: requests with the token, tabs, and samplers side by side from one noise.
import {setUpLive} from "/live.js";
import {setUpRuns} from "/runs.js";

export const $ = (selector, root = document) => root.querySelector(selector);

const fromLink = new URLSearchParams(location.hash.slice(1)).get("token");
if (fromLink) {
  sessionStorage.setItem("token", fromLink);
  history.replaceState(null, "", location.pathname);
}

/** Returns a new element with attributes and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Fetches with the token; an answer that is none of success throws its message. */
export async function ask(path, body) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const options = {headers};
  if (body) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, {method: "POST", body: JSON.stringify(body)});
  }
  const answer = await fetch(path, options);
  if (answer.status === 401) $("#token").hidden = false;
  if (!answer.ok) {
    const error = await answer.json().catch(() => null);
    throw new Error(error?.error?.message ?? `HTTP ${answer.status}`);
  }
  return answer;
}

export function say(text, isError = false) {
  $("#status").textContent = text;
  $("#status").classList.toggle("error", isError);
}

/** The fields that the images and the race share. */
export function conditions(model) {
  const body = {model: model.name};
  if (model.classes && $("#label").value !== "") body.label = Number($("#label").value);
  if (model.prompt) body.prompt = $("#prompt").value;
  if (model.guidance) body.guidance = Number($("#guidance").value);
  return body;
}

export const png = (text) => `data:image/png;base64,${text}`;
export const digits = (x) => (x < 10 ? x.toFixed(2) : x < 100 ? x.toFixed(1) : x.toFixed(0));

const columns = [];

/** Samplers of all models: name -> the steps that are compiled. */
function choices(models) {
  const found = [];
  for (const model of models) {
    const names = [...new Set(model.samplers.map((s) => s.sampler))];
    for (const name of names) {
      const steps = model.samplers.filter((s) => s.sampler === name).map((s) => s.steps);
      found.push({model, name, steps: steps.sort((a, b) => a - b)});
    }
  }
  return found;
}

function addColumn(all, index, steps) {
  const id = `column-${columns.length}`;
  const select = make("select", {id, "aria-label": "Model and sampler"});
  all.forEach((c, k) =>
    select.append(make("option", {value: k}, `${c.model.name}: ${c.name}`)));
  select.value = index;
  const range = make("input", {type: "range", id: `${id}-steps`, min: 0});
  const shown = make("output", {for: `${id}-steps`});
  const label = make("label", {for: `${id}-steps`}, "Steps ");
  const pictures = make("div", {class: "pictures"});
  const facts = make("dl");
  const remove = make("button", {type: "button", "aria-label": "Remove this column"}, "Remove");
  const element = make("div", {class: "column", role: "group", "aria-label": "Column"},
    select, label, range, shown, pictures, facts, remove);
  const column = {element, pictures, facts, get choice() { return all[select.value]; },
    get steps() { return this.choice.steps[range.value]; }};
  const update = (wanted) => {
    range.max = column.choice.steps.length - 1;
    const at = column.choice.steps.indexOf(wanted);
    if (at >= 0) range.value = at;
    range.disabled = column.choice.steps.length < 2;
    shown.textContent = column.steps;
    range.setAttribute("aria-valuetext", `${column.steps} steps`);
  };
  select.addEventListener("change", () => { update(column.choice.steps[0]); makeImages(); });
  range.addEventListener("input", () => update());
  range.addEventListener("change", () => makeImages());
  remove.addEventListener("click", () => {
    columns.splice(columns.indexOf(column), 1);
    element.remove();
  });
  update(steps);
  columns.push(column);
  $("#columns").append(element);
}

/** The first columns: each model's own sampler; one and two steps of those of few steps. */
function firstColumns(all) {
  for (const model of all.map((c) => c.model).filter((m, k, list) => list.indexOf(m) === k)) {
    const own = model.samplers[0];
    const index = all.findIndex((c) => c.model === model && c.name === own.sampler);
    const few = own.steps <= 4 && all[index].steps.includes(1);
    for (const steps of few ? [...new Set([1, own.steps])] : [own.steps]) addColumn(all, index, steps);
  }
}

let turn = 0;

/** Asks for the images of all columns, one after the other, so that none slows another. */
async function makeImages() {
  const mine = ++turn;
  const seed = Number($("#seed").value);
  const count = Number($("#count").value);
  say("");
  for (const column of [...columns]) {
    const {choice, steps} = column;
    const times = [];
    const images = [];
    let evaluations = 0;
    try {
      for (let k = 0; k < count; k++) {
        const body = {...conditions(choice.model), seed: seed + k, sampler: choice.name, steps,
          format: "json"};
        const answer = await (await ask("/v1/images", body)).json();
        if (mine !== turn) return;
        const image = answer.images[0];
        times.push(answer.batch_ms);
        evaluations = image.evaluations;
        const what = choice.model.prompt ? "" : `, class ${image.label}`;
        images.push(make("img", {src: png(image.png),
          alt: `Seed ${seed + k}${what}, ${choice.name} in ${steps} steps`}));
      }
    } catch (error) {
      if (mine === turn) say(error.message, true);
      return;
    }
    column.pictures.classList.toggle("one", count === 1);
    column.pictures.replaceChildren(...images);
    const middle = times.sort((a, b) => a - b)[Math.floor(times.length / 2)];
    column.facts.replaceChildren(
      make("dt", {}, "evaluations"), make("dd", {}, String(evaluations)),
      make("dt", {}, "ms an image"), make("dd", {}, digits(middle)));
  }
  say(`Made ${count} ${count === 1 ? "image" : "images"} in each column.`);
}

function setUpControls(models) {
  const images = models.filter((m) => m.makes === "images");
  const classes = Math.max(0, ...images.map((m) => m.classes));
  $("#label").append(make("option", {value: ""}, "in turn"));
  for (let k = 0; k < classes; k++) $("#label").append(make("option", {value: k}, String(k)));
  $("#of-class").hidden = classes === 0;
  $("#of-prompt").hidden = !images.some((m) => m.prompt);
  $("#of-guidance").hidden = !images.some((m) => m.guidance);
  for (const name of ["seed", "guidance"]) {
    const input = $(`#${name}`);
    const show = () => { $(`output[for=${name}]`).textContent = input.value; };
    input.addEventListener("input", show);
    show();
  }
  $("#request").addEventListener("change", () => makeImages());
  $("#request").addEventListener("submit", (event) => { event.preventDefault(); makeImages(); });
  const all = choices(images);
  firstColumns(all);
  $("#add").addEventListener("click", () => {
    addColumn(all, 0, all[0].steps[0]);
    makeImages();
  });
  const names = images.map((m) => `${m.name} (${m.title})`).join(", ");
  $("#lead").textContent = `The same noise, as several samplers end it. Served: ${names}.`;
}

function setUpTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const open = (tab) => {
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", chosen);
      other.tabIndex = chosen ? 0 : -1;
      $(`#${other.getAttribute("aria-controls")}`).hidden = !chosen;
    }
    tab.dispatchEvent(new CustomEvent("opened"));
  };
  tabs.forEach((tab, k) => {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!step) return;
      const next = tabs[(k + step + tabs.length) % tabs.length];
      next.focus();
      open(next);
    });
  });
}

async function start() {
  try {
    const {models} = await (await ask("/v1/models")).json();
    $("#token").hidden = true;
    if (models.some((m) => m.makes === "images")) {
      setUpControls(models);
      setUpLive(models.filter((m) => m.watch));
      await makeImages();
    } else {
      $("#request").hidden = true;
      say("This service makes actions alone; see the HTTP interface below.");
    }
    document.body.dataset.ready = "yes";
  } catch (error) {
    say(error.message, true);
  }
}

$("#token").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("#token-value").value);
  start();
});
setUpTabs();
setUpRuns();
start();
