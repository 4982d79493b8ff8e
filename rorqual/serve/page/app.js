// @ts-check
// The page: what is shown, what is under way, and what the buttons and keys do.

import { answer, formats } from "./answer.js";
import { Failure, ask, setKey, words } from "./api.js";
import { askKey } from "./dialogs.js";
import { announce, byId, h } from "./dom.js";
import { Inside } from "./inside.js";
import { closeDrawer, isOpen, setUpDrawers, showDrawer } from "./drawers.js";
import { setUpKeys } from "./keys.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import { Trace } from "./trace.js";
import { add, create, path, turn } from "./tree.js";

const input = byId("ask");
const watch = byId("watch");
/** @type {any[]} */
let talks = [];
/** @type {any} */
let talk = create(store.recall("last-settings", {}));
/** What is under way, by conversation. @type {Map<string, {node: any, stop: AbortController}>} */
const runs = new Map();
/** Look inside, by node; kept as long as the page. @type {Map<string, Trace>} */
const traces = new Map();
/** What the server tells of its inside; null if it doesn't. @type {any} */
let insideModel = null;
let model = "";
let context = 0;
/** @type {string | null} */
let looked = null;

const thread = new Thread(byId("thread"), byId("latest"), {
  edit: (node, text) => submit(node.parent, text),
  again: (node) => again(node),
  branch: (node, step) => {
    const other = turn(talk, node, step);
    save(talk);
    show();
    thread.focusBranch(other, step);
    announce("Another version is shown");
  },
  results(node, results) {
    let parent = node.id;
    for (const result of results) parent = add(talk, parent, { role: "tool", ...result }).id;
    run(parent);
  },
  inside: (node) => look(node.id, true),
  hasInside: (node) => Boolean(traces.get(node.id)?.tokens.length),
  key: async () => {
    if (await useKey(false)) again(path(talk).at(-1));
  },
});
const inside = new Inside(byId("inside-body"));
const settings = new Settings(byId("options"), () => {
  store.keep("last-settings", { system: talk.system, options: talk.options });
  save(talk, 500);
});
const sidebar = new Sidebar({
  open: (id) => open(id),
  rename(other, title) {
    Object.assign(other, { title, named: true });
    save(other);
    show();
  },
  async remove(other) {
    runs.get(other.id)?.stop.abort();
    talks = talks.filter((one) => one !== other);
    await store.remove(other.id);
    if (other === talk) start();
    else show();
    announce("Conversation deleted");
  },
  async imported(more) {
    for (const one of more) await store.save(one);
    talks = [...more, ...talks];
    open(more[0].id);
  },
  all: () => talks,
  fail: notice,
});

// ------------------------------------------------------------------------------------------- showing

function show() {
  const running = runs.get(talk.id)?.node.id ?? "";
  byId("title").textContent = talk.title;
  document.title = talk.children.length ? `${talk.title} – rorqual` : "rorqual";
  thread.show(talk, running, welcome());
  sidebar.show(talks, talk.id);
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
}

function welcome() {
  const facts = [model, context ? `context of ${context.toLocaleString("en")} tokens` : ""].filter(Boolean);
  return h(
    "div", { class: "welcome" },
    h("p", { class: "welcome-title" }, "What would you like to know?"),
    h("p", { class: "quiet" }, facts.join(" · ")),
    h("p", { class: "quiet" }, "Press ", h("kbd", null, "?"), " for the keyboard's shortcuts",
      ...(insideModel ? [", ", h("kbd", null, "Alt"), " ", h("kbd", null, "I"), " to look inside the model while it answers"] : []), "."),
  );
}

/** Words above the message box; "" takes them away. @param {string} text */
function notice(text) {
  byId("notice").textContent = text;
}

/** @type {Map<string, any>} */
const saving = new Map();

/** @param {any} what @param {number} [wait] ms */
function save(what, wait = 0) {
  if (saving.has(what.id)) clearTimeout(saving.get(what.id));
  const write = () => {
    saving.delete(what.id);
    if (!talks.includes(what)) return; // deleted meanwhile
    store.save(what).catch(() => notice("The browser did not keep this conversation: its storage is full or closed."));
  };
  if (wait) saving.set(what.id, setTimeout(write, wait));
  else write();
}

/** @param {string} id */
function open(id) {
  talk = talks.find((one) => one.id === id) ?? talk;
  store.keep("open", talk.id);
  arrive();
}

function start() {
  talk = create(store.recall("last-settings", {}));
  store.keep("open", null);
  arrive();
}

function arrive() {
  notice("");
  closeDrawer("list", true);
  thread.follow = true;
  settings.show(talk);
  show();
  const last = path(talk).filter((node) => traces.has(node.id)).at(-1);
  look(last?.id ?? null, false);
  focusInput();
}

function focusInput() {
  if (matchMedia("(pointer: fine)").matches) input.focus(); // elsewhere a keyboard would rise over the page
}

// ------------------------------------------------------------------------------------------- talking

/** A user's message below a node, and the answer to it. @param {string | null} parent @param {string} text */
function submit(parent, text) {
  if (runs.has(talk.id)) return false;
  const wrong = settings.wrong();
  try {
    formats(talk.options);
  } catch (error) {
    notice(/** @type {Error} */ (error).message);
    showDrawer("settings");
    return false;
  }
  if (wrong) {
    notice("One of the settings can't be sent as it is.");
    showDrawer("settings");
    wrong.focus();
    return false;
  }
  if (!talks.includes(talk)) talks = [talk, ...talks];
  const node = add(talk, parent, { role: "user", content: text });
  talks = [talk, ...talks.filter((one) => one !== talk)];
  store.keep("open", talk.id);
  thread.follow = true;
  run(node.id);
  return true;
}

