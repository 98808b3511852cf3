/** The large picture: the original, and what was kept of it, one at a time or side by side. */

import { byId, make } from "./dom.js";

/**
 * A picture to be shown.
 * @typedef {Object} Shown
 * @property {string} address `blob:` or `data:` URL.
 * @property {string} alt What it shows, for those who do not see it.
 * @property {string} caption Stands below it where there are two to choose from.
 */

/** The frame with the picture, and the buttons that say what it shows. */
export class Viewer {
  constructor() {
    this.original = null;
    this.kept = [];
    this.choice = null; // what the reader chose last; null until they choose
    byId("views").addEventListener("change", (event) => {
      this.choice = event.target.value;
      this.#draw();
    });
  }

  /** Show a new picture, of which nothing has been kept yet. @param {import("./picture.js").Picture} picture */
  open(picture) {
    this.original = { address: picture.address, alt: "Your picture", caption: "" };
    byId("frame").classList.remove("empty");
    this.forget();
  }

  /** Show the original alone. */
  forget() {
    this.keep([]);
    this.choice = null;
  }

  /** Show what was kept. @param {Shown[]} kept One picture, two to be compared, or none. */
  keep(kept) {
    this.kept = kept;
    this.#listViews();
    this.#draw();
  }

  #options() {
    const [left, right] = this.kept;
    if (!left) return [];
    const original = ["original", "Original"];
    if (!right) return [["left", "What was kept"], original];
    return [["both", "Both"], ["left", "First", left.caption], ["right", "Second", right.caption], original];
  }

  #chosen() {
    const values = this.#options().map(([value]) => value);
    return values.includes(this.choice) ? this.choice : values[0];
  }

  #listViews() {
    const chosen = this.#chosen();
    const choices = this.#options().map(([value, label, title]) =>
      make("label", { title }, make("input", { type: "radio", name: "view", value, checked: value === chosen }),
        make("span", {}, label)));
    const focused = byId("views").contains(document.activeElement);
    byId("views").replaceChildren(make("legend", {}, "Show"), ...choices);
    byId("views").hidden = choices.length === 0;
    if (focused) byId("views").querySelector(":checked")?.focus();
  }

  #draw() {
    const [left, right] = this.kept;
    const chosen = this.#chosen();
    const shown = { both: [left, right], left: [left], right: [right] }[chosen] ?? [this.original];
    byId("shown").classList.toggle("two", shown.length > 1);
    byId("shown").replaceChildren(...shown.filter(Boolean).map(({ address, alt, caption }) =>
      make("figure", {}, make("img", { src: address, alt }),
        right && caption ? make("figcaption", {}, caption) : null)));
  }
}
