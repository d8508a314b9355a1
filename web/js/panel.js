/** The panel in the sidebar: what lies where, what moves, and the last run. It shows the store and changes nothing itself. */

import { app } from "../../../scripts/app.js";
import * as actions from "./actions.js";
import { make, reconcile, setAttribute, setText } from "./dom.js";
import * as failures from "./failures.js";
import { bytes, duration } from "./format.js";
import { updateBars } from "./panel_bars.js";
import { Chart } from "./panel_chart.js";
import { button, ModelList } from "./panel_models.js";
import { updatePastMoves, updateRunningMoves, whatHappened } from "./panel_moves.js";
import { AUTO_PARK } from "./setting_ids.js";
import { inOneLine } from "./summary.js";
import { texts } from "./texts.js";

const BETWEEN_CLOCKS = 30_000; // milliseconds; "used 3 min ago" grows older

export class Panel {
  /**
   * @param {HTMLElement} container
   * @param {import("./store.js").Store} store
   */
  constructor(container, store) {
    this._store = store;
    this._parts = build(store);
    container.append(this._parts.root);
    this._chart = new Chart(this._parts.lastRun);
    this._announced = store.past[0]?.id ?? 0;
    this._unsubscribe = store.subscribe(() => this.update());
    this._clock = setInterval(() => this.update(), BETWEEN_CLOCKS);
    this.update();
  }

  /** @param {HTMLElement} container */
  isIn(container) {
    return container.contains(this._parts.root);
  }

  update() {
    const { status, snapshot, reason } = this._store;
    const { root, loading, error, errorText, retry, content } = this._parts;
    const words = texts();
    setAttribute(root, "data-status", status);
    setAttribute(root, "aria-label", words.panelTitle);
    setText(this._parts.title, words.panelTitle);
    loading.hidden = status !== "loading";
    setText(loading, words.loading);
    error.hidden = status !== "failed" && status !== "away";
    setText(errorText, status === "away" ? words.away : status === "failed" ? `${words.failed} ${reason}` : "");
    setText(retry, words.retry);
    retry.hidden = status !== "failed" && snapshot !== null; // what is away comes back by itself
    content.hidden = snapshot === null;
    setAttribute(content, "inert", status !== "ready");
    if (snapshot !== null) this._updateContent(snapshot);
  }

  destroy() {
    this._unsubscribe();
    clearInterval(this._clock);
    this._chart.destroy();
    this._parts.root.remove();
  }

  /** @param {import("./types").Snapshot} snapshot */
  _updateContent(snapshot) {
    const parts = this._parts;
    const words = texts();
    for (const [element, key] of parts.labels) setText(element, /** @type {string} */ (words[key]));
    const autoPark = app.extensionManager.setting.get(AUTO_PARK) !== false;
    parts.autoPark.checked = autoPark;
    setText(parts.autoParkHint, autoPark ? words.autoParkOn : words.autoParkOff);
    setAttribute(parts.gib, "aria-label", words.gibField);
    setAttribute(parts.gib, "title", words.gibField);
    this._updateNow();
    updateBars(parts.bars, snapshot);
    parts.noGpu.hidden = snapshot.devices.some((device) => device.total !== null);
    const pool = snapshot.pool;
    parts.pool.hidden = !pool?.limit;
    setText(parts.pool, pool ? aboutPool(pool) : "");
    parts.models.update(snapshot, this._store.moves.values());
    parts.empty.hidden = snapshot.models.length + snapshot.comfyui_models.length > 0;
    if (document.activeElement !== parts.gib && !parts.gib.dataset.entered) {
      parts.gib.value = String(actions.gibToFree(snapshot));
    }
    const canPark = snapshot.models.some((model) => Object.keys(model.resident).length > 0);
    setAttribute(parts.parkAll, "aria-disabled", String(!canPark));
    for (const [element, tip] of parts.tips) setAttribute(element, "title", /** @type {string} */ (words[tip]));
    this._chart.update(this._store.run);
    parts.past.hidden = this._store.past.length === 0;
    updatePastMoves(parts.pastList, this._store.past);
    this._announce();
  }

  /**
   * What moves now, always in the same place; else what the last run has gained, or what moved last. And what went wrong.
   */
  _updateNow() {
    const { past, moves, run } = this._store;
    const words = texts();
    const parts = this._parts;
    updateRunningMoves(parts.running, moves.values());
    const summary = run && !run.running ? run.summary : null;
    parts.idle.hidden = moves.size > 0;
    setText(parts.idle, summary ? inOneLine(summary) : past[0] ? whatHappened(past[0]) : words.nothingMoves);
    setAttribute(parts.idle, "data-summary", summary !== null && summary !== undefined);
    setAttribute(parts.idle, "title", summary ? words.steppedAside(summary.models.join(", ")) : null);
    reconcile(
      parts.failures,
      this._store.failures,
      (failure) => String(failure.id),
      createFailure,
      updateFailure
    );
  }

  /** Says to screen readers what has moved. */
  _announce() {
    const last = this._store.past[0];
    if (last && last.id !== this._announced) {
      this._announced = last.id;
      setText(this._parts.live, whatHappened(last));
    }
  }
}

/** @param {import("./types").PoolFigures} pool */
function aboutPool(pool) {
  const words = texts();
  const saved = words.loadsSaved(String(pool.hits), duration(pool.seconds_saved), String(pool.misses));
  return words.stayLoaded(String(pool.models), bytes(pool.in_ram), bytes(pool.limit), saved);
}

