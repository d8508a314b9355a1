/**
 * What the browser knows of the backend: one picture for the panel, the menus and the commands, kept up to date by events.
 *
 * Nothing is polled. After a lost connection everything is asked for anew.
 */

import { api } from "../../../scripts/api.js";
import * as server from "./server.js";

/**
 * @typedef {import("./types").Snapshot} Snapshot
 * @typedef {import("./types").Run} Run
 * @typedef {import("./types").Move} Move
 * @typedef {import("./types").Failure} Failure
 * @typedef {{failure?: Failure, move?: Move, summary?: import("./types").Summary}} Happened
 * @typedef {"loading" | "ready" | "failed" | "away"} Status
 */

const MOST_PAST_MOVES = 6;

export class Store {
  constructor() {
    /** @type {Status} */
    this.status = "loading";
    /** Why it failed. */
    this.reason = "";
    /** @type {Snapshot | null} */
    this.snapshot = null;
    /** @type {Run | null} */
    this.run = null;
    /** Moves that run now, by id. @type {Map<number, Move>} */
    this.moves = new Map();
    /** The last moves that have ended, the newest first. @type {Move[]} */
    this.past = [];
    /** What went wrong in the last run, the newest last. @type {Failure[]} */
    this.failures = [];
    /** @type {Set<() => void>} */
    this._listeners = new Set();
    /** @type {Set<(happened: Happened) => void>} */
    this._followers = new Set();
    /** The run whose end was told. */
    this._told = 0;
    this._asked = 0;
    this._scheduled = false;
  }

  /** Starts to follow the backend, and asks for the first picture. */
  start() {
    listen("qmove.state", (snapshot) => this._takeSnapshot(snapshot));
    listen("qmove.move", (move) => this._takeMove(move));
    listen("qmove.history", (run) => this._takePoints(run));
    listen("qmove.failure", (failure) => this._takeFailure(failure));
    listen("reconnecting", () => {
      this.status = "away";
      this._tell();
    });
    listen("reconnected", () => this.refresh());
    return this.refresh();
  }

  /** Asks for everything anew. */
  async refresh() {
    const asked = ++this._asked;
    if (!this.snapshot) this.status = "loading";
    this._tell();
    try {
      const [snapshot, run] = await Promise.all([server.getState(), server.getLastRun()]);
      if (asked !== this._asked) return; // a later request answers for this one
      this.run = run;
      this.moves = new Map();
      this._takeSnapshot(snapshot);
    } catch (error) {
      if (asked !== this._asked) return;
      const failure = /** @type {server.ServerError} */ (error);
      this.status = failure.isAway ? "away" : "failed";
      this.reason = failure.message;
      this._tell();
    }
  }

  /**
   * Calls `listener` after each change, once for all changes of the same frame.
   *
   * @param {() => void} listener
   * @returns {() => void} ends it
   */
  subscribe(listener) {
    this._listeners.add(listener);
    return () => this._listeners.delete(listener);
  }

  /**
   * Calls `follower` once for each thing that happens: a failure, a move that failed, a run that has gained something.
   *
   * @param {(happened: Happened) => void} follower
   * @returns {() => void} ends it
   */
  follow(follower) {
    this._followers.add(follower);
    return () => this._followers.delete(follower);
  }

  /** Something that this picture does not have has changed: the panel is to be drawn anew. */
  changed() {
    this._tell();
  }

  /** @param {Snapshot} snapshot */
  _takeSnapshot(snapshot) {
    this.snapshot = snapshot;
    this.failures = snapshot.failures ?? this.failures;
    const running = new Map(snapshot.moves.map((move) => [move.id, move]));
    for (const [id, move] of this.moves) if (running.has(id)) running.set(id, move); // the event is as new, or newer
    this.moves = running;
    this.status = "ready";
    this.reason = "";
    this._tell();
  }

  /** @param {Move} move */
  _takeMove(move) {
    if (move.state === "running") {
      this.moves.set(move.id, move);
    } else {
      this.moves.delete(move.id);
      this.past = [move, ...this.past.filter((other) => other.id !== move.id)].slice(0, MOST_PAST_MOVES);
      // What a button asked for is answered to it; what is pinned stays as the user wants.
      if (move.state === "failed" && move.node !== null && move.advice !== "unpin") this._happened({ move });
    }
    this._tell();
  }

  /** @param {Run} run points that are new; from another run, or with a gap, the whole run is asked for */
  _takePoints(run) {
    const known = this.run;
    if (known?.id !== run.id) this.failures = this.failures.filter((failure) => failure.run === run.id);
    if (!run.running && run.summary && run.id !== this._told) {
      this._told = run.id;
      this._happened({ summary: run.summary });
    }
    if (run.from === 0) {
      this.run = run;
    } else if (known && known.id === run.id && known.revision === run.revision && known.times.length >= run.from) {
      this.run = joined(known, run);
    } else {
      server.getLastRun().then(
        (whole) => {
          this.run = whole;
          this._tell();
        },
        (error) => console.warn("[qmove] the chart is out of date:", error.message)
      );
    }
    this._tell();
  }

  /** @param {Failure} failure */
  _takeFailure(failure) {
    const earlier = this.failures.filter((known) => known.run === failure.run && known.id !== failure.id);
    this.failures = [...earlier, failure];
    this._happened({ failure });
    this._tell();
  }

  /** @param {Happened} happened */
  _happened(happened) {
    for (const follower of this._followers) follower(happened);
  }

  _tell() {
    if (this._scheduled) return;
    this._scheduled = true;
    requestAnimationFrame(() => {
      this._scheduled = false;
      for (const listener of this._listeners) listener();
    });
  }
}

/**
 * @param {Run} known
 * @param {Run} more
 * @returns {Run}
 */
function joined(known, more) {
  /** @param {number[]} old @param {number[]} added */
  const join = (old, added) => [...old.slice(0, more.from), ...added];
  return {
    ...more,
    from: 0,
    times: join(known.times, more.times),
    parked: join(known.parked, more.parked),
    used: Object.fromEntries(
      Object.entries(more.used).map(([device, points]) => [device, join(known.used[device] ?? [], points)])
    ),
  };
}

/**
 * @param {string} event
 * @param {(detail: any) => void} callback
 */
function listen(event, callback) {
  /** @type {EventTarget} */ (api).addEventListener(event, (received) =>
    callback(/** @type {CustomEvent} */ (received).detail)
  );
}
