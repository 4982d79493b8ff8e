// @ts-check
// The page's dialogs. Each is the browser's own: it keeps the focus and gives it back.

import { byId, h } from "./dom.js";

/** Open a dialog; whether it ended with its main button. @param {any} dialog @returns {Promise<boolean>} */
function opened(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const cancel = dialog.querySelector("[data-cancel]");
    const close = () => dialog.close("");
    const submit = () => (dialog.returnValue = "yes");
    cancel?.addEventListener("click", close);
    dialog.addEventListener("submit", submit);
    dialog.addEventListener(
      "close",
      () => {
        cancel?.removeEventListener("click", close);
        dialog.removeEventListener("submit", submit);
        resolve(dialog.returnValue === "yes");
      },
      { once: true },
    );
  });
}

/** @param {string} title @param {string} text */
export function sure(title, text) {
  byId("sure-title").textContent = title;
  byId("sure-text").textContent = text;
  return opened(byId("sure-dialog"));
}

/** Ask for an API key; null if none was given. @param {boolean} again  one was refused @returns {Promise<string | null>} */
export async function askKey(again) {
  const dialog = byId("key-dialog");
  if (dialog.open) return null;
  byId("key-note").textContent = (again ? "The server did not accept that key. " : "") + "It is kept until this tab is closed.";
  byId("key").value = "";
  return (await opened(dialog)) ? byId("key").value.trim() || null : null;
}

/** @param {[string, string][]} shortcuts  keys and what they do @param {boolean} on @param {(on: boolean) => void} turn */
export function help(shortcuts, on, turn) {
  byId("shortcuts").replaceChildren(
    ...shortcuts.map(([keys, what]) => h("div", null, h("dt", null, ...keys.split(" ").map((key) => h("kbd", null, key))), h("dd", null, what))),
  );
  byId("shortcuts-on").checked = on;
  byId("shortcuts-on").onchange = () => turn(byId("shortcuts-on").checked);
  return opened(byId("help-dialog"));
}
