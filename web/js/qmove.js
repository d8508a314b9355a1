/** qmove's part of ComfyUI's frontend. ComfyUI imports this file; what an older frontend does not know is left out by it silently. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { Chip } from "./chip.js";
import { commands, keybindings, menuCommands, TAB, use } from "./commands.js";
import * as failures from "./failures.js";
import { nodeMenuItems } from "./node_menu.js";
import { followRuns, keepResultOf } from "./node_result.js";
import { fitSize } from "./node_size.js";
import * as notify from "./notify.js";
import { Panel } from "./panel.js";
import { ServerError } from "./server.js";
import { Settings } from "./settings.js";
import { Store } from "./store.js";
import { texts } from "./texts.js";

const store = new Store();
const settings = new Settings(() => store.changed());
/** Filled once the backend has told its version. @type {{label: string, url: string, icon: string}[]} */
const badges = [];
/** @type {Panel | null} */
let panel = null;

app.registerExtension({
  name: "qmove.vram",
  settings: settings.definitions(),
  commands,
  keybindings,
  menuCommands,
  aboutPageBadges: badges,

  /** @param {import("./types").GraphNode} node */
  nodeCreated(node) {
    fitSize(node);
    keepResultOf(node);
  },

  /** @param {import("./types").GraphNode} node */
  getNodeMenuItems: (node) => nodeMenuItems(node, store),

  setup() {
    loadStyles();
    app.extensionManager.registerSidebarTab({
      id: TAB,
      type: "custom",
      title: "VRAM",
      icon: "pi pi-microchip",
      tooltip: texts().panelTooltip,
      render: showPanel,
      destroy: hidePanel,
    });
    listenForResults();
    followRuns();
    use(store);
    new Chip(store, openPanel).start();
    store.follow(sayFailure);
    store.subscribe(addBadge);
    store.subscribe(() => settings.sayZeros());
    void store.start();
    void settings.start();
  },
});

/** Old frontends call it again and again with the same container. @param {HTMLElement} container */
function showPanel(container) {
  if (panel?.isIn(container)) return;
  hidePanel();
  panel = new Panel(container, store);
}

function openPanel() {
  if (panel) return;
  void app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB}`);
}

/** @param {import("./store.js").Happened} happened */
function sayFailure({ failure, move }) {
  if (failure) notify.offer(failures.tell(failure));
  if (move) notify.offer(failures.tellMove(move));
}

function hidePanel() {
  panel?.destroy();
  panel = null;
}

/** Once the version is known. A badge without an address is no link. */
function addBadge() {
  const { snapshot } = store;
  if (badges.length || !snapshot?.version) return;
  const url = /** @type {string} */ (snapshot.url ?? undefined);
  badges.push({ label: `qmove v${snapshot.version}`, url, icon: "pi pi-microchip" });
}

/** What a button asked for while a node ran is done later; this says what came of it. */
function listenForResults() {
  /** @type {EventTarget} */ (api).addEventListener("qmove.result", (event) => {
    const { report, error, cancelled, advice } = /** @type {CustomEvent} */ (event).detail;
    if (error && !cancelled) notify.failed(texts().notDone, new ServerError(409, error, false, advice));
    else notify.done(report ?? texts().cancelled);
  });
}

function loadStyles() {
  for (const file of ["../vendor/uplot/uPlot.min.css", "../qmove.css"]) {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL(file, import.meta.url).href;
    document.head.append(link);
  }
}
