/** What buttons, menus and commands do: ask the backend, and say what came of it. */

import { app } from "../../../scripts/app.js";
import * as notify from "./notify.js";
import * as server from "./server.js";
import { texts } from "./texts.js";

/** @typedef {import("./server.js").Target} Target */

const DEFAULT_GIB = 8;
export const LEAST_GIB = 0.1;
export const MOST_GIB = 1024; // what the route takes

/** How many GiB "Free" is for: what the user has entered last. */
let gibToFree = DEFAULT_GIB;

export const currentGib = () => gibToFree;

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

/** @param {number} gib */
export async function freeVram(gib) {
  if (!isGib(gib)) {
    notify.failed(texts().notFreed, new Error(texts().notGib));
    return false;
  }
  gibToFree = gib;
  return act(() => server.freeVram(gib), texts().notFreed);
}

/** Asks how many GiB, where the frontend can ask, and frees them. */
export async function askAndFreeVram() {
  const prompt = app.extensionManager.dialog?.prompt;
  if (!prompt) return freeVram(gibToFree);
  const entered = await prompt({
    title: texts().freeVram,
    message: texts().howManyGib,
    defaultValue: String(gibToFree),
  });
  return entered === null ? false : freeVram(Number(entered.replace(",", ".")));
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
 * @returns {Promise<boolean>} whether it was done, or will be
 */
async function act(request, otherwise) {
  try {
    notify.done(await request());
    return true;
  } catch (error) {
    const failure = /** @type {server.ServerError} */ (error);
    if (failure.cancelled) {
      notify.done(texts().cancelled);
    } else {
      notify.failed(otherwise, failure);
    }
    return false;
  }
}
