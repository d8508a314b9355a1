/** Toasts. What was done is told only if the user wants notifications; what failed is always told. */

import { app } from "../../../scripts/app.js";
import { make } from "./dom.js";
import { NOTIFICATIONS } from "./setting_ids.js";
import { texts } from "./texts.js";

const SHORT = 4000; // milliseconds
const LONG = 10000;
const MOST_OFFERS = 2; // toasts with a button at once

export const wanted = () => app.extensionManager.setting.get(NOTIFICATIONS) !== false;

/** @param {string} report one line for each thing that was done */
export function done(report) {
  if (!wanted()) return;
  app.extensionManager.toast.add({ severity: "success", summary: "qmove", detail: report, life: SHORT });
}

/**
 * @param {string} what could not be done
 * @param {import("./server.js").ServerError | Error} error
 */
export function failed(what, error) {
  app.extensionManager.toast.add({ severity: "error", summary: what, detail: reasonOf(error), life: LONG });
}

/**
 * What was done, but less than was asked for.
 *
 * @param {string} what
 * @param {import("./server.js").ServerError | Error} error
 */
export function lacking(what, error) {
  app.extensionManager.toast.add({ severity: "warn", summary: what, detail: reasonOf(error), life: LONG });
}

/** @param {string} message */
export function info(message) {
  app.extensionManager.toast.add({ severity: "info", summary: "qmove", detail: message, life: SHORT });
}

/**
 * A toast that stays until it is closed, with a button for what helps: ComfyUI's own have none.
 *
 * @param {import("./failures.js").Told} told
 */
export function offer({ title, lines, offer }) {
  const words = texts();
  const close = () => toast.remove();
  const act = offer && make("button", { type: "button", class: "qmove-button qmove-main", "data-testid": "qmove-toast-act",
    click: () => { close(); offer.act(); } }, offer.label);
  const toast = make(
    "div",
    { class: "qmove-toast", role: "alert", "data-testid": "qmove-toast" },
    make("strong", {}, title),
    ...lines.filter(Boolean).map((line) => make("p", {}, line)),
    make("div", { class: "qmove-buttons" }, act,
      make("button", { type: "button", class: "qmove-button", "data-testid": "qmove-toast-close", click: close }, words.close))
  );
  const place = document.querySelector(".qmove-toasts") ?? document.body.appendChild(make("div", { class: "qmove-toasts" }));
  place.append(toast);
  while (place.children.length > MOST_OFFERS) place.firstElementChild?.remove();
}

/** @param {import("./server.js").ServerError | Error} error */
function reasonOf(error) {
  if ("isAway" in error && error.isAway) return texts().serverAway;
  const help = "advice" in error ? texts().advice[error.advice] : undefined;
  return help ? `${error.message} ${help}` : error.message;
}
