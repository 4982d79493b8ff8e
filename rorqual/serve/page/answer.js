// @ts-check
// One answer on its way: from the request's fields to a node of the conversation, with what was measured.

import { ask, stream } from "./api.js";
import { messages } from "./tree.js";

/** Numbers among the options that go into a request as they are. */
export const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

/** JSON of a panel, checked; an Error says what is wrong. @param {any} options */
export function formats(options) {
  /** @type {Record<string, any>} */
  const body = {};
  if (options.schemaOn) {
    const schema = parsed(options.schema, "The JSON schema");
    if (typeof schema !== "object" || schema === null || Array.isArray(schema)) {
      throw new Error("The JSON schema must be an object, such as {\"type\": \"object\"}.");
    }
    body.response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
  }
  if (options.toolsOn) {
    const tools = parsed(options.tools, "The list of tools");
    if (!Array.isArray(tools) || !tools.length) throw new Error("The tools must be a list: [{…}].");
    body.tools = tools.map((tool) => {
      if (typeof tool !== "object" || tool === null) throw new Error("Each tool must be an object.");
      return "function" in tool ? tool : { type: "function", function: tool };
    });
    if (options.toolChoice && options.toolChoice !== "auto") body.tool_choice = options.toolChoice;
  }
  return body;
}

/** @param {string | undefined} text @param {string} what */
function parsed(text, what) {
  try {
    return JSON.parse(text ?? "");
  } catch (error) {
    throw new Error(`${what} is not JSON: ${/** @type {Error} */ (error).message}`);
  }
}

/** A request's body. @param {any} talk @param {string | null} last @param {any} inside */
function body(talk, last, inside) {
  const { options } = talk;
  /** @type {Record<string, any>} */
  const told = { messages: messages(talk, last), stream_options: { include_usage: true }, ...formats(options) };
  for (const name of NUMBERS) if (Number.isFinite(options[name])) told[name] = options[name];
  if (options.thinking === "on" || options.thinking === "off") {
    told.thinking = { type: options.thinking === "on" ? "enabled" : "disabled" };
  }
  if (options.effort && options.thinking !== "off") told.reasoning_effort = options.effort;
  if (inside) told.inside = inside;
  return told;
}

/**
 * Fill a node with an answer to what stands above it. Errors are thrown; what came before them stays in the node.
 * @param {any} talk
 * @param {any} node
 * @param {{signal: AbortSignal, inside?: any, trace?: any, changed: () => void}} how
 */
export async function answer(talk, node, { signal, inside, trace, changed }) {
  const request = body(talk, node.parent, inside);
  const began = performance.now();
  /** @type {number | undefined} */
  let first;
  /** @type {number | undefined} */
  let spoke;
  const stats = (node.stats = /** @type {any} */ ({}));
  if (trace) promptOf(request, trace, changed);
  try {
    for await (const chunk of stream(request, signal)) {
      const now = performance.now();
      if (chunk.inside && trace) trace.add(chunk.inside);
      const choice = chunk.choices?.[0];
      const delta = choice?.delta ?? {};
      if (delta.reasoning_content) {
        node.reasoning = (node.reasoning ?? "") + delta.reasoning_content;
        first ??= now;
        node.thought = now - first;
      }
      if (delta.content) node.content += delta.content;
      for (const piece of delta.tool_calls ?? []) {
        node.calls ??= [];
        node.calls[piece.index] ??= { id: piece.id ?? "", name: "", arguments: "" };
        const call = node.calls[piece.index];
        call.name += piece.function?.name ?? "";
        call.arguments += piece.function?.arguments ?? "";
      }
      if (delta.content || delta.tool_calls) {
        first ??= now;
        if (spoke === undefined && node.reasoning) node.thought = now - first;
        spoke ??= now;
      }
      if (choice?.finish_reason) node.finish = choice.finish_reason;
      if (choice?.format_problem) node.problem = String(choice.format_problem.message ?? "");
      if (chunk.usage) {
        stats.tokens = chunk.usage.completion_tokens;
        stats.prompt = chunk.usage.prompt_tokens;
        stats.hits = chunk.usage.prompt_cache_hit_tokens ?? 0;
        stats.reasoning = chunk.usage.completion_tokens_details?.reasoning_tokens ?? 0;
      }
      if (first !== undefined) {
        stats.first = first - began;
        stats.took = now - first;
      }
      changed();
    }
  } catch (error) {
    if (!signal.aborted) throw error;
    node.finish = "stopped";
  }
}

/** The prompt's tokens, for the look inside; without them it shows numbers instead of words.
 * @param {any} request @param {any} trace @param {() => void} changed */
async function promptOf({ messages: given, tools, thinking, reasoning_effort }, trace, changed) {
  const fields = { messages: given, tools, thinking, reasoning_effort, return_token_strs: true };
  const told = await ask("tokenize", fields).catch(() => null);
  if (!told) return;
  trace.setPrompt(told.count, Array.isArray(told.token_strs) ? told.token_strs : null);
  changed();
}
