import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { Panel } from "../../web/js/panel.js";
import { Store } from "../../web/js/store.js";
import { api } from "./fake_host/api.js";
import { app, graphOf } from "./fake_host/app.js";
import { failure, GIB, hostModel, model, move, parkedModel, run, snapshot, stage } from "./samples.js";

// It draws on a canvas, which there is none of here; the browser tests look at what it draws.
vi.mock("../../web/vendor/uplot/uPlot.esm.js", () => ({
  default: class {
    width = 300;
    setData() {}
    setSize() {}
    destroy() {}
  },
}));

/** @type {Store} */
let store;
/** @type {Panel} */
let panel;

/** @param {string} id @returns {any} */
const part = (id) => document.querySelector(`[data-testid="qmove-${id}"]`);
/** @param {string} id @returns {any[]} */
const parts = (id) => [...document.querySelectorAll(`[data-testid="qmove-${id}"]`)];
const rows = () => parts("model-row");

/** @param {any} state @param {any} [lastRun] */
async function show(state, lastRun = null) {
  api.answers = { "/qmove/state": state, "/qmove/history": { run: lastRun } };
  await store.start();
  panel.update();
}

/** @param {any} state */
function send(state) {
  api.send("qmove.state", state);
  panel.update();
}

beforeEach(() => {
  api.reset();
  app.reset();
  app.settings.add({ id: "qmove.autoPark", defaultValue: true });
  store = new Store();
  document.body.replaceChildren();
  panel = new Panel(document.body.appendChild(document.createElement("div")), store);
});

afterEach(() => panel.destroy());

describe("states", () => {
  test("while it loads it says so, and shows nothing else", () => {
    expect(part("loading").hidden).toBe(false);
    expect(document.querySelector(".qmove-content")).toHaveProperty("hidden", true);
    expect(part("error").hidden).toBe(true);
  });

  test("models that stay loaded are counted, and nothing is said where that is off", async () => {
    await show(snapshot({ pool: null }));
    expect(part("pool").hidden).toBe(true);
    const figures = { limit: 32 * GIB, models: 2, nbytes: 9 * GIB, in_ram: 6 * GIB, hits: 5, misses: 3, seconds_saved: 400 };
    send(snapshot({ pool: figures }));
    expect(part("pool").hidden).toBe(false);
    expect(part("pool").textContent).toBe(
      "Models that stay loaded between workflows: 2, with 6.0 GiB of 32.0 GiB in RAM. Loads saved: 5 (6 min 40 s); loads made: 3."
    );
    send(snapshot({ pool: { ...figures, limit: 0 } }));
    expect(part("pool").hidden).toBe(true);
  });

  test("what failed is told with the reason, and can be tried again", async () => {
    await show(() => Response.json({ error: "out of order" }, { status: 500 }));
    expect(part("error").textContent).toContain("out of order");
    api.answers["/qmove/state"] = snapshot();
    part("retry").click();
    await vi.waitFor(() => expect(store.status).toBe("ready"));
    panel.update();
    expect([part("error").hidden, rows().length]).toEqual([true, 1]);
  });

  test("while the server is away the last picture stays and cannot be used", async () => {
    await show(snapshot());
    api.send("reconnecting");
    panel.update();
    expect(part("error").textContent).toContain("not reachable");
    expect(rows()).toHaveLength(1);
    expect(document.querySelector(".qmove-content")?.hasAttribute("inert")).toBe(true);
  });

  test("without a model it says how there come to be some", async () => {
    await show(snapshot({ models: [] }));
    expect(part("empty").hidden).toBe(false);
    expect(part("park-all").getAttribute("aria-disabled")).toBe("true");
    expect(part("chart-empty").hidden).toBe(false);
  });
});

