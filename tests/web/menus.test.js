import { beforeEach, describe, expect, test, vi } from "vitest";
import * as actions from "../../web/js/actions.js";
import { commands, keybindings, menuCommands } from "../../web/js/commands.js";
import { nodeTitle } from "../../web/js/graph.js";
import { nodeMenuItems } from "../../web/js/node_menu.js";
import { Store } from "../../web/js/store.js";
import { api } from "./fake_host/api.js";
import { app, graphOf } from "./fake_host/app.js";
import { snapshot } from "./samples.js";

/** @type {Store} */
let store;

beforeEach(async () => {
  api.reset();
  app.reset();
  api.answers = { "/qmove/state": snapshot({ nodes: ["5", "3:6"] }), "/qmove/history": { run: null } };
  store = new Store();
  await store.start();
});

describe("the menu of a node", () => {
  test("with a model offers to park, restore, pin and unpin it", async () => {
    for (const route of ["park", "restore", "pin"]) api.answers[`/qmove/${route}`] = { report: "Done." };
    const node = { id: 5, comfyClass: "LoadIt", title: "My loader" };
    app.rootGraph = graphOf([node]);
    const [separator, ...items] = nodeMenuItems(/** @type {any} */ (node), store);
    expect(separator).toBeNull();
    for (const item of items) item?.callback();
    await vi.waitFor(() => expect(app.toasts).toHaveLength(4));
    expect(api.posted("/qmove/park")).toEqual([{ node: "5", class: "LoadIt" }]);
    expect(api.posted("/qmove/restore")).toEqual([{ node: "5", class: "LoadIt" }]);
    expect(api.posted("/qmove/pin").map((body) => body.pin)).toEqual(["pin", "unpin"]);
    expect(api.posted("/qmove/pin")[0]).toEqual({ node: "5", class: "LoadIt", pin: "pin" });
  });

  test("of a node in a subgraph is found by the nodes around it", () => {
    const inner = { id: 6, comfyClass: "LoadIt" };
    const subgraph = graphOf([inner]);
    app.rootGraph = graphOf([{ id: 3, subgraph, title: "Group" }], new Map([["x", subgraph]]));
    expect(nodeMenuItems(/** @type {any} */ (inner), store)).toHaveLength(5);
  });

  test("of a node whose subgraph is used twice says nothing, as nobody knows which is meant", () => {
    const inner = { id: 6, comfyClass: "LoadIt" };
    const subgraph = graphOf([inner]);
    app.rootGraph = graphOf([{ id: 3, subgraph }, { id: 4, subgraph }], new Map([["x", subgraph]]));
    expect(nodeMenuItems(/** @type {any} */ (inner), store)).toEqual([]);
  });

  test("without a model has no entries", () => {
    const node = { id: 9, comfyClass: "Note" };
    app.rootGraph = graphOf([node]);
    expect(nodeMenuItems(/** @type {any} */ (node), store)).toEqual([]);
  });
});

describe("the title of a node", () => {
  const stage = { class: "KSampler", name: "KSampler" };

  test("is what the user has called it", () => {
    app.rootGraph = graphOf([{ id: 5, title: "Refine", comfyClass: "KSampler" }]);
    expect(nodeTitle("5", stage)).toBe("Refine");
  });

  test("is not that of another workflow's node with the same id", () => {
    app.rootGraph = graphOf([{ id: 5, title: "My note", comfyClass: "Note" }]);
    expect(nodeTitle("5", stage)).toBe("KSampler");
  });
});

describe("commands", () => {
  test("each has a label and a tooltip, is in the menu, and has a key", () => {
    const ids = commands.map((command) => command.id);
    expect(commands.every((command) => command.label && command.tooltip)).toBe(true);
    expect(menuCommands).toEqual([{ path: ["qmove"], commands: ids }]);
    expect(keybindings.map((binding) => binding.commandId)).toEqual(ids);
    expect(new Set(keybindings.map((binding) => JSON.stringify(binding.combo))).size).toBe(ids.length);
  });

  test("park all parks all", async () => {
    api.answers["/qmove/park"] = { report: "Parked." };
    await commands[0].function();
    expect(api.posted("/qmove/park")).toEqual([{ models: "all" }]);
  });

  test("free VRAM asks how much", async () => {
    api.answers["/qmove/free"] = { report: "Freed." };
    app.extensionManager.dialog = { prompt: vi.fn().mockResolvedValue("3,5") };
    await commands[1].function();
    expect(api.posted("/qmove/free")).toEqual([{ gib: 3.5 }]);
  });

  test("free VRAM does nothing when the question is closed", async () => {
    app.extensionManager.dialog = { prompt: vi.fn().mockResolvedValue(null) };
    await commands[1].function();
    expect(api.posted("/qmove/free")).toEqual([]);
    expect(app.toasts).toEqual([]);
  });

  test("free VRAM takes the last figure where the frontend cannot ask", async () => {
    api.answers["/qmove/free"] = { report: "Freed." };
    await actions.freeVram(2);
    await commands[1].function();
    expect(api.posted("/qmove/free")).toEqual([{ gib: 2 }, { gib: 2 }]);
  });
});

describe("toasts", () => {
  test("what was done is not told to who wants no notifications; what failed is", async () => {
    app.settings.values.set("qmove.notifications", false);
    api.answers["/qmove/park"] = { report: "Parked." };
    await actions.parkAll();
    expect(app.toasts).toEqual([]);
    api.answers["/qmove/park"] = () => Response.json({ error: "too little RAM" }, { status: 409 });
    await actions.parkAll();
    expect(app.toasts).toEqual([expect.objectContaining({ severity: "error", detail: "too little RAM" })]);
  });

  test("a cancelled move is no failure", async () => {
    api.answers["/qmove/park"] = () => Response.json({ error: "cancelled", cancelled: true }, { status: 409 });
    await actions.parkAll();
    expect(app.toasts.map((toast) => toast.severity)).toEqual(["success"]);
  });
});
