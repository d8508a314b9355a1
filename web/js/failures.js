/** What was lacking, destroyed or refused: in words, with the action that helps. */

import { app } from "../../../scripts/app.js";
import * as actions from "./actions.js";
import { bytes } from "./format.js";
import { isOpen, nodeTitle } from "./graph.js";
import { AUTO_PARK } from "./setting_ids.js";
import { texts } from "./texts.js";

/**
 * @typedef {import("./types").Failure} Failure
 * @typedef {import("./types").Move} Move
 * @typedef {{title: string, lines: string[], offer: {label: string, act: () => unknown} | null}} Told
 */

/**
 * @param {Failure} failure
 * @returns {Told}
 */
export function tell(failure) {
  const words = texts();
  const node = failure.stage ? nodeTitle(failure.stage) : "";
  if (failure.kind === "lost") {
    const lines = failure.models.map(({ name, tensors }) => words.lostTensors(name, tensors));
    return { title: words.lostTitle(node), lines: [...lines, words.advice.reload], offer: null };
  }
  const lines = failure.devices.flatMap((device) => [
    words.freeOn(device.name, bytes(device.free ?? 0), bytes(device.total ?? 0)),
    ...device.holders.map((holder) => `${words.others[holder.kind] ?? holder.name}: ${bytes(holder.nbytes)}`),
  ]);
  const canRun = failure.stage !== null && isOpen(failure.stage.workflow);
  const isOff = app.extensionManager.setting.get(AUTO_PARK) === false; // to park once does not last for the next run
  return {
    title: words.shortageTitle(node),
    lines: [failure.reason, ...lines],
    offer: canRun && isOff
      ? { label: words.turnOnAndRun, act: actions.turnOnAndRun }
      : canRun
      ? { label: words.parkAndRun, act: actions.parkAllAndRun }
      : { label: words.parkIdle, act: actions.parkAll },
  };
}

/**
 * A move that a node needed and that failed.
 *
 * @param {Move} move
 * @returns {Told}
 */
export function tellMove(move) {
  const words = texts();
  const help = words.advice[move.advice ?? ""];
  return { title: words.hasFailed(move.name), lines: [move.reason ?? "", help ?? ""].filter(Boolean), offer: null };
}
