/** The words of the panel, in the language that ComfyUI is set to. Settings, nodes and commands have theirs in `locales/`. */

import { app } from "../../../scripts/app.js";
import { en } from "./texts/en.js";
import { ja } from "./texts/ja.js";
import { zh } from "./texts/zh.js";

/** @typedef {typeof en} Texts */

/** @type {Record<string, Texts>} */
const BY_LANGUAGE = { en, ja, zh };

/** @returns {Texts} those of the language that is set now; English for one that qmove does not have */
export function texts() {
  const locale = String(app.extensionManager?.setting.get("Comfy.Locale") ?? "en");
  return BY_LANGUAGE[locale] ?? BY_LANGUAGE[locale.split("-")[0]] ?? en;
}
