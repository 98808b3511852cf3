/** The list of the server's requests, made from its own `openapi.json`. */

import { byId, make, newId } from "./dom.js";

const DEEPEST = 6; // objects within objects; a schema may contain itself

/** Return the schema that a `$ref` names, or the schema itself. */
function resolve(api, schema) {
  const path = schema?.$ref?.replace("#/", "").split("/");
  return path ? path.reduce((found, key) => found[key], api) : (schema ?? {});
}

/** Return the schemas of which a value needs to keep one; null if there is no choice. */
const alternatives = (schema) => schema.anyOf ?? schema.oneOf ?? null;

/** Return the schemas of the values other than null. */
function kinds(schema) {
  return alternatives(schema)?.flatMap(kinds) ?? (schema.type === "null" ? [] : [schema]);
}

/** Return a short name of the type of a schema, such as "string or null". */
function typeName(api, schema) {
  const found = resolve(api, schema);
  if (found.const !== undefined) return JSON.stringify(found.const);
  if (found.enum) return found.enum.map((value) => JSON.stringify(value)).join(" or ");
  const choices = alternatives(found);
  if (choices) return [...new Set(choices.map((choice) => typeName(api, choice)))].join(" or ");
  if (found.type === "array") return `list of ${typeName(api, found.items)}`;
  return found.type ?? "anything";
}

/** Return the only values that a schema allows, null apart; null if there are others. */
function onlyValues(api, schema) {
  const found = kinds(resolve(api, schema)).map((kind) => resolve(api, kind));
  const values = found.map((kind) => {
    if (kind.const !== undefined) return [JSON.stringify(kind.const)];
    if (kind.enum) return kind.enum.map((value) => JSON.stringify(value));
    if (kind.minimum !== undefined && kind.minimum === kind.maximum) return [String(kind.minimum)];
    if (kind.maxProperties === 0) return ["{}"];
    if (kind.maxItems === 0) return ["[]"];
    if (kind.maxItems !== 1 || kind.minItems !== 1) return null;
    return onlyValues(api, kind.items)?.map((value) => `[${value}]`) ?? null;
  });
  return values.includes(null) ? null : values.flat();
}

/** Say which values a schema allows beside its type. */
function limits(api, schema) {
  const bounds = [
    ["minimum", (n) => `at least ${n}`], ["exclusiveMinimum", (n) => `above ${n}`], ["maximum", (n) => `at most ${n}`],
    ["exclusiveMaximum", (n) => `below ${n}`], ["maxLength", (n) => `up to ${n} characters`],
    ["maxItems", (n) => `up to ${n} items`],
  ];
  // A bound that a number of JavaScript cannot hold is that of 64 bits, which no one comes near.
  const bounded = (kind) => bounds.filter(([key]) => Math.abs(kind[key]) <= Number.MAX_SAFE_INTEGER)
    .map(([key, words]) => words(kind[key]));
  const found = kinds(schema).map((kind) => resolve(api, kind)).flatMap(bounded);
  if (schema.default !== undefined && schema.default !== null) found.push(`${JSON.stringify(schema.default)} by default`);
  const text = found.join(", ");
  return text && `${text[0].toUpperCase()}${text.slice(1)}.`;
}

/** Return the schemas of the objects that a value may be or hold. */
function objects(api, schema) {
  const found = resolve(api, schema);
  if (found.properties) return [found];
  const inner = alternatives(found) ?? (found.items ? [found.items] : []);
  return inner.flatMap((one) => objects(api, one));
}

/**
 * Describe the fields of an object, and those of the objects in it.
 * @param {boolean} sent Whether clients send the object: fields of which nothing is said then change nothing.
 */
