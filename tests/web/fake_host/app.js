/** ComfyUI's `app` as far as the pack uses it. `isOld` has the ways of 1.27: settings are stored without waiting for a handler. */

class FakeSettings {
  constructor() {
    /** @type {Map<string, any>} */
    this.definitions = new Map();
    /** @type {Map<string, any>} */
    this.values = new Map();
    /** What ComfyUI has stored on its server, in order. @type {[string, any][]} */
    this.stored = [];
    this.isOld = false;
    this.storeFails = false;
  }

  /** @param {any} definition */
  add(definition) {
    this.definitions.set(definition.id, definition);
    definition.onChange?.(this.get(definition.id), undefined);
  }

  /** @param {string} id */
  get(id) {
    return this.values.get(id) ?? this.definitions.get(id)?.defaultValue;
  }

  /** @param {string} id @param {any} value */
  async set(id, value) {
    const before = this.get(id);
    if (value === before) return;
    const handler = this.definitions.get(id)?.onChange;
    if (this.isOld) {
      handler?.(value, before);
      this.values.set(id, value);
    } else {
      this.values.set(id, value);
      await handler?.(value, before);
      if (this.values.get(id) !== value) return; // a later change owns it
    }
    if (this.storeFails) throw new TypeError("Failed to fetch");
    this.stored.push([id, value]);
  }
}

class FakeApp {
  constructor() {
    this.reset();
  }

  reset() {
    /** @type {any[]} */
    this.toasts = [];
    /** @type {any[]} */
    this.tabs = [];
    /** @type {any[]} */
    this.extensions = [];
    /** @type {string[]} */
    this.executed = [];
    this.rootGraph = graphOf([]);
    /** @type {any} */
    this.graph = this.rootGraph;
    /** How often a workflow was queued. */
    this.queued = 0;
    /** The top bar. @type {any} */
    this.menu = undefined;
    const setting = new FakeSettings();
    this.settings = setting;
    this.extensionManager = {
      setting,
      toast: { add: (/** @type {any} */ message) => this.toasts.push(message) },
      command: { execute: async (/** @type {string} */ id) => this.executed.push(id) },
      dialog: /** @type {any} */ ({}),
      registerSidebarTab: (/** @type {any} */ tab) => this.tabs.push(tab),
    };
  }

  async queuePrompt() {
    this.queued += 1;
  }

  /** @param {any} extension */
  registerExtension(extension) {
    this.extensions.push(extension);
    for (const definition of extension.settings) this.settings.add(definition);
  }
}

/** @param {any[]} nodes @param {Map<string, any>} [subgraphs] */
export function graphOf(nodes, subgraphs = new Map()) {
  const graph = { nodes, subgraphs, getNodeById: (/** @type {number} */ id) => nodes.find((node) => node.id === id) };
  for (const node of nodes) node.graph = graph;
  return graph;
}

export const app = new FakeApp();
