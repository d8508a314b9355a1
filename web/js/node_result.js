/**
 * What a node of qmove has done, shown on it after the run.
 *
 * Old frontends leave the text that the backend sends while a node runs. Newer ones remove it when the run has ended: there the result
 * takes its place. It is not saved with the workflow.
 */

import { api } from "../../../scripts/api.js";
import { make, setText } from "./dom.js";

/** @typedef {import("./types").GraphNode} GraphNode */

const OWN = "QMove";
const WIDGET = "qmove_result";
const LIVE_TEXT = "$$node-text-preview"; // ComfyUI's name for the text of a running node
const HEIGHT = 44; // pixels; longer reports scroll
const WIDTH = 240; // pixels; in less a line breaks within its words
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];

/** Results of the run that is going on. @type {Map<GraphNode, string>} */
const results = new Map();

/** Starts to follow runs. */
export function followRuns() {
  for (const event of ENDS) {
    // ComfyUI removes its texts on the same event.
    /** @type {EventTarget} */ (api).addEventListener(event, () => setTimeout(showResults));
  }
}

/**
 * For `nodeCreated`: takes note of what the node will report.
 *
 * @param {GraphNode} node
 */
export function keepResultOf(node) {
  if (!String(node.comfyClass ?? "").startsWith(OWN)) return;
  const before = node.onExecuted;
  node.onExecuted = function (output) {
    before?.call(this, output);
    const text = output.text;
    if (text) results.set(node, text.join("\n"));
    if (widgetOf(node, WIDGET)) showResult(node, text?.join("\n") ?? "");
  };
}

function showResults() {
  for (const [node, text] of results) {
    if (!widgetOf(node, LIVE_TEXT)) showResult(node, text);
    if (node.size[0] < WIDTH) node.setSize([WIDTH, node.size[1]]);
  }
  results.clear();
}

/**
 * @param {GraphNode} node
 * @param {string} text
 */
function showResult(node, text) {
  const present = widgetOf(node, WIDGET);
  if (present) {
    present.value = text;
  } else {
    const element = make("div", { class: "qmove-result", role: "status" }, text);
    const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
      serialize: false,
      getValue: () => element.textContent ?? "",
      setValue: (value) => setText(element, value),
      getMinHeight: () => HEIGHT,
    });
    widget.serialize = false;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  }
  node.setDirtyCanvas(true);
}

/**
 * @param {GraphNode} node
 * @param {string} name
 */
function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}
