/** Nodes of the graph that is open, by the ids that the backend tells, and whether it is their workflow. */

import { app } from "../../../scripts/app.js";

/** @typedef {import("./types").NodeName} NodeName */

/** Old frontends have no rootGraph, and no other graph open. @returns {any} */
const root = () => app.rootGraph ?? app.graph;

/**
 * Whether the workflow that is open now is the one of a node. The same id in another workflow is another node.
 *
 * @param {string | null | undefined} workflow its id; null where the backend does not know it
 */
export function isOpen(workflow) {
  const open = root()?.id;
  return workflow === null || workflow === undefined || !open || workflow === String(open);
}

/**
 * @param {string} id as the backend knows it: "5", or "3:5" for node 5 in the subgraph of node 3
 * @returns {import("./types").GraphNode | null}
 */
export function findNode(id) {
  let graph = root();
  let node = null;
  for (const part of id.split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/**
 * What the user calls a node now, if its workflow is open; else what it was called when it ran.
 *
 * @param {NodeName} stage
 */
export function nodeTitle(stage) {
  const node = isOpen(stage.workflow) ? findNode(stage.node) : null;
  return node?.title && node.comfyClass === stage.class ? node.title : stage.title;
}

/**
 * The id by which the backend knows a node: those of the subgraphs around it come first.
 *
 * @param {import("./types").GraphNode} node
 * @returns {string | null} null for a node in a subgraph that several nodes use, of which nobody can say which one is meant
 */
export function idOf(node) {
  /** @type {any} */
  let graph = node.graph;
  const path = [String(node.id)];
  while (graph && graph !== root()) {
    const users = usersOf(graph);
    if (users.length !== 1) return null;
    path.unshift(String(users[0].id));
    graph = users[0].graph;
  }
  return path.join(":");
}

/**
 * @param {any} subgraph
 * @returns {any[]} the nodes, anywhere in the workflow, that stand for this subgraph
 */
function usersOf(subgraph) {
  const graphs = [root(), ...(root()?.subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph.nodes.filter((/** @type {any} */ node) => node.subgraph === subgraph));
}
