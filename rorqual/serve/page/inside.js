// @ts-check
// The panel that shows a model's inside while it answers: its tokens, its experts, its cache.

import { bytes, h } from "./dom.js";
import { Heat } from "./heat.js";

/** @typedef {import("./trace.js").Trace} Trace */
/** @typedef {import("./trace.js").Token} Token */

const percent = (/** @type {number | null | undefined} */ logprob) => {
  if (logprob === null || logprob === undefined) return "?";
  const p = Math.exp(logprob) * 100;
  return p >= 99.95 ? "100 %" : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};
/** Letters that can be seen. @param {string} text */
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "∅";
/** A bar, for the eyes: the number stands beside it. @param {number} share */
function level(share) {
  const bar = h("span", { class: "level", "aria-hidden": "true" });
  bar.style.setProperty("--p", String(share));
  return bar;
}
const PARTS = new Map([
  ["reasoning", "reasoning"], ["content", "answer"], ["call", "tool call"], ["markup", "markup"],
]);

export class Inside {
  /** @param {HTMLElement} root  an empty element of the panel */
  constructor(root) {
    this.root = root;
    /** @type {Trace | null} */
    this.trace = null;
    this.shown = 0; // tokens in the strip
    this.active = -1; // the token chosen by keyboard or a press
    this.hover = -1;
    this.layer = "all";
    this.due = false;
    this.heat = new Heat();
    this.build();
  }

