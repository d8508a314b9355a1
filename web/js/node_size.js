/** How large new nodes of qmove are: wide enough for their titles in every language. A workflow keeps the sizes that it was saved with. */

/** @typedef {import("./types").GraphNode} GraphNode */

const OWN = "QMove";
const FONT = "14px Inter, Arial, sans-serif"; // the frontends' own, of a node's title
const BESIDE = 76; // pixels: the dot or arrow before the title, the buttons behind it
const MOST = 460; // pixels
/** Pixels; of nodes whose reports have many lines. @type {Record<string, [number, number]>} */
const AT_LEAST = { QMoveReport: [380, 320] };

/**
 * For `nodeCreated`.
 *
 * @param {GraphNode} node
 */
export function fitSize(node) {
  const type = String(node.comfyClass ?? "");
  if (!type.startsWith(OWN)) return;
  const [width, height] = AT_LEAST[type] ?? [0, 0];
  const wanted = Math.max(width, Math.min(titleWidth(node) + BESIDE, MOST));
  if (node.size[0] < wanted || node.size[1] < height) {
    node.setSize([Math.max(node.size[0], wanted), Math.max(node.size[1], height)]);
  }
}

/** @param {GraphNode} node @returns {number} pixels; 0 where nothing can be measured */
function titleWidth(node) {
  const context = document.createElement("canvas").getContext("2d");
  if (!context) return 0;
  context.font = FONT;
  return Math.ceil(context.measureText(node.title ?? "").width);
}