describe("models", () => {
  test("each says its name, kind, size, state and home", async () => {
    await show(snapshot({ models: [model(), parkedModel({ id: 2, name: "T5" })] }));
    expect(rows().map((row) => row.dataset.state)).toEqual(["resident", "parked"]);
    expect(rows()[0].textContent).toContain("Flux");
    expect(rows()[0].textContent).toContain("nf4");
    expect(rows()[0].textContent).toContain("6.0 GiB");
    expect(rows()[1].textContent).toContain("parked in RAM · home cuda:0");
  });

  test("each says where it was found, and which others have the same weights", async () => {
    const place = "Caption node, self.model";
    const same = [{ id: 2, name: "Flux again", nbytes: 3 * GIB }];
    await show(snapshot({ models: [model({ place, same }), model({ id: 2, name: "T5", place: "T5" })] }));
    const [first, second] = rows().map((row) => row.querySelector(".qmove-model-where").textContent);
    expect(first).toContain("found at Caption node, self.model");
    expect(first).toContain("same weights as Flux again: 3.0 GiB");
    expect(second).not.toMatch(/found at|same weights/);
    app.settings.values.set("Comfy.Locale", "ja");
    panel.update();
    expect(rows()[0].textContent).toContain("Flux again と同じ重み");
  });

  test("Park and Restore ask for that model, and only what can be done is offered", async () => {
    await show(snapshot({ models: [model(), parkedModel({ id: 2 })] }));
    api.answers["/qmove/park"] = { report: "Parked." };
    api.answers["/qmove/restore"] = { report: "Restored." };
    for (const button of [...parts("park"), ...parts("restore")]) button.click();
    await vi.waitFor(() => expect(app.toasts).toHaveLength(2));
    expect(api.posted("/qmove/park")).toEqual([{ models: [1] }]);
    expect(api.posted("/qmove/restore")).toEqual([{ models: [2] }]);
  });

  test("a row stays the same element while its model moves, so that focus stays", async () => {
    await show(snapshot({ models: [model(), model({ id: 2 })] }));
    const [first] = rows();
    parts("park")[0].focus();
    send(snapshot({ models: [parkedModel()] }));
    expect(rows()).toEqual([first]);
    expect(document.activeElement).toBe(parts("park")[0]);
  });

  test("one that moves is busy and cannot be moved meanwhile", async () => {
    await show(snapshot());
    api.send("qmove.move", move());
    panel.update();
    expect(rows()[0].dataset.state).toBe("busy");
    expect(parts("park")[0].getAttribute("aria-disabled")).toBe("true");
  });

  test("names are text, whatever they look like", async () => {
    await show(snapshot({ models: [model({ name: "<img src=x onerror=alert(1)>", kind: "<b>" })] }));
    expect(document.querySelector("img, b")).toBeNull();
    expect(rows()[0].textContent).toContain("<img src=x onerror=alert(1)>");
  });
});

describe("the list", () => {
  const names = () => rows().map((row) => row.querySelector(".qmove-name").textContent);
  /** @param {string} id @param {string} value @param {string} event */
  const enter = (id, value, event) => {
    part(id).value = value;
    part(id).dispatchEvent(new Event(event));
  };
  const three = [
    parkedModel({ id: 1, name: "b", nbytes: 9 * GIB, last_used: 3 }),
    model({ id: 2, name: "c", nbytes: 2 * GIB, last_used: 1 }),
    model({ id: 3, name: "a", nbytes: 4 * GIB, last_used: 2 }),
  ];

  test("has what is in VRAM first, and can be ordered otherwise", async () => {
    await show(snapshot({ models: three }));
    expect(names()).toEqual(["a", "c", "b"]);
    for (const [order, expected] of /** @type {[string, string[]][]} */ ([
      ["name", ["a", "b", "c"]],
      ["size", ["b", "a", "c"]],
      ["used", ["b", "a", "c"]],
    ])) {
      enter("order", order, "change");
      expect(names()).toEqual(expected);
    }
  });

  test("is searched when it has more than ten, by name, class and kind", async () => {
    const many = Array.from({ length: 12 }, (_unused, id) => model({ id, name: `model ${id}`, class: id ? "Blob" : "Sampler" }));
    await show(snapshot({ models: many.slice(0, 10) }));
    expect(part("search").hidden).toBe(true);
    send(snapshot({ models: many }));
    expect(part("search").hidden).toBe(false);
    enter("search", "MODEL 11", "input");
    expect(names()).toEqual(["model 11"]);
    enter("search", "sampler", "input");
    expect(names()).toEqual(["model 0"]);
    enter("search", "none such", "input");
    expect(names()).toEqual([]);
    expect(document.querySelector(".qmove-content")?.textContent).toContain("No model has this name.");
  });

  test("has ComfyUI's own models, marked, with their own unload", async () => {
    await show(snapshot({ models: [], comfyui_models: [hostModel(), hostModel({ id: 4, name: "VAE", resident: { "cuda:0": 0 } })] }));
    api.answers["/qmove/unload"] = { report: "Unloaded." };
    expect(part("empty").hidden).toBe(true);
    expect(rows().map((row) => row.dataset.managedBy)).toEqual(["comfyui", "comfyui"]);
    expect(rows()[0].textContent).toContain("managed by ComfyUI");
    for (const unload of parts("unload")) unload.click();
    await vi.waitFor(() => expect(app.toasts).toHaveLength(1));
    expect(api.posted("/qmove/unload")).toEqual([{ comfyui_models: [3] }]);
  });

  test("says of one whose weights were destroyed that they were", async () => {
    await show(snapshot({ models: [model({ lost: ["0.weight", "1.weight"] })] }));
    expect(rows()[0].textContent).toContain("2 weights have no bytes any more");
  });

  test("a row opens to say where its model is, and stays open", async () => {
    await show(snapshot());
    const where = () => rows()[0].querySelector(".qmove-model-where");
    expect(where().hidden).toBe(true);
    part("model-name").click();
    send(snapshot({ models: [parkedModel()] }));
    expect([where().hidden, part("model-name").getAttribute("aria-expanded")]).toEqual([false, "true"]);
  });
});

