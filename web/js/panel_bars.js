/** The bars of the panel: one for each GPU and one for the RAM, with a legend. */

import { make, reconcile, setAttribute, setText } from "./dom.js";
import { bytes, percent } from "./format.js";
import { memories } from "./memory.js";
import { texts } from "./texts.js";

/**
 * @typedef {import("./memory.js").Memory} Memory
 * @typedef {import("./memory.js").Part} Part
 */

const MOST_NAMED = 4; // parts of a bar; the list of models has all of them

/**
 * @param {HTMLElement} list
 * @param {import("./types").Snapshot} snapshot
 */
export function updateBars(list, snapshot) {
  reconcile(list, memories(snapshot, texts()), (memory) => memory.id, createBar, updateBar);
}

/** @param {Memory} memory */
function createBar(memory) {
  return make(
    "li",
    { class: "qmove-memory" },
    make(
      "div",
      { class: "qmove-memory-head" },
      make("span", { class: "qmove-memory-title" }),
      make("span", { class: "qmove-memory-free" })
    ),
    make("div", { class: "qmove-bar", role: "img", "data-testid": `qmove-bar-${memory.id}` }),
    make("ul", { class: "qmove-legend", "data-testid": "qmove-legend" })
  );
}

/**
 * @param {HTMLElement} element
 * @param {Memory} memory
 */
function updateBar(element, memory) {
  const words = texts();
  const [head, bar, legend] = /** @type {HTMLElement[]} */ ([...element.children]);
  setText(head.children[0], memory.title);
  setText(head.children[1], words.freeOf(bytes(memory.free), bytes(memory.total)));
  const parts = memory.parts.map((part) => `${part.name} ${bytes(part.nbytes)}`).join(", ");
  setAttribute(
    bar,
    "aria-label",
    words.barLabel(memory.title, bytes(memory.total - memory.free), bytes(memory.total), parts)
  );
  reconcile(
    bar,
    memory.parts,
    (part) => part.key,
    () => make("span", {}),
    (segment, part) => {
      setAttribute(segment, "class", `qmove-segment ${part.color}`);
      setAttribute(segment, "title", `${part.name}: ${bytes(part.nbytes)}, ${percent(part.nbytes / memory.total)}`);
      segment.style.width = `${(100 * part.nbytes) / memory.total}%`;
    }
  );
  reconcile(
    legend,
    named(memory.parts.filter((part) => part.key !== "free")),
    (part) => part.key,
    () => make("li", {}, make("span", { "aria-hidden": "true" }), make("span", { class: "qmove-name" }), make("span")),
    (item, part) => {
      setAttribute(item.children[0], "class", `qmove-swatch ${part.color}`);
      setText(item.children[1], part.name);
      setAttribute(item.children[1], "title", part.name);
      setText(item.children[2], bytes(part.nbytes));
    }
  );
}

/**
 * The largest parts, in their order, and one that stands for all others.
 *
 * @param {Part[]} parts
 * @returns {Part[]}
 */
function named(parts) {
  if (parts.length <= MOST_NAMED + 1) return parts;
  const large = [...parts].sort((one, other) => other.nbytes - one.nbytes).slice(0, MOST_NAMED);
  const others = parts.filter((part) => !large.includes(part));
  const nbytes = others.reduce((sum, part) => sum + part.nbytes, 0);
  const rest = { key: "more", name: texts().more(others.length), nbytes, color: "qmove-color-more" };
  return [...parts.filter((part) => large.includes(part)), rest];
}
