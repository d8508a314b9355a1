/** Talks to qmove's routes in the running ComfyUI. */

import { api } from "../../../scripts/api.js";

/**
 * @typedef {import("./types").Snapshot} Snapshot
 * @typedef {import("./types").Run} Run
 * @typedef {import("./types").SettingValue} SettingValue
 * @typedef {number[] | "all" | {node: string, class: string, workflow?: string}} Target models by id, all of them, or those of a node
 */

/** The server said no, or could not be reached (then `status` is 0). The message is its reason, if it gave one. */
export class ServerError extends Error {
  /**
   * @param {number} status
   * @param {string} reason
   * @param {boolean} [cancelled]
   * @param {string} [advice] what helps: a key of the texts
   */
  constructor(status, reason, cancelled = false, advice = "") {
    super(reason);
    this.name = "ServerError";
    this.status = status;
    this.cancelled = cancelled;
    this.advice = advice;
  }

  get isAway() {
    return this.status === 0;
  }
}

/** @returns {Promise<Snapshot>} */
export const getState = () => ask("/qmove/state");

/** @returns {Promise<Run | null>} */
export const getLastRun = async () => (await ask("/qmove/history")).run;

/** @returns {Promise<Record<string, SettingValue>>} */
export const getSettings = () => ask("/qmove/settings");

/**
 * @param {Record<string, SettingValue>} changes
 * @returns {Promise<Record<string, SettingValue>>} all settings
 */
export const postSettings = (changes) => ask("/qmove/settings", changes);

/**
 * @param {Target} target
 * @returns {Promise<string>} what was done
 */
export const park = async (target) => (await ask("/qmove/park", bodyOf(target))).report;

/**
 * @param {Target} target
 * @returns {Promise<string>} what was done
 */
export const restore = async (target) => (await ask("/qmove/restore", bodyOf(target))).report;

/**
 * @param {Target} target
 * @param {string} pin one of the snapshot's `pins`
 * @returns {Promise<string>} what was done
 */
export const pin = async (target, pin) => (await ask("/qmove/pin", { ...bodyOf(target), pin })).report;

/**
 * @param {number} gib
 * @returns {Promise<string>} what was done
 */
export const freeVram = async (gib) => (await ask("/qmove/free", { gib })).report;

/**
 * Has ComfyUI unload one of its own models.
 *
 * @param {number} model
 * @returns {Promise<string>} what was done
 */
export const unload = async (model) => (await ask("/qmove/unload", { comfyui_models: [model] })).report;

/** Gives all VRAM to other programs. @returns {Promise<string>} what was done */
export const release = async () => (await ask("/qmove/release", {})).report;

/** Begins to bring home what the last run used. @returns {Promise<string>} what has begun */
export const takeBack = async () => (await ask("/qmove/take_back", {})).report;

/** @param {number} move */
export const cancel = (move) => ask("/qmove/cancel", { move });

/** @param {Target} target */
function bodyOf(target) {
  return target === "all" || Array.isArray(target) ? { models: target } : target;
}

/**
 * @param {string} path
 * @param {object} [body] sent as JSON with POST; without it this is a GET
 * @returns {Promise<any>}
 */
async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await api.fetchApi(path, options);
  } catch (error) {
    throw new ServerError(0, String(/** @type {Error} */ (error).message ?? error));
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok || answer === null) {
    // A proxy in front of a server that is away answers for it.
    const away = [502, 503, 504].includes(response.status);
    throw new ServerError(away ? 0 : response.status, answer?.error ?? `HTTP ${response.status}`, answer?.cancelled, answer?.advice);
  }
  return answer;
}
