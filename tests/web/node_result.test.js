import { beforeEach, expect, test, vi } from "vitest";
import { followRuns, keepResultOf } from "../../web/js/node_result.js";
import { api } from "./fake_host/api.js";
import { app, graphOf } from "./fake_host/app.js";

/** A node as far as results need one. @param {string} comfyClass */
function nodeOf(comfyClass) {
  /** @type {any} */
  const node = { comfyClass, widgets: [], size: [200, 80], computeSize: () => [150, 120] };
  node.setSize = (/** @type {any} */ size) => (node.size = size);
  node.setDirtyCanvas = vi.fn();
  node.addDOMWidget = (/** @type {string} */ name, _type, /** @type {HTMLElement} */ element, /** @type {any} */ options) => {
    const widget = { name, element, options, get value() { return options.getValue(); }, set value(text) { options.setValue(text); } };
    node.widgets.push(widget);
    return widget;
  };
  keepResultOf(node);
  return node;
}

beforeEach(() => {
  api.reset();
  app.reset();
  followRuns();
});

test("a node has its place for results from the beginning, not saved, and no run changes its size", () => {
  const node = nodeOf("QMovePark");
  const size = [...node.size];
  const shown = () => node.widgets.map((/** @type {any} */ widget) => [widget.value, widget.serialize, widget.options.serialize]);
  expect(shown()).toEqual([["", false, false]]);
  for (const text of ["Parked Flux: 6 GiB left cuda:0.", "two"]) {
    node.onExecuted({ text: [text] });
    expect(shown()).toEqual([[text, false, false]]);
  }
  expect(node.size).toEqual(size);
});

test("the text of a running node of ours is taken from ComfyUI, which would add a widget; that of others is left", () => {
  const ours = Object.assign(nodeOf("QMoveFreeVRAM"), { id: 7 });
  app.rootGraph = graphOf([ours, { id: 8, comfyClass: "PreviewAny" }]);
  const comfyui = vi.fn();
  api.addEventListener("progress_text", comfyui);
  api.send("progress_text", { nodeId: "7", text: "Waiting" });
  expect(comfyui).not.toHaveBeenCalled();
  expect(ours.widgets[0].value).toBe("Waiting");
  api.send("progress_text", { nodeId: "8", text: "another pack's" });
  expect(comfyui).toHaveBeenCalledOnce();
});

test("the nodes of others are left alone", () => {
  const node = nodeOf("PreviewAny");
  expect(node.onExecuted).toBeUndefined();
  expect(node.widgets).toEqual([]);
});

test("what the node did before it still does, and text is no HTML", () => {
  /** @type {any} */
  const node = nodeOf("QMoveReport");
  const before = vi.fn();
  const other = { ...nodeOf("QMoveReport"), onExecuted: before };
  keepResultOf(other);
  other.onExecuted({ images: [] });
  expect(before).toHaveBeenCalledWith({ images: [] });
  node.onExecuted({ text: ["<b>x</b>"] });
  expect(node.widgets[0].element.querySelector("b")).toBeNull();
  expect(node.widgets[0].value).toBe("<b>x</b>");
});
