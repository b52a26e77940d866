// Shows the OpenAPI document as tables.
const make = (tag, ...children) => {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
};

/** Returns what a value may be, in words. */
function form(schema) {
  if (schema.anyOf) return schema.anyOf.map(form).join(" or ");
  if (schema.enum) return schema.enum.map((v) => JSON.stringify(v)).join(", ");
  const bounds = [];
  if (schema.minimum !== undefined) bounds.push(`at least ${schema.minimum}`);
  if (schema.exclusiveMinimum !== undefined) bounds.push(`above ${schema.exclusiveMinimum}`);
  if (schema.maximum !== undefined) bounds.push(`at most ${schema.maximum}`);
  if (schema.maxLength !== undefined) bounds.push(`at most ${schema.maxLength} characters`);
  if (schema.maxItems !== undefined) bounds.push(`at most ${schema.maxItems}`);
  const items = schema.items ? ` of ${form(schema.items)}` : "";
  return `${schema.type ?? "any"}${items}${bounds.length ? ` (${bounds.join(", ")})` : ""}`;
}

function fields(schema) {
  const head = make("tr", ...["field", "form", "default", "meaning"].map((t) => make("th", t)));
  const rows = Object.entries(schema.properties).map(([name, field]) =>
    make("tr", make("td", make("code", name)), make("td", form(field)),
      make("td", field.default === undefined ? "required" : JSON.stringify(field.default)),
      make("td", field.description ?? "")));
  const wide = make("div", make("table", head, ...rows));
  wide.className = "wide";
  return wide;
}

const document_ = await (await fetch("/openapi.json")).json();
const place = document.querySelector("#paths");
for (const [path, methods] of Object.entries(document_.paths)) {
  for (const [method, about] of Object.entries(methods)) {
    place.append(make("h2", `${method.toUpperCase()} ${path}`), make("p", `${about.summary}.`));
    const reference = about.requestBody?.content["application/json"].schema.$ref;
    if (reference) place.append(fields(document_.components.schemas[reference.split("/").at(-1)]));
    const rows = Object.entries(about.responses).map(([code, r]) =>
      make("tr", make("td", code), make("td", r.description)));
    place.append(make("table", ...rows));
  }
}
document.body.dataset.ready = "yes";