/** Another answer beside one; in its place if there is nothing in it. @param {any} node */
function again(node) {
  if (!node || runs.has(talk.id)) return;
  const blank = node.role === "assistant" && !node.content && !node.reasoning && !node.calls?.length;
  run(node.role === "assistant" ? node.parent : node.id, blank ? node : undefined);
}

/** Answer what stands above. @param {string | null} parent @param {any} [node] to fill, else a new one */
async function run(parent, node) {
  const here = talk;
  node ??= add(here, parent, { role: "assistant" });
  Object.assign(node, { error: undefined, finish: null });
  const stop = new AbortController();
  runs.set(here.id, { node, stop });
  notice("");
  const wanted = insideModel && watch.checked ? { alternatives: 5, experts: true, drafts: true, seen: true } : null;
  const trace = wanted ? new Trace(insideModel) : undefined;
  if (trace) {
    traces.set(node.id, trace);
    if (traces.size > 20) traces.delete([...traces.keys()][0]);
    look(node.id, false);
  }
  thread.views.delete(node.id);
  save(here);
  show();
  if (document.activeElement === document.body) focusInput(); // the button that began this is gone
  let saved = performance.now();
  try {
    await answer(here, node, {
      signal: stop.signal, inside: wanted, trace,
      changed() {
        if (talk === here) thread.grown(node.id);
        if (trace && looked === node.id) inside.changed();
        if (performance.now() - saved < 2000) return;
        saved = performance.now();
        save(here); // so that little is lost with the page
      },
    });
  } catch (error) {
    node.error = { ...words(error), key: error instanceof Failure && error.status === 401 };
  }
  node.finish ??= node.error ? "error" : "stop";
  runs.delete(here.id);
  here.updated = Date.now();
  save(here);
  if (talk === here) {
    show();
    if (!node.error) announce(told(node));
  }
  if (node.error?.key && (await useKey(Boolean(sessionStorage.getItem("api-key"))))) again(node);
}

/** What a screen reader says at an answer's end. @param {any} node */
function told(node) {
  if (node.finish === "stopped") return "Stopped";
  if (node.calls?.length) return `The model calls ${node.calls.map((/** @type {any} */ call) => call.name).join(", ")}`;
  const short = node.content.length < 400;
  return short ? `Answer: ${node.content}` : `The answer is there, ${node.content.trim().split(/\s+/).length} words`;
}

function stop() {
  runs.get(talk.id)?.stop.abort();
  input.focus();
}

function send() {
  const text = input.value;
  if (!text.trim() || runs.has(talk.id)) return;
  const last = path(talk).at(-1);
  if (last?.role === "assistant" && last.calls?.length) {
    notice("The model waits for the result of its call: give it in the card above.");
    byId(`result-${last.id}-0`)?.focus();
    return;
  }
  if (submit(last?.id ?? null, text)) {
    input.value = "";
    fit();
  }
}

/** As high as its text, up to a point. */
function fit() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
}

// ------------------------------------------------------------------------------------------- inside

/** Show at the button that answers are watched. */
function watched() {
  byId("show-inside").classList.toggle("on", watch.checked);
}

/** @param {string | null} id  the answer to look at @param {boolean} open  the panel too */
function look(id, open) {
  looked = id;
  inside.show((id && traces.get(id)) || null);
  if (open) showDrawer("inside");
}

// ------------------------------------------------------------------------------------------- the server

/** @param {boolean} again  @returns {Promise<boolean>} whether there is a key now */
async function useKey(again) {
  const key = await askKey(again);
  if (!key) return false;
  setKey(key);
  await meet(true);
  return true;
}

/** Learn what the server serves. @param {boolean} quiet  ask for no key */
async function meet(quiet) {
  try {
    const card = (await ask("v1/models")).data[0];
    model = card.id;
    context = card.context_window ?? 0;
    byId("model").textContent = model;
    notice("");
  } catch (error) {
    if (error instanceof Failure && error.status === 401) {
      if (!quiet) return useKey(false);
    } else {
      const { title, text } = words(error);
      notice(`${title}. ${text}`);
    }
    return;
  }
  const told = await ask("inside").catch(() => null);
  insideModel = told?.enabled ? told.model : null;
  byId("inside-about").textContent = insideModel ? "" : "This server does not tell of its inside.";
  byId("watch-label").hidden = !insideModel;
  if (!talk.children.length) show();
}

// ------------------------------------------------------------------------------------------- beginning

byId("composer").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  send();
});
input.addEventListener("input", fit);
input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", stop);
byId("new-talk").addEventListener("click", start);
addEventListener("pagehide", () => runs.forEach((_, id) => save(talks.find((one) => one.id === id))));
for (const change of [matchMedia("(prefers-color-scheme: dark)"), byId("theme")]) {
  change.addEventListener(change instanceof MediaQueryList ? "change" : "click", () => inside.changed());
}
setUpDrawers({
  inside(open, covering) {
    // Where the panel covers the conversation, it must be closed to talk: watching goes on then.
    if (open || !covering) watch.checked = open;
    watched();
    inside.changed();
  },
});
watch.checked = isOpen("inside");
watch.addEventListener("change", watched);
setUpKeys({
  stop: () => runs.has(talk.id) && (stop(), true), start, again: () => again(path(talk).at(-1)), input,
  edit: () => [...document.querySelectorAll("[data-edit]")].at(-1)?.dispatchEvent(new MouseEvent("click")),
});

talks = await store.all().catch(() => []);
talk = talks.find((one) => one.id === store.recall("open", null)) ?? talk;
arrive();
if (!(await store.lasting())) notice("This browser keeps no conversations here: they end with the page.");
await meet(false);