describe("what went wrong", () => {
  beforeEach(() => {
    app.rootGraph = Object.assign(graphOf([]), { id: "w1" });
  });

  test("is told with its reason and with what helps: it parks what is idle and runs again", async () => {
    await show(snapshot({ failures: [failure()] }));
    api.answers["/qmove/park"] = { report: "Parked." };
    expect(part("failure").textContent).toContain("Out of VRAM in “VAE Decode”");
    expect(part("failure").textContent).toContain("Tried to allocate 8.0 GiB.");
    expect(part("failure").textContent).toContain("Flux: 20.0 GiB");
    expect(part("failure-act").textContent).toBe("Park idle models and run again");
    part("failure-act").click();
    await vi.waitFor(() => expect(app.queued).toBe(1));
    expect(api.posted("/qmove/park")).toEqual([{ models: "all" }]);
  });

  test("with auto-parking off turns it on first, as else the next run would end in the same way", async () => {
    await app.settings.set("qmove.autoPark", false);
    await show(snapshot({ failures: [failure()] }));
    api.answers["/qmove/park"] = { report: "Parked." };
    expect(part("failure-act").textContent).toBe("Turn auto-parking on and run again");
    part("failure-act").click();
    await vi.waitFor(() => expect(app.queued).toBe(1));
    expect(app.settings.get("qmove.autoPark")).toBe(true);
  });

  test("in another workflow does not run this one", async () => {
    await show(snapshot({ failures: [failure({ stage: stage({ workflow: "w2" }) })] }));
    api.answers["/qmove/park"] = { report: "Parked." };
    expect(part("failure-act").textContent).toBe("Park idle models (unload to RAM)");
    part("failure-act").click();
    await vi.waitFor(() => expect(app.toasts).toHaveLength(1));
    expect(app.queued).toBe(0);
  });

  test("may be that another node has destroyed weights", async () => {
    await show(snapshot({ failures: [failure({ kind: "lost", devices: [], models: [{ name: "Flux", tensors: 8 }] })] }));
    expect(part("failure").textContent).toContain("Flux: 8 weights have no bytes any more");
    expect(part("failure").textContent).toContain("Load the model again");
    expect(part("failure-act").hidden).toBe(true);
  });

  test("is gone with the next run", async () => {
    await show(snapshot({ failures: [failure()] }));
    api.send("qmove.history", run({ id: 2, running: true }));
    panel.update();
    expect(part("failure")).toBeNull();
  });
});

describe("what the run has gained", () => {
  const summary = { device: "cuda:0", used: 23 * GIB, wanted: 61 * GIB, models: ["Flux", "T5"], seconds: 3.1 };

  test("is one line", async () => {
    await show(snapshot(), run({ summary }));
    expect(part("line").textContent).toBe("Ran in 23.0 GiB instead of 61.0 GiB: 2 models stepped aside for 3.1 s");
  });

  test("is not told while it runs, nor where it is nothing", async () => {
    await show(snapshot(), run());
    expect(part("line").textContent).toBe("Nothing moves.");
    api.send("qmove.history", run({ id: 2, running: true }));
    panel.update();
    expect(part("line").textContent).toBe("Nothing moves.");
  });
});

