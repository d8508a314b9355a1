/** The list of models, one line each: where it is, Park and Restore, its pin; ComfyUI's own with their own unload. */

import * as actions from "./actions.js";
import { make, reconcile, setAttribute, setText } from "./dom.js";
import { bytes } from "./format.js";
import { colorOf } from "./memory.js";
import { texts } from "./texts.js";

/**
 * @typedef {import("./types").ModelEntry & {pins: string[]}} ModelEntry what can be chosen as its pin goes with it
 * @typedef {import("./types").HostModel} HostModel
 * @typedef {"place" | "name" | "size" | "used"} Order
 */

const FEW = 10; // models; more are searched
/** @type {Order[]} */
const ORDERS = ["place", "name", "size", "used"];

export class ModelList {
  constructor() {
    const redraw = () => this._draw();
    this._order = make("select", { class: "qmove-order", "data-testid": "qmove-order", change: redraw });
    this._search = make("input", { type: "search", class: "qmove-search", "data-testid": "qmove-search", input: redraw });
    this._none = make("p", { class: "qmove-hint" });
    this._list = make("ul", { class: "qmove-models" });
    this._tools = make("div", { class: "qmove-list-tools" }, this._search, this._order);
    this.element = make("div", {}, this._tools, this._list, this._none);
    /** @type {import("./types").Snapshot | null} */
    this._snapshot = null;
    /** @type {import("./types").Move[]} */
    this._moves = [];
  }

  /**
   * @param {import("./types").Snapshot} snapshot
   * @param {Iterable<import("./types").Move>} moves that run now
   */
  update(snapshot, moves) {
    this._snapshot = snapshot;
    this._moves = [...moves];
    this._draw();
  }

  _draw() {
    if (!this._snapshot) return;
    const words = texts();
    const { models, comfyui_models: own, pins } = this._snapshot;
    const count = models.length + own.length;
    this._tools.hidden = count < 2;
    this._search.hidden = count <= FEW;
    setAttribute(this._search, "placeholder", words.search);
    setAttribute(this._search, "aria-label", words.search);
    setAttribute(this._order, "aria-label", words.orderLabel);
    reconcile(
      this._order,
      ORDERS,
      (order) => order,
      (order) => make("option", { value: order }),
      (option, order) => setText(option, words.orders[order])
    );
    const verbs = new Map(this._moves.map((move) => [move.model, move.verb]));
    const ours = models.map((model) => {
      const verb = verbs.get(model.id);
      return verb ? { ...model, pins, state: /** @type {const} */ ("busy"), busy: verb } : { ...model, pins };
    });
    const wanted = this._search.hidden ? "" : this._search.value.trim().toLowerCase();
    const fits = (/** @type {{name: string, class?: string, kind?: string}} */ model) =>
      [model.name, model.class, model.kind].some((text) => text?.toLowerCase().includes(wanted));
    const rows = [...ours.map(rowOf), ...own.map(rowOfHost)].filter((row) => fits(row.model));
    const order = /** @type {Order} */ (this._order.value || "place");
    rows.sort((one, other) => compare(order, one, other));
    reconcile(
      this._list,
      rows,
      (row) => row.key,
      (row) => row.create(),
      (element, row) => row.update(element)
    );
    this._none.hidden = rows.length > 0 || count === 0;
    setText(this._none, words.noneFound);
  }
}

/**
 * @typedef {{
 *   key: string, model: any, name: string, nbytes: number, away: boolean, used: number,
 *   create: () => HTMLElement, update: (element: HTMLElement) => void,
 * }} Row
 */

/** @param {ModelEntry} model @returns {Row} */
function rowOf(model) {
  const away = isEmpty(model.resident) && model.busy !== "restore";
  const { name, nbytes } = model;
  return {
    ...{ key: String(model.id), model, name, nbytes, away, used: model.last_used ?? 0 },
    create: () => createRow(model),
    update: (element) => updateRow(element, model),
  };
}

/** @param {HostModel} model @returns {Row} */
function rowOfHost(model) {
  const { name, nbytes } = model;
  const away = !Object.values(model.resident).some(Boolean);
  return {
    ...{ key: `comfyui-${model.id}`, model, name, nbytes, away, used: 0 },
    create: () => createHostRow(model),
    update: (element) => updateHostRow(element, model),
  };
}

/** What is in VRAM comes first, whatever the order; what is equal keeps its place. @param {Order} order @param {Row} one @param {Row} other */
function compare(order, one, other) {
  if (order === "name") return one.name.localeCompare(other.name);
  if (order === "size") return other.nbytes - one.nbytes;
  if (order === "used") return other.used - one.used;
  return Number(one.away) - Number(other.away) || other.nbytes - one.nbytes;
}

/**
 * @param {string} key
 * @param {Record<string, any>} attributes
 * @param {string} color
 * @param {HTMLElement[]} buttons
 */
function line(key, attributes, color, buttons) {
  const details = make("div", { class: "qmove-model-where", id: `qmove-about-${key}`, hidden: true });
  /** @param {MouseEvent} event */
  const toggle = (event) => {
    details.hidden = !details.hidden;
    setAttribute(/** @type {HTMLElement} */ (event.currentTarget), "aria-expanded", String(!details.hidden));
  };
  return make(
    "li",
    { class: "qmove-model", "data-testid": "qmove-model-row", ...attributes },
    make(
      "div",
      { class: "qmove-model-head" },
      make("span", { class: `qmove-swatch ${color}`, "aria-hidden": "true" }),
      make(
        "button",
        { type: "button", class: "qmove-model-name", "aria-expanded": "false", "aria-controls": details.id,
          "data-testid": "qmove-model-name", click: toggle },
        make("span", { class: "qmove-name" })
      ),
      make("span", { class: "qmove-kind" }),
      make("span", { class: "qmove-bytes" }),
      make("span", { class: "qmove-row-buttons" }, ...buttons)
    ),
    details
  );
}