function fields(api, schema, sent, depth = 0) {
  const required = schema.required ?? [];
  const idle = [];
  const rows = Object.entries(schema.properties).flatMap(([name, property]) => {
    const found = { ...resolve(api, property), ...property };
    const inner = depth < DEEPEST ? objects(api, property) : [];
    if (sent && !required.includes(name) && !found.description && !inner.length) {
      idle.push([name, onlyValues(api, property)]);
      return [];
    }
    return [
      make("dt", {}, make("code", {}, name), make("span", { class: "type" }, typeName(api, property),
        required.includes(name) ? ", required" : "")),
      make("dd", {}, ...[found.description, limits(api, found)].filter(Boolean).map((text) => make("p", {}, text)),
        ...inner.map((one) => make("details", {}, make("summary", {}, inner.length > 1 && one.title ? `Fields of ${one.title}` : "Fields"),
          fields(api, one, sent, depth + 1)))),
    ];
  });
  return make("dl", {}, ...rows, ...idleFields(idle));
}

/** List fields that change nothing, with the values that are taken. @param {[string, string[]|null][]} found */
function idleFields(found) {
  const groups = [
    ["Taken with any value, which changes nothing.", found.filter(([, values]) => !values)],
    ["Taken with the value that stands here, or with null, which changes nothing.", found.filter(([, values]) => values?.length)],
    ["Taken with null alone, which changes nothing.", found.filter(([, values]) => values?.length === 0)],
  ];
  return groups.filter(([, group]) => group.length).flatMap(([words, group]) => [
    make("dt", { class: "idle" }, ...group.map(([name, values]) =>
      make("span", {}, make("code", {}, name), values?.length ? ` ${values.join(" or ")}` : ""))),
    make("dd", {}, words),
  ]);
}

function content(api, title, body, sent) {
  const schema = Object.values(body?.content ?? {})[0]?.schema;
  const found = objects(api, schema);
  return found.length ? [make("h3", {}, title), ...found.map((one) => fields(api, one, sent))] : [];
}

function parameters(api, list) {
  if (!list?.length) return [];
  const rows = list.map((one) => resolve(api, one)).flatMap((one) => [
    make("dt", {}, make("code", {}, one.name), make("span", { class: "type" }, `${typeName(api, one.schema)}, in the ${one.in}`)),
    make("dd", {}, one.description ?? ""),
  ]);
  return [make("h3", {}, "Parameters"), make("dl", {}, ...rows)];
}

function operation(api, method, path, described) {
  const title = make("h2", { id: newId("operation") }, make("b", { class: "method" }, method.toUpperCase()), " ", make("code", {}, path));
  const refusals = Object.entries(described.responses ?? {}).filter(([status]) => !status.startsWith("2"));
  const answer = Object.entries(described.responses ?? {}).find(([status]) => status.startsWith("2"))?.[1];
  return make("section", { "aria-labelledby": title.id }, title,
    ...[described.summary, described.description].filter(Boolean).flatMap((text) => text.split("\n\n")).map((text) => make("p", {}, text)),
    ...parameters(api, described.parameters),
    ...content(api, "Request", resolve(api, described.requestBody), true),
    ...content(api, "Answer", resolve(api, answer), false),
    ...(refusals.length ? [make("h3", {}, "Refusals"), make("dl", {}, ...refusals.flatMap(([status, response]) => [
      make("dt", {}, make("code", {}, status)), make("dd", {}, resolve(api, response).description ?? ""),
    ]))] : []));
}

/** Put the address of this server and the name of its model into the examples. */
async function fillExamples() {
  const base = new URL("./", document.baseURI).href.replace(/\/$/, "");
  const response = await fetch("v1/models"); // refused where the server has keys: the name stays MODEL then
  const model = response.ok ? (await response.json()).data[0]?.id : null;
  for (const id of ["python-example", "shell-example"]) {
    const text = byId(id).textContent.replaceAll("BASE", base);
    byId(id).textContent = model ? text.replaceAll("MODEL", model) : text;
  }
}

async function describe() {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`The server refused openapi.json with the status ${response.status}.`);
  const api = await response.json();
  const operations = Object.entries(api.paths).flatMap(([path, { parameters: shared = [], ...methods }]) =>
    Object.entries(methods).map(([method, described]) =>
      operation(api, method, path, { ...described, parameters: [...shared, ...(described.parameters ?? [])] })));
  byId("operations").replaceChildren(...operations);
}

fillExamples().catch(() => {}); // the examples can be read as they are
describe().catch((error) => byId("operations").replaceChildren(make("p", { class: "error", role: "alert" }, error.message)));
