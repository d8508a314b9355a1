/** Commands with their keys, and the menu they are in. */

import { app } from "../../../scripts/app.js";
import * as actions from "./actions.js";

export const TAB = "qmove";
const TOGGLE_PANEL = `Workspace.ToggleSidebarTab.${TAB}`; // ComfyUI makes it for each tab

export const commands = [
  {
    id: "qmove.parkAll",
    label: "Park all models",
    tooltip: "Moves every model that qmove knows out of VRAM into RAM.",
    icon: "pi pi-arrow-circle-down",
    function: async () => {
      await actions.parkAll();
    },
  },
  {
    id: "qmove.freeVram",
    label: "Free VRAM",
    tooltip: "Parks the least useful models until as much VRAM is free as you say.",
    icon: "pi pi-eraser",
    function: async () => {
      await actions.askAndFreeVram();
    },
  },
  {
    id: "qmove.showPanel",
    label: "Show GPU memory",
    tooltip: "Opens and closes qmove's panel: which model lies where, and the last run.",
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
