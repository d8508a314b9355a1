/** Moves: those that run, in a place of fixed height, and the last ones, with what they were for. */

import * as actions from "./actions.js";
import { make, reconcile, setAttribute, setText } from "./dom.js";
import { bytes, duration, speed } from "./format.js";
import { nodeTitle } from "./graph.js";
import { button } from "./panel_models.js";
import { texts } from "./texts.js";

/** @typedef {import("./types").Move} Move */

/** Moves that the user has cancelled and that have not ended yet. @type {Set<number>} */
const cancelling = new Set();

/**
 * @param {HTMLElement} list
 * @param {Iterable<Move>} moves
 */
export function updateRunningMoves(list, moves) {
  reconcile(list, [...moves], (move) => String(move.id), createMove, updateMove);
}

/** @param {Move} move */
function createMove(move) {
  const cancel = button("qmove-cancel", async () => {
    cancelling.add(move.id);
    setText(cancel, texts().cancelling);
    setAttribute(cancel, "aria-disabled", "true");
    if (!(await actions.cancel(move.id))) cancelling.delete(move.id);
  });
  return make(
    "li",
    { class: "qmove-move" },
    make("div", { class: "qmove-move-head" }, make("div", { class: "qmove-move-title" }), cancel),
    make(
      "div",
      { class: "qmove-progress", role: "progressbar", "aria-valuemin": "0", "data-testid": "qmove-progress" },
      make("span", { class: "qmove-progress-done" })
    ),
    make("div", { class: "qmove-move-figures", "data-testid": "qmove-progress-text" })
  );
}

/**
 * @param {HTMLElement} element
 * @param {Move} move
 */
function updateMove(element, move) {
  const words = texts();
  const [head, bar, figures_] = /** @type {HTMLElement[]} */ ([...element.children]);
  const what = `${words.moving[move.verb]} ${move.name}`;
  setText(head.children[0], what);
  setAttribute(head.children[0], "title", move.stage ? `${what} ${reason(move)}` : what);
  const figures = [words.doneOf(bytes(move.done), bytes(move.total))];
  if (move.bytes_per_second) figures.push(speed(move.bytes_per_second));
  if (move.seconds_left !== null) figures.push(words.timeLeft(duration(move.seconds_left)));
  const text = figures.join(" · ");
  setAttribute(bar, "aria-label", what);
  setAttribute(bar, "aria-valuemax", move.total);
  setAttribute(bar, "aria-valuenow", move.done);
  setAttribute(bar, "aria-valuetext", text);
  /** @type {HTMLElement} */ (bar.children[0]).style.width = `${move.total ? (100 * move.done) / move.total : 0}%`;
  setText(figures_, text);
  const cancel = /** @type {HTMLElement} */ (head.children[1]);
  const isCancelling = cancelling.has(move.id);
  const stops = move.cancel === "prompt";
  setAttribute(cancel, "hidden", move.cancel === null);
  setText(cancel, isCancelling ? words.cancelling : stops ? words.stopWorkflow : words.cancel);
  setAttribute(cancel, "aria-disabled", String(isCancelling));
  setAttribute(cancel, "aria-label", stops ? words.stopLabel(what) : words.cancelLabel(what));
  setAttribute(cancel, "title", stops ? words.cancelsPrompt : null);
}

/**
 * @param {HTMLElement} list
 * @param {Move[]} moves the newest first
 */
export function updatePastMoves(list, moves) {
  for (const move of moves) cancelling.delete(move.id);
  reconcile(
    list,
    moves,
    (move) => String(move.id),
    () => make("li", {}),
    (item, move) => {
      setAttribute(item, "data-state", move.state);
      setText(item, `${whatHappened(move)} (${reason(move)})`);
    }
  );
}

/** @param {Move} move one that has ended */
export function whatHappened(move) {
  const words = texts();
  if (move.verb === "wait") {
    return move.state === "done" ? words.hasWaited(move.name, duration(move.seconds)) : words.hasNotWaited(move.name);
  }
  if (move.state === "cancelled") return words.wasCancelled(move.name);
  if (move.state === "failed") return [words.hasFailed(move.name), move.reason].filter(Boolean).join(": ");
  const say = move.verb === "park" ? words.hasParked : words.hasRestored;
  const nbytes = bytes(move.nbytes ?? move.total);
  return say(move.name, move.done ? nbytes : `${nbytes}, ${words.copiedNothing}`, duration(move.seconds));
}

/** @param {Move} move */
function reason(move) {
  const words = texts();
  return move.stage ? words.because(nodeTitle(move.stage)) : words.becauseHost;
}
