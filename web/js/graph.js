/** Nodes of the graph that is open, by the ids that the backend tells. */

import { app } from "../../../scripts/app.js";

/**
 * @param {string} id as the backend knows it: "5", or "3:5" for node 5 in the subgraph of node 3
 * @returns {import("./types").GraphNode | null}
 */
export function findNode(id) {
  /** @type {any} */
  let graph = app.rootGraph ?? app.graph; // old frontends have no rootGraph, and no other graph open
  let node = null;
  for (const part of id.split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/**
 * What the user has called a node.
 *
 * @param {string} id
 * @param {{class: string, name: string}} [stage] what it is; a node of another workflow may have the same id
 */
export function nodeTitle(id, stage) {
  const node = findNode(id);
  if (node?.title && (!stage || node.comfyClass === stage.class)) return node.title;
  return stage ? stage.name : `#${id}`;
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
  while (graph && graph !== (app.rootGraph ?? app.graph)) {
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
  /** @type {any} */
  const root = app.rootGraph ?? app.graph;
  const graphs = [root, ...(root?.subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph.nodes.filter((/** @type {any} */ node) => node.subgraph === subgraph));
}
