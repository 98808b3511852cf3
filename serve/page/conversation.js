/** A conversation about one picture. Its last question can be answered again, with other settings. */

import { TurnView, verdict } from "./answers.js";
import { countWords, stages, wasEncoded } from "./figures.js";

/**
 * An answer, whole or stopped.
 * @typedef {Object} Answer
 * @property {import("./settings.js").Side} side
 * @property {string} text
 * @property {string|null} finish
 * @property {Object|null} figures The object `visprune` of the answer; null if it was stopped.
 * @property {Object[]} stages As `figures.stages` gives them.
 */

const keyOf = (side) => JSON.stringify([side.model, side.ratio]);

/** The turns of a conversation, and what is being asked now. */
export class Conversation {
  /**
   * @param {import("./api.js").Api} api
   * @param {import("./settings.js").Settings} settings
   * @param {HTMLElement} list Where the turns are shown.
   * @param {{busy: (is: boolean) => void, kept: (left: Answer, right: Answer|null, words: string) => void,
   *   say: (words: string) => void, unanswered: (question: string) => void}} page busy is told of beginnings
   *   and ends, kept of new pictures, say of what has been completed, and unanswered of a question that was
   *   taken back.
   */
  constructor(api, settings, list, page) {
    Object.assign(this, { api, settings, list, page });
    this.picture = null;
    this.undrawn = new Set(); // models whose visual tokens are no grid, so that no picture can show them
    this.clear();
  }

  /** Begin anew, with the same picture. */
  clear() {
    this.stop();
    this.turns = [];
    this.list.replaceChildren();
  }

  /** Begin anew, with another picture. */
  about(picture) {
    this.clear();
    this.picture = picture;
    this.encoded = new Map(); // what the vision encoder was given -> its milliseconds, when it last ran
  }

  /** End the answer that is being computed, if any. */
  stop() {
    this.running?.abort();
    this.running = null;
  }

  /**
   * Ask a question.
   * @throws {Error} There is no answer, or no second one. Without a first one the question is taken back.
   */
  async ask(question) {
    const turn = { question, view: new TurnView(question), left: null, known: new Map() };
    this.turns.push(turn);
    this.list.append(turn.view.element);
    turn.view.element.scrollIntoView({ block: "nearest" });
    await this.#run(turn);
  }

  /** Answer the last question again, because the settings have changed. */
  async again() {
    const turn = this.turns.at(-1);
    if (turn) await this.#run(turn);
  }

  async #run(turn) {
    this.stop();
    const running = new AbortController();
    this.running = running;
    this.page.busy(true);
    const { left, right } = this.settings;
    const { view } = turn;
    view.compare(right !== null);
    if (right && !this.#showKnown(turn, right, view.right)) view.right.wait(right.title, "Comes next.");
    try {
      const first = await this.#answer(turn, left, view.left, running);
      if (this.running !== running) return;
      turn.left = first;
      this.#show(turn, first, null);
      if (!right || !first.figures) return;
      const second = await this.#answer(turn, right, view.right, running);
      if (this.running === running) this.#show(turn, first, second);
    } finally {
      if (this.running === running) {
        this.running = null;
        if (!turn.left?.figures && !turn.left?.text) this.#withdraw(turn);
        this.page.busy(false);
      }
    }
  }

  /** Take back a question to which nothing was answered. */
  #withdraw(turn) {
    this.turns = this.turns.filter((other) => other !== turn);
    turn.view.element.remove();
    this.page.unanswered(turn.question);
  }

  #show(turn, left, right) {
    turn.view.conclude(left, right, (answer) => this.#encoderMs(answer));
    const count = left.figures ? `${countWords(left.figures).join(" ")}.` : "";
    this.page.kept(left, right, `${count} ${verdict(left, right)}`);
    const latest = right ?? left;
    this.page.say(`${latest.side.title}: ${latest.text.trim()}. ${right ? verdict(left, right) : count}`);
  }

  /** Show and return the answer with the settings of one side, if it is known. */
  #showKnown(turn, side, view) {
    const known = turn.known.get(keyOf(side));
    if (!known) return null;
    known.side = side; // its title may be another one now
    view.finish(known);
    return known;
  }

  /** Return the answer with the settings of one side; one that is known is not computed again. */
  async #answer(turn, side, view, running) {
    const known = this.#showKnown(turn, side, view);
    if (known) return known;
    view.wait(side.title, "Looking at the picture …");
    const answer = { side, text: "", finish: null, figures: null, stages: [] };
    const onText = (text) => {
      answer.text = text;
      if (this.running === running) view.grow(text);
    };
    try {
      Object.assign(answer, await this.#request(turn, side, onText, running.signal));
      answer.stages = stages(answer.figures);
      if (!wasEncoded(answer.figures)) {
        this.encoded.set(this.#encoding(answer), answer.figures.timings_ms.vision_encoder ?? 0);
      }
      turn.known.set(keyOf(side), answer);
    } catch (error) {
      if (this.running === running) view.fail("No answer.");
      if (error.name !== "AbortError") throw error;
    }
    if (this.running === running) view.finish(answer);
    return answer;
  }

  /** Name what the vision encoder was given. A model that shrinks the picture gives it another one at each ratio. */
  #encoding({ side, figures }) {
    const shrinks = this.settings.methodOf(side.model) === "resize";
    return JSON.stringify([side.model, shrinks ? figures.keep_tokens : null]);
  }

  /** Return the milliseconds that the vision encoder did not need to run; null if they are not known. */
  #encoderMs(answer) {
    return wasEncoded(answer.figures) ? (this.encoded.get(this.#encoding(answer)) ?? null) : 0;
  }

  async #request(turn, side, onText, signal) {
    try {
      return await this.api.answer(this.#body(turn, side), onText, signal);
    } catch (error) {
      if (error.param !== "visprune.overlay") throw error;
      this.undrawn.add(side.model);
      return this.api.answer(this.#body(turn, side), onText, signal);
    }
  }

  #body(turn, side) {
    const messages = [];
    for (const { question, left } of this.turns.slice(0, this.turns.indexOf(turn))) {
      if (left?.text) messages.push({ role: "user", content: question }, { role: "assistant", content: left.text });
    }
    messages.push({ role: "user", content: turn.question });
    const image = { type: "image_url", image_url: { url: this.picture.data } };
    messages[0].content = [image, { type: "text", text: messages[0].content }];
    // The whole prompt is computed each time, so that the times of two answers can be compared.
    const visprune = { overlay: !this.undrawn.has(side.model), reuse_prefix: false };
    if (side.ratio !== null) visprune.ratio = side.ratio;
    return { model: side.model, messages, visprune };
  }
}
