// @ts-check
// Elements without HTML strings: text stays text.

/**
 * An element. `props`: `class`, `on` ({event: listener}), `data` (dataset), anything else is an attribute
 * (true: present, false or null: absent). Children: nodes, strings, numbers; null and false are left out.
 * @param {string} tag
 * @param {Record<string, any> | null} [props]
 * @param {...any} children
 * @returns {any}
 */
export function h(tag, props, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name === "data") {
      Object.assign(element.dataset, value);
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/**
 * One of the page's icons; it says nothing to a screen reader.
 * @param {string} name
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/**
 * A button that shows an icon only.
 * @param {string} name  the icon
 * @param {string} label  what it does
 * @param {(event: Event) => void} act
 * @param {Record<string, any>} [props]
 */
export function iconButton(name, label, act, props = {}) {
  return h(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, on: { click: act }, ...props },
    icon(name),
  );
}

/** @param {string} id @returns {any} */
export const byId = (id) => document.getElementById(id);

let said = 0;

/** Say something to screen readers, once. @param {string} text */
export function announce(text) {
  // The same words twice would not be read twice: a space more tells them apart.
  byId("announcer").textContent = text + (said++ % 2 ? "\u00a0" : "");
}

/** Seconds in words. @param {number} ms */
export function seconds(ms) {
  const s = ms / 1000;
  if (s < 60) return `${s < 0.095 ? s.toFixed(2) : s.toFixed(1)} s`;
  return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}

/** Bytes in words, decimal. @param {number} n */
export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  for (; n >= 1000 && power < 4; power++) n /= 1000;
  return `${n.toFixed(power && n < 100 ? 1 : 0)} ${units[power]}`;
}

/** Copy text; a button shows for a moment that it went well. @param {string} text @param {any} button */
export async function copy(text, button) {
  let good = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // No clipboard outside https and localhost: the old way, through a selection.
    const area = h("textarea", { class: "visually-hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    good = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  announce(good ? "Copied" : "This browser did not let the page copy");
  button.classList.toggle("done", good);
  setTimeout(() => button.classList.remove("done"), 1500);
}