/** @param {ModelEntry} model */
function createRow(model) {
  return line(String(model.id), { "data-model-id": model.id }, colorOf(model.id), [
    button("qmove-park", () => actions.park([model.id]), "pi-arrow-down"),
    button("qmove-restore", () => actions.restore([model.id]), "pi-arrow-up"),
    pinChoice(model),
  ]);
}

/** @param {HostModel} model */
function createHostRow(model) {
  return line(`comfyui-${model.id}`, { "data-managed-by": "comfyui" }, "qmove-color-host", [
    button("qmove-unload", () => actions.unload(model.id), "pi-times"),
  ]);
}

/** @param {ModelEntry} model */
function pinChoice(model) {
  /** @param {Event} event */
  const change = async (event) => {
    const select = /** @type {HTMLSelectElement} */ (event.currentTarget);
    const done = await actions.pin([model.id], select.value);
    if (!done) select.value = select.dataset.pin ?? "";
  };
  return make("span", { class: "qmove-pin-place" }, make("select", { class: "qmove-pin", "data-testid": "qmove-pin", change }));
}

/**
 * A button that stays focusable when it has nothing to do, so that a keyboard user does not lose the place.
 *
 * @param {string} testId
 * @param {() => unknown} act
 * @param {string} [icon] of PrimeIcons; the words are hidden where there is little room
 */
export function button(testId, act, icon) {
  /** @param {MouseEvent} event */
  const click = (event) => {
    const target = /** @type {HTMLElement} */ (event.currentTarget);
    if (target.getAttribute("aria-disabled") !== "true") act();
  };
  const attributes = { type: "button", class: "qmove-button", "data-testid": testId, click };
  if (!icon) return make("button", attributes);
  return make("button", attributes, make("i", { class: `pi ${icon}`, "aria-hidden": "true" }), make("span", { class: "qmove-word" }));
}

/**
 * @param {HTMLElement} element
 * @param {string} word that is seen
 * @param {string} label that explains it
 * @param {boolean} canAct
 */
function updateButton(element, word, label, canAct) {
  setText(/** @type {HTMLElement} */ (element.lastElementChild), word);
  setAttribute(element, "aria-label", label);
  setAttribute(element, "title", label);
  setAttribute(element, "aria-disabled", String(!canAct));
}

/**
 * @param {HTMLElement} row
 * @param {{name: string, kind: string, nbytes: number, state: string, about: string}} shown
 * @returns {HTMLElement[]} its buttons
 */
function updateLine(row, { name, kind, nbytes, state, about }) {
  const [head, details] = /** @type {HTMLElement[]} */ ([...row.children]);
  setAttribute(row, "data-state", state);
  const [, name_, kind_, bytes_, buttons] = /** @type {HTMLElement[]} */ ([...head.children]);
  setText(name_.children[0], name);
  setAttribute(name_, "title", `${name} · ${bytes(nbytes)} · ${about}`);
  setText(kind_, kind);
  setAttribute(kind_, "hidden", !kind);
  setText(bytes_, bytes(nbytes));
  setText(details, about);
  return /** @type {HTMLElement[]} */ ([...buttons.children]);
}

/**
 * @param {HTMLElement} row
 * @param {ModelEntry} model
 */
function updateRow(row, model) {
  const words = texts();
  const [park, restore, pin] = updateLine(row, { ...model, about: whereabouts(model) });
  const canPark = model.state !== "busy" && !isEmpty(model.resident) && model.pin === "unpin";
  updateButton(park, words.park, words.parkLabel(model.name), canPark);
  updateButton(restore, words.restore, words.restoreLabel(model.name), model.state !== "busy" && !isEmpty(model.parked));
  updatePin(/** @type {HTMLSelectElement} */ (pin.children[0]), model);
}

/**
 * @param {HTMLElement} row
 * @param {HostModel} model
 */
function updateHostRow(row, model) {
  const words = texts();
  const loaded = Object.values(model.resident).reduce((sum, nbytes) => sum + nbytes, 0);
  const about = [words.ownNote, loaded < model.nbytes ? words.loadedOf(bytes(loaded), bytes(model.nbytes)) : null, model.device];
  const [unload] = updateLine(row, {
    name: model.name,
    kind: "ComfyUI",
    nbytes: model.nbytes,
    state: loaded ? "resident" : "in RAM",
    about: [...about, model.class].filter(Boolean).join(" · "),
  });
  updateButton(unload, words.unload, words.unloadLabel(model.name), loaded > 0);
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
  setAttribute(select, "title", `${words.pinLabel(name)}: ${words.pins[pin] ?? words.keptOn(pin)}`);
  setAttribute(select, "data-pinned", pin !== "unpin");
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
  parts.push(...[model.kind, model.class ?? ""].filter(Boolean));
  if (model.place && model.place !== model.name) parts.push(words.foundAt(model.place));
  for (const other of model.same ?? []) parts.push(words.sameAs(other.name, bytes(other.nbytes)));
  if (model.lost?.length) parts.push(words.lostTensors(model.name, model.lost.length));
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
