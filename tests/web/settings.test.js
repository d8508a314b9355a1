import { beforeEach, describe, expect, test, vi } from "vitest";
import { Settings } from "../../web/js/settings.js";
import { api } from "./fake_host/api.js";
import { app } from "./fake_host/app.js";

const PATH = "/qmove/settings";
const LIMIT = "qmove.ramLimit";

/** The backend: what it has, as its route answers. @type {Record<string, any>} */
let backend;
/** @type {Settings} */
let settings;

/** @param {any} body */
function take(body) {
  if (body === undefined) return { ...backend };
  Object.assign(backend, body);
  return { ...backend };
}

/** @param {string} reason */
const refuse = (reason) => () => Response.json({ error: reason }, { status: 400 });

beforeEach(async () => {
  api.reset();
  app.reset();
  vi.spyOn(console, "warn").mockImplementation(() => {});
  settings = new Settings();
  backend = Object.fromEntries(settings.definitions().map((definition) => [definition.id, definition.defaultValue]));
  api.answers[PATH] = take;
  for (const definition of settings.definitions()) app.settings.add(definition);
  await settings.start();
});

/** Lets everything that was queued happen. */
const settled = () => vi.waitFor(() => expect([...settings._pending.values()].some(Boolean)).toBe(false));

describe.each([
  ["a new frontend", false],
  ["an old frontend", true],
])("in %s", (_name, isOld) => {
  beforeEach(() => {
    app.settings.isOld = isOld;
  });

  test("as the page loads nothing is sent", () => {
    expect(api.posted(PATH)).toEqual([]);
  });

  test("a change reaches the backend once and is stored", async () => {
    await app.settings.set(LIMIT, 8);
    await settled();
    expect(api.posted(PATH)).toEqual([{ [LIMIT]: 8 }]);
    expect(backend[LIMIT]).toBe(8);
    expect(app.settings.stored).toEqual([[LIMIT, 8]]);
    expect(app.toasts).toEqual([]);
  });

  test("what the backend refuses is told with the reason and the old value is back", async () => {
    await app.settings.set(LIMIT, 8);
    await settled();
    api.answers[PATH] = refuse("not so much");
    await app.settings.set(LIMIT, 9);
    await settled();
    await vi.waitFor(() => expect(app.settings.get(LIMIT)).toBe(8));
    expect(app.toasts).toEqual([expect.objectContaining({ severity: "error", detail: "not so much" })]);
    expect(app.settings.stored.at(-1)).toEqual([LIMIT, 8]);
    expect(api.posted(PATH)).toEqual([{ [LIMIT]: 8 }, { [LIMIT]: 9 }]); // the way back is not sent
  });

  test("while the server is away the old value is back, also if it cannot be stored", async () => {
    api.away = true;
    app.settings.storeFails = true;
    await app.settings.set(LIMIT, 8).catch(() => {});
    await settled();
    await vi.waitFor(() => expect(app.settings.get(LIMIT)).toBe(0));
    expect(app.toasts).toEqual([expect.objectContaining({ severity: "error", detail: "ComfyUI is not reachable." })]);
  });

  test("another tab's change shows and is not sent back", async () => {
    backend[LIMIT] = 5;
    api.send("qmove.settings", { ...backend });
    await vi.waitFor(() => expect(app.settings.get(LIMIT)).toBe(5));
    await settled();
    expect(api.posted(PATH)).toEqual([]);
  });

  test("of two quick changes the last one wins, everywhere", async () => {
    void app.settings.set(LIMIT, 3);
    void app.settings.set(LIMIT, 4);
    await settled();
    expect(api.posted(PATH).map((body) => body[LIMIT])).toEqual([3, 4]);
    expect([backend[LIMIT], app.settings.get(LIMIT)]).toEqual([4, 4]);
  });

  test("the echo of an earlier change does not undo a later one that is on its way", async () => {
    /** @type {(value?: any) => void} */
    let answer = () => {};
    api.answers[PATH] = async (/** @type {any} */ body) => {
      await new Promise((resolve) => (answer = resolve));
      return take(body);
    };
    void app.settings.set(LIMIT, 3);
    await vi.waitFor(() => expect(api.posted(PATH)).toHaveLength(1));
    void app.settings.set(LIMIT, 4);
    answer();
    await vi.waitFor(() => expect(api.posted(PATH)).toHaveLength(2));
    api.send("qmove.settings", { ...backend }); // says 3
    await Promise.resolve();
    expect(app.settings.get(LIMIT)).toBe(4);
    answer();
    await settled();
    expect([backend[LIMIT], app.settings.get(LIMIT)]).toEqual([4, 4]);
  });
});

test("what the backend has holds when the page loads and when the server is back", async () => {
  backend[LIMIT] = 2;
  await settings.ask();
  expect(app.settings.get(LIMIT)).toBe(2);
  backend[LIMIT] = 6;
  api.send("reconnected");
  await vi.waitFor(() => expect(app.settings.get(LIMIT)).toBe(6));
  expect(api.posted(PATH)).toEqual([]);
});

test("the words that people search for find the settings", () => {
  const words = settings.definitions().map(({ name, category }) => [name, ...category].join(" ").toLowerCase());
  for (const wanted of ["vram", "gpu", "memory", "offload", "unload"]) {
    expect(words.filter((text) => text.includes(wanted)).length, wanted).toBeGreaterThan(3);
  }
});

test("the chip is a setting of the page: the backend is not asked", async () => {
  await app.settings.set("qmove.chip", false);
  expect(api.posted(PATH)).toEqual([]);
  expect(app.settings.get("qmove.chip")).toBe(false);
});

test("the style sheet has the words that are shown instead of 0, in the language that is set", () => {
  const word = (/** @type {string} */ name) => document.documentElement.style.getPropertyValue(`--qmove-${name}`);
  expect(["automatic", "none", "never"].map(word)).toEqual(['"automatic"', '"none"', '"never"']);
  app.settings.values.set("Comfy.Locale", "ja");
  settings.sayZeros();
  expect(word("automatic")).toBe('"自動"');
});

test("whoever shows a setting hears at once of a change, here and in another tab", async () => {
  const told = vi.fn();
  const others = new Settings(told);
  for (const definition of others.definitions()) app.settings.add(definition);
  await others.start();
  told.mockClear();
  await app.settings.set("qmove.autoPark", false);
  expect(told).toHaveBeenCalled();
  told.mockClear();
  api.send("qmove.settings", { ...backend, "qmove.autoPark": true });
  await vi.waitFor(() => expect(told).toHaveBeenCalled());
});

test("each setting has its place, a tooltip and a default", () => {
  const definitions = settings.definitions();
  expect(definitions.map((definition) => definition.id)).toEqual([
    "qmove.autoPark",
    "qmove.autoParkWhen",
    "qmove.vramToKeepFree",
    "qmove.idleMinutes",
    "qmove.runAgain",
    "qmove.keepLoaded",
    "qmove.keepLoadedLimit",
    "qmove.keepLoadedOwn",
    "qmove.keepMirrors",
    "qmove.ramLimit",
    "qmove.verify",
    "qmove.chip",
    "qmove.notifications",
  ]);
  for (const definition of definitions) {
    expect(definition.category[0]).toBe("qmove");
    expect(definition.tooltip).toMatch(/costs/i);
    expect(definition.defaultValue).toBeDefined();
  }
});