/** @param {import("./types").Failure} failure */
function createFailure(failure) {
  const act = button("qmove-failure-act", () => failures.tell(failure).offer?.act());
  act.classList.add("qmove-main");
  return make("li", { class: "qmove-notice qmove-error", "data-testid": "qmove-failure" }, make("strong"), make("ul"), act);
}

/**
 * @param {HTMLElement} element
 * @param {import("./types").Failure} failure
 */
function updateFailure(element, failure) {
  const { title, lines, offer } = failures.tell(failure);
  const [strong, list, act] = /** @type {HTMLElement[]} */ ([...element.children]);
  setText(strong, title);
  reconcile(
    list,
    lines,
    (line) => line,
    () => make("li", { class: "qmove-hint" }),
    setText
  );
  act.hidden = offer === null;
  setText(act, offer?.label ?? "");
}

/** @param {import("./store.js").Store} store */
function build(store) {
  /** Texts that do not vary, set anew when the language changes. @type {[HTMLElement, keyof import("./texts.js").Texts][]} */
  const labels = [];
  /**
   * @template {HTMLElement} Labelled
   * @param {Labelled} element
   * @param {keyof import("./texts.js").Texts} key
   */
  const labelled = (element, key) => {
    labels.push([element, key]);
    return element;
  };
  const heading = (/** @type {keyof import("./texts.js").Texts} */ key) => labelled(make("h3"), key);

  const title = make("h2");
  const live = make("div", { class: "qmove-unseen", role: "status", "aria-live": "polite", "data-testid": "qmove-status" });
  const loading = make("p", { class: "qmove-notice", role: "status", "data-testid": "qmove-loading" });
  const errorText = make("span");
  const retry = button("qmove-retry", () => store.refresh());
  const error = make("div", { class: "qmove-notice qmove-error", role: "alert", "data-testid": "qmove-error" }, errorText, retry);

  const autoPark = make("input", {
    type: "checkbox",
    role: "switch",
    id: "qmove-auto-park",
    "aria-describedby": "qmove-auto-park-hint",
    "data-testid": "qmove-auto-park",
    change: () => app.extensionManager.setting.set(AUTO_PARK, autoPark.checked),
  });
  const autoParkHint = make("p", { class: "qmove-hint", id: "qmove-auto-park-hint" });
  const autoParkRow = make(
    "div",
    { class: "qmove-switch" },
    autoPark,
    labelled(make("label", { for: "qmove-auto-park" }), "autoPark")
  );

  const running = make("ul", { class: "qmove-moves" });
  const idle = make("p", { class: "qmove-idle", "data-testid": "qmove-line" });
  const now = make("div", { class: "qmove-now" }, running, idle);
  const failed = make("ul", { class: "qmove-failures" });
  const bars = make("ul", { class: "qmove-memories" });
  const pool = make("p", { class: "qmove-hint", "data-testid": "qmove-pool" });
  const noGpu = labelled(make("p", { class: "qmove-hint" }), "noGpu");

  const models = new ModelList();
  /** Explanations, set anew when the language changes. @type {[HTMLElement, keyof import("./texts.js").Texts][]} */
  const tips = [];
  /**
   * @param {HTMLElement} element
   * @param {keyof import("./texts.js").Texts} key
   */
  const explained = (element, key) => {
    tips.push([element, key]);
    return element;
  };
  const empty = make(
    "div",
    { class: "qmove-notice", "data-testid": "qmove-empty" },
    labelled(make("strong"), "empty"),
    labelled(make("p", { class: "qmove-hint" }), "emptyHint")
  );
  const parkAll = explained(
    labelled(
      button("qmove-park-all", () => actions.parkAll()),
      "parkAll"
    ),
    "parkAllTip"
  );
  const release = explained(
    labelled(
      button("qmove-release", () => actions.release()),
      "release"
    ),
    "releaseTip"
  );
  const takeBack = explained(
    labelled(
      button("qmove-take-back", () => actions.takeBack()),
      "takeBack"
    ),
    "takeBackTip"
  );
  const gib = make("input", {
    type: "number",
    min: actions.LEAST_GIB,
    max: actions.MOST_GIB,
    step: "any",
    value: actions.gibToFree(store.snapshot),
    "data-testid": "qmove-free-gib",
    input: () => (gib.dataset.entered = "yes"),
  });
  const free = explained(
    labelled(make("button", { type: "submit", class: "qmove-button", "data-testid": "qmove-free" }), "freeButton"),
    "gibField"
  );
  /** @param {SubmitEvent} event */
  const submit = (event) => {
    event.preventDefault();
    actions.freeVram(gib.valueAsNumber);
  };
  const freeForm = make("form", { class: "qmove-free", submit, novalidate: true }, free, gib, make("span", {}, "GiB"));

  const lastRun = make("section", {}, heading("lastRun"));
  const pastList = make("ul", { class: "qmove-past" });
  const past = make("section", {}, heading("moves"), pastList);
  const content = make(
    "div",
    { class: "qmove-content" },
    make("section", {}, autoParkRow, autoParkHint),
    now,
    failed,
    make("section", {}, heading("memory"), bars, pool, noGpu),
    make(
      "section",
      {},
      heading("models"),
      make("div", { class: "qmove-toolbar" }, parkAll, freeForm, release, takeBack),
      models.element,
      empty
    ),
    lastRun,
    past
  );
  const root = make(
    "div",
    { class: "qmove-panel", role: "region", "data-testid": "qmove-panel" },
    title,
    live,
    loading,
    error,
    content
  );
  return {
    ...{ root, title, live, loading, error, errorText, retry, content, labels },
    ...{ autoPark, autoParkHint, running, idle, failures: failed, bars, pool, noGpu, models, empty, parkAll, gib, tips },
    ...{ lastRun, past, pastList },
  };
}
