/** What the words on the page mean: those of the figures, and the methods that are served. */

import { byId, make } from "./dom.js";
import { STAGE_WORDS } from "./figures.js";

const TOKEN = ["visual token", "A piece of the picture as the language model reads it, most often a square patch."];
/** Methods by name, and what each does. */
export const METHODS = {
  cdpruner: "Keeps tokens that differ from each other and matter for the question.",
  dart: "Keeps a few large tokens, and those least like them and least like the question.",
  divprune: "Keeps the tokens that differ most from each other.",
  downsample: "Averages neighbouring tokens to a smaller square grid.",
  fastervlm: "Keeps the tokens that receive most attention from the vision encoder's CLS token.",
  fastv: "Drops tokens early in the language model: those that the last token of the prompt attends to least.",
  fitprune: "Drops at each layer of the language model as many tokens as a recipe says.",
  "fopru-rank": "Keeps the tokens that receive most attention in the vision encoder.",
  "fopru-row": "Keeps the rows of patches that receive most attention in the vision encoder.",
  freepruner: "Keeps tokens that receive much attention in all layers, and those that they attend to.",
  holov: "Keeps in each part of the picture as many tokens as the part deserves, by attention.",
  none: "Keeps all visual tokens.",
  "prumerge+": "Keeps attended and evenly spaced tokens, and adds to each those most like it.",
  pyramiddrop: "Drops tokens in stages: those that the last token of the prompt attends to least.",
  random: "Keeps a random choice of tokens, the same for every picture.",
  resize: "Makes the picture smaller before the vision encoder sees it.",
  sparsevlm: "Drops tokens in stages: those that the text about the picture attends to least.",
  uniform: "Keeps evenly spaced tokens.",
  visionzip: "Keeps the tokens that receive most attention, and merges the others into a few.",
  vispruner: "Keeps the tokens that receive most attention, and of the others those least alike.",
};

/** List the words. @param {Object[]} models As `/v1/models` lists them. */
export function explainWords(models) {
  const served = new Set(models.flatMap(({ visprune }) => [visprune.method, visprune.inside_llm]));
  const methods = [...served].filter((name) => METHODS[name]).map((name) => [name, METHODS[name]]);
  const terms = [TOKEN, ...STAGE_WORDS, ...methods];
  byId("terms").replaceChildren(...terms.flatMap(([term, words]) => [make("dt", {}, term), make("dd", {}, words)]));
  byId("words").hidden = false;
}