describe("pins", () => {
  /** @param {any} select @param {string} choice */
  const choose = (select, choice) => {
    select.value = choice;
    select.dispatchEvent(new Event("change"));
  };
  const choices = () => [...part("pin").options].map((option) => option.textContent);

  test("a row shows its model's pin, and what else can be chosen", async () => {
    await show(snapshot({ models: [model({ pin: "cuda:0" }), model({ id: 2, pin: "forget" }), model({ id: 3 })] }));
    expect(parts("pin").map((select) => select.value)).toEqual(["cuda:0", "forget", "unpin"]);
    expect(choices()).toEqual(["not pinned", "pinned: never parked", "kept on cuda:0", "left alone by qmove"]);
    expect(part("pin").getAttribute("aria-label")).toContain("Pin of Flux");
  });

  test("what is pinned cannot be parked here", async () => {
    await show(snapshot({ models: [model({ pin: "pin" }), model({ id: 2 })] }));
    expect(parts("park").map((button) => button.getAttribute("aria-disabled"))).toEqual(["true", "false"]);
    parts("park")[0].click();
    expect(api.posted("/qmove/park")).toEqual([]);
  });

  test("a choice is asked for, and shown until the backend says what is", async () => {
    await show(snapshot());
    api.answers["/qmove/pin"] = { report: "Pinned." };
    choose(part("pin"), "cuda:0");
    await vi.waitFor(() => expect(app.toasts).toHaveLength(1));
    expect(api.posted("/qmove/pin")).toEqual([{ models: [1], pin: "cuda:0" }]);
    send(snapshot({ models: [model({ last_used: 1 })] }));
    expect(part("pin").value).toBe("cuda:0");
    send(snapshot({ models: [model({ pin: "cuda:0" })] }));
    send(snapshot());
    expect(part("pin").value).toBe("unpin");
  });

  test("what was refused is taken back, with the reason", async () => {
    await show(snapshot());
    api.answers["/qmove/pin"] = () => Response.json({ error: "no room" }, { status: 409 });
    choose(part("pin"), "pin");
    await vi.waitFor(() => expect(part("pin").value).toBe("unpin"));
    expect(app.toasts).toEqual([expect.objectContaining({ summary: "Not pinned", detail: "no room" })]);
  });

  test("the language changes with all others", async () => {
    app.settings.add({ id: "Comfy.Locale", defaultValue: "zh" });
    await show(snapshot());
    expect(choices()).toEqual(["未固定", "已固定：从不停放", "保持在 cuda:0", "qmove 不处理"]);
  });
});

describe("moves", () => {
  beforeEach(async () => {
    await show(snapshot());
    api.send("qmove.move", move());
    panel.update();
  });

  test("one that runs shows bytes, speed and time left, also to a screen reader", () => {
    expect(part("progress-text").textContent).toBe("2.0 GiB of 6.0 GiB · 2.0 GiB/s · 2.0 s left");
    const bar = part("progress");
    expect(bar.getAttribute("role")).toBe("progressbar");
    expect([bar.getAttribute("aria-valuenow"), bar.getAttribute("aria-valuemax")]).toEqual([`${2 * GIB}`, `${6 * GIB}`]);
    expect(bar.getAttribute("aria-label")).toBe("Parking Flux");
  });

  test("Cancel asks once, and says that it does", async () => {
    api.answers["/qmove/cancel"] = { cancelled: "move" };
    part("cancel").click();
    part("cancel").click();
    await vi.waitFor(() => expect(api.posted("/qmove/cancel")).toEqual([{ move: 7 }]));
    expect(part("cancel").textContent).toBe("Cancelling…");
  });

  test("where it stops the workflow it says so", () => {
    api.send("qmove.move", move({ id: 8, cancel: "prompt" }));
    panel.update();
    const [, cancel] = parts("cancel");
    expect([cancel.textContent, cancel.getAttribute("aria-label")]).toEqual(["Stop workflow", "Stop the workflow: Parking Flux"]);
  });

  test("one that failed says why", () => {
    api.send("qmove.move", move({ state: "failed", reason: "RAM is short." }));
    panel.update();
    expect(document.querySelector(".qmove-past")?.textContent).toContain("the move failed: RAM is short.");
  });

  test("one that the host needs has no Cancel", () => {
    api.send("qmove.move", move({ cancel: null }));
    panel.update();
    expect(part("cancel").hidden).toBe(true);
  });

  test("what has moved is told to a screen reader and stays in the list, with the reason", () => {
    const done = { state: "done", done: 6 * GIB, nbytes: 6 * GIB, seconds: 3, node: "8", stage: stage({ title: "Upscale" }) };
    api.send("qmove.move", move(done));
    panel.update();
    expect(part("progress")).toBeNull();
    expect(part("status").textContent).toBe("Flux went to RAM: 6.0 GiB in 3.0 s");
    expect(document.querySelector(".qmove-past")?.textContent).toBe("Flux went to RAM: 6.0 GiB in 3.0 s (for “Upscale”)");
  });
});

