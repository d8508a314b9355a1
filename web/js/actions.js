/** What buttons, menus and commands do: ask the backend, and say what came of it. */

import { app } from "../../../scripts/app.js";
import * as notify from "./notify.js";
import * as server from "./server.js";
import { AUTO_PARK } from "./setting_ids.js";
import { texts } from "./texts.js";

/** @typedef {import("./server.js").Target} Target */

export const LEAST_GIB = 0.1;
export const MOST_GIB = 1024; // what the route takes

/** How many GiB are to be free: what the user has entered last. @type {number | null} */
let entered = null;

/**
 * How many GiB "Free" offers: what was entered last, else half of the largest GPU.
 *
 * @param {import("./types").Snapshot | null} snapshot
 */
export function gibToFree(snapshot) {
  if (entered !== null) return entered;
  const largest = Math.max(0, ...(snapshot?.devices ?? []).map((device) => device.total ?? 0)) / 2 ** 30;
  const half = largest >= 4 ? Math.round(largest / 2) : Math.round(largest * 5) / 10;
  return Math.max(half, LEAST_GIB);
}

/** @param {Target} target */
export const park = (target) => act(() => server.park(target), texts().notParked);

/** @param {Target} target */
export const restore = (target) => act(() => server.restore(target), texts().notRestored);

/**
 * @param {Target} target
 * @param {string} pin "pin", "unpin", "forget", or the device to keep it on
 */
export const pin = (target, pin) => act(() => server.pin(target, pin), texts().notPinned);

export const parkAll = () => park("all");

/** @param {number} model one of ComfyUI's own */
export const unload = (model) => act(() => server.unload(model), texts().notUnloaded);

export const release = () => act(() => server.release(), texts().notReleased);

export const takeBack = () => act(() => server.takeBack(), texts().notRestored);

/** For a run that lacked VRAM: parks what is idle, and queues the workflow that is open once more. */
export async function parkAllAndRun() {
  if (await parkAll()) await app.queuePrompt(0);
}

/** The same where idle models do not leave by themselves: from now on they do. */
export async function turnOnAndRun() {
  await app.extensionManager.setting.set(AUTO_PARK, true);
  await parkAllAndRun();
}

/** @param {number} gib that are to be free on each GPU */
export async function freeVram(gib) {
  if (!isGib(gib)) {
    notify.failed(texts().notFreed, new Error(texts().notGib));
    return false;
  }
  entered = gib;
  return act(() => server.freeVram(gib), texts().lessFreed, notify.lacking);
}

/**
 * Asks how many GiB, where the frontend can ask, and frees them.
 *
 * @param {import("./types").Snapshot | null} snapshot
 */
export async function askAndFreeVram(snapshot) {
  const prompt = app.extensionManager.dialog?.prompt;
  if (!prompt) return freeVram(gibToFree(snapshot));
  const answer = await prompt({
    title: texts().freeVram,
    message: texts().howManyGib,
    defaultValue: String(gibToFree(snapshot)),
  });
  return answer === null ? false : freeVram(Number(answer.replace(",", ".")));
}

/** @param {number} move */
export async function cancel(move) {
  try {
    await server.cancel(move);
    return true;
  } catch (error) {
    const failure = /** @type {server.ServerError} */ (error);
    if (failure.status === 409) return false; // it ended just before
    notify.failed(texts().notCancelled, failure);
    return false;
  }
}

/** @param {number} gib */
export const isGib = (gib) => Number.isFinite(gib) && gib >= LEAST_GIB && gib <= MOST_GIB;

/**
 * @param {() => Promise<string>} request
 * @param {string} otherwise says what failed
 * @param {typeof notify.failed} [tell] how a refusal is told
 * @returns {Promise<boolean>} whether it was done, or will be
 */
async function act(request, otherwise, tell = notify.failed) {
  try {
    notify.done(await request());
    return true;
  } catch (error) {
    const failure = /** @type {server.ServerError} */ (error);
    if (failure.cancelled) {
      notify.done(texts().cancelled);
    } else {
      (failure.status === 409 ? tell : notify.failed)(otherwise, failure);
    }
    return false;
  }
}
