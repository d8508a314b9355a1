/** Commands with their keys, and the menu they are in. */

import { app } from "../../../scripts/app.js";
import * as actions from "./actions.js";

export const TAB = "qmove";
const TOGGLE_PANEL = `Workspace.ToggleSidebarTab.${TAB}`; // ComfyUI makes it for each tab

/** @type {import("./store.js").Store | null} */
let store = null;

/** @param {import("./store.js").Store} known what the commands act on */
export const use = (known) => (store = known);

export const commands = [
  {
    id: "qmove.parkAll",
    label: "Park all models (unload to RAM)",
    tooltip: "Unloads every model that qmove knows from VRAM to RAM. They come back when they are used.",
    icon: "pi pi-arrow-circle-down",
    function: async () => {
      await actions.parkAll();
    },
  },
  {
    id: "qmove.freeVram",
    label: "Free VRAM",
    tooltip: "Unloads idle models from GPU memory to RAM until as much VRAM is free as you say.",
    icon: "pi pi-eraser",
    function: async () => {
      await actions.askAndFreeVram(store?.snapshot ?? null);
    },
  },
  {
    id: "qmove.showPanel",
    label: "Show VRAM (GPU memory)",
    tooltip: "Opens and closes the VRAM tab: which model lies where, and the last run.",
    icon: "pi pi-chart-bar",
    function: async () => {
      await app.extensionManager.command.execute(TOGGLE_PANEL);
    },
  },
];

export const keybindings = [
  { combo: { key: "p", alt: true, shift: true }, commandId: "qmove.parkAll" },
  { combo: { key: "f", alt: true, shift: true }, commandId: "qmove.freeVram" },
  { combo: { key: "q", alt: true, shift: true }, commandId: "qmove.showPanel" },
];

export const menuCommands = [{ path: ["qmove"], commands: commands.map((command) => command.id) }];
