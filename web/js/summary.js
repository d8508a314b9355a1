/** One line after a run: what parking has gained, from figures that were measured. */

import { bytes, duration } from "./format.js";
import { texts } from "./texts.js";

/**
 * @param {import("./types").Summary} summary
 * @returns {string} "Ran in 22.9 GiB instead of 61.0 GiB: 2 models stepped aside for 3.1 s"
 */
export function inOneLine({ used, wanted, models, seconds }) {
  return texts().ranIn(bytes(used), bytes(wanted), models.length, duration(seconds));
}
