/** Which bundles are compared, and how many of the visual tokens each of the two sides keeps. */

import { byId, make } from "./dom.js";

const UNPRUNED = ""; // value of the choice "the same bundle, with all tokens"
const LEAST = 5; // percent
const QUIET_MS = 350; // after the last step of the slider, so that arrow keys do not ask at every step

/** Return whether a request may choose another ratio than the one that the bundle was exported for. */
function adjustable(model) {
  const { method, inside_llm: inside } = model.visprune;
  return method !== "none" || Boolean(inside && inside !== "fitprune"); // a recipe fixes what is kept
}

const percent = (ratio) => Math.round(100 * ratio);

/**
 * One side of the comparison.
 * @typedef {Object} Side
 * @property {string} model
 * @property {number|null} ratio Null for the ratio that the bundle was exported for.
 * @property {string} title
 */

/** The choices of the reader. */
export class Settings {
  /**
   * @param {Object[]} models As `/v1/models` lists them; at least one.
   * @param {() => void} onChange Called when a choice has changed.
   */
  constructor(models, onChange) {
    this.models = models;
    this.onChange = onChange;
    this.ratio = null;
    byId("left-bundle").addEventListener("change", () => this.#chooseLeft());
    byId("right-bundle").addEventListener("change", () => this.#choose());
    byId("bundles").addEventListener("submit", (event) => event.preventDefault());
    byId("bundles").hidden = models.length < 2;
    byId("left-bundle").replaceChildren(...models.map(({ id }) => make("option", { value: id }, id)));
    this.#listOthers();
    if (models.length > 1) byId("right-bundle").value = models[1].id;
    this.#setUpSlider();
  }

  get #left() {
    return this.models.find(({ id }) => id === byId("left-bundle").value);
  }

  /** The first side, whose ratio the slider sets. @returns {Side} */
  get left() {
    const { id, visprune } = this.#left;
    const kept = percent(this.ratio ?? visprune.ratio);
    const title = this.#keepsAll ? this.#allTitle : `${kept}% of the tokens`;
    return { model: id, ratio: this.ratio, title: this.comparesBundles ? `${id}, ${kept}%` : title };
  }

  /** The side that it is compared with; null where there is nothing to compare. @returns {Side|null} */
  get right() {
    const other = byId("right-bundle").value;
    if (other !== UNPRUNED) {
      const { id, visprune } = this.models.find((model) => model.id === other);
      return { model: id, ratio: null, title: `${id}, ${percent(visprune.ratio)}%` };
    }
    if (!adjustable(this.#left) || this.#keepsAll) return null;
    return { model: this.#left.id, ratio: 1, title: this.#allTitle };
  }

  get #keepsAll() {
    return (this.ratio ?? this.#left.visprune.ratio) === 1;
  }

  get #allTitle() {
    const both = this.#left.visprune.inside_llm && this.#left.visprune.method !== "none";
    return both ? "All tokens enter the language model" : "All tokens";
  }

  /** Return the name of the method by which a model prunes before its language model. */
  methodOf(model) {
    return this.models.find(({ id }) => id === model).visprune.method;
  }

  /** Whether the two sides are two bundles. */
  get comparesBundles() {
    return byId("right-bundle").value !== UNPRUNED;
  }

  /** Say what is served, and what the page shows of it. */
  describe() {
    const { visual_tokens: all, keep_tokens: kept, method, inside_llm: inside } = this.#left.visprune;
    const by = [method === "none" ? null : method, inside].filter(Boolean).join(" and ");
    if (!by) return `This model reads a picture as ${all} visual tokens, and keeps them all.`;
    const other = this.comparesBundles ? "the two bundles' answers differ" : "the answer from all tokens differs";
    const compared = this.right ? `, how long the answer took, and whether ${other}` : " and how long the answer took";
    return `This model reads a picture as ${all} visual tokens, and keeps ${kept} of them, chosen by ${by}. Ask a `
      + `question to see which parts of the picture were kept${compared}.`;
  }

  #chooseLeft() {
    const previous = byId("right-bundle").value;
    this.#listOthers();
    byId("right-bundle").value = previous === byId("left-bundle").value ? UNPRUNED : previous;
    this.#showOwnRatio();
    this.#choose();
  }

  #choose() {
    this.#showChoice();
    this.onChange();
  }

  #listOthers() {
    const others = this.models.filter((model) => model !== this.#left);
    const same = make("option", { value: UNPRUNED }, "all tokens of the same bundle");
    byId("right-bundle").replaceChildren(same, ...others.map(({ id }) => make("option", { value: id }, id)));
  }

  #setUpSlider() {
    const slider = byId("ratio");
    let waiting = 0;
    const ask = () => {
      const value = Number(slider.value);
      this.ratio = value === percent(this.#left.visprune.ratio) ? null : value / 100;
      this.onChange();
    };
    slider.addEventListener("input", () => this.#showRatio());
    slider.addEventListener("change", () => {
      clearTimeout(waiting);
      waiting = setTimeout(ask, QUIET_MS);
    });
    this.#showOwnRatio();
    this.#showChoice();
  }

  #showOwnRatio() {
    this.ratio = null;
    const own = percent(this.#left.visprune.ratio);
    const slider = byId("ratio");
    slider.min = Math.max(1, Math.min(LEAST, own));
    slider.value = own;
    byId("ratio-least").textContent = `${slider.min}%`;
    this.#showRatio();
  }

  #showChoice() {
    const { id, visprune } = this.#left;
    byId("keep").hidden = !adjustable(this.#left);
    const facts = [id, [visprune.method, visprune.inside_llm].filter(Boolean).join(" and "), visprune.precision];
    byId("served").textContent = this.models.length > 1 ? `${this.models.length} bundles` : facts.join(" · ");
    byId("columns").classList.toggle("bundles-compared", this.comparesBundles);
    byId("explained").textContent = this.describe();
  }

  #showRatio() {
    const { value } = byId("ratio");
    byId("ratio-shown").textContent = `${value}%`;
    byId("ratio").setAttribute("aria-valuetext", `${value}% of the visual tokens`);
  }
}
