/** What the backend would send, for tests. */

export const MIB = 2 ** 20;
export const GIB = 2 ** 30;

/** @param {object} [parts] */
export const model = (parts = {}) => ({
  id: 1,
  name: "Flux",
  kind: "nf4",
  nbytes: 6 * GIB,
  state: "resident",
  busy: null,
  resident: { "cuda:0": 6 * GIB },
  parked: {},
  on_disk: 0,
  home: ["cuda:0"],
  last_used: null,
  pin: "unpin",
  ...parts,
});

/** @param {object} [parts] */
export const parkedModel = (parts = {}) =>
  model({ state: "parked", resident: {}, parked: { "cuda:0": 6 * GIB }, ...parts });

/** @param {object} [parts] */
export const hostModel = (parts = {}) => ({
  id: 3,
  name: "SDXL",
  nbytes: 2 * GIB,
  resident: { "cuda:0": 2 * GIB },
  device: "cuda:0",
  dynamic: false,
  pin: "unpin",
  ...parts,
});

/** @param {object} [parts] */
export const stage = (parts = {}) => ({ node: "8", class: "VAEDecode", title: "VAE Decode", workflow: "w1", ...parts });

/** @param {object} [parts] */
export const failure = (parts = {}) => ({
  id: 1,
  run: 1,
  at: 1_700_000_000,
  kind: "shortage",
  stage: stage(),
  reason: "Tried to allocate 8.0 GiB.",
  devices: [{ name: "cuda:0", free: GIB, total: 24 * GIB, holders: [{ name: "Flux", nbytes: 20 * GIB, kind: "" }] }],
  models: [],
  ...parts,
});

/** @param {object} [parts] */
export const move = (parts = {}) => ({
  id: 7,
  verb: "park",
  name: "Flux",
  model: 1,
  done: 2 * GIB,
  total: 6 * GIB,
  nbytes: null,
  seconds: 1,
  bytes_per_second: 2 * GIB,
  seconds_left: 2,
  node: null,
  stage: null,
  reason: "",
  advice: "",
  cancel: "move",
  state: "running",
  ...parts,
});

/** @param {object} [parts] */
export const snapshot = (parts = {}) => ({
  version: "1.2.3",
  url: null,
  settings: {},
  models: [model()],
  comfyui_models: [],
  devices: [{ name: "cuda:0", title: "Big GPU", total: 24 * GIB, free: 16 * GIB }],
  ram: { total: 64 * GIB, free: 40 * GIB, parked: 0, mirrors: 0, spare: 0 },
  done: { parks: 0, restores: 0, moves: 0, copied_bytes: 0 },
  moves: [],
  failures: [],
  nodes: [],
  menus: [],
  pins: ["unpin", "pin", "cuda:0", "forget"],
  ...parts,
});

/** @param {object} [parts] */
export const run = (parts = {}) => ({
  id: 1,
  revision: 0,
  started: 1_700_000_000,
  running: false,
  devices: ["cuda:0"],
  totals: { "cuda:0": 24 * GIB },
  stages: [
    { ...stage({ node: "4", class: "KSampler", title: "KSampler" }), name: "KSampler", begin: 0, end: 2, peak: { "cuda:0": 9 * GIB } },
    { ...stage(), name: "VAE Decode", begin: 2, end: 3 },
  ],
  from: 0,
  times: [0, 1, 2, 3],
  used: { "cuda:0": [GIB, 8 * GIB, 7 * GIB, 2 * GIB] },
  parked: [0, 0, 0, 6 * GIB],
  now: null,
  summary: /** @type {any} */ (null),
  ...parts,
});