  build() {
    this.empty = h("p", { class: "quiet" }, "Nothing to show yet: only answers that were watched can be looked into.");
    this.colours = h("select", { id: "token-colours", on: { change: () => this.recolour() } });
    for (const [value, text] of [["probability", "by probability"], ["drafts", "by drafts"]]) {
      this.colours.append(h("option", { value }, text));
    }
    this.strip = h("div", {
      id: "tokens", class: "tokens", role: "listbox", tabindex: 0, "aria-label": "Tokens of the answer",
      on: {
        keydown: (/** @type {KeyboardEvent} */ event) => this.key(event),
        pointerover: (/** @type {any} */ event) => this.point(event),
        pointerleave: () => this.point(null),
        click: (/** @type {any} */ event) => this.press(event),
        focus: () => this.active < 0 && this.choose(0),
      },
    });
    this.legend = h("p", { class: "legend" });
    this.detail = h("div", { class: "detail", id: "token-detail" });
    this.promptStrip = h("div", { class: "tokens prompt-tokens", tabindex: 0, role: "region", "aria-label": "Tokens of the prompt" });
    this.promptBox = h("details", null, h("summary", null, "The prompt's tokens"), this.promptStrip);
    this.promptBox.addEventListener("toggle", () => this.drawPrompt());
    this.balance = h("dl", { class: "figures" });
    this.rows = h("tbody");
    this.table = h(
      "details", null, h("summary", null, "Layer by layer"),
      h("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Balance layer by layer" },
        h("table", null, h("thead", null, h("tr", null, ...["Layer", "Max / mean", "Variation", "Unused"].map((t) => h("th", { scope: "col" }, t)))), this.rows)),
    );
    this.table.addEventListener("toggle", () => this.draw());
    this.cache = h("div", { class: "cache" });
    this.tokensPart = h(
      "section", { "aria-labelledby": "inside-tokens" },
      h("div", { class: "row" }, h("h3", { id: "inside-tokens" }, "Tokens"), h("label", { class: "inline", for: "token-colours" }, "Coloured "), this.colours),
      this.strip, this.legend, this.detail, this.promptBox,
    );
    this.expertsPart = h("section", { "aria-labelledby": "inside-experts" }, h("h3", { id: "inside-experts" }, "Experts"), this.heat.element, this.balance, this.table);
    this.cachePart = h("section", { "aria-labelledby": "inside-cache" }, h("h3", { id: "inside-cache" }, "Cache"), this.cache);
    this.root.append(this.empty, this.tokensPart, this.expertsPart, this.cachePart);
    this.show(null);
  }

  /** Show another answer's trace. @param {Trace | null} trace */
  show(trace) {
    if (trace !== this.trace) {
      this.shown = 0;
      this.active = this.hover = -1;
      this.layer = "all";
      this.strip.replaceChildren();
      this.strip.removeAttribute("aria-activedescendant");
      this.promptStrip.replaceChildren();
    }
    this.trace = trace;
    this.changed();
  }

  /** The trace has grown: draw it with the next frame. */
  changed() {
    if (this.due) return;
    this.due = true;
    requestAnimationFrame(() => {
      this.due = false;
      this.draw();
    });
  }

  draw() {
    const { trace } = this;
    const any = Boolean(trace?.tokens.length);
    this.empty.hidden = any;
    this.tokensPart.hidden = !any;
    this.expertsPart.hidden = !any || !trace?.layers || !trace.tokens.some((token) => token.experts);
    this.cachePart.hidden = !any || !trace?.cache;
    if (!trace || !any) return;
    const atEnd = this.strip.scrollTop + this.strip.clientHeight >= this.strip.scrollHeight - 8;
    for (; this.shown < trace.tokens.length; this.shown++) this.strip.append(...this.tokenNodes(trace.tokens[this.shown], this.shown));
    if (atEnd && this.active < 0) this.strip.scrollTop = this.strip.scrollHeight;
    this.colours.parentElement.querySelector("label").hidden = this.colours.hidden = !trace.drafted;
    this.recolour();
    this.drawDetail();
    if (!this.expertsPart.hidden) this.drawExperts(trace);
    if (trace.cache) this.drawCache(trace.cache);
  }

  /** @param {Token} token @param {number} at */
  tokenNodes(token, at) {
    const refused = (token.refused ?? []).map((draft) => h("del", { class: "refused", "aria-hidden": "true" }, visible(draft.text)));
    const notes = [percent(token.logprob)];
    if (token.draft === "accepted") notes.push("drafted and accepted");
    if (token.refused?.length) notes.push(`instead of the draft ${token.refused.map((draft) => visible(draft.text)).join(" ")}`);
    const text = token.text.replace(/\n/g, "↵\n");
    const node = h("span", {
      id: `token-${at}`, role: "option", "aria-selected": "false", class: `token part-${token.part ?? "content"}`,
      "aria-label": `${visible(token.text)}, ${notes.join(", ")}`, data: { at, draft: token.draft ?? "none" },
    }, text || "∅");
    node.style.setProperty("--p", String(token.logprob === null || token.logprob === undefined ? 1 : Math.exp(token.logprob)));
    return [...refused, node];
  }

  recolour() {
    const drafts = !this.colours.hidden && this.colours.value === "drafts";
    this.strip.dataset.colours = drafts ? "drafts" : "probability";
    this.legend.replaceChildren(
      ...(drafts
        ? [h("span", { class: "swatch accepted" }, "drafted, accepted"), " ", h("del", { class: "refused" }, "drafted, refused"), this.rate()]
        : ["sure ", h("span", { class: "scale", "aria-hidden": "true" }), " unlikely"]),
    );
  }

  rate() {
    const tokens = this.trace?.tokens ?? [];
    const good = tokens.filter((token) => token.draft === "accepted").length;
    const all = good + tokens.reduce((sum, token) => sum + (token.refused?.length ?? 0), 0);
    return all ? ` · ${good} of ${all} drafts accepted` : "";
  }

  // ------------------------------------------------------------------------------------ one token

  /** @param {any} event */
  point(event) {
    const at = event?.target?.dataset?.at;
    this.hover = at === undefined ? -1 : Number(at);
    this.changed();
  }

  /** @param {any} event */
  press(event) {
    const at = event.target?.dataset?.at;
    if (at !== undefined) this.choose(Number(at));
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const last = this.shown - 1;
    const to = { ArrowLeft: this.active - 1, ArrowUp: this.active - 10, ArrowRight: this.active + 1, ArrowDown: this.active + 10, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.choose(Math.min(Math.max(to, 0), last));
  }

  /** @param {number} at */
  choose(at) {
    const node = this.strip.querySelector(`#token-${at}`);
    if (!node) return;
    this.strip.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    node.setAttribute("aria-selected", "true");
    this.strip.setAttribute("aria-activedescendant", node.id);
    this.active = at;
    node.scrollIntoView({ block: "nearest" });
    this.changed();
  }

  drawDetail() {
    const { trace } = this;
    const at = this.hover >= 0 ? this.hover : this.active;
    const token = trace?.tokens[at];
    for (const node of this.root.querySelectorAll(".looked-at")) node.classList.remove("looked-at");
    if (!trace || !token) {
      this.detail.replaceChildren(h("p", { class: "quiet" }, "Point at a token, or focus the text and use the arrow keys."));
      return;
    }
    const facts = [percent(token.logprob), `token ${token.id}`, PARTS.get(token.part ?? "") ?? token.part];
    if (token.draft === "accepted") facts.push("drafted, accepted");
    const guesses = [...(token.top ?? [])];
    if (guesses.length && !guesses.some((guess) => guess.id === token.id) && token.logprob !== null) guesses.push(/** @type {any} */ (token));
    const rows = guesses.map((guess) => {
      const bar = level(Math.exp(guess.logprob));
      const own = guess.id === token.id;
      return h("li", { class: own ? "own" : null }, h("code", null, visible(guess.text)), bar, h("span", null, percent(guess.logprob)));
    });
    const refused = (token.refused ?? []).map((draft) => [" ", h("del", { class: "refused" }, visible(draft.text))]);
    this.detail.replaceChildren(
      h("p", { class: "chosen" }, h("code", null, visible(token.text)), h("span", null, facts.filter(Boolean).join(" · "))),
      ...(rows.length ? [h("ol", { class: "guesses", "aria-label": "Alternatives" }, ...rows)] : []),
      ...(refused.length ? [h("p", null, "Refused before it:", refused)] : []),
      ...(token.seen?.length ? [this.seenPart(trace, token)] : []),
    );
  }

  /** Which earlier tokens a token looked at. @param {Trace} trace @param {Token} token */
  seenPart(trace, token) {
    const layers = (token.seen ?? []).filter((one) => this.layer === "all" || String(one.layer) === this.layer);
    // A position may stand for a block of tokens, as a compressed cache keeps them.
    /** @type {Map<number, {weight: number, every: number}>} */
    const found = new Map();
    for (const { positions, weights, every } of layers) {
      positions.forEach((position, n) => {
        const one = found.get(position) ?? { weight: 0, every: 1 };
        found.set(position, { weight: one.weight + (weights?.[n] ?? 1), every: Math.max(one.every, every ?? 1) });
      });
    }
    const sorted = [...found].sort((a, b) => b[1].weight - a[1].weight || a[0] - b[0]);
    const places = new Set(sorted.flatMap(([position, { every }]) => Array.from({ length: every }, (_, n) => position + n)));
    const select = h("select", { "aria-label": "Layer", on: { change: () => { this.layer = select.value; this.changed(); } } });
    select.append(h("option", { value: "all" }, "all layers"));
    for (const one of token.seen ?? []) select.append(h("option", { value: one.layer }, `layer ${one.layer}`));
    select.value = layers.length ? this.layer : "all";
    for (const place of places) {
      this.strip.querySelector(`#token-${place - trace.prompt}`)?.classList.add("looked-at");
      this.promptStrip.querySelector(`[data-position="${place}"]`)?.classList.add("looked-at");
    }
    const told = sorted.slice(0, 12).map(([position, { every }]) =>
      h("code", { title: every > 1 ? `positions ${position} to ${position + every - 1}` : `position ${position}` }, visible(trace.textAt(position, every) || `#${position}`)));
    const more = sorted.length > 12 ? ` and ${sorted.length - 12} more` : "";
    const near = trace.model.window ? h("p", { class: "quiet" }, `Besides, every token sees the ${trace.model.window} before it.`) : null;
    return h("div", { class: "seen" }, h("p", { class: "row" }, `Looked at ${places.size} earlier tokens in `, select), h("p", { class: "chips" }, ...told, more), near);
  }

  drawPrompt() {
    const { trace } = this;
    const texts = trace?.promptTexts;
    if (!this.promptBox.open || this.promptStrip.childElementCount) return;
    this.promptStrip.replaceChildren(
      ...(texts ? texts.map((text, position) => h("span", { class: "token", data: { position } }, text.replace(/\n/g, "↵\n"))) : ["The server does not tell them."]),
    );
    this.changed();
  }

  // ------------------------------------------------------------------------------- experts and cache

  /** @param {Trace} trace */
  drawExperts(trace) {
    const at = this.hover >= 0 ? this.hover : this.active;
    this.heat.show(trace, trace.tokens[at] ?? null);
    const all = trace.balances();
    if (!all) return;
    const numbers = trace.model.expert_layers;
    const facts = [
      ["Max / mean", all.peak.toFixed(2), `worst in layer ${numbers[all.worst]}: ${all.rows[all.worst].peak.toFixed(2)}`],
      ["Variation", all.spread.toFixed(2), "standard deviation over mean"],
      ["Unused", all.unused.toFixed(1), `of ${trace.experts} experts a layer`],
    ];
    this.balance.replaceChildren(...facts.map(([name, value, note]) => h("div", null, h("dt", null, name), h("dd", null, value, h("small", null, note)))));
    if (!this.table.open) return;
    this.rows.replaceChildren(
      ...all.rows.map((row, n) => h("tr", null, h("th", { scope: "row" }, numbers[n]), h("td", null, row.peak.toFixed(2)), h("td", null, row.spread.toFixed(2)), h("td", null, row.unused))),
    );
  }

  /** @param {{tokens: number, bytes: number, mha_bytes: number}} cache */
  drawCache(cache) {
    const times = cache.bytes ? cache.mha_bytes / cache.bytes : 0;
    const bar = (/** @type {string} */ name, /** @type {number} */ n) =>
      h("div", { class: "bar" }, h("span", null, name), level(n / (cache.mha_bytes || 1)), h("span", null, bytes(n)));
    this.cache.replaceChildren(
      bar("In use", cache.bytes), bar("With MHA", cache.mha_bytes),
      h("p", { class: "quiet" }, `${cache.tokens.toLocaleString("en")} tokens`, times > 1.05 ? ` · ${times.toFixed(1)} times smaller` : ""),
    );
  }
}
