// @ts-check
// A model's text as elements. The text is hostile until shown otherwise: HTML in it stays text, links go to the web
// or nowhere, pictures are not fetched, and what marked writes passes through DOMPurify before it becomes elements.
// Beyond that stand the page's policy and trusted types (pages.py).

import { Marked } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js";
import { copy, h, iconButton } from "./dom.js";

const purify = /** @type {any} */ (globalThis).DOMPurify;
const ALLOWED = {
  ALLOWED_TAGS: (
    "p br hr h3 h4 h5 h6 strong em del code pre blockquote ul ol li table thead tbody tr th td a span sub sup kbd"
  ).split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const ONLY_COLOURS = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true };
const MOST_MATH = 4000; // letters of one formula

const escaped = (/** @type {string} */ text) =>
  text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

/** A formula at the text's beginning. @param {string} text @param {[string, string, boolean][]} forms */
function formula(text, forms) {
  for (const [open, close, display] of forms) {
    if (!text.startsWith(open)) continue;
    const end = text.slice(0, MOST_MATH).indexOf(close, open.length);
    const tex = text.slice(open.length, end);
    if (end > 0 && tex.trim() && !/\n\s*\n/.test(tex)) return { raw: text.slice(0, end + close.length), tex, display };
  }
  return null;
}

