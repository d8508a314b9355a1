import { beforeEach, describe, expect, test, vi } from "vitest";
import * as actions from "../../web/js/actions.js";
import { commands, keybindings, menuCommands, use } from "../../web/js/commands.js";
import { nodeTitle } from "../../web/js/graph.js";
import { nodeMenuItems } from "../../web/js/node_menu.js";
import { Store } from "../../web/js/store.js";
import { api } from "./fake_host/api.js";
import { app, graphOf } from "./fake_host/app.js";
import { snapshot, stage } from "./samples.js";

/** @type {Store} */
let store;

beforeEach(async () => {
  api.reset();
  app.reset();
  api.answers = { "/qmove/state": snapshot(), "/qmove/history": { run: null } };
  store = new Store();
  await store.start();
});

/** What the backend tells of a node. @param {object} [parts] */
const menu = (parts = {}) => ({
  ...{ node: "5", class: "LoadIt", title: "My loader", workflow: "w1", can: ["park", "pin", "restore", "unpin"] },
  ...parts,
});

/** @param {any[]} menus */
const know = (...menus) => api.send("qmove.state", snapshot({ menus }));

/** @param {any[]} nodes @param {string} [id] @param {any} [subgraphs] */
const open = (nodes, id = "w1", subgraphs = undefined) => (app.rootGraph = Object.assign(graphOf(nodes, subgraphs), { id }));

/** @param {any} node */
const labels = (node) => nodeMenuItems(node, store).map((item) => item?.content ?? null);

describe("the menu of a node", () => {
  const node = { id: 5, comfyClass: "LoadIt", title: "My loader" };

  test("with a model offers to park, restore, pin and unpin it", async () => {
    for (const route of ["park", "restore", "pin"]) api.answers[`/qmove/${route}`] = { report: "Done." };
    open([node]);
    know(menu());
    const [separator, ...items] = nodeMenuItems(/** @type {any} */ (node), store);
    expect(separator).toBeNull();
    for (const item of items) item?.callback();
    await vi.waitFor(() => expect(app.toasts).toHaveLength(4));
    const target = { node: "5", class: "LoadIt", workflow: "w1" };
    expect(api.posted("/qmove/park")).toEqual([target]);
    expect(api.posted("/qmove/restore")).toEqual([target]);
    expect(api.posted("/qmove/pin")).toEqual([{ ...target, pin: "pin" }, { ...target, pin: "unpin" }]);
  });

  test.each([
    [["park", "pin"], ["Park this model now (unload to RAM)", "Pin this model"]],
    [["restore", "unpin"], ["Restore this model (load back)", "Unpin this model"]],
  ])("offers only what can be done: %s", (can, offered) => {
    open([node]);
    know(menu({ can }));
    expect(labels(node)).toEqual([null, ...offered]);
  });

  test.each([
    ["of another workflow with the same id", { workflow: "w2" }],
    ["of another class with the same id", { class: "Other" }],
    ["of which nothing can be moved", { can: [] }],
  ])("%s has no entries", (_what, parts) => {
    open([node]);
    know(menu(parts));
    expect(labels(node)).toEqual([]);
  });

  test("of a workflow that nobody named is offered by its class", () => {
    open([node]);
    know(menu({ workflow: null }));
    expect(labels(node)).toHaveLength(5);
  });

  test("of a node in a subgraph is found by the nodes around it", () => {
    const inner = { id: 6, comfyClass: "LoadIt" };
    const subgraph = graphOf([inner]);
    open([{ id: 3, subgraph, title: "Group" }], "w1", new Map([["x", subgraph]]));
    know(menu({ node: "3:6" }));
    expect(labels(inner)).toHaveLength(5);
  });

  test("of a node whose subgraph is used twice says nothing, as nobody knows which is meant", () => {
    const inner = { id: 6, comfyClass: "LoadIt" };
    const subgraph = graphOf([inner]);
    open([{ id: 3, subgraph }, { id: 4, subgraph }], "w1", new Map([["x", subgraph]]));
    know(menu({ node: "3:6" }));
    expect(labels(inner)).toEqual([]);
  });

  test("without a model has no entries", () => {
    const note = { id: 9, comfyClass: "Note" };
    open([note]);
    know(menu());
    expect(labels(note)).toEqual([]);
  });
});

describe("the title of a node", () => {
  const named = stage({ node: "5", class: "KSampler", title: "KSampler" });

  test("is what the user calls it now, where its workflow is open", () => {
    open([{ id: 5, title: "Refine", comfyClass: "KSampler" }]);
    expect(nodeTitle(named)).toBe("Refine");
  });

  test.each([
    ["the same class", "KSampler"],
    ["another class", "Note"],
  ])("is not that of another workflow's node with the same id and %s", (_what, comfyClass) => {
    open([{ id: 5, title: "My note", comfyClass }], "w2");
    expect(nodeTitle(named)).toBe("KSampler");
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

  test("free VRAM offers half of the largest card, and less than asked for is no success", async () => {
    use(store);
    const prompt = vi.fn().mockResolvedValue("30");
    app.extensionManager.dialog = { prompt };
    api.answers["/qmove/free"] = () => Response.json({ error: "cuda:0: 20 GiB are free." }, { status: 409 });
    await commands[1].function();
    expect(prompt.mock.calls[0][0].defaultValue).toBe("12");
    expect(app.toasts).toEqual([
      expect.objectContaining({ severity: "warn", summary: "Less VRAM is free than asked for", detail: "cuda:0: 20 GiB are free." }),
    ]);
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

  test("a refusal says what helps", async () => {
    api.answers["/qmove/park"] = () => Response.json({ error: "Parking needs more RAM.", advice: "ram" }, { status: 409 });
    await actions.parkAll();
    expect(app.toasts[0].detail).toBe(
      "Parking needs more RAM. Close other programs, let models go that stay loaded, or raise the RAM limit in the settings."
    );
  });

  test("a cancelled move is no failure", async () => {
    api.answers["/qmove/park"] = () => Response.json({ error: "cancelled", cancelled: true }, { status: 409 });
    await actions.parkAll();
    expect(app.toasts.map((toast) => toast.severity)).toEqual(["success"]);
  });
});
