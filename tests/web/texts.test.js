import { describe, expect, test } from "vitest";
import { texts } from "../../web/js/texts.js";
import { en } from "../../web/js/texts/en.js";
import { ja } from "../../web/js/texts/ja.js";
import { zh } from "../../web/js/texts/zh.js";
import { app } from "./fake_host/app.js";

const OTHERS = /** @type {[string, any][]} */ ([
  ["zh", zh],
  ["ja", ja],
]);

/** Every text by its name; functions are called with marks, which must come back. @param {any} language */
function flat(language, prefix = "") {
  /** @type {Record<string, string>} */
  const result = {};
  for (const [name, text] of Object.entries(language)) {
    if (typeof text === "object") Object.assign(result, flat(text, `${name}.`));
    else result[prefix + name] = typeof text === "function" ? text("⟨1⟩", "⟨2⟩", "⟨3⟩", "⟨4⟩") : text;
  }
  return result;
}

/** @param {string} text */
const marks = (text) => [...text.matchAll(/⟨\d⟩/g)].map(String).sort();

describe.each(OTHERS)("%s", (_language, words) => {
  test("has every text, with all of its figures, and not in English", () => {
    const [english, translated] = [flat(en), flat(words)];
    expect(Object.keys(translated)).toEqual(Object.keys(english));
    for (const [name, text] of Object.entries(translated)) {
      expect(marks(text), name).toEqual(marks(english[name]));
      if (!["ram", "vram", "doneOf"].includes(name)) expect(text, name).not.toBe(english[name]);
    }
  });
});

test.each([
  ["ja", ja],
  ["zh", zh],
  ["zh-TW", zh],
  ["fr", en],
  [undefined, en],
])("in %s", (locale, expected) => {
  app.reset();
  if (locale) app.settings.values.set("Comfy.Locale", locale);
  expect(texts()).toBe(expected);
});
