/** VRAM over time in the last run, with its stages: a chart, and the same as a list. */

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { make, reconcile, setAttribute, setText } from "./dom.js";
import { bytes, duration } from "./format.js";
import { nodeTitle } from "./graph.js";
import { texts } from "./texts.js";

/**
 * @typedef {import("./types").Run} Run
 * @typedef {import("./types").Stage} Stage
 */

const HEIGHT = 180; // pixels
const NARROWEST_CHART = 120;
const LINES = ["#4c8dff", "#e0883a", "#3fae7a", "#c05bc0"];
const PARKED = "#9a9a9a";
const NARROWEST_LABEL = 16; // pixels; the number of a narrower stage is only in the list

export class Chart {
  /** @param {HTMLElement} container */
  constructor(container) {
    this._canvas = make("div", { class: "qmove-chart", role: "img", "data-testid": "qmove-chart" });
    this._legend = make("ul", { class: "qmove-legend" });
    this._stages = make("ol", { class: "qmove-stages", tabindex: 0 });
    this._tip = make("div", { class: "qmove-chart-tip", "data-testid": "qmove-chart-tip", hidden: true });
    this._empty = make("p", { class: "qmove-hint", "data-testid": "qmove-chart-empty" });
    container.append(this._empty, make("div", { class: "qmove-chart-place" }, this._canvas, this._tip), this._legend, this._stages);
    /** @type {uPlot | null} */
    this._plot = null;
    this._outline = "";
    /** @type {Run | null} */
    this._run = null;
    // It is called when the chart comes into the page as well: before that it has no size, and no colours.
    this._resized = new ResizeObserver(() => {
      this._redraw();
      this._fit();
    });
    this._resized.observe(this._canvas);
    // ComfyUI changes its theme by the style and class of these two, in several steps.
    this._themed = new MutationObserver(() => requestAnimationFrame(() => this._redraw()));
    for (const element of [document.documentElement, document.body]) {
      this._themed.observe(element, { attributes: true, attributeFilter: ["class", "style"] });
    }
  }

  /** @param {Run | null} run */
  update(run) {
    const words = texts();
    setText(this._empty, words.noRun);
    this._empty.hidden = run !== null;
    this._canvas.hidden = this._stages.hidden = this._legend.hidden = run === null || run.devices.length === 0;
    if (run === null || this._canvas.hidden) return;
    this._run = run;
    const outline = JSON.stringify([run.devices, words.parkedRam]);
    if (this._plot === null || outline !== this._outline || this._colors() !== this._drawnWith) {
      this._outline = outline;
      this._draw();
    } else {
      this._plot.setData(dataOf(run));
    }
    setAttribute(this._canvas, "aria-label", describe(run));
    setAttribute(this._stages, "aria-label", words.stages);
    this._explain(run);
    this._list(run);
  }

  destroy() {
    this._resized.disconnect();
    this._themed.disconnect();
    this._plot?.destroy();
    this._plot = null;
  }

  _redraw() {
    if (this._plot && this._colors() !== this._drawnWith) this._draw();
  }

  _colors() {
    const style = getComputedStyle(this._canvas);
    return JSON.stringify([style.color, style.borderTopColor]);
  }

  _draw() {
    if (this._run === null) return;
    const words = texts();
    const run = this._run;
    this._plot?.destroy();
    this._drawnWith = this._colors();
    const [text, grid] = JSON.parse(this._drawnWith);
    const font = "11px sans-serif";
    /** @type {uPlot.Axis} */
    const axis = { stroke: text, font, ticks: { stroke: grid, width: 1 } };
    this._plot = new uPlot(
      {
        width: this._width(),
        height: HEIGHT,
        legend: { show: false }, // it cannot be read by a screen reader, and has no room here
        cursor: { drag: { x: false, y: false } },
        scales: { x: { time: false }, y: { range: (_plot, _least, most) => [0, Math.max(most, highest(this._run)) * 1.04] } },
        axes: [
          { ...axis, size: 30, grid: { show: false }, values: (_plot, ticks) => ticks.map((tick) => `${tick} s`) },
          {
            ...axis,
            size: 66,
            grid: { stroke: grid, width: 1, dash: [1, 4] },
            values: (_plot, ticks) => ticks.map((tick) => bytes(tick)),
            incrs: powersOfTwo(),
          },
        ],
        series: [
          { label: "s" },
          ...run.devices.map((device, index) => ({
            label: words.inUseOn(device),
            stroke: lineColor(index),
            fill: `${lineColor(index)}33`,
            width: 2,
            points: { show: false },
          })),
          { label: words.parkedRam, stroke: PARKED, dash: [5, 4], width: 2, points: { show: false } },
        ],
        hooks: { setCursor: [(plot) => this._point(plot)], drawClear: [(plot) => shadeStages(plot, this._run?.stages ?? [], text)] },
      },
      dataOf(run),
      this._canvas
    );
  }

  _fit() {
    if (this._plot && this._plot.width !== this._width()) this._plot.setSize({ width: this._width(), height: HEIGHT });
  }

  _width() {
    return Math.max(NARROWEST_CHART, this._canvas.clientWidth);
  }

