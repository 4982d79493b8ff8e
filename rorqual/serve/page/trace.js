// @ts-check
// What an answer's stream told of the model's inside, gathered and counted.

/**
 * @typedef {{id: number, text: string, logprob: number}} Guess
 * @typedef {{index: number, id: number, text: string, logprob: number | null, top?: Guess[], part?: string,
 *   experts?: number[][] | null, draft?: string, refused?: {id: number, text: string}[],
 *   seen?: {layer: number, positions: number[], weights: number[] | null, every?: number}[] | null}} Token
 */

export class Trace {
  /** @param {any} model  the server's `/inside` */
  constructor(model) {
    this.model = model;
    /** @type {Token[]} */
    this.tokens = [];
    /** @type {{tokens: number, bytes: number, mha_bytes: number} | null} */
    this.cache = null;
    this.layers = model.expert_layers?.length ?? 0;
    this.experts = model.experts ?? 0;
    /** How often each expert was chosen: [layers × experts]. */
    this.counts = new Uint32Array(this.layers * this.experts);
    this.prompt = 0;
    /** @type {string[] | null} */
    this.promptTexts = null;
    this.answers = new Set(["reasoning", "content"]);
  }

  /** @param {{tokens?: Token[], cache?: any}} told */
  add(told) {
    for (const token of told.tokens ?? []) {
      this.tokens.push(token);
      (token.experts ?? []).forEach((chosen, layer) => {
        if (layer >= this.layers) return;
        for (const expert of chosen) if (expert < this.experts) this.counts[layer * this.experts + expert]++;
      });
    }
    if (told.cache) this.cache = told.cache;
  }

  /** @param {number} count @param {string[] | null} texts */
  setPrompt(count, texts) {
    this.prompt = count;
    this.promptTexts = texts;
  }

  /** The text of tokens from a position of the whole context on, the prompt first.
   * @param {number} position @param {number} count */
  textAt(position, count) {
    let text = "";
    for (let at = position; at < position + count; at++) {
      text += (at < this.prompt ? this.promptTexts?.[at] : this.tokens[at - this.prompt]?.text) ?? "";
    }
    return text;
  }

  /** Tokens whose experts are known. */
  get routed() {
    return this.tokens.reduce((sum, token) => sum + (token.experts ? 1 : 0), 0);
  }

  /** Whether anything was drafted. */
  get drafted() {
    return this.tokens.some((token) => token.draft === "accepted" || token.refused?.length);
  }

  /** How evenly one expert layer's choices spread. @param {number} layer  its place among the expert layers */
  balance(layer) {
    const row = this.counts.subarray(layer * this.experts, (layer + 1) * this.experts);
    let sum = 0;
    let squares = 0;
    let most = 0;
    let unused = 0;
    for (const n of row) {
      sum += n;
      squares += n * n;
      if (n > most) most = n;
      if (!n) unused++;
    }
    const mean = sum / row.length;
    const spread = mean ? Math.sqrt(Math.max(squares / row.length - mean * mean, 0)) / mean : 0;
    return { peak: mean ? most / mean : 0, spread, unused, sum };
  }

  /** Over all expert layers: means, and the layer with the highest peak. Null before anything is counted. */
  balances() {
    const rows = Array.from({ length: this.layers }, (_, layer) => this.balance(layer));
    if (!rows.some((row) => row.sum)) return null;
    const mean = (/** @type {"peak" | "spread" | "unused"} */ name) =>
      rows.reduce((sum, row) => sum + row[name], 0) / rows.length;
    const worst = rows.reduce((best, row, at) => (row.peak > rows[best].peak ? at : best), 0);
    return { rows, peak: mean("peak"), spread: mean("spread"), unused: mean("unused"), worst };
  }
}
