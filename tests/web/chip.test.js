import { beforeEach, describe, expect, test, vi } from "vitest";
import { Chip } from "../../web/js/chip.js";
import { Store } from "../../web/js/store.js";
import { api } from "./fake_host/api.js";
import { app } from "./fake_host/app.js";
import { failure, GIB, model, move, parkedModel, run, snapshot } from "./samples.js";

/** @type {Store} */
let store;
/** @type {Chip} */
let chip;
const openPanel = vi.fn();

/** @param {string} id @returns {any} */
const part = (id) => document.querySelector(`[data-testid="qmove-${id}"]`);

/** @param {any} state */
function send(state) {
  api.send("qmove.state", state);
  chip.update();
}

beforeEach(async () => {
  api.reset();
  app.reset();
  openPanel.mockClear();
  document.body.replaceChildren();
  const element = document.body.appendChild(document.createElement("div"));
  app.menu = { settingsGroup: { element } };
  api.answers = { "/qmove/state": snapshot(), "/qmove/history": { run: null } };
  store = new Store();
  chip = new Chip(store, openPanel);
  chip.start();
  await store.start();
  chip.update();
});

test("it says what is in use and how many models are parked, live", () => {
  expect(part("chip").textContent).toBe("VRAM 8/24");
  const [device] = snapshot().devices;
  send(snapshot({ models: [parkedModel(), parkedModel({ id: 2 }), model({ id: 3 })], devices: [{ ...device, free: 5.8 * GIB }] }));
  expect(part("chip").textContent).toBe("VRAM 18.2/24 · 2 parked");
  expect(part("chip").getAttribute("aria-label")).toContain("VRAM 18.2/24 GiB, 2 parked");
});

test("of several GPUs it shows the one with the least left, and names all", () => {
  const gpu = (/** @type {string} */ name, /** @type {number} */ free) => ({ name, title: name, total: 24 * GIB, free: free * GIB });
  send(snapshot({ devices: [gpu("cuda:0", 20), gpu("cuda:1", 3), { name: "mps", title: "mps", total: null, free: null }] }));
  expect(part("chip").textContent).toBe("VRAM 21/24");
  expect(part("chip").title).toContain("cuda:0: 4.0 GiB of 24.0 GiB in use");
  expect(part("chip").title).toContain("cuda:1: 21.0 GiB of 24.0 GiB in use");
});

test("it shows that something moves, that something failed, and that the server is away", () => {
  api.send("qmove.move", move());
  chip.update();
  expect([part("chip").dataset.state, part("chip").title.includes("Parking Flux")]).toEqual(["moving", true]);
  api.send("qmove.failure", failure());
  chip.update();
  expect(part("chip").dataset.state).toBe("failed");
  api.send("reconnecting");
  chip.update();
  expect(part("chip").dataset.state).toBe("away");
});

test("a click opens the panel", () => {
  part("chip").click();
  expect(openPanel).toHaveBeenCalledOnce();
});

describe("its menu", () => {
  beforeEach(() => {
    app.settings.add({ id: "qmove.autoPark", defaultValue: true });
    part("chip").dispatchEvent(new MouseEvent("contextmenu", { cancelable: true }));
  });
  const items = () => [...part("chip-menu").children];

  test("has the switch, park all and the settings", async () => {
    api.answers["/qmove/park"] = { report: "Parked." };
    expect(items()[0].getAttribute("aria-checked")).toBe("true");
    items()[0].click();
    expect([app.settings.get("qmove.autoPark"), part("chip-menu")]).toEqual([false, null]);
    part("chip").dispatchEvent(new MouseEvent("contextmenu"));
    expect(items()[0].getAttribute("aria-checked")).toBe("false");
    items().find((item) => item.textContent === "Park all (unload to RAM)").click();
    await vi.waitFor(() => expect(api.posted("/qmove/park")).toEqual([{ models: "all" }]));
    part("chip").dispatchEvent(new MouseEvent("contextmenu"));
    items().find((item) => item.textContent === "Settings…").click();
    expect(app.executed).toEqual(["Comfy.ShowSettingsDialog"]);
  });

  test("can be used with keys", () => {
    const press = (/** @type {string} */ key) => part("chip-menu").dispatchEvent(new KeyboardEvent("keydown", { key }));
    expect(document.activeElement).toBe(items()[0]);
    press("ArrowDown");
    expect(document.activeElement).toBe(items()[1]);
    press("Home");
    press("ArrowUp");
    expect(document.activeElement).toBe(items().at(-1));
    press("Escape");
    expect([part("chip-menu"), document.activeElement]).toEqual([null, part("chip")]);
  });

  test("can hide the chip, and the setting brings it back", async () => {
    items().at(-1).click();
    chip.update();
    expect(chip.element.hidden).toBe(true);
    await app.settings.set("qmove.chip", true);
    chip.update();
    expect(chip.element.hidden).toBe(false);
  });
});

describe("after a run", () => {
  const summary = { device: "cuda:0", used: 23 * GIB, wanted: 61 * GIB, models: ["Flux", "T5"], seconds: 3.1 };
  const line = "Ran in 23.0 GiB instead of 61.0 GiB: 2 models stepped aside for 3.1 s";

  test("one line under it says once what was gained, and opens the panel", () => {
    api.send("qmove.history", run({ summary }));
    expect([part("chip-line").hidden, part("chip-line").textContent]).toEqual([false, line]);
    part("chip-line").click();
    expect([part("chip-line").hidden, openPanel.mock.calls.length]).toEqual([true, 1]);
    api.send("qmove.history", run({ summary }));
    expect(part("chip-line").hidden).toBe(true);
  });

  test("nothing is said of a run that gained nothing, or to who wants no notifications", () => {
    api.send("qmove.history", run());
    expect(part("chip-line").hidden).toBe(true);
    app.settings.values.set("qmove.notifications", false);
    api.send("qmove.history", run({ id: 2, summary }));
    expect(part("chip-line").hidden).toBe(true);
  });

  test("it is a toast where the chip is hidden", () => {
    app.settings.values.set("qmove.chip", false);
    chip.update();
    api.send("qmove.history", run({ summary }));
    expect(app.toasts.map((toast) => toast.detail)).toEqual([line]);
  });
});

test("a frontend without that bar has no chip, and nothing fails", () => {
  app.menu = undefined;
  document.body.replaceChildren();
  new Chip(store, openPanel).start();
  expect(part("chip")).toBeNull();
});
