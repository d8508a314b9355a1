import { fileURLToPath } from "node:url";
import { defineConfig } from "vitest/config";

/** @param {string} path */
const here = (path) => fileURLToPath(new URL(path, import.meta.url));

export default defineConfig({
  test: {
    environment: "happy-dom",
    include: ["*.test.js"],
    restoreMocks: true,
  },
  server: { fs: { allow: [here("../..")] } },
  resolve: {
    // The two files that ComfyUI serves, and that the pack imports.
    alias: [
      { find: /^.*\/scripts\/app\.js$/, replacement: here("./fake_host/app.js") },
      { find: /^.*\/scripts\/api\.js$/, replacement: here("./fake_host/api.js") },
    ],
  },
});
