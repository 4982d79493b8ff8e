// @ts-check
// The conversation as it is shown: a turn for each node of the path.

import { copy, h, icon, iconButton, seconds } from "./dom.js";
import { Markdown } from "./markdown.js";
import { branch, path } from "./tree.js";

/** @typedef {import("./tree.js").Node} Node */
/**
 * What the turns' buttons do.
 * @typedef {{
 *   edit: (node: Node, text: string) => void, again: (node: Node) => void, branch: (node: Node, step: number) => void,
 *   results: (node: Node, results: {callId: string, name: string, content: string}[]) => void,
 *   inside: (node: Node) => void, hasInside: (node: Node) => boolean, key: () => void
 * }} Acts
 */

export class Thread {
  /** @param {HTMLElement} root  scrolls @param {HTMLElement} latest  a button to its end @param {Acts} acts */
  constructor(root, latest, acts) {
    this.root = root;
    this.acts = acts;
    this.latest = latest;
    /** @type {any} */
    this.talk = null;
    /** @type {Map<string, any>} */
    this.views = new Map();
    this.running = "";
    this.due = false;
    this.slow = 0;
    this.follow = true;
    root.addEventListener("scroll", () => {
      this.follow = root.scrollHeight - root.scrollTop - root.clientHeight < 60;
      latest.hidden = this.follow;
    });
    root.addEventListener("grown", () => this.follow && this.toEnd());
    latest.addEventListener("click", () => this.toEnd());
  }

  toEnd() {
    this.follow = true;
    this.root.scrollTop = this.root.scrollHeight;
    this.latest.hidden = true;
  }

  /** Show a conversation's path. @param {any} talk @param {string} running  the node under way, "" for none
   * @param {any} empty  what to show when there is nothing */
  show(talk, running, empty) {
    if (talk !== this.talk) this.views.clear();
    this.talk = talk;
    this.running = running;
    const nodes = path(talk);
    const turns = [];
    for (const node of nodes) {
      if (node.role === "tool") continue;
      let view = this.views.get(node.id);
      if (!view) this.views.set(node.id, (view = node.role === "user" ? this.userTurn(node) : this.answerTurn(node)));
      view.update();
      turns.push(view.element);
    }
    const wanted = new Set(turns.length ? turns : [empty]);
    for (const child of [...this.root.children]) if (!wanted.has(child)) child.remove();
    // What stays in its place is not touched: it would lose the focus.
    [...wanted].forEach((child, at) => this.root.children[at] !== child && this.root.insertBefore(child, this.root.children[at] ?? null));
    if (this.follow) this.toEnd();
  }

  /** An answer has grown: draw it at most once a frame, and less often when drawing is slow. @param {string} id */
  grown(id) {
    if (this.due) return;
    this.due = true;
    const draw = () => {
      const began = performance.now();
      this.due = false;
      this.views.get(id)?.update();
      if (this.follow) this.root.scrollTop = this.root.scrollHeight;
      this.slow = performance.now() - began;
    };
    if (this.slow < 12) requestAnimationFrame(draw);
    else setTimeout(() => requestAnimationFrame(draw), Math.min(4 * this.slow, 500));
  }

  /** Put the focus where it was before another version was shown. @param {string} id @param {number} step */
  focusBranch(id, step) {
    const buttons = [...(this.views.get(id)?.element.querySelectorAll(".branches button") ?? [])];
    if (step > 0) buttons.reverse();
    buttons.find((button) => !button.disabled)?.focus();
  }

  // ----------------------------------------------------------------------------------------- parts

  /** ‹ 2/3 › @param {Node} node @param {string} what */
  branches(node, what) {
    const { index, count } = branch(this.talk, node);
    if (count < 2) return null;
    const step = (/** @type {string} */ name, /** @type {string} */ label, /** @type {number} */ by, /** @type {boolean} */ off) =>
      iconButton(name, label, () => this.acts.branch(node, by), { disabled: off || Boolean(this.running) });
    return h(
      "div", { class: "branches", role: "group", "aria-label": `Versions of this ${what}` },
      step("left", "Earlier version", -1, index === 0),
      h("span", null, h("span", { class: "visually-hidden" }, "Version "), `${index + 1}/${count}`),
      step("right", "Later version", 1, index === count - 1),
    );
  }

