// @ts-check
// The server's API: requests, streams of events, and errors in words.

const ROOT = new URL(".", document.baseURI);
const KEY = "api-key";

/** A failed request. `status` 0: no answer came. `retry`: seconds that the server asks to wait. */
export class Failure extends Error {
  /** @param {number} status @param {string} message @param {{param?: string | null, retry?: number}} [more] */
  constructor(status, message, more = {}) {
    super(message);
    this.status = status;
    this.param = more.param ?? null;
    this.retry = more.retry ?? 0;
  }
}

/** @param {string | null} key  null forgets it */
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** @param {string} path @param {any} body @param {AbortSignal} [signal] */
async function send(path, body, signal) {
  /** @type {Record<string, string>} */
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  /** @type {RequestInit} */
  const init = { method: body === undefined ? "GET" : "POST", headers, signal, credentials: "omit" };
  if (body !== undefined) init.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(new URL(path, ROOT), init);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure(0, "The server cannot be reached. Is it running, and is the network up?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const retry = Number(response.headers.get("retry-after")) || 0;
  throw failure(response.status, told?.error, retry);
}

/** @param {number} status @param {any} told @param {number} [retry] */
function failure(status, told, retry = 0) {
  const message = typeof told?.message === "string" ? told.message : `the server answered with status ${status}`;
  return new Failure(status, message, { param: typeof told?.param === "string" ? told.param : null, retry });
}

/** A JSON answer. @param {string} path @param {any} [body] @param {AbortSignal} [signal] @returns {Promise<any>} */
export async function ask(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/** The events of a streamed answer, parsed. Raises Failure. @param {any} body @param {AbortSignal} signal */
export async function* stream(body, signal) {
  const response = await send("v1/chat/completions", { ...body, stream: true }, signal);
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let whole = false;
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (signal.aborted) throw error;
        throw new Failure(0, "The connection to the server broke before the answer was whole.");
      });
      if (done) break;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = /** @type {string} */ (lines.pop());
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") {
          whole = true;
          continue;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw failure(Number(chunk.error.status) || 500, chunk.error);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!whole) throw new Failure(0, "The connection to the server broke before the answer was whole.");
}

const TITLES = new Map([
  [0, "No connection"],
  [400, "The server can't do this"],
  [401, "This server wants an API key"],
  [404, "Not found"],
  [408, "It took too long"],
  [413, "That is too much at once"],
  [422, "The server doesn't understand a setting"],
  [429, "The server is busy"],
  [501, "The server can't do this"],
  [503, "The server isn't taking requests"],
  [504, "It took too long"],
]);

/** What went wrong: a short line and a longer one. @param {any} error */
export function words(error) {
  if (!(error instanceof Failure)) return { title: "The page failed", text: String(error?.message ?? error) };
  let text = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  if (error.retry) text += ` (It asks to wait ${error.retry} s.)`;
  if (error.param && !error.message.includes(error.param)) text += ` [${error.param}]`;
  if (!/[.!?)\]]$/.test(text)) text += ".";
  return { title: TITLES.get(error.status) ?? "The server failed", text };
}
