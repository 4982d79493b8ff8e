// @ts-check
// The keyboard, and the switch of colours.

import { byId } from "./dom.js";
import { help } from "./dialogs.js";
import { closeTop, toggleDrawer } from "./drawers.js";
import { keep, recall } from "./store.js";

/** @type {[string, string][]} */
const SHORTCUTS = [
  ["Enter", "send"],
  ["Shift Enter", "begin a new line"],
  ["Esc", "stop the answer; close a panel"],
  ["/", "to the message box"],
  ["Alt N", "new conversation"],
  ["Alt C", "list of conversations"],
  ["Alt S", "settings"],
  ["Alt I", "look inside"],
  ["Alt R", "answer again"],
  ["Alt ↑", "edit the last message"],
  ["?", "this list"],
];
const THEMES = ["auto", "light", "dark"];
const NAMES = { auto: "as the system", light: "light", dark: "dark" };

/** @param {{stop: () => boolean, start: () => void, again: () => void, edit: () => void, input: HTMLElement}} acts */
export function setUpKeys(acts) {
  let on = recall("shortcuts", true);
  const showHelp = () => {
    help(SHORTCUTS, on, (now) => keep("shortcuts", (on = now)));
  };
  /** @type {Record<string, () => void>} */
  const alt = {
    KeyN: acts.start, KeyC: () => toggleDrawer("list"), KeyS: () => toggleDrawer("settings"),
    KeyI: () => toggleDrawer("inside"), KeyR: acts.again, ArrowUp: acts.edit,
  };
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    if (event.key === "Escape") {
      if (acts.stop() || closeTop()) event.preventDefault();
      return;
    }
    if (!on || event.ctrlKey || event.metaKey) return;
    if (event.altKey) {
      if (event.shiftKey || !Object.hasOwn(alt, event.code)) return;
      event.preventDefault();
      alt[event.code]();
      return;
    }
    const target = /** @type {HTMLElement} */ (event.target);
    if (target.matches?.("textarea, input, select")) return;
    if (event.key === "?") showHelp();
    else if (event.key === "/") acts.input.focus();
    else return;
    event.preventDefault();
  });
  byId("help").addEventListener("click", showHelp);

  const button = byId("theme");
  const named = () => {
    const theme = /** @type {"auto"} */ (document.documentElement.dataset.theme ?? "auto");
    button.setAttribute("aria-label", `Colours: ${NAMES[theme]}`);
    button.title = `Colours: ${NAMES[theme]}`;
  };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3];
    document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("theme", next);
    } catch {
      // until the page is closed, then
    }
    named();
  });
  named();
}
