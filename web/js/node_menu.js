/** Entries in the menu of a node that gave or took a model: park it, restore it, pin it; only what can be done now. */

import * as actions from "./actions.js";
import { idOf, isOpen } from "./graph.js";
import { texts } from "./texts.js";

/**
 * For `getNodeMenuItems`, which old frontends do not call.
 *
 * @param {import("./types").GraphNode} node
 * @param {import("./store.js").Store} store
 */
export function nodeMenuItems(node, store) {
  const id = idOf(node);
  const known = (store.snapshot?.menus ?? []).filter(
    (menu) => menu.node === id && menu.class === node.comfyClass && isOpen(menu.workflow)
  );
  const menu = known.at(-1); // the one that ran last
  if (id === null || !menu) return [];
  const workflow = menu.workflow === null ? {} : { workflow: menu.workflow };
  const target = { node: id, class: menu.class, ...workflow };
  const words = texts();
  const offers = [
    { what: "park", content: words.parkNode, callback: () => void actions.park(target) },
    { what: "restore", content: words.restoreNode, callback: () => void actions.restore(target) },
    { what: "pin", content: words.pinNode, callback: () => void actions.pin(target, "pin") },
    { what: "unpin", content: words.unpinNode, callback: () => void actions.pin(target, "unpin") },
  ];
  const items = offers.filter(({ what }) => menu.can.includes(what)).map(({ content, callback }) => ({ content, callback }));
  return items.length ? [null, ...items] : [];
}