  /** Shows the figures under the mouse. @param {uPlot} plot */
  _point(plot) {
    const index = plot.cursor.idx;
    const run = this._run;
    this._tip.hidden = index === null || index === undefined || run === null;
    if (this._tip.hidden || run === null) return;
    const words = texts();
    const [times, ...lines] = dataOf(run);
    const time = /** @type {number[]} */ (times)[/** @type {number} */ (index)];
    const stage = run.stages.find((one) => one.begin <= time && (one.end ?? Infinity) >= time);
    const names = [...run.devices, words.parkedRam];
    const figures = lines.map((line, at) => `${names[at]}: ${bytes(Number(line[/** @type {number} */ (index)] ?? 0))}`);
    const said = [duration(time), ...(stage ? [nodeTitle(stage)] : []), ...figures];
    reconcile(
      this._tip,
      said,
      (line) => line,
      () => make("div"),
      setText
    );
    const left = plot.valToPos(time, "x") + Number(plot.over.style.left.replace("px", ""));
    this._tip.style.left = `${Math.max(0, Math.min(left + 8, this._width() - this._tip.offsetWidth))}px`;
  }

  /** @param {Run} run */
  _explain(run) {
    const words = texts();
    const lines = run.devices.map((device, index) => ({ name: words.inUseOn(device), color: lineColor(index) }));
    reconcile(
      this._legend,
      [...lines, { name: words.parkedRam, color: PARKED }],
      (line) => line.color,
      () => make("li", {}, make("span", { class: "qmove-swatch", "aria-hidden": "true" }), make("span")),
      (item, line) => {
        /** @type {HTMLElement} */ (item.children[0]).style.background = line.color;
        setText(item.children[1], line.name);
      }
    );
  }

  /** @param {Run} run */
  _list(run) {
    const words = texts();
    reconcile(
      this._stages,
      run.stages.map((stage, index) => ({ stage, index })),
      ({ index }) => String(index),
      () => make("li", {}, make("span", { class: "qmove-name" }), make("span", { class: "qmove-hint" })),
      (item, { stage }) => {
        setText(item.children[0], nodeTitle(stage));
        const parts = [];
        if (stage.end !== null) parts.push(duration(stage.end - stage.begin));
        const peaks = run.devices.map((device) => stage.peak?.[device] ?? usedAt(run, device, stage.end ?? Infinity));
        parts.push(words.peak(peaks.map(bytes).join(" / ")));
        setText(item.children[1], parts.join(" · "));
      }
    );
  }
}

/**
 * @param {Run} run
 * @returns {uPlot.AlignedData}
 */
function dataOf(run) {
  const { now, times } = run;
  const isNewer = run.running && now && now.time > (times.at(-1) ?? -1);
  const add = (/** @type {number[]} */ points, /** @type {number} */ latest) => (isNewer ? [...points, latest] : points);
  return [
    add(times, now?.time ?? 0),
    ...run.devices.map((device) => add(run.used[device], now?.used[device] ?? 0)),
    add(run.parked, now?.parked ?? 0),
  ];
}

/**
 * @param {uPlot} plot
 * @param {Stage[]} stages
 * @param {string} color
 */
function shadeStages(plot, stages, color) {
  const { ctx, bbox } = plot;
  const last = plot.data[0].at(-1) ?? 0;
  ctx.save();
  ctx.fillStyle = color;
  ctx.font = `${Math.round(10 * devicePixelRatio)}px sans-serif`;
  ctx.textAlign = "center";
  stages.forEach((stage, index) => {
    const left = plot.valToPos(stage.begin, "x", true);
    const right = plot.valToPos(stage.end ?? last, "x", true);
    ctx.globalAlpha = index % 2 ? 0.04 : 0.14;
    ctx.fillRect(left, bbox.top, right - left, bbox.height);
    ctx.globalAlpha = 0.5;
    ctx.fillRect(left, bbox.top, devicePixelRatio, bbox.height); // where it begins
    if (right - left >= NARROWEST_LABEL * devicePixelRatio) {
      ctx.globalAlpha = 0.9;
      ctx.fillText(String(index + 1), (left + right) / 2, bbox.top + 12 * devicePixelRatio);
    }
  });
  ctx.restore();
}

/** @param {Run} run */
function describe(run) {
  const device = run.devices[0];
  const used = run.used[device];
  const peak = used.reduce((best, nbytes, index) => (nbytes > used[best] ? index : best), 0);
  const time = run.times[peak];
  const stage = run.stages.find((one) => one.begin <= time && (one.end ?? Infinity) >= time);
  return texts().chartLabel(device, bytes(used[peak] ?? 0), stage ? nodeTitle(stage) : "–");
}

/**
 * @param {Run} run
 * @param {string} device
 * @param {number} time
 * @returns {number} bytes in use at the last point up to that time
 */
function usedAt(run, device, time) {
  const index = run.times.findLastIndex((point) => point <= time + 1e-3);
  return run.used[device][Math.max(0, index)] ?? 0;
}

/** @param {number} index of a device */
const lineColor = (index) => LINES[index % LINES.length];

/** @param {Run | null} run @returns {number} the size of the biggest device, so that the chart shows what is free as well */
const highest = (run) => Math.max(1, ...Object.values(run?.totals ?? {}));

/** Steps of the axis that are round in GiB. */
const powersOfTwo = () => Array.from({ length: 42 }, (_unused, exponent) => 2 ** (exponent + 10));
