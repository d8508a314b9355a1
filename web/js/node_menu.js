/** Entries in the menu of a node that gave or took a model: park it, restore it, pin it. */

import * as actions from "./actions.js";
import { idOf } from "./graph.js";
import { texts } from "./texts.js";

/**
 * For `getNodeMenuItems`, which old frontends do not call.
 *
 * @param {import("./types").GraphNode} node
 * @param {import("./store.js").Store} store
 */
export function nodeMenuItems(node, store) {
  const id = idOf(node);
  if (id === null || !store.snapshot?.nodes.includes(id)) return [];
  const target = { node: id, class: String(node.comfyClass) };
  return [
    null,
    { content: texts().parkNode, callback: () => void actions.park(target) },
    { content: texts().restoreNode, callback: () => void actions.restore(target) },
    { content: texts().pinNode, callback: () => void actions.pin(target, "pin") },
    { content: texts().unpinNode, callback: () => void actions.pin(target, "unpin") },
  ];
}
