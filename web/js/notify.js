/** Toasts. What was done is told only if the user wants notifications; what failed is always told. */

import { app } from "../../../scripts/app.js";
import { NOTIFICATIONS } from "./setting_ids.js";
import { texts } from "./texts.js";

const SHORT = 4000; // milliseconds
const LONG = 10000;

/** @param {string} report one line for each thing that was done */
export function done(report) {
  if (app.extensionManager.setting.get(NOTIFICATIONS) === false) return;
  app.extensionManager.toast.add({ severity: "success", summary: "qmove", detail: report, life: SHORT });
}

/**
 * @param {string} what could not be done
 * @param {import("./server.js").ServerError | Error} error
 */
export function failed(what, error) {
  const away = "isAway" in error && error.isAway;
  const detail = away ? texts().serverAway : error.message;
  app.extensionManager.toast.add({ severity: "error", summary: what, detail, life: LONG });
}

/** @param {string} message */
export function info(message) {
  app.extensionManager.toast.add({ severity: "info", summary: "qmove", detail: message, life: SHORT });
}