describe("a node that waits for other programs", () => {
  const wait = (/** @type {object} */ parts = {}) =>
    move({ verb: "wait", name: "cuda:0", model: 0, bytes_per_second: null, seconds_left: null, node: "8", cancel: "prompt", ...parts });

  beforeEach(async () => {
    await show(snapshot());
    api.send("qmove.move", wait());
    panel.update();
  });

  test("shows how much is free of what it waits for, without a speed, and no model is busy", () => {
    expect(document.querySelector(".qmove-move-title")?.textContent).toBe("Waiting for other programs to free VRAM of cuda:0");
    expect(part("progress-text").textContent).toBe("2.0 GiB of 6.0 GiB");
    expect(rows()[0].dataset.state).toBe("resident");
  });

  test("can be cancelled", async () => {
    api.answers["/qmove/cancel"] = { cancelled: "prompt" };
    part("cancel").click();
    await vi.waitFor(() => expect(api.posted("/qmove/cancel")).toEqual([{ move: 7 }]));
  });

  test.each([
    ["done", "other programs have freed VRAM of cuda:0 after 3.0 s"],
    ["cancelled", "no longer waiting for VRAM of cuda:0"],
    ["failed", "no longer waiting for VRAM of cuda:0"],
  ])("says how it ended: %s", (state, text) => {
    api.send("qmove.move", wait({ state, seconds: 3 }));
    panel.update();
    expect(part("status").textContent).toBe(text);
  });
});

describe("controls", () => {
  beforeEach(() => show(snapshot()));

  test("the switch is the setting", async () => {
    part("auto-park").click();
    expect(app.settings.get("qmove.autoPark")).toBe(false);
    await app.settings.set("qmove.autoPark", true);
    panel.update();
    expect(part("auto-park").checked).toBe(true);
  });

  test("all VRAM is lent and taken back", async () => {
    api.answers["/qmove/release"] = { report: "Lent.", devices: [] };
    api.answers["/qmove/take_back"] = { report: "Comes home.", began: [], stays: [] };
    part("release").click();
    part("take-back").click();
    await vi.waitFor(() => expect(app.toasts.map((toast) => toast.detail)).toEqual(["Lent.", "Comes home."]));
    expect([api.posted("/qmove/release"), api.posted("/qmove/take_back")]).toEqual([[{}], [{}]]);
  });

  test("Free asks for as many GiB as the field says", async () => {
    api.answers["/qmove/free"] = { report: "Freed." };
    part("free-gib").value = "2.5";
    part("free").click();
    await vi.waitFor(() => expect(api.posted("/qmove/free")).toEqual([{ gib: 2.5 }]));
  });

  test.each(["", "0", "5000"])("Free says what to enter instead of %o", async (value) => {
    part("free-gib").value = value;
    part("free").click();
    await vi.waitFor(() => expect(app.toasts[0]?.detail).toContain("0.1 to 1024"));
    expect(api.posted("/qmove/free")).toEqual([]);
  });

  test("everything that can be pressed has a name", () => {
    for (const control of document.querySelectorAll("button, input")) {
      const label = document.querySelector(`label[for="${control.id}"]`);
      expect(control.getAttribute("aria-label") || control.textContent || label?.textContent).toBeTruthy();
    }
  });
});

test("the last run is drawn, described, and listed by stage with what was in use after it", async () => {
  await show(snapshot(), run());
  expect(part("chart").getAttribute("aria-label")).toBe(
    "VRAM over time. The most on cuda:0 was 8.0 GiB, in stage KSampler."
  );
  expect([...document.querySelectorAll(".qmove-stages li")].map((item) => item.textContent)).toEqual([
    "KSampler2.0 s · peak 9.0 GiB",
    "VAE Decode1.0 s · peak 2.0 GiB",
  ]);
});

test("another language holds at once", async () => {
  await show(snapshot());
  app.settings.values.set("Comfy.Locale", "ja");
  panel.update();
  expect(parts("park")[0].textContent).toBe("退避");
  expect(parts("park")[0].getAttribute("aria-label")).toContain("RAM へアンロード");
});
