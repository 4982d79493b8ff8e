// @ts-check
// The list of conversations: choose, rename, delete, export, import.

import { announce, byId, h, iconButton } from "./dom.js";
import { sure } from "./dialogs.js";
import { checked } from "./tree.js";

const MOST_BYTES = 100_000_000;

export class Sidebar {
  /**
   * @param {{open: (id: string) => void, rename: (talk: any, title: string) => void, remove: (talk: any) => void,
   *   imported: (talks: any[]) => Promise<void>, all: () => any[], fail: (text: string) => void}} acts
   */
  constructor(acts) {
    this.acts = acts;
    this.list = byId("talks");
    byId("export").addEventListener("click", () => this.export(this.acts.all(), "conversations"));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (/** @type {any} */ event) => this.import(event.target));
  }

  /** @param {any[]} talks @param {string} current  its id */
  show(talks, current) {
    this.list.replaceChildren(...talks.map((talk) => this.row(talk, talk.id === current)));
  }

  /** @param {any} talk @param {boolean} current */
  row(talk, current) {
    const open = h(
      "button",
      { type: "button", class: "talk", "aria-current": current ? "true" : null, on: { click: () => this.acts.open(talk.id), dblclick: () => rename() } },
      talk.title,
    );
    const rename = () => {
      const input = h("input", { type: "text", value: talk.title, "aria-label": "Name of the conversation", maxlength: 200 });
      let over = false;
      const end = (/** @type {boolean} */ good) => {
        if (over) return;
        over = true;
        if (good && input.value.trim()) this.acts.rename(talk, input.value.trim());
        else input.replaceWith(open);
        this.list.querySelector('[aria-current="true"]')?.focus();
      };
      input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
        if (event.key === "Enter") end(true);
        if (event.key === "Escape") { event.stopPropagation(); end(false); }
      });
      input.addEventListener("blur", () => end(true));
      open.replaceWith(input);
      input.select();
    };
    const remove = async () => {
      if (await sure("Delete this conversation?", `“${talk.title}” will be gone for good.`)) this.acts.remove(talk);
    };
    return h(
      "li", null, open,
      iconButton("down", `Export ${talk.title}`, () => this.export([talk], talk.title)),
      iconButton("edit", `Rename ${talk.title}`, rename),
      iconButton("trash", `Delete ${talk.title}`, remove),
    );
  }

  /** @param {any[]} talks @param {string} name */
  export(talks, name) {
    const text = JSON.stringify({ format: "rorqual conversations", version: 1, conversations: talks }, null, 1);
    const link = h("a", {
      href: URL.createObjectURL(new Blob([text], { type: "application/json" })),
      download: `${name.replace(/[^\p{L}\p{N}-]+/gu, "-").slice(0, 60) || "conversation"}.json`,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  /** @param {HTMLInputElement} input */
  async import(input) {
    const file = input.files?.[0];
    input.value = "";
    if (!file) return;
    try {
      if (file.size > MOST_BYTES) throw new Error("it is larger than 100 MB");
      const raw = JSON.parse(await file.text());
      const given = Array.isArray(raw?.conversations) ? raw.conversations : [raw];
      const talks = given.map(checked);
      if (!talks.length) throw new Error("it holds no conversation");
      await this.acts.imported(talks);
      announce(`${talks.length} conversation${talks.length === 1 ? "" : "s"} imported`);
    } catch (error) {
      this.acts.fail(`The file can't be imported: ${/** @type {Error} */ (error).message}.`);
    }
  }
}
