// @ts-check
// The panel of a conversation's settings.

import { h } from "./dom.js";

/** name, label, attributes of the input, and a few words */
const FIELDS = /** @type {[string, string, Record<string, any>, string][]} */ ([
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05 }, "0 to 2; 0 takes the likeliest token"],
  ["top_p", "Top p", { min: 0, max: 1, step: 0.01 }, "0 to 1"],
  ["top_k", "Top k", { min: 0, step: 1 }, "0 for all"],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }, "0 to 1"],
  ["max_tokens", "Most tokens", { min: 1, step: 1 }, "of an answer"],
  ["seed", "Seed", { min: 0, step: 1, max: 2 ** 53 - 1 }, "the same draws again"],
]);
const SCHEMA = { type: "object", properties: { name: { type: "string" } }, required: ["name"], additionalProperties: false };
const TOOLS = [
  {
    type: "function",
    function: {
      name: "weather",
      description: "The weather at a place",
      parameters: { type: "object", properties: { place: { type: "string" } }, required: ["place"] },
    },
  },
];

export class Settings {
  /** @param {HTMLFormElement} form @param {() => void} changed */
  constructor(form, changed) {
    this.form = form;
    this.changed = changed;
    /** @type {any} */
    this.talk = null;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.append(this.system(), this.thinking(), this.sampling(), this.json("schema", "JSON schema", "Hold the answer to a schema", SCHEMA), this.toolsPart());
  }

  system() {
    const area = h("textarea", { id: "system", rows: 4, on: { input: () => { this.talk.system = area.value; this.changed(); } } });
    this.systemArea = area;
    return h("div", { class: "field" }, h("label", { for: "system" }, "System prompt"), area);
  }

  thinking() {
    const select = (/** @type {string} */ name, /** @type {string} */ label, /** @type {[string, string][]} */ choices) =>
      h(
        "div", { class: "field half" }, h("label", { for: name }, label),
        h("select", { id: name, data: { option: name }, on: { change: (/** @type {any} */ event) => this.set(name, event.target.value || undefined) } }, ...choices.map(([value, text]) => h("option", { value }, text))),
      );
    return h(
      "div", { class: "fields" },
      select("thinking", "Thinking", [["", "default"], ["on", "on"], ["off", "off"]]),
      select("effort", "Effort", [["", "default"], ["low", "low"], ["medium", "medium"], ["high", "high"], ["max", "max"]]),
    );
  }

  sampling() {
    return h(
      "fieldset", null, h("legend", null, "Sampling"),
      h("p", { class: "quiet" }, "What is left empty stays as the server has it."),
      h("div", { class: "fields" }, ...FIELDS.map(([name, label, limits, note]) => {
        const told = h("p", { class: "quiet", id: `${name}-note` }, note);
        const input = h("input", { id: name, type: "number", inputmode: "decimal", placeholder: "default", "aria-describedby": told.id, data: { option: name }, ...limits });
        input.addEventListener("input", () => {
          const good = input.validity.valid;
          input.setAttribute("aria-invalid", String(!good));
          told.textContent = good ? note : input.validationMessage;
          if (good) this.set(name, input.value === "" ? undefined : Number(input.value));
        });
        return h("div", { class: "field half" }, h("label", { for: name }, label), input, told);
      })),
    );
  }

  /** A switch and an area of JSON. @param {string} name @param {string} title @param {string} label @param {any} example */
  json(name, title, label, example) {
    const told = h("p", { class: "quiet", id: `${name}-note` });
    const area = h("textarea", { id: name, rows: 9, spellcheck: "false", class: "mono", "aria-label": title, "aria-describedby": told.id, data: { option: name } });
    const check = () => {
      let message = "";
      try {
        JSON.parse(area.value);
      } catch (error) {
        message = `Not JSON yet: ${/** @type {Error} */ (error).message}`;
      }
      area.setAttribute("aria-invalid", String(Boolean(message)));
      told.textContent = message || "Valid JSON.";
    };
    area.addEventListener("input", () => { this.set(name, area.value); check(); });
    const box = h("div", { class: "json", hidden: true }, area, told);
    const on = h("input", { type: "checkbox", id: `${name}-on`, data: { option: `${name}On` } });
    const show = () => {
      box.hidden = !on.checked;
      if (on.checked && !area.value) { area.value = JSON.stringify(example, null, 2); this.set(name, area.value); }
      if (on.checked) check();
    };
    on.addEventListener("change", () => { this.set(`${name}On`, on.checked); show(); });
    box.addEventListener("shown", show);
    return h("fieldset", { class: `${name}-part` }, h("legend", null, title), h("label", { class: "check" }, on, label), box);
  }

  toolsPart() {
    const part = this.json("tools", "Tools", "Offer functions to call", TOOLS);
    const choice = h("select", { id: "toolChoice", data: { option: "toolChoice" }, on: { change: () => this.set("toolChoice", choice.value) } });
    for (const [value, text] of [["auto", "as the model likes"], ["required", "always"], ["none", "never"]]) choice.append(h("option", { value }, text));
    part.querySelector(".json").append(h("div", { class: "field" }, h("label", { for: "toolChoice" }, "Calls are made"), choice));
    return part;
  }

  /** @param {string} name @param {any} value */
  set(name, value) {
    if (value === undefined) delete this.talk.options[name];
    else this.talk.options[name] = value;
    this.changed();
  }

  /** Show a conversation's settings. @param {any} talk */
  show(talk) {
    this.talk = talk;
    this.systemArea.value = talk.system;
    for (const input of this.form.querySelectorAll("[data-option]")) {
      const field = /** @type {any} */ (input);
      const value = talk.options[field.dataset.option];
      if (field.type === "checkbox") field.checked = value === true;
      else field.value = value ?? (field.id === "toolChoice" ? "auto" : "");
      field.removeAttribute("aria-invalid");
    }
    for (const box of this.form.querySelectorAll(".json")) box.dispatchEvent(new Event("shown"));
  }

  /** The first field that holds what can't be sent, if any. */
  wrong() {
    return /** @type {HTMLElement | null} */ (this.form.querySelector('input[aria-invalid="true"]'));
  }
}
