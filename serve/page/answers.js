/** The questions and answers on the page. Each turn has one answer, or two that are compared. */

import { make, newId } from "./dom.js";
import { cacheWords, countWords, timeFigure, timeWords } from "./figures.js";

/** One answer: its text while it streams, its figures afterwards. */
class AnswerView {
  constructor() {
    this.title = make("h4", { id: newId("answer") });
    this.text = make("p", { class: "text" });
    this.facts = make("div", { class: "facts" });
    this.element = make("article", { "aria-labelledby": this.title.id }, this.title, this.text, this.facts);
  }

  /** Show that nothing has come yet. @param {string} words Stands where the answer will be. */
  wait(title, words) {
    this.title.textContent = title;
    this.text.textContent = words;
    this.facts.replaceChildren();
    this.#state("waiting");
  }

  /** Show a text that is still growing. */
  grow(text) {
    this.text.textContent = text.trim();
    this.#state("streaming");
  }

  /** Show that there is no answer. */
  fail(words) {
    this.text.textContent = words;
    this.#state("failed");
  }

  /** Show an answer that is complete. @param {import("./conversation.js").Answer} answer */
  finish(answer) {
    this.title.textContent = answer.side.title;
    this.text.textContent = answer.text.trim() || "(an empty answer)";
    this.#state("finished");
    if (!answer.figures) {
      this.facts.replaceChildren(make("p", { class: "soft" }, "Stopped."));
      return;
    }
    const [count, words] = countWords(answer.figures);
    const cut = answer.finish === "length" ? "Cut off at the limit of new tokens. " : "";
    this.facts.replaceChildren(
      make("p", { class: "count" }, make("b", {}, count), " ", make("span", {}, words)),
      make("p", { class: "soft" }, cut + timeWords(answer.stages)),
      make("p", { class: "soft" }, cacheWords(answer.figures)),
    );
  }

  #state(state) {
    this.element.setAttribute("aria-busy", String(state === "waiting" || state === "streaming"));
    this.element.className = `answer ${state}`;
  }
}

/** A question with its answers, as an item of the list of turns. */
export class TurnView {
  /** @param {string} question */
  constructor(question) {
    this.left = new AnswerView();
    this.right = new AnswerView();
    this.answers = make("div", { class: "answers" }, this.left.element, this.right.element);
    this.verdict = make("p", { class: "verdict" });
    this.times = make("div", {});
    this.element = make("li", { class: "turn" },
      make("h3", { class: "question" }, question), this.answers, this.verdict, this.times);
  }

  /** Show that one answer is coming, or two beside each other. */
  compare(two) {
    this.element.classList.add("stale"); // the verdict and the times, until there are others
    this.right.element.hidden = !two;
    this.answers.classList.toggle("two", two);
  }

  /**
   * Say whether the answers agree, and draw their times. Either may be missing.
   * @param {(answer: import("./conversation.js").Answer) => number|null} encoderMs As `timeFigure` needs it.
   */
  conclude(left, right, encoderMs) {
    this.element.classList.remove("stale");
    this.verdict.textContent = verdict(left, right);
    this.verdict.className = agree(left, right) ? "verdict same" : "verdict";
    const rows = [left, right].filter((answer) => answer?.figures);
    const drawn = rows.map((answer) => ({
      title: answer.side.title, stages: answer.stages, encoderMs: encoderMs(answer),
    }));
    const open = this.times.querySelector("details")?.open;
    this.times.replaceChildren(...(rows.length ? [timeFigure(drawn)] : []));
    if (open && rows.length) this.times.querySelector("details").open = true;
  }
}

const agree = (left, right) => left?.text.trim() === right?.text.trim();

/** Say in words whether two answers agree; nothing if one of them is missing or was stopped. */
export function verdict(left, right) {
  if (!left?.figures || !right?.figures) return "";
  const same = agree(left, right);
  if (right.side.ratio === null) return same ? "The same answer from both bundles." : "Another answer from each bundle.";
  return same ? "The same answer as from all tokens." : "Another answer than from all tokens.";
}
