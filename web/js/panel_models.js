/** The list of models, each with where it is, and with Park and Restore. */

import * as actions from "./actions.js";
import { make, reconcile, setAttribute, setText } from "./dom.js";
import { bytes } from "./format.js";
import { colorOf } from "./memory.js";
import { texts } from "./texts.js";

/** @typedef {import("./types").ModelEntry} ModelEntry */

/**
 * @param {HTMLElement} list
 * @param {ModelEntry[]} models
 * @param {Iterable<import("./types").Move>} moves that run now
 */
export function updateModels(list, models, moves) {
  const verbs = new Map([...moves].map((move) => [move.model, move.verb]));
  const marked = models.map((model) => {
    const verb = verbs.get(model.id);
    return verb ? { ...model, state: /** @type {const} */ ("busy"), busy: verb } : model;
  });
  reconcile(list, marked, (model) => String(model.id), createRow, updateRow);
}

/** @param {ModelEntry} model */
function createRow(model) {
  return make(
    "li",
    { class: "qmove-model", "data-testid": "qmove-model-row", "data-model-id": model.id },
    make(
      "div",
      { class: "qmove-model-head" },
      make("span", { class: `qmove-swatch ${colorOf(model.id)}`, "aria-hidden": "true" }),
      make("span", { class: "qmove-name" }),
      make("span", { class: "qmove-kind" }),
      make("span", { class: "qmove-bytes" })
    ),
    make("div", { class: "qmove-model-where" }),
    make(
      "div",
      { class: "qmove-buttons" },
      button("qmove-park", () => actions.park([model.id])),
      button("qmove-restore", () => actions.restore([model.id]))
    )
  );
}

/**
 * A button that stays focusable when it has nothing to do, so that a keyboard user does not lose the place.
 *
 * @param {string} testId
 * @param {() => unknown} act
 */
export function button(testId, act) {
  /** @param {MouseEvent} event */
  const click = (event) => {
    const target = /** @type {HTMLElement} */ (event.currentTarget);
    if (target.getAttribute("aria-disabled") !== "true") act();
  };
  return make("button", { type: "button", class: "qmove-button", "data-testid": testId, click });
}

/**
 * @param {HTMLElement} row
 * @param {ModelEntry} model
 */
function updateRow(row, model) {
  const words = texts();
  const [head, where, buttons] = /** @type {HTMLElement[]} */ ([...row.children]);
  setAttribute(row, "data-state", model.state);
  setText(head.children[1], model.name);
  setAttribute(head.children[1], "title", model.name);
  setText(head.children[2], model.kind);
  setAttribute(head.children[2], "hidden", !model.kind);
  setText(head.children[3], bytes(model.nbytes));
  setText(where, whereabouts(model));
  const [park, restore] = /** @type {HTMLElement[]} */ ([...buttons.children]);
  setText(park, words.park);
  setAttribute(park, "aria-label", words.parkLabel(model.name));
  setAttribute(park, "aria-disabled", String(model.state === "busy" || isEmpty(model.resident)));
  setText(restore, words.restore);
  setAttribute(restore, "aria-label", words.restoreLabel(model.name));
  setAttribute(restore, "aria-disabled", String(model.state === "busy" || isEmpty(model.parked)));
}

/** @param {ModelEntry} model */
function whereabouts(model) {
  const words = texts();
  const state = model.busy === "park" ? words.parking : model.busy === "restore" ? words.restoring : words.states[model.state];
  const parts = [state];
  if (model.on_disk && model.state !== "on disk") parts.push(words.onDisk(bytes(model.on_disk)));
  if (model.home.length) parts.push(words.home(model.home.join(", ")));
  parts.push(model.last_used === null ? words.neverUsed : words.used(ago(Date.now() / 1000 - model.last_used)));
  if (model.place && model.place !== model.name) parts.push(words.foundAt(model.place));
  for (const other of model.same ?? []) parts.push(words.sameAs(other.name, bytes(other.nbytes)));
  return parts.join(" · ");
}

/** @param {number} seconds */
function ago(seconds) {
  const words = texts();
  if (seconds < 60) return words.secondsAgo;
  return seconds < 3600 ? words.minutesAgo(Math.floor(seconds / 60)) : words.hoursAgo(Math.floor(seconds / 3600));
}

/** @param {Record<string, number>} sizes */
const isEmpty = (sizes) => Object.keys(sizes).length === 0;