  /** @param {Node} node */
  userTurn(node) {
    const bubble = h("div", { class: "bubble" }, node.content);
    const actions = h("div", { class: "actions" });
    const element = h("article", { class: "turn user", "aria-label": "You" }, h("h2", { class: "visually-hidden" }, "You"), bubble, actions);
    const edit = () => {
      const area = h("textarea", { rows: Math.min(12, node.content.split("\n").length + 1), "aria-label": "Edit the message" });
      area.value = node.content;
      const close = () => {
        form.replaceWith(bubble);
        actions.hidden = false;
        actions.querySelector("[data-edit]")?.focus();
      };
      const form = h(
        "form", { class: "edit", on: { submit: (/** @type {Event} */ event) => { event.preventDefault(); if (area.value.trim()) this.acts.edit(node, area.value); } } },
        area,
        h("div", { class: "buttons" }, h("button", { type: "button", class: "text-button", on: { click: close } }, "Cancel"), h("button", { class: "main-button" }, "Send as a new version")),
      );
      area.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
        if (event.key === "Escape") { event.stopPropagation(); close(); }
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
      });
      bubble.replaceWith(form);
      actions.hidden = true;
      area.focus();
    };
    const update = () => {
      if (!bubble.isConnected && element.contains(element.querySelector("form"))) {
        element.querySelector("form")?.replaceWith(bubble);
        actions.hidden = false;
      }
      const copyButton = iconButton("copy", "Copy message", () => copy(node.content, copyButton));
      actions.replaceChildren(
        ...[this.branches(node, "message"), iconButton("edit", "Edit message", edit, { data: { edit: "" }, disabled: Boolean(this.running) }), copyButton].filter(Boolean),
      );
    };
    return { element, update };
  }

  /** @param {Node} node */
  answerTurn(node) {
    const summary = h("summary");
    const thoughts = h("div", { class: "prose thoughts" });
    const reasoning = h("details", { class: "reasoning", hidden: true }, summary, thoughts);
    const prose = h("div", { class: "prose" });
    const cards = h("div", { class: "cards" });
    const trouble = h("div", { class: "trouble" });
    const figures = h("p", { class: "figures-line quiet" });
    const actions = h("div", { class: "actions" });
    const element = h(
      "article", { class: "turn answer", "aria-label": "Answer" },
      h("h2", { class: "visually-hidden" }, "Answer"), reasoning, prose, cards, trouble, h("div", { class: "under" }, actions, figures),
    );
    const [text, thinking] = [new Markdown(prose), new Markdown(thoughts)];
    const think = () => reasoning.open && thinking.show(node.reasoning ?? "");
    reasoning.addEventListener("toggle", think);
    let was = "";
    const update = () => {
      const live = this.running === node.id;
      element.classList.toggle("live", live);
      element.setAttribute("aria-busy", String(live));
      reasoning.hidden = !node.reasoning;
      if (node.reasoning) {
        const still = live && !node.content && !node.calls?.length;
        summary.textContent = `${still ? "Thinking…" : "Thought for"} ${seconds(node.thought ?? 0)}`;
        think();
      }
      text.show(node.content);
      prose.classList.toggle("waiting", live && !node.content && !node.reasoning && !node.calls?.length);
      // What stands below changes rarely; made anew only then, it keeps its focus and what was typed.
      const all = path(this.talk);
      const results = all.filter((other) => other.role === "tool" && node.calls?.some((call) => call.id === other.callId));
      const state = JSON.stringify([live, this.running !== "", node.calls, results.map((result) => result.id), node.error, node.finish, branch(this.talk, node), this.acts.hasInside(node), node.stats?.tokens]);
      if (state === was) return;
      was = state;
      cards.replaceChildren(...(node.calls?.length ? this.callCards(node, results, live) : []));
      trouble.replaceChildren(...this.troubles(node, live));
      actions.replaceChildren(...(live ? [] : this.answerActions(node)));
      figures.textContent = live ? "" : told(node);
    };
    return { element, update };
  }

  /** @param {Node} node */
  answerActions(node) {
    const copyButton = iconButton("copy", "Copy answer", () => copy(node.content, copyButton));
    return /** @type {any[]} */ ([
      this.branches(node, "answer"), copyButton,
      iconButton("redo", "Answer again", () => this.acts.again(node), { disabled: Boolean(this.running), data: { again: "" } }),
      this.acts.hasInside(node) ? iconButton("inside", "Look inside this answer", () => this.acts.inside(node)) : null,
    ]).filter(Boolean);
  }

  /** @param {Node} node @param {boolean} live */
  troubles(node, live) {
    const box = (/** @type {string} */ title, /** @type {string} */ text, /** @type {any} */ button) =>
      h("div", { class: "error", role: "alert" }, h("p", null, h("strong", null, title), " ", text), button);
    const again = h("button", { type: "button", class: "plain-button", on: { click: () => this.acts.again(node) } }, icon("redo"), "Try again");
    if (live) return [];
    if (node.error) {
      const key = h("button", { type: "button", class: "plain-button", on: { click: () => this.acts.key() } }, "Enter a key");
      return [box(node.error.title, node.error.text, node.error.key ? key : again)];
    }
    if (!node.finish) return [box("Interrupted.", "The page was closed before this answer was whole.", again)];
    const notes = [];
    if (node.finish === "length") notes.push("It ended at the limit of tokens.");
    if (node.finish === "stopped") notes.push("Stopped.");
    if (node.problem) notes.push(`The model broke its output format: ${node.problem}`);
    return notes.map((note) => h("p", { class: "note quiet" }, note));
  }

  /** Tool calls, with room for their results. @param {Node} node @param {Node[]} results @param {boolean} live */
  callCards(node, results, live) {
    /** @type {any[]} */
    const areas = [];
    const cards = (node.calls ?? []).map((call, index) => {
      const result = results.find((other) => other.callId === call.id);
      const id = `result-${node.id}-${index}`;
      const area = h("textarea", { id, rows: 2, spellcheck: "false", placeholder: "What the function returned" });
      areas.push(area);
      return h(
        "div", { class: "card", role: "group", "aria-label": `Call of ${call.name}` },
        h("p", { class: "card-head" }, icon("tool"), h("code", null, call.name)),
        h("pre", { tabindex: 0, role: "region", "aria-label": "Arguments" }, pretty(call.arguments)),
        result
          ? [h("p", { class: "quiet" }, "Result"), h("pre", { tabindex: 0, role: "region", "aria-label": "Result" }, result.content)]
          : live ? null : [h("label", { for: id }, `Result of ${call.name}`), area],
      );
    });
    if (live || results.length) return cards;
    const form = h("form", { class: "results" }, ...cards, h("div", { class: "buttons" }, h("button", { class: "main-button", disabled: Boolean(this.running) }, areas.length > 1 ? "Send results" : "Send result")));
    form.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.acts.results(node, (node.calls ?? []).map((call, n) => ({ callId: call.id, name: call.name, content: areas[n].value })));
    });
    form.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
    });
    return [form];
  }
}

/** JSON laid out, or the text as it is. @param {string} text */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** What was measured, in a line. @param {Node} node */
function told(node) {
  const { tokens, prompt, hits, first, took } = node.stats ?? {};
  const facts = [];
  if (tokens !== undefined) facts.push(`${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`);
  if (tokens && tokens > 1 && took && took > 0) facts.push(`${(((tokens - 1) * 1000) / took).toFixed(1)} a second`);
  if (first !== undefined) facts.push(`first after ${seconds(first)}`);
  if (hits !== undefined && prompt) facts.push(`${hits.toLocaleString("en")} of ${prompt.toLocaleString("en")} prompt tokens from the cache`);
  return facts.join(" · ");
}
