/** The dialog that asks for the server's key. */

import { byId } from "./dom.js";

/**
 * Ask for a key, and have the API use it.
 * @param {import("./api.js").Api} api
 * @param {boolean} refused Whether the server refused a key.
 * @returns {Promise<string|null>} The key; null if the reader gave none.
 */
export function askForKey(api, refused) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  if (refused) byId("key-why").textContent = "This key is not known. Check it.";
  field.value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    let given = null;
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      given = field.value.trim();
      if (!given) return;
      api.useKey(given, byId("key-kept").checked);
      dialog.close();
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      field.value = ""; // nothing else on the page needs it
      resolve(given);
    };
  });
}
