/** What an answer cost, drawn and in words: visual tokens, and the milliseconds of each stage. */

import { make, newId } from "./dom.js";

/** Stages in their order: name of the colour, label, the timings that belong to it, and what happens. */
const STAGES = [
  ["waiting", "waiting", [], "The request waits until the server has time for it."],
  ["prepare", "image and text", ["preprocess"], "The picture is scaled, and the text is split into tokens."],
  ["vision", "vision encoder", ["vision_encoder"], "It makes visual tokens of the picture."],
  ["pruner", "pruner", ["token_pruner", "segment_pruner"], "It chooses the visual tokens that are kept."],
  ["prefill", "prefill", ["prefill", "embedding"],
    "The language model reads the visual tokens and the text. Then it has the first token of the answer."],
  ["decode", "decode", ["decode"], "The language model writes the rest of the answer, token by token."],
];
export const STAGE_WORDS = STAGES.map(([, label, , words]) => [label, words]);
const TOO_SMALL = 150; // a stage of less than a 150th of the longest bar is not drawn; the table has it
const NO_STAGE = ["total", "decode_per_token"];
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const small = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** Return milliseconds as a text, with as many digits as are worth reading. */
export const ms = (value) => `${(value < 10 ? small : number).format(value)} ms`;

/**
 * Return the stages of an answer with their milliseconds.
 * @param {Object} figures The object `visprune` of an answer.
 * @returns {{name: string, label: string, ms: number}[]}
 */
export function stages(figures) {
  const timings = figures.timings_ms;
  const known = new Set([...STAGES.flatMap(([, , keys]) => keys), ...NO_STAGE]);
  const segments = Object.keys(timings).filter((key) => !known.has(key)); // of a decoder in several graphs
  return STAGES.map(([name, label, keys]) => {
    const all = name === "prefill" ? [...keys, ...segments] : keys;
    const spent = all.reduce((sum, key) => sum + (timings[key] ?? 0), 0);
    return { name, label, ms: name === "waiting" ? (figures.queue_ms ?? 0) : spent };
  });
}

const total = (found, what = "ms") => found.reduce((sum, stage) => sum + (stage[what] ?? 0), 0);

/** Return the milliseconds up to the first token, without the time in the queue. */
const untilFirst = (found) => total(found.filter(({ name }) => name !== "waiting" && name !== "decode"));

/** Say how many visual tokens were kept: [the count, what follows it]. */
export function countWords({ tokens_kept: kept, visual_tokens: all }) {
  const removed = all ? (100 * (all - kept)) / all : 0;
  const words = kept === all ? "visual tokens, none removed" : `visual tokens, ${Math.round(removed)}% removed`;
  return [`${number.format(kept)} of ${number.format(all)}`, words];
}

/** Say when the first token came, and how long everything took. */
export function timeWords(found) {
  return `First token after ${ms(untilFirst(found))}, the whole answer after ${ms(total(found))}.`;
}

/** Return whether the picture of an answer was in the cache. */
export const wasEncoded = ({ cached }) => Boolean(cached?.images);

/** Say that the picture was in the cache; empty if it was not. */
export function cacheWords(figures) {
  return wasEncoded(figures) ? "The picture had been encoded before, so the vision encoder did not run." : "";
}

/**
 * Return the stages that can be compared: the vision encoder is in all rows or in none. Where it did not run,
 * its earlier time becomes `saved`. If that time is not known, the encoder is left out of every row.
 */
function comparable(rows) {
  const without = rows.some(({ encoderMs }) => encoderMs === null);
  return rows.map(({ stages: found, encoderMs }) =>
    found.map((stage) => {
      if (stage.name !== "vision") return stage;
      return without ? { ...stage, ms: 0 } : { ...stage, saved: encoderMs };
    }));
}

/** Say why the vision encoder is left out; empty if it is not. */
function withoutWords(rows) {
  const unknown = rows.filter(({ encoderMs }) => encoderMs === null);
  if (!unknown.length) return "";
  const where = unknown.length < rows.length ? `${unknown[0].title}: the` : "The";
  const bars = rows.length > 1 ? "both bars" : "the bar";
  return `${where} picture was encoded for an earlier request, and this page does not know how long that took. `
    + `So ${bars} leave${rows.length > 1 ? "" : "s"} the vision encoder out.`;
}

/**
 * Draw where the time went: a bar for each answer on one scale, a legend, and the numbers as a table.
 * @param {{title: string, stages: Object[], encoderMs: number|null}[]} answers encoderMs is what the vision
 *   encoder would have taken if the picture had not been encoded before: 0 if it ran, null if nobody knows.
 */
export function timeFigure(answers) {
  const compared = comparable(answers);
  const rows = answers.map(({ title }, i) => ({ title, stages: compared[i] }));
  const why = withoutWords(answers);
  const longest = Math.max(...rows.map(({ stages: found }) => total(found) + total(found, "saved")));
  const used = STAGES.filter((_, i) => rows.some(({ stages: found }) => found[i].ms >= longest / TOO_SMALL || found[i].saved));
  const caption = make("figcaption", { id: newId("caption") }, "Where the time goes");
  const bars = rows.map(({ title, stages: found }) => [
    make("p", { class: "bar-title" }, make("span", {}, title), make("b", {}, totalWords(found) + (why && " without the vision encoder"))),
    bar(title, found, longest),
  ]);
  const legend = used.map(([name, label, , words]) =>
    make("li", { title: words }, make("i", { class: `swatch ${name}` }), label));
  if (rows.some(({ stages: found }) => found.some(({ saved }) => saved))) {
    legend.push(make("li", {}, make("i", { class: "swatch saved" }), "saved by the cache"));
  }
  return make("figure", { class: "times", "aria-labelledby": caption.id },
    caption, ...bars.flat(), make("ul", { class: "legend", "aria-hidden": "true" }, ...legend),
    why && make("p", { class: "soft" }, why), table(answers));
}

function totalWords(found) {
  const [spent, saved] = [total(found), total(found, "saved")];
  return saved ? `${ms(spent)} (${ms(spent + saved)} without the cache)` : ms(spent);
}

/** Return the time of a stage for the table, which has every time that is known. */
function cellWords({ stages: found, encoderMs }, i) {
  const stage = found[i];
  if (stage.name !== "vision") return ms(stage.ms);
  return encoderMs === null ? "encoded before" : totalWords([{ ...stage, saved: encoderMs }]);
}

function bar(title, found, longest) {
  const parts = found.filter((stage) => stage.ms || stage.saved);
  const words = parts.map((s) => `${s.label} ${ms(s.ms)}${s.saved ? `, ${ms(s.saved)} saved by the cache` : ""}`);
  const drawn = make("div", { class: "bar", role: "img", "aria-label": `${title}: ${words.join(", ")}` });
  for (const stage of parts) {
    for (const [kind, value] of [[stage.name, stage.ms], ["saved", stage.saved ?? 0]]) {
      if (value < longest / TOO_SMALL) continue;
      const part = make("span", { class: kind, title: `${stage.label}: ${ms(value)}` });
      part.style.width = `${(100 * value) / longest}%`;
      drawn.append(part);
    }
  }
  return drawn;
}

function table(rows) {
  const head = make("tr", {}, make("th", { scope: "col" }, "stage"),
    ...rows.map(({ title }) => make("th", { scope: "col" }, title)));
  const lines = STAGES.map(([, label], i) => make("tr", {}, make("th", { scope: "row" }, label),
    ...rows.map((row) => make("td", {}, cellWords(row, i)))));
  const made = make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines));
  return make("details", {}, make("summary", {}, "The numbers"), made);
}