// As Pandoc has it: no space inside either dollar, no digit after the second; so "$5 to $6" is money.
const DOLLARS = /^\$(?![\s$])((?:\\[^\n]|[^$\\`\n]){1,800})(?<!\s)\$(?!\d)/;

const math = (/** @type {any} */ token) =>
  `<span class="math${token.display ? " math-display" : ""}">${escaped(token.tex)}</span>`;

const inlineMath = {
  name: "math",
  level: "inline",
  start: (/** @type {string} */ text) => at(text.search(/\$|\\[([]/)),
  tokenizer(/** @type {string} */ text) {
    const found = formula(text, [["$$", "$$", true], ["\\(", "\\)", false], ["\\[", "\\]", true]]);
    if (found) return { type: "math", ...found };
    const match = DOLLARS.exec(text);
    return match ? { type: "math", raw: match[0], tex: match[1], display: false } : undefined;
  },
  renderer: math,
};

const blockMath = {
  name: "mathBlock",
  level: "block",
  start: (/** @type {string} */ text) => at(text.search(/^ {0,3}(?:\$\$|\\\[)/m)),
  tokenizer(/** @type {string} */ text) {
    const indent = /^ {0,3}/.exec(text)?.[0] ?? "";
    const found = formula(text.slice(indent.length), [["$$", "$$", true], ["\\[", "\\]", true]]);
    const after = found && /^[ \t]*(?:\n+|$)/.exec(text.slice(indent.length + found.raw.length));
    return found && after ? { type: "mathBlock", ...found, raw: indent + found.raw + after[0] } : undefined;
  },
  renderer: (/** @type {any} */ token) => `<p>${math(token)}</p>`,
};

const at = (/** @type {number} */ index) => (index < 0 ? undefined : index);

const marked = new Marked({
  gfm: true,
  extensions: /** @type {any} */ ([blockMath, inlineMath]),
  tokenizer: /** @type {any} */ ({
    html: () => undefined, // HTML is text here …
    tag(/** @type {string} */ text) {
      const match = /^<\/?(?:br|sub|sup|kbd)\s*\/?>/i.exec(text); // … but for these, which tables and chemistry want
      return match ? { type: "html", raw: match[0], text: match[0], block: false } : undefined;
    },
  }),
  renderer: /** @type {any} */ ({
    heading(/** @type {any} */ token) {
      const level = Math.min(token.depth + 2, 6); // below the page's own
      return `<h${level}>${/** @type {any} */ (this).parser.parseInline(token.tokens)}</h${level}>`;
    },
    code: (/** @type {any} */ token) => {
      const language = /^[\w+#.-]{1,30}/.exec(token.lang ?? "")?.[0] ?? "";
      return `<pre><code class="language-${language}">${escaped(token.text)}</code></pre>`;
    },
    link(/** @type {any} */ token) {
      const text = /** @type {any} */ (this).parser.parseInline(token.tokens);
      return /^(?:https?:\/\/|mailto:)/i.test(token.href) ? `<a href="${escaped(token.href)}">${text}</a>` : text;
    },
    image: (/** @type {any} */ token) => {
      const text = escaped(token.text || "picture");
      return /^https?:\/\//i.test(token.href) ? `<a href="${escaped(token.href)}">${text}</a>` : text;
    },
    checkbox: (/** @type {any} */ token) => (token.checked ? "☑ " : "☐ "),
  }),
});

/** Text that grows, shown as Markdown in an element: only blocks that changed are made anew. */
export class Markdown {
  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
    /** @type {{raw: string, nodes: ChildNode[]}[]} */
    this.blocks = [];
    this.links = "";
  }

  /** @param {string} text */
  show(text) {
    const tokens = /** @type {any} */ (marked.lexer(text));
    const links = JSON.stringify(tokens.links);
    if (links !== this.links) this.cut(0); // what "[1]" stands for has changed, above as well as below
    this.links = links;
    let same = 0;
    while (same < this.blocks.length && this.blocks[same].raw === tokens[same]?.raw) same++;
    this.cut(same);
    for (const token of tokens.slice(same)) {
      const nodes = [...rendered(token)];
      this.element.append(...nodes);
      this.blocks.push({ raw: token.raw, nodes });
    }
  }

  /** @param {number} from */
  cut(from) {
    for (const block of this.blocks.splice(from)) for (const node of block.nodes) node.remove();
  }
}

/** @param {any} token */
function rendered(token) {
  const fragment = purify.sanitize(marked.parser([token]), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) codeBlock(pre);
  for (const span of fragment.querySelectorAll("span.math")) showMath(span);
  return fragment.childNodes;
}

/** @param {any} pre */
function codeBlock(pre) {
  const code = pre.firstElementChild;
  const language = code.className.replace("language-", "");
  const button = iconButton("copy", "Copy code", () => copy(code.textContent ?? "", button));
  const bar = h("div", { class: "code-bar" }, h("span", null, language || "text"), button);
  const frame = h("div", { class: "code" }, bar);
  pre.replaceWith(frame);
  frame.append(pre);
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code in ${language}` : "Code");
  if (language) colour(code, language);
}

/** Draw what had to wait for a library, and tell whoever scrolls. @param {any} element @param {() => void} draw */
function later(element, draw) {
  if (!element.isConnected) return;
  draw();
  element.dispatchEvent(new Event("grown", { bubbles: true }));
}

/** @type {any} */
let highlighter = null;
/** @type {Promise<any> | null} */
let fetching = null;

/** @param {any} code @param {string} language */
function colour(code, language) {
  if (!highlighter) {
    fetching ??= import("./vendor/highlight.min.js").then((module) => (highlighter = module.default));
    fetching.then(() => later(code, () => colour(code, language)));
    return;
  }
  const text = code.textContent ?? "";
  if (!highlighter.getLanguage(language) || text.length > 100_000) return;
  const html = highlighter.highlight(text, { language, ignoreIllegals: true }).value;
  code.replaceChildren(purify.sanitize(html, ONLY_COLOURS));
}

/** @type {any} */
let katex = null;
/** @type {Promise<void> | null} */
let fetchingMath = null;

/** @param {any} span  holds the formula as text, and keeps it so if it can't be set */
function showMath(span) {
  if (!katex) {
    fetchingMath ??= (async () => {
      const style = h("link", { rel: "stylesheet", href: new URL("./vendor/katex.min.css", import.meta.url).href });
      document.head.append(style);
      // @ts-ignore: it leaves its name in the global scope
      await import("./vendor/katex.min.js");
      katex = /** @type {any} */ (globalThis).katex;
    })();
    fetchingMath.then(() => later(span, () => showMath(span)));
    return;
  }
  const tex = span.textContent ?? "";
  const displayMode = span.classList.contains("math-display");
  let made;
  try {
    const tree = katex.__renderToDomTree(tex, {
      displayMode, throwOnError: true, trust: false, strict: "ignore", maxSize: 20, maxExpand: 200,
    });
    withoutStyles(tree);
    made = tree.toNode();
  } catch {
    span.classList.add("math-broken");
    return;
  }
  for (const part of made.querySelectorAll("[data-style]")) part.style.cssText = part.dataset.style;
  if (displayMode) {
    span.tabIndex = 0;
    span.setAttribute("role", "region");
    span.setAttribute("aria-label", "Formula");
  }
  span.replaceChildren(made);
}

/** The page's policy forbids style attributes, which tall brackets have; a script may set the same afterwards.
 * @param {any} tree  of KaTeX's */
function withoutStyles(tree) {
  if (tree.attributes?.style) {
    tree.attributes["data-style"] = tree.attributes.style;
    delete tree.attributes.style;
  }
  for (const child of tree.children ?? []) withoutStyles(child);
}
