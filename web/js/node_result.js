/**
 * What a node of qmove does and has done, shown on it. The nodes of others get nothing.
 *
 * The text has its place on the node from the beginning, so that no run changes the node's size, and the saved workflow with it.
 * ComfyUI's own text for a running node would: for our nodes it is taken here, before ComfyUI adds a widget for it.
 */

import { api } from "../../../scripts/api.js";
import { make, setText } from "./dom.js";
import { findNode } from "./graph.js";

/** @typedef {import("./types").GraphNode} GraphNode */

const OWN = "QMove";
const WIDGET = "qmove_result";
const HEIGHT = 44; // pixels; longer reports scroll

/** Starts to follow the texts of running nodes. */
export function followRuns() {
  // Before all others, who would show it on the node in a widget of their own.
  /** @type {any} */ (api).addEventListener("progress_text", takeText, { capture: true });
}

/** @param {CustomEvent<{nodeId?: string, text?: string}>} event */
function takeText(event) {
  const { nodeId, text } = event.detail ?? {};
  const node = nodeId ? findNode(String(nodeId)) : null;
  if (!node || !isOwn(node)) return;
  event.stopImmediatePropagation();
  show(node, text ?? "");
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
