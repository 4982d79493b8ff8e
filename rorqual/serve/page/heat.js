// @ts-check
// Layers × experts as a picture on a canvas: a cell is the warmer, the more often its expert was chosen.

import { h } from "./dom.js";

const HINT = "Point at a cell, or focus the map and use the arrow keys.";

export class Heat {
  constructor() {
    this.canvas = h("canvas", { class: "heat", tabindex: 0, role: "img", "aria-label": "Experts chosen" });
    this.reading = h("p", { class: "heat-reading", "aria-live": "polite" }, HINT);
    this.across = h("span");
    this.down = h("span");
    this.element = h(
      "div", { class: "heat-frame" },
      h("p", { class: "axis" }, this.down, this.across), this.canvas, this.reading,
    );
    /** @type {import("./trace.js").Trace | null} */
    this.trace = null;
    /** @type {import("./trace.js").Token | null} */
    this.token = null;
    /** @type {{layer: number, expert: number} | null} */
    this.cursor = null;
    this.small = document.createElement("canvas");
    this.canvas.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.moveTo(null));
    this.canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  /** @param {any} trace @param {any} token  the one whose experts are framed */
  show(trace, token) {
    if (trace !== this.trace) this.cursor = null;
    this.trace = trace;
    this.token = token;
    this.draw();
  }

  /** Pixels of the screen a layer takes. */
  get row() {
    return Math.min(13, Math.max(3, Math.floor(260 / Math.max(this.trace?.layers ?? 1, 1))));
  }

  draw() {
    const { trace, canvas } = this;
    if (!trace?.layers || !canvas.isConnected) return;
    const { layers, experts, counts } = trace;
    const numbers = trace.model.expert_layers;
    this.down.textContent = `↓ layers ${numbers[0]} to ${numbers[layers - 1]}`;
    this.across.textContent = `experts 0 to ${experts - 1} →`;
    canvas.style.height = `${this.row * layers}px`;
    const scale = devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * scale);
    const height = Math.round(this.row * layers * scale);
    if (!width) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const most = counts.reduce((a, b) => Math.max(a, b), 1);
    const [cold, warm] = [colour(canvas, "--heat-cold"), colour(canvas, "--heat-warm")];
    Object.assign(this.small, { width: experts, height: layers });
    const small = /** @type {CanvasRenderingContext2D} */ (this.small.getContext("2d"));
    const image = small.createImageData(experts, layers);
    counts.forEach((n, at) => {
      const t = Math.sqrt(n / most); // so that a single choice shows beside hundreds
      for (let c = 0; c < 3; c++) image.data[4 * at + c] = cold[c] + (warm[c] - cold[c]) * t;
      image.data[4 * at + 3] = 255;
    });
    small.putImageData(image, 0, 0);
    const brush = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    brush.imageSmoothingEnabled = false;
    brush.drawImage(this.small, 0, 0, width, height);
    const [w, t] = [width / experts, height / layers];
    brush.lineWidth = Math.max(1, scale);
    brush.strokeStyle = getComputedStyle(canvas).color;
    (this.token?.experts ?? []).forEach((chosen, layer) => {
      for (const expert of chosen) brush.strokeRect(expert * w + 0.5, layer * t + 0.5, Math.max(w - 1, 2), t - 1);
    });
    if (this.cursor) {
      brush.lineWidth = 2 * scale;
      brush.strokeRect(this.cursor.expert * w - 1, this.cursor.layer * t - 1, w + 2, t + 2);
    }
    const all = trace.balances();
    canvas.setAttribute(
      "aria-label",
      `Heat map of ${layers} layers by ${experts} experts over ${trace.routed} tokens` +
        (all ? `; the busiest expert of a layer has ${all.peak.toFixed(1)} times the mean` : ""),
    );
  }

  /** @param {PointerEvent} event */
  point(event) {
    if (!this.trace) return;
    const box = this.canvas.getBoundingClientRect();
    const within = (/** @type {number} */ part, /** @type {number} */ n) => Math.min(Math.max(Math.floor(part * n), 0), n - 1);
    this.moveTo({
      layer: within((event.clientY - box.top) / box.height, this.trace.layers),
      expert: within((event.clientX - box.left) / box.width, this.trace.experts),
    });
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !this.trace?.layers) return;
    event.preventDefault();
    const { layer, expert } = this.cursor ?? { layer: 0, expert: 0 };
    const [layers, experts] = [this.trace.layers, this.trace.experts];
    if (!this.cursor) this.moveTo({ layer, expert });
    else this.moveTo({ layer: (layer + step[0] + layers) % layers, expert: (expert + step[1] + experts) % experts });
  }

  /** @param {{layer: number, expert: number} | null} cursor */
  moveTo(cursor) {
    this.cursor = cursor;
    if (cursor && this.trace) {
      const n = this.trace.counts[cursor.layer * this.trace.experts + cursor.expert];
      const number = this.trace.model.expert_layers[cursor.layer];
      this.reading.textContent = `Layer ${number}, expert ${cursor.expert}: chosen for ${n} of ${this.trace.routed} tokens`;
    } else {
      this.reading.textContent = HINT;
    }
    this.draw();
  }
}

/** @type {CanvasRenderingContext2D | null} */
let palette = null;

/** A colour of the style sheet as three numbers. @param {HTMLElement} element @param {string} name */
function colour(element, name) {
  palette ??= document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const brush = /** @type {CanvasRenderingContext2D} */ (palette);
  const probe = h("i", { class: "probe" });
  probe.style.color = `var(${name})`;
  /** @type {HTMLElement} */ (element.parentElement).append(probe);
  brush.fillStyle = getComputedStyle(probe).color;
  probe.remove();
  brush.fillRect(0, 0, 1, 1);
  return [...brush.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}
