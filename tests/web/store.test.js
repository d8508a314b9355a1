import { beforeEach, describe, expect, test, vi } from "vitest";
import { Store } from "../../web/js/store.js";
import { api } from "./fake_host/api.js";
import { model, move, run, snapshot } from "./samples.js";

/** @type {Store} */
let store;

beforeEach(() => {
  api.reset();
  api.answers = { "/qmove/state": snapshot(), "/qmove/history": { run: null } };
  store = new Store();
});

test("it loads, and then is ready", async () => {
  expect(store.status).toBe("loading");
  await store.start();
  expect([store.status, store.snapshot?.models[0].name]).toEqual(["ready", "Flux"]);
});

test("what the server says no to is told, and asking again helps", async () => {
  api.answers["/qmove/state"] = () => Response.json({ error: "out of order" }, { status: 500 });
  await store.start();
  expect([store.status, store.reason]).toEqual(["failed", "out of order"]);
  api.answers["/qmove/state"] = snapshot();
  await store.refresh();
  expect([store.status, store.reason]).toEqual(["ready", ""]);
});

test("a lost server keeps the last picture, and everything is asked for anew when it is back", async () => {
  await store.start();
  api.send("reconnecting");
  expect([store.status, store.snapshot?.models.length]).toEqual(["away", 1]);
  api.answers["/qmove/state"] = snapshot({ models: [model(), model({ id: 2 })] });
  api.send("reconnected");
  await vi.waitFor(() => expect([store.status, store.snapshot?.models.length]).toEqual(["ready", 2]));
});

test("a proxy that answers for a server that is gone does not make it a failure", async () => {
  api.answers["/qmove/state"] = () => new Response("Bad gateway", { status: 502 });
  await store.start();
  expect(store.status).toBe("away");
});

test("an answer that was overtaken by a later request is not shown", async () => {
  /** @type {((state: any) => void)[]} */
  const answers = [];
  api.answers["/qmove/state"] = () => new Promise((resolve) => answers.push(resolve));
  const first = store.start();
  const second = store.refresh();
  answers[1](snapshot({ models: [] }));
  await second;
  answers[0](snapshot());
  await first;
  expect(store.snapshot?.models).toEqual([]);
});

test("listeners are told once for all changes of a frame", async () => {
  await store.start();
  const told = vi.fn();
  store.subscribe(told);
  await vi.waitFor(() => expect(told).toHaveBeenCalledTimes(1)); // of the start
  for (let done = 0; done < 5; done += 1) api.send("qmove.move", move({ done }));
  await vi.waitFor(() => expect(told).toHaveBeenCalledTimes(2));
  expect(store.moves.get(7)?.done).toBe(4);
});

describe("moves", () => {
  beforeEach(() => store.start());

  test("one that has ended is among the past ones, the newest first and not too many", () => {
    for (let id = 1; id <= 10; id += 1) {
      api.send("qmove.move", move({ id }));
      api.send("qmove.move", move({ id, state: "done" }));
    }
    expect(store.moves.size).toBe(0);
    expect(store.past.map((past) => past.id)).toEqual([10, 9, 8, 7, 6, 5]);
  });

  test("a snapshot ends those that it does not know, and does not set others back", () => {
    api.send("qmove.move", move({ id: 1, done: 10 }));
    api.send("qmove.move", move({ id: 2, done: 20 }));
    api.send("qmove.state", snapshot({ moves: [move({ id: 2, done: 5 }), move({ id: 3, done: 1 })] }));
    expect([...store.moves.values()].map(({ id, done }) => [id, done])).toEqual([
      [2, 20],
      [3, 1],
    ]);
  });
});

describe("the last run", () => {
  beforeEach(() => store.start());

  test("points are put together", () => {
    api.send("qmove.history", run({ from: 0, times: [0], used: { "cuda:0": [1] }, parked: [0], running: true }));
    api.send("qmove.history", run({ from: 1, times: [1, 2], used: { "cuda:0": [2, 3] }, parked: [0, 4] }));
    expect(store.run).toMatchObject({ times: [0, 1, 2], used: { "cuda:0": [1, 2, 3] }, parked: [0, 0, 4], running: false });
  });

  test.each([
    ["a gap", { from: 3 }],
    ["another run", { id: 2, from: 1 }],
    ["points that have changed", { revision: 1, from: 1 }],
  ])("after %s the whole run is asked for", async (_what, parts) => {
    api.send("qmove.history", run({ from: 0, times: [0], used: { "cuda:0": [1] }, parked: [0] }));
    api.answers["/qmove/history"] = { run: run({ id: 9 }) };
    api.send("qmove.history", run({ times: [5], used: { "cuda:0": [5] }, parked: [0], ...parts }));
    await vi.waitFor(() => expect(store.run?.id).toBe(9));
  });
});
