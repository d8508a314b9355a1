/** The list of models, each with where it is, with Park and Restore, and with its pin. */

import * as actions from "./actions.js";
import { make, reconcile, setAttribute, setText } from "./dom.js";
import { bytes } from "./format.js";
import { colorOf } from "./memory.js";
import { texts } from "./texts.js";

/** @typedef {import("./types").ModelEntry & {pins: string[]}} ModelEntry what can be chosen as its pin goes with it */

/**
 * @param {HTMLElement} list
 * @param {import("./types").Snapshot} snapshot
 * @param {Iterable<import("./types").Move>} moves that run now
 */
export function updateModels(list, { models, pins }, moves) {
  const verbs = new Map([...moves].map((move) => [move.model, move.verb]));
  const marked = models.map((model) => {
    const verb = verbs.get(model.id);
    return verb ? { ...model, pins, state: /** @type {const} */ ("busy"), busy: verb } : { ...model, pins };
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
      button("qmove-restore", () => actions.restore([model.id])),
      pinChoice(model)
    )
  );
}

/** @param {ModelEntry} model */
function pinChoice(model) {
  /** @param {Event} event */
  const change = async (event) => {
    const select = /** @type {HTMLSelectElement} */ (event.currentTarget);
    const done = await actions.pin([model.id], select.value);
    if (!done) select.value = select.dataset.pin ?? "";
  };
  return make("select", { class: "qmove-pin", "data-testid": "qmove-pin", change });
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
  const [park, restore, pin] = /** @type {HTMLElement[]} */ ([...buttons.children]);
  setText(park, words.park);
  setAttribute(park, "aria-label", words.parkLabel(model.name));
  setAttribute(park, "aria-disabled", String(model.state === "busy" || isEmpty(model.resident) || model.pin !== "unpin"));
  setText(restore, words.restore);
  setAttribute(restore, "aria-label", words.restoreLabel(model.name));
  setAttribute(restore, "aria-disabled", String(model.state === "busy" || isEmpty(model.parked)));
  updatePin(/** @type {HTMLSelectElement} */ (pin), model);
}

/**
 * @param {HTMLSelectElement} select
 * @param {ModelEntry} model
 */
function updatePin(select, { name, pin, pins }) {
  const words = texts();
  /** @param {string} choice */
  const create = (choice) => make("option", { value: choice });
  /** @param {HTMLElement} option @param {string} choice */
  const update = (option, choice) => setText(option, words.pins[choice] ?? words.keptOn(choice));
  reconcile(select, pins, (choice) => choice, create, update);
  setAttribute(select, "aria-label", words.pinLabel(name));
  if (select.dataset.pin === pin) return; // what is being chosen is not taken back meanwhile
  select.dataset.pin = pin;
  select.value = pin;
}

/** @param {ModelEntry} model */
function whereabouts(model) {
  const words = texts();
  const state = model.busy ? words.moving[model.busy] : words.states[model.state];
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
