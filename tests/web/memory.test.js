import { expect, test } from "vitest";
import { memories } from "../../web/js/memory.js";
import { en } from "../../web/js/texts/en.js";
import { ja } from "../../web/js/texts/ja.js";
import { zh } from "../../web/js/texts/zh.js";
import { GIB, hostModel, model, move, parkedModel, snapshot } from "./samples.js";

/** @param {any} state */
const parts = (state) =>
  memories(state, en).map(({ id, parts }) => [id, Object.fromEntries(parts.map((part) => [part.name, part.nbytes / GIB]))]);

test("a GPU's parts are the models on it, what others use, and what is free", () => {
  expect(parts(snapshot())).toEqual([
    ["cuda:0", { Flux: 6, "other use": 2, free: 16 }],
    ["ram", { "other use": 24, free: 40 }],
  ]);
});

test("a parked model lies in RAM, and kept copies beside it", () => {
  const state = snapshot({
    models: [parkedModel()],
    ram: { total: 64 * GIB, free: 40 * GIB, parked: 6 * GIB, mirrors: 3 * GIB, spare: 0 },
  });
  expect(parts(state)).toEqual([
    ["cuda:0", { "other use": 8, free: 16 }],
    ["ram", { "Flux (parked)": 6, "kept copies": 3, "other use": 15, free: 40 }],
  ]);
});

test("ComfyUI's own models are told by name", () => {
  const state = snapshot({ comfyui_models: [hostModel()] });
  expect(parts(state)[0]).toEqual(["cuda:0", { Flux: 6, "SDXL (managed by ComfyUI)": 2, free: 16 }]);
});

test("a model over two GPUs shows on each with what it has there", () => {
  const state = snapshot({
    models: [model({ resident: { "cuda:0": 1 * GIB, "cuda:1": 5 * GIB } })],
    devices: ["cuda:0", "cuda:1"].map((name) => ({ name, title: name, total: 8 * GIB, free: 3 * GIB })),
  });
  expect(parts(state).slice(0, 2)).toEqual([
    ["cuda:0", { Flux: 1, "other use": 4, free: 3 }],
    ["cuda:1", { Flux: 5, free: 3 }],
  ]);
});

test("what parked models share counts once", () => {
  const models = [parkedModel(), parkedModel({ id: 2, name: "Again" })];
  const ram = { total: 64 * GIB, free: 40 * GIB, parked: 12 * GIB, mirrors: 0, spare: 0, shared: 5 * GIB };
  expect(parts(snapshot({ models, ram }))[1]).toEqual([
    "ram",
    { "Flux (parked)": 6, "Again (parked)": 1, "other use": 17, free: 40 },
  ]);
});

test("what nobody explains, and what flows on wires, is told in the reader's language", () => {
  const others = [
    { name: "images and latents on wires", nbytes: GIB, kind: "wires" },
    { name: "python (1234)", nbytes: GIB, kind: "" },
    { name: "not explained by this process (...)", nbytes: GIB, kind: "unexplained" },
    { name: "of a backend that says no kind", nbytes: GIB },
  ];
  const [device] = snapshot().devices;
  const state = /** @type {any} */ (snapshot({ models: [], devices: [{ ...device, others }] }));
  for (const words of [en, zh, ja]) {
    const names = memories(state, words)[0].parts.map((part) => part.name);
    const { wires, unexplained } = words.others;
    expect(names.slice(0, 4)).toEqual([wires, "python (1234)", unexplained, "of a backend that says no kind"]);
  }
});

test("parts that are too narrow to be seen are one, and leave no hole", () => {
  const small = [2, 3, 4].map((id) => model({ id, name: `Small ${id}`, resident: { "cuda:0": GIB / 8 } }));
  const state = snapshot({ models: [model(), ...small] });
  const [gpu] = memories(state, en);
  expect(gpu.parts.map(({ key }) => key)).toEqual(["model-1", "small", "other", "free"]);
  expect(gpu.parts[1]).toMatchObject({ name: "3 small ones: Small 2, Small 3, Small 4", nbytes: (3 * GIB) / 8 });
  expect(gpu.parts.reduce((sum, part) => sum + part.nbytes, 0)).toBe(24 * GIB);
});

test("what has come of a model that is on its way is its own, and not unexplained", () => {
  const [device] = snapshot().devices;
  const others = [{ name: "?", nbytes: 2 * GIB, kind: "unexplained" }];
  const moves = [move({ verb: "restore", done: 2 * GIB })];
  const state = /** @type {any} */ (snapshot({ models: [parkedModel()], moves, devices: [{ ...device, free: 22 * GIB, others }] }));
  expect(parts(state)[0]).toEqual(["cuda:0", { "Flux (arriving)": 2, free: 22 }]);
});

test("figures that contradict each other still fill a bar exactly", () => {
  const state = snapshot({ devices: [{ name: "cuda:0", title: "x", total: 8 * GIB, free: 7 * GIB }] });
  const [gpu] = memories(state, en);
  expect(gpu.parts.reduce((sum, part) => sum + part.nbytes, 0)).toBe(8 * GIB);
  expect(gpu.free).toBe(2 * GIB);
});

test("what is too little to be seen has no line, and the bar is full all the same", () => {
  const state = snapshot({ models: [], devices: [{ name: "cuda:0", title: "x", total: 8 * GIB, free: 8 * GIB - 1200 }] });
  const [gpu] = memories(state, en);
  expect(gpu.parts.map(({ name, nbytes }) => [name, nbytes])).toEqual([["free", 8 * GIB]]);
});

test("a device that cannot say its size has no bar", () => {
  const state = snapshot({ devices: [{ name: "mps:0", title: "mps", total: null, free: null }] });
  expect(memories(state, en).map((memory) => memory.id)).toEqual(["ram"]);
});
