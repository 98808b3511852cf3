/** The page: connects the picture, the questions and the settings with the server's API. */

import { Api } from "./api.js";
import { Conversation } from "./conversation.js";
import { byId, make } from "./dom.js";
import { countWords } from "./figures.js";
import { askForKey } from "./key.js";
import { readPicture, takePictures } from "./picture.js";
import { Settings } from "./settings.js";
import { Viewer } from "./viewer.js";
import { explainWords } from "./words.js";

const api = new Api((refused) => askForKey(api, refused));
const viewer = new Viewer();
let conversation = null; // until the server has said what it serves
let picture = null;
let reading = null; // promise of the picture that is being read
let connecting = null; // promise of the first answer of the server
let later = 0; // timer of the next try

/** Have a screen reader say something. */
const say = (words) => {
  byId("status").textContent = words;
};

/** Show a sentence until the reader closes it or does something else; with `again`, they can try again. */
function tell(message, again = null) {
  const button = (words, act) => {
    const made = make("button", { type: "button", class: "button" }, words);
    made.addEventListener("click", act);
    return made;
  };
  const close = button("Close", () => tell(""));
  const buttons = make("div", { class: "row" }, again && button("Try again", again), close);
  byId("error").replaceChildren(...(message ? [make("p", {}, message), buttons] : []));
}

/** Do something, and tell if it failed. */
async function attempt(what) {
  tell("");
  try {
    await what();
  } catch (error) {
    tell(error.message);
  }
}

/** Exchange the buttons that ask and stop; the focus goes with them. */
function busy(is) {
  const [shown, hidden] = is ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
  const focused = document.activeElement === hidden;
  shown.hidden = false;
  hidden.hidden = true;
  if (focused) shown.focus();
  byId("fresh").hidden = !conversation.turns.length;
  byId("welcome").hidden = conversation.turns.length > 0;
}

/** Show what was kept of the picture: of one answer, or of two bundles. */
function showKept(left, right, words) {
  const compared = conversation.settings.comparesBundles ? [left, right] : [left];
  viewer.keep(compared.filter((answer) => answer?.figures?.overlays?.length).map(({ side, figures }) => ({
    address: figures.overlays[0],
    alt: `The picture as the model saw it: ${countWords(figures).join(" ")}. Dropped parts are dimmed.`,
    caption: side.title,
  })));
  byId("kept").textContent = words;
}

function forgetKept() {
  viewer.forget();
  byId("kept").textContent = "";
}

async function takePicture(file) {
  await attempt(async () => {
    const taken = await readPicture(file);
    picture?.release();
    picture = taken;
    viewer.open(picture);
    byId("kept").textContent = "";
    conversation?.about(picture);
    if (conversation) busy(false);
    say(`${picture.name} is ready.`);
  });
}

async function ask() {
  await Promise.all([reading, connecting]);
  if (byId("send").hidden) return; // it has just been asked
  const field = byId("question");
  const question = field.value.trim();
  if (!question) return tell("Write a question first.");
  if (!picture) return tell("Choose a picture first.");
  if (!conversation) return tell("The server has not answered yet. Try again in a moment.");
  field.value = "";
  await attempt(() => conversation.ask(question));
}

/** Give a question back, so that it can be asked again. */
function unanswered(question) {
  if (!byId("question").value) byId("question").value = question;
}

/** Find out what is served. */
async function start() {
  clearTimeout(later);
  tell("");
  byId("served").textContent = "Connecting to the server …";
  try {
    const models = await api.models();
    const page = { busy, kept: showKept, say, unanswered };
    explainWords(models);
    const settings = new Settings(models, () => attempt(() => conversation.again()));
    conversation = new Conversation(api, settings, byId("turns"), page);
    if (picture) conversation.about(picture);
  } catch (error) {
    byId("served").textContent = "Not connected";
    tell(error.message, start);
    if (error.status === 503) later = setTimeout(start, 1000 * (error.retryAfter ?? 2)); // it is loading
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
byId("stop").addEventListener("click", () => conversation.running?.abort());
byId("fresh").addEventListener("click", () => {
  conversation.clear();
  forgetKept();
  tell("");
  busy(false);
  byId("question").focus();
});
takePictures((file) => {
  reading = takePicture(file);
});
connecting = start();
