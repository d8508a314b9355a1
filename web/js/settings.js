/**
 * qmove's settings in ComfyUI's dialog, and their agreement with the running backend.
 *
 * The backend is the truth: a change counts once it has taken it; one that it refuses, or cannot be told of, is taken back. It tells
 * all tabs of each change. ComfyUI stores the values for the next start.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import * as notify from "./notify.js";
import * as server from "./server.js";
import { AUTO_PARK, CHIP, NOTIFICATIONS } from "./setting_ids.js";
import { texts } from "./texts.js";

/** @typedef {import("./types").SettingValue} SettingValue */

/** A number field. @param {number} max @param {number} step */
const number = (max, step) => ({ min: 0, max, step, minFractionDigits: 0, maxFractionDigits: 1, showButtons: true });

/** @param {number} max */
const gib = (max) => number(max, 0.5);

/** What 0 means in a number field: a key of the texts. qmove.css shows it instead of the 0 while the field is not edited. */
const ZEROS = /** @type {const} */ (["automatic", "none", "never"]);

const PARKING = "Unload and offload idle models from VRAM and GPU memory";
const LOADED = "Models that stay loaded in memory";
const COPIES = "RAM for models unloaded from VRAM";
const SHOWN = "What is shown of VRAM and GPU memory";

/** What the dialog shows, in this order. The locales have the translations of names, tooltips and options. */
const DEFINITIONS = [
  {
    id: AUTO_PARK,
    name: "Unload idle models from VRAM automatically (auto-parking)",
    type: "boolean",
    defaultValue: true,
    group: PARKING,
    tooltip:
      "Models that stand idle are parked (unloaded to RAM) when another node needs the VRAM, and are loaded back before they are " +
      "used. Costs RAM for what is parked, and the time of the copies.",
  },
  {
    id: "qmove.autoParkWhen",
    name: "When to unload idle models",
    type: "combo",
    defaultValue: "needed",
    options: [
      { text: "When needed", value: "needed" },
      { text: "At each stage", value: "stage" },
    ],
    group: PARKING,
    tooltip:
      "When needed: only what a node lacks is freed, so little is copied. At each stage: everything that a node does not use " +
      "is parked before it; leaves the most VRAM, costs the most copies.",
  },
  {
    id: "qmove.vramToKeepFree",
    name: "VRAM to keep free for other programs (GiB)",
    type: "number",
    defaultValue: 0,
    attrs: gib(1024),
    group: PARKING,
    tooltip:
      "So much VRAM of each GPU is left to other programs: auto-parking parks idle models until it is free. " +
      "Costs more copies the higher it is. Holds from the next node on.",
  },
  {
    id: "qmove.idleMinutes",
    name: "Free all VRAM after idle minutes",
    type: "number",
    defaultValue: 0,
    attrs: number(10080, 1),
    group: PARKING,
    tooltip:
      "When nothing was used for so many minutes, all VRAM goes back to the system, for other programs and to save power. " +
      "Costs a copy out, and one home when the models are used again.",
  },
  {
    id: "qmove.runAgain",
    name: "Run a node again when it was out of memory",
    type: "boolean",
    defaultValue: true,
    group: PARKING,
    tooltip:
      "A node that ran out of VRAM while idle models could make room runs once more by itself. Nodes that save or show " +
      "something never do. Costs the time of its first try.",
  },
  {
    id: "qmove.keepLoaded",
    name: "Keep models loaded between workflows",
    type: "boolean",
    defaultValue: true,
    group: LOADED,
    tooltip:
      "A model whose workflow is left stays in RAM, and comes back where its loader is asked for again with the same inputs " +
      "and the same files, instead of being loaded from disk. Needs auto-parking. Costs RAM up to the limit below.",
  },
  {
    id: "qmove.keepLoadedLimit",
    name: "RAM for models that stay loaded (GiB)",
    type: "number",
    defaultValue: 0,
    attrs: gib(65536),
    group: LOADED,
    tooltip:
      "The most RAM that they may take; what was used longest ago and loads the quickest goes first. Automatic: half of the RAM. " +
      "Costs that much RAM; less as soon as other programs need it.",
  },
  {
    id: "qmove.keepLoadedOwn",
    name: "Keep ComfyUI's own models loaded too",
    type: "boolean",
    defaultValue: false,
    group: LOADED,
    tooltip:
      "Also what ComfyUI's own loaders give (MODEL, CLIP, VAE). Costs RAM: they count with their whole size.",
  },
  {
    id: "qmove.keepMirrors",
    name: "Keep copies in RAM, so that models unload at once",
    type: "boolean",
    defaultValue: true,
    group: COPIES,
    tooltip:
      "The copy in RAM is kept after a model was loaded back, so that parking it again copies only what has changed. " +
      "Costs as much RAM as the models take VRAM; it is given back when RAM gets short.",
  },
  {
    id: "qmove.ramLimit",
    name: "RAM limit (GiB)",
    type: "number",
    defaultValue: 0,
    attrs: gib(65536),
    group: COPIES,
    tooltip:
      "The most RAM that parked models and their copies may take. Automatic: as much as the system allows. " +
      "Costs nothing; but what would not fit is not parked, and stays in VRAM.",
  },
  {
    id: "qmove.verify",
    name: "Verify models after they were loaded back",
    type: "boolean",
    defaultValue: false,
    group: COPIES,
    tooltip:
      "Compares a checksum of every weight when a model has come home, before it is used. Costs one more pass over its bytes on the " +
      "GPU for each park and restore.",
  },
  {
    id: CHIP,
    name: "Show VRAM in the top bar",
    type: "boolean",
    defaultValue: true,
    group: SHOWN,
    tooltip: "A chip that says how much VRAM is in use and how many models are parked. Costs nothing.",
  },
  {
    id: NOTIFICATIONS,
    name: "Show notifications",
    type: "boolean",
    defaultValue: true,
    group: SHOWN,
    tooltip: "Says what a button or a command has done, and what parking has gained in a run. Errors are always shown. Costs nothing.",
  },
];

