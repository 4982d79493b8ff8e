// @ts-check
// The list at the left and the panels at the right: beside the conversation where there is room, over it where not.

import { byId } from "./dom.js";
import { keep, recall } from "./store.js";

const PANELS = ["settings", "inside"];
const narrow = matchMedia("(max-width: 900px)");
/** What else happens when one opens or closes. @type {Record<string, (open: boolean, covering: boolean) => void>} */
let told = {};

/** @param {string} id */
export const isOpen = (id) => (id === "list" ? document.body.classList.contains("with-list") : !byId(id).hidden);

/** @param {string} id @param {boolean} open */
function set(id, open) {
  if (id === "list") {
    document.body.classList.toggle("with-list", open);
    byId("list").inert = !open;
  } else {
    byId(id).hidden = !open;
    document.body.classList.toggle("with-panel", PANELS.some(isOpen));
  }
  byId(`show-${id}`).setAttribute("aria-expanded", String(open));
  // What lies under a drawer can't be reached.
  byId("middle").inert = narrow.matches && ["list", ...PANELS].some(isOpen);
  if (!narrow.matches) keep("drawers", ["list", ...PANELS].filter(isOpen));
}

/** @param {string} id */
export function showDrawer(id) {
  for (const other of PANELS) if (other !== id && PANELS.includes(id) && isOpen(other)) {
    set(other, false);
    told[other]?.(false, narrow.matches);
  }
  const was = isOpen(id);
  set(id, true);
  if (!was) byId(id).querySelector("button, [href], input, textarea, select")?.focus();
  told[id]?.(true, narrow.matches);
}

/** @param {string} id @param {boolean} [onlyNarrow]  leave it where there is room for it */
export function closeDrawer(id, onlyNarrow = false) {
  if (!isOpen(id) || (onlyNarrow && !narrow.matches)) return;
  set(id, false);
  told[id]?.(false, narrow.matches);
  byId(`show-${id}`).focus();
}

/** @param {string} id */
export const toggleDrawer = (id) => (isOpen(id) ? closeDrawer(id) : showDrawer(id));

/** Close the drawer on top, if there is one. @returns {boolean} */
export function closeTop() {
  const id = [...PANELS, ...(narrow.matches ? ["list"] : [])].find(isOpen);
  if (id) closeDrawer(id);
  return Boolean(id);
}

/** @param {Record<string, (open: boolean, covering: boolean) => void>} tell */
export function setUpDrawers(tell) {
  told = tell;
  for (const id of ["list", ...PANELS]) {
    byId(`show-${id}`).addEventListener("click", () => toggleDrawer(id));
    byId(id).querySelector("[data-close]")?.addEventListener("click", () => closeDrawer(id));
  }
  byId("close-list").addEventListener("click", () => closeDrawer("list"));
  const settle = () => {
    const kept = recall("drawers", ["list"]);
    for (const id of ["list", ...PANELS]) set(id, !narrow.matches && Array.isArray(kept) && kept.includes(id));
  };
  narrow.addEventListener("change", settle);
  settle();
}
