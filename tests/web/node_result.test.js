import { beforeEach, expect, test, vi } from "vitest";
import { followRuns, keepResultOf } from "../../web/js/node_result.js";
import { api } from "./fake_host/api.js";

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

const end = async () => {
  api.send("execution_success");
  await new Promise((resolve) => setTimeout(resolve));
};

beforeEach(() => {
  api.reset();
  followRuns();
});

test("the result of a run shows when it has ended, and is not saved with the workflow", async () => {
  const node = nodeOf("QMovePark");
  node.onExecuted({ text: ["Parked Flux: 6 GiB left cuda:0."] });
  expect(node.widgets).toEqual([]);
  await end();
  expect(node.widgets.map((/** @type {any} */ widget) => [widget.value, widget.serialize, widget.options.serialize])).toEqual([
    ["Parked Flux: 6 GiB left cuda:0.", false, false],
  ]);
  expect(node.size).toEqual([240, 120]);
});

test("the next result takes its place", async () => {
  const node = nodeOf("QMovePark");
  for (const text of ["one", "two"]) {
    node.onExecuted({ text: [text] });
    await end();
  }
  expect(node.widgets.map((/** @type {any} */ widget) => widget.value)).toEqual(["two"]);
});

test("where ComfyUI leaves the text of the running node nothing is added", async () => {
  const node = nodeOf("QMovePark");
  node.widgets.push({ name: "$$node-text-preview", value: "Parked Flux" });
  node.onExecuted({ text: ["Parked Flux"] });
  await end();
  expect(node.widgets).toHaveLength(1);
  expect(node.size).toEqual([240, 80]);
});

test("the nodes of others are left alone", async () => {
  const node = nodeOf("PreviewAny");
  expect(node.onExecuted).toBeUndefined();
});

test("what the node did before it still does, and text is no HTML", async () => {
  /** @type {any} */
  const node = nodeOf("QMoveReport");
  const before = vi.fn();
  const other = { ...nodeOf("QMoveReport"), onExecuted: before };
  keepResultOf(other);
  other.onExecuted({ images: [] });
  expect(before).toHaveBeenCalledWith({ images: [] });
  node.onExecuted({ text: ["<b>x</b>"] });
  await end();
  expect(node.widgets[0].element.querySelector("b")).toBeNull();
  expect(node.widgets[0].value).toBe("<b>x</b>");
});