/** Settings of this page only: the backend does not know them. */
const ONLY_HERE = new Set([CHIP]);

export class Settings {
  /** @param {() => void} [changed] is called as a value changes, here or in another tab */
  constructor(changed = () => {}) {
    this._tell = changed;
    /** What the backend has, as far as it has told. @type {Record<string, SettingValue>} */
    this._confirmed = {};
    /** How many changes of each setting are on their way. @type {Map<string, number>} */
    this._pending = new Map();
    /** Changes go out one after the other. @type {Promise<void>} */
    this._last = Promise.resolve();
  }

  /**
   * For `registerExtension`.
   *
   * @returns {any[]} its type knows only the ids of ComfyUI's own settings
   */
  definitions() {
    return DEFINITIONS.map(({ group, ...definition }, index) => ({
      ...definition,
      category: ["qmove", group, definition.name],
      sortOrder: DEFINITIONS.length - index, // the dialog sorts downwards
      /** @param {SettingValue} value @param {SettingValue} [before] */
      onChange: (value, before) => this._changed(definition.id, value, before),
    }));
  }

  /** Takes over what the backend has now, and follows it from here on. */
  start() {
    this.sayZeros();
    /** @type {EventTarget} */ (api).addEventListener("qmove.settings", (event) =>
      this._take(/** @type {CustomEvent} */ (event).detail)
    );
    /** @type {EventTarget} */ (api).addEventListener("reconnected", () => this.ask());
    return this.ask();
  }

  /** Gives the style sheet the words for 0, in the language that is set now. */
  sayZeros() {
    const { style } = document.documentElement;
    for (const key of ZEROS) {
      const word = JSON.stringify(texts()[key]);
      if (style.getPropertyValue(`--qmove-${key}`) !== word) style.setProperty(`--qmove-${key}`, word);
    }
  }

  async ask() {
    try {
      this._take(await server.getSettings());
    } catch (error) {
      console.warn("[qmove] the settings of the backend are not known:", /** @type {Error} */ (error).message);
    }
  }

  /**
   * The dialog calls this for each setting as the page loads (with nothing before), then for each change, before it stores it.
   *
   * @param {string} id
   * @param {SettingValue} value
   * @param {SettingValue} [before]
   * @returns {Promise<void> | undefined} new frontends wait for it before they store the value
   */
  _changed(id, value, before) {
    this._tell();
    if (ONLY_HERE.has(id)) return undefined;
    if (before === undefined || value === this._confirmed[id]) return undefined;
    this._pending.set(id, (this._pending.get(id) ?? 0) + 1);
    this._last = this._last.then(() => this._send(id, value, before));
    return this._last;
  }

  /**
   * @param {string} id
   * @param {SettingValue} value
   * @param {SettingValue} before
   */
  async _send(id, value, before) {
    let failure = null;
    try {
      Object.assign(this._confirmed, await server.postSettings({ [id]: value }));
    } catch (error) {
      failure = /** @type {server.ServerError} */ (error);
      this._confirmed[id] ??= before;
    }
    const left = (this._pending.get(id) ?? 1) - 1;
    this._pending.set(id, left);
    if (failure) {
      notify.failed(texts().settingNotChanged, failure);
      if (left === 0) await this._show(id, this._confirmed[id]);
    }
  }

  /** @param {Record<string, SettingValue>} values all settings of the backend */
  _take(values) {
    Object.assign(this._confirmed, values);
    for (const { id } of DEFINITIONS) {
      if (id in values && !this._pending.get(id)) void this._show(id, values[id]);
    }
  }

  /**
   * Shows a value in the dialog without telling the backend, which has it.
   *
   * @param {string} id
   * @param {SettingValue} value
   */
  async _show(id, value) {
    const { setting } = app.extensionManager;
    if (setting.get(id) === value) return;
    try {
      await setting.set(id, value);
    } catch (error) {
      // The value shows; only ComfyUI could not store it, for the same reason that was told already.
      console.warn(`[qmove] ${id} was not stored:`, /** @type {Error} */ (error).message);
    }
  }
}
