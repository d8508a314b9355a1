/** The chip in the top bar: "VRAM 18.2/24 · 3 parked", live, with a menu; and the line under it after a run. */

import { app } from "../../../scripts/app.js";
import * as actions from "./actions.js";
import { make, setAttribute, setText } from "./dom.js";
import { bytes, gib } from "./format.js";
import * as notify from "./notify.js";
import { AUTO_PARK, CHIP } from "./setting_ids.js";
import { inOneLine } from "./summary.js";
import { texts } from "./texts.js";

const SECONDS_OF_LINE = 20;

export class Chip {
  /**
   * @param {import("./store.js").Store} store
   * @param {() => unknown} openPanel
   */
  constructor(store, openPanel) {
    this._store = store;
    this._openPanel = openPanel;
    this._used = make("span", { class: "qmove-chip-used" });
    this._figures = make("span", {});
    this._button = make(
      "button",
      {
        type: "button",
        class: "qmove-chip",
        "data-testid": "qmove-chip",
        "aria-haspopup": "menu",
        click: openPanel,
        contextmenu: (event) => this._openMenu(event),
      },
      this._used,
      this._figures
    );
    this._line = make("button", {
      type: "button",
      class: "qmove-chip-line",
      "data-testid": "qmove-chip-line",
      hidden: true,
      click: () => {
        this._hideLine();
        openPanel();
      },
    });
    this._said = make("span", { class: "qmove-unseen", role: "status", "aria-live": "polite" });
    this.element = make("div", { class: "qmove-chip-place" }, this._button, this._said);
    /** @type {HTMLElement | null} */
    this._menu = null;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this._timer = undefined;
  }

  /** Puts it into the top bar, where this frontend has one that can be added to. */
  start() {
    const group = app.menu?.settingsGroup?.element;
    if (!group) return;
    group.before(this.element);
    document.body.append(this._line); // older frontends clip what hangs out of the top bar
    this._store.subscribe(() => this.update());
    this._store.follow(({ summary }) => summary && this._sayLine(inOneLine(summary)));
    document.addEventListener("pointerdown", (event) => {
      if (!this._menu?.contains(/** @type {Node} */ (event.target))) this._closeMenu();
    });
    this.update();
  }

  update() {
    const { snapshot, status, moves, failures } = this._store;
    this.element.hidden = app.extensionManager.setting.get(CHIP) === false;
    const words = texts();
    const device = snapshot && fullest(snapshot.devices);
    if (!snapshot || !device) {
      setText(this._figures, snapshot ? words.vram : `${words.vram} …`);
      setAttribute(this._button, "aria-label", words.panelTooltip);
      return;
    }
    const used = device.total - device.free;
    const parked = snapshot.models.filter((model) => Object.keys(model.parked).length > 0).length;
    const text = `${words.vram} ${gib(used)}/${gib(device.total)}`;
    setText(this._figures, parked ? `${text} · ${words.countParked(parked)}` : text);
    this._used.style.width = `${(100 * used) / device.total}%`;
    setAttribute(this._button, "data-state", status !== "ready" ? "away" : failures.length ? "failed" : moves.size ? "moving" : "ready");
    const all = snapshot.devices.filter((each) => each.total !== null && each.free !== null);
    const about = all.map((each) => words.inUse(each.name, bytes(Number(each.total) - Number(each.free)), bytes(Number(each.total))));
    const moving = [...moves.values()].map((move) => `${words.moving[move.verb]} ${move.name}`);
    setAttribute(this._button, "title", [...about, ...moving, words.chipTip].join("\n"));
    setAttribute(this._button, "aria-label", [`${text} GiB`, parked ? words.countParked(parked) : "", words.panelTooltip].filter(Boolean).join(", "));
  }

  /** @param {string} line */
  _sayLine(line) {
    if (!notify.wanted()) return;
    if (this.element.hidden || !this.element.isConnected) {
      notify.info(line);
      return;
    }
    setText(this._line, line);
    setText(this._said, line);
    this._line.hidden = false;
    const { right, bottom } = this._button.getBoundingClientRect();
    this._line.style.right = `${Math.max(4, innerWidth - right)}px`;
    this._line.style.top = `${bottom + 6}px`;
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this._hideLine(), SECONDS_OF_LINE * 1000);
  }

  _hideLine() {
    clearTimeout(this._timer);
    this._line.hidden = true;
  }

  /** @param {MouseEvent} event */
  _openMenu(event) {
    event.preventDefault();
    event.stopPropagation();
    this._closeMenu();
    const words = texts();
    const { setting, command } = app.extensionManager;
    const isOn = setting.get(AUTO_PARK) !== false;
    const items = [
      this._item(words.autoPark, () => setting.set(AUTO_PARK, !isOn), { role: "menuitemcheckbox", "aria-checked": String(isOn) }),
      this._item(words.parkAll, () => actions.parkAll()),
      this._item(words.release, () => actions.release()),
      this._item(words.takeBack, () => actions.takeBack()),
      this._item(words.openPanel, this._openPanel),
      this._item(words.settings, () => command.execute("Comfy.ShowSettingsDialog")),
      this._item(words.hideChip, () => setting.set(CHIP, false)),
    ];
    /** @param {KeyboardEvent} pressed */
    const keydown = (pressed) => this._press(pressed, items);
    this._menu = make("div", { class: "qmove-menu", role: "menu", "data-testid": "qmove-chip-menu", "aria-label": words.vram, keydown }, ...items);
    document.body.append(this._menu);
    const { left, bottom } = this._button.getBoundingClientRect();
    this._menu.style.left = `${Math.max(4, Math.min(left, innerWidth - this._menu.offsetWidth - 4))}px`;
    this._menu.style.top = `${bottom + 4}px`;
    items[0].focus();
  }

  /**
   * @param {string} label
   * @param {() => unknown} act
   * @param {Record<string, string>} [attributes]
   */
  _item(label, act, attributes = { role: "menuitem" }) {
    const click = () => {
      this._closeMenu();
      this._button.focus();
      act();
    };
    return make("button", { type: "button", class: "qmove-menu-item", tabindex: "-1", ...attributes, click }, label);
  }

  /**
   * @param {KeyboardEvent} event
   * @param {HTMLElement[]} items
   */
  _press(event, items) {
    const at = items.indexOf(/** @type {HTMLElement} */ (document.activeElement));
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
    if (event.key === "Escape" || event.key === "Tab") {
      this._closeMenu();
      this._button.focus();
    } else if (next !== undefined) {
      items[(next + items.length) % items.length].focus();
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  _closeMenu() {
    this._menu?.remove();
    this._menu = null;
  }
}

/**
 * @param {import("./types").Device[]} devices
 * @returns {{name: string, total: number, free: number} | null} the one with the largest share in use, of those that say it
 */
function fullest(devices) {
  const share = (/** @type {any} */ device) => 1 - device.free / device.total;
  const known = /** @type {any[]} */ (devices.filter((device) => device.total && device.free !== null));
  return known.reduce((best, device) => (best === null || share(device) > share(best) ? device : best), null);
}
