/**
 * What a node of qmove does and has done, shown on it. The nodes of others get nothing.
 *
 * The text has its place on the node from the beginning, so that no run changes the node's size, and the saved workflow with it.
 * ComfyUI's own text for a running node would: on our nodes its widget is taken away again, before anything is drawn.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { make, setText } from "./dom.js";
import { findNode } from "./graph.js";

/** @typedef {import("./types").GraphNode} GraphNode */

const OWN = "QMove";
const WIDGET = "qmove_result";
const LIVE_TEXT = "$$node-text-preview"; // ComfyUI's name for the text of a running node
const HEIGHT = 44; // pixels; longer reports scroll

/** Sizes of our nodes as the run began. @type {WeakMap<GraphNode, [number, number]>} */
const sizes = new WeakMap();

/** Starts to follow the texts of running nodes. */
export function followRuns() {
  const events = /** @type {EventTarget} */ (api);
  events.addEventListener("execution_start", noteSizes);
  events.addEventListener("progress_text", (event) => takeText(/** @type {CustomEvent} */ (event).detail));
}

function noteSizes() {
  /** @type {any} */
  const graph = app.graph;
  for (const node of graph?.nodes ?? graph?._nodes ?? []) if (isOwn(node)) sizes.set(node, [node.size[0], node.size[1]]);
}

/** ComfyUI has its listener for longer, and has shown the text by now. @param {{nodeId?: string, text?: string}} detail */
function takeText({ nodeId, text }) {
  const node = nodeId ? findNode(String(nodeId)) : null;
  if (!node || !isOwn(node)) return;
  show(node, text ?? "");
  const index = node.widgets?.findIndex((widget) => widget.name === LIVE_TEXT) ?? -1;
  const [live] = index < 0 ? [] : (node.widgets?.splice(index, 1) ?? []);
  if (!live) return;
  /** @type {any} */ (live).onRemove?.();
  const size = sizes.get(node);
  if (size) node.setSize([...size]);
}

/**
 * For `nodeCreated`: gives the node its place for what it reports.
 *
 * @param {GraphNode} node
 */
export function keepResultOf(node) {
  if (!isOwn(node)) return;
  addPlace(node);
  const before = node.onExecuted;
  node.onExecuted = function (output) {
    before?.call(this, output);
    show(node, output.text?.join("\n") ?? "");
  };
}

/** @param {GraphNode} node */
const isOwn = (node) => String(node.comfyClass ?? "").startsWith(OWN);

/** @param {GraphNode} node */
function addPlace(node) {
  const element = make("div", { class: "qmove-result", role: "status", "data-testid": "qmove-result" });
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false,
    getValue: () => element.textContent ?? "",
    setValue: (value) => setText(element, value),
    getMinHeight: () => HEIGHT,
  });
  widget.serialize = false;
}

/**
 * @param {GraphNode} node
 * @param {string} text
 */
function show(node, text) {
  const widget = node.widgets?.find((known) => known.name === WIDGET);
  if (widget) widget.value = text;
  node.setDirtyCanvas(true);
}
