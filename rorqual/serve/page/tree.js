// @ts-check
// A conversation is a tree: an edit and a new answer are branches, and one path through them is shown.

/**
 * @typedef {{id: string, name: string, arguments: string}} Call
 * @typedef {{
 *   id: string, parent: string | null, role: "user" | "assistant" | "tool", content: string, reasoning?: string,
 *   calls?: Call[], callId?: string, name?: string, children: string[], chosen: number,
 *   finish?: string | null, thought?: number, stats?: Stats, error?: any, problem?: string
 * }} Node
 * @typedef {{tokens?: number, prompt?: number, hits?: number, reasoning?: number, first?: number, took?: number}} Stats
 * @typedef {{
 *   id: string, title: string, named: boolean, created: number, updated: number, system: string,
 *   options: Record<string, any>, nodes: Record<string, Node>, children: string[], chosen: number
 * }} Conversation
 */

const id = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");

/** @param {{system?: string, options?: Record<string, any>}} [from] @returns {Conversation} */
export function create(from = {}) {
  const now = Date.now();
  return {
    id: id(), title: "New conversation", named: false, created: now, updated: now, system: from.system ?? "",
    options: { ...from.options }, nodes: {}, children: [], chosen: 0,
  };
}

/** What holds a node's children: its parent, or the conversation. @param {Conversation} talk @param {Node} node */
const above = (talk, node) => (node.parent === null ? talk : talk.nodes[node.parent]);

/** A new node below another (null: at the top), on the path shown. @returns {Node}
 * @param {Conversation} talk @param {string | null} parent @param {Partial<Node>} fields */
export function add(talk, parent, fields) {
  const node = /** @type {Node} */ ({ id: id(), parent, content: "", children: [], chosen: 0, ...fields });
  talk.nodes[node.id] = node;
  const holder = above(talk, node);
  holder.chosen = holder.children.push(node.id) - 1;
  talk.updated = Date.now();
  if (!talk.named && node.role === "user") {
    const first = path(talk).find((other) => other.role === "user") ?? node;
    talk.title = first.content.trim().replace(/\s+/g, " ").slice(0, 60) || talk.title;
  }
  return node;
}

/** The nodes shown, from the top. @param {Conversation} talk @returns {Node[]} */
export function path(talk) {
  const found = [];
  /** @type {Conversation | Node} */
  let at = talk;
  while (at.children.length) {
    at = talk.nodes[at.children[at.chosen]];
    found.push(at);
  }
  return found;
}

/** The nodes from the top down to one, itself included. @param {Conversation} talk @param {string | null} last */
export function above_and(talk, last) {
  const found = [];
  for (let at = last; at !== null; at = talk.nodes[at].parent) found.unshift(talk.nodes[at]);
  return found;
}

/** Which of how many branches a node is. @param {Conversation} talk @param {Node} node */
export function branch(talk, node) {
  const { children } = above(talk, node);
  return { index: children.indexOf(node.id), count: children.length };
}

/** Show another branch instead of a node's. @param {Conversation} talk @param {Node} node @param {number} step */
export function turn(talk, node, step) {
  const holder = above(talk, node);
  holder.chosen = Math.min(Math.max(holder.chosen + step, 0), holder.children.length - 1);
  return holder.children[holder.chosen];
}

/** The messages that lead to an answer below `last`, as the API takes them.
 * @param {Conversation} talk @param {string | null} last */
export function messages(talk, last) {
  /** @type {any[]} */
  const told = talk.system.trim() ? [{ role: "system", content: talk.system }] : [];
  for (const node of above_and(talk, last)) {
    if (node.role === "tool") {
      told.push({ role: "tool", tool_call_id: node.callId, content: node.content });
    } else if (node.role === "assistant") {
      if (!node.content && !node.reasoning && !node.calls?.length) continue; // it failed before its first word
      const calls = (node.calls ?? []).map((call) => ({
        id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
      }));
      told.push({
        role: "assistant", content: node.content,
        ...(node.reasoning ? { reasoning_content: node.reasoning } : {}),
        ...(calls.length ? { tool_calls: calls } : {}),
      });
    } else {
      told.push({ role: "user", content: node.content });
    }
  }
  return told;
}

const text = (/** @type {any} */ value, most = 4_000_000) => (typeof value === "string" ? value.slice(0, most) : "");
const number = (/** @type {any} */ value) => (Number.isFinite(value) ? value : undefined);

/** A conversation from a file that may hold anything; an Error says what is wrong. @param {any} raw */
export function checked(raw) {
  if (typeof raw !== "object" || raw === null || typeof raw.nodes !== "object" || raw.nodes === null) {
    throw new Error("it holds no conversation");
  }
  const talk = create({ system: text(raw.system), options: typeof raw.options === "object" ? raw.options : {} });
  talk.title = text(raw.title, 200) || talk.title;
  talk.named = raw.named === true;
  talk.created = number(raw.created) ?? talk.created;
  talk.updated = number(raw.updated) ?? talk.updated;
  const open = [[raw, talk, null]];
  let count = 0;
  while (open.length) {
    const [from, holder, parent] = /** @type {any[]} */ (open.pop());
    const names = Array.isArray(from.children) ? from.children : [];
    for (const name of names) {
      const node = Object.hasOwn(raw.nodes, name) ? raw.nodes[name] : null;
      if (!node || !["user", "assistant", "tool"].includes(node.role)) throw new Error("a message in it is broken");
      if (++count > 20_000) throw new Error("it goes round in circles, or has more than 20,000 messages");
      const kept = {
        id: id(), parent, role: node.role, content: text(node.content), children: [], chosen: 0,
        ...(node.reasoning ? { reasoning: text(node.reasoning), thought: number(node.thought) } : {}),
        ...(node.role === "tool" ? { callId: text(node.callId, 200), name: text(node.name, 200) } : {}),
        ...(Array.isArray(node.calls) && node.calls.length ? { calls: node.calls.slice(0, 200).map(call) } : {}),
        ...(node.role === "assistant" ? { finish: text(node.finish, 40) || null, stats: figures(node.stats) } : {}),
      };
      talk.nodes[kept.id] = /** @type {Node} */ (kept);
      holder.children.push(kept.id);
      open.push([node, kept, kept.id]);
    }
    const last = holder.children.length - 1;
    holder.chosen = Math.min(Math.max(Math.trunc(number(from.chosen) ?? 0), 0), Math.max(last, 0));
  }
  return talk;
}

const call = (/** @type {any} */ raw) => ({
  id: text(raw?.id, 200), name: text(raw?.name, 200), arguments: text(raw?.arguments),
});

const figures = (/** @type {any} */ raw) =>
  Object.fromEntries(
    ["tokens", "prompt", "hits", "reasoning", "first", "took"].map((name) => [name, number(raw?.[name])]),
  );
