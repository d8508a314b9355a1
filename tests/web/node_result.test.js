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

test("the text of a running node of ours shows in its place, and ComfyUI's widget for it is taken away; that of others is left", () => {
  const ours = Object.assign(nodeOf("QMoveFreeVRAM"), { id: 7 });
  const other = Object.assign(nodeOf("PreviewAny"), { id: 8 });
  app.graph = app.rootGraph = graphOf([ours, other]);
  const size = [...ours.size];
  const onRemove = vi.fn();
  api.send("execution_start");
  for (const node of [ours, other]) {
    node.widgets.push({ name: "$$node-text-preview", onRemove });
    node.size = [300, 300];
    api.send("progress_text", { nodeId: String(node.id), text: "Waiting" });
  }
  expect(ours.widgets.map((/** @type {any} */ widget) => [widget.name, widget.value])).toEqual([["qmove_result", "Waiting"]]);
  expect(ours.size).toEqual(size);
  expect(onRemove).toHaveBeenCalledOnce();
  expect([other.widgets.length, other.size]).toEqual([1, [300, 300]]);
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
