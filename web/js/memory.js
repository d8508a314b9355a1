/** Divides each memory (a GPU's, the RAM) into the parts that a bar shows. Plain data in, plain data out. */

/**
 * @typedef {import("./types").Snapshot} Snapshot
 * @typedef {{key: string, name: string, nbytes: number, color: string}} Part `color` is a CSS class
 * @typedef {{id: string, title: string, total: number, free: number, parts: Part[]}} Memory
 */

export const COLORS = 8; // classes qmove-color-0 and so on
const SMALLEST = 2000; // of what others use: a smaller share of a memory is not worth a line

/** @param {number} id of a model */
export const colorOf = (id) => `qmove-color-${id % COLORS}`;

/**
 * @param {Snapshot} snapshot
 * @param {import("./texts.js").Texts} words
 * @returns {Memory[]} one for each GPU that says its size, then the RAM; the parts of each add up to its total
 */
export function memories(snapshot, words) {
  return [...snapshot.devices.flatMap((device) => gpu(device, snapshot, words)), ram(snapshot, words)];
}

/**
 * @param {import("./types").Device} device
 * @param {Snapshot} snapshot
 * @param {import("./texts.js").Texts} words
 * @returns {Memory[]}
 */
function gpu(device, snapshot, words) {
  if (device.total === null || device.free === null) return [];
  const own = snapshot.models.map((model) => ({
    key: `model-${model.id}`,
    name: model.name,
    nbytes: model.resident[device.name] ?? 0,
    color: colorOf(model.id),
  }));
  const hosts = snapshot.comfyui_models.map((model, index) => ({
    key: `comfyui-${index}`,
    name: model.name,
    nbytes: model.resident[device.name] ?? 0,
    color: "qmove-color-host",
  }));
  const others = (device.others ?? []).map(({ name, nbytes, kind }, index) => ({
    key: `other-${index}`,
    name: words.others[kind ?? ""] ?? name,
    nbytes,
    color: "qmove-color-other",
  }));
  const title = device.title === device.name ? device.name : `${device.name} · ${device.title}`;
  return [filled(device.name, title, device.total, device.free, [...own, ...hosts, ...others], words)];
}

/**
 * @param {Snapshot} snapshot
 * @param {import("./texts.js").Texts} words
 * @returns {Memory}
 */
function ram({ ram, models }, words) {
  const parked = models.map((model) => ({
    key: `model-${model.id}`,
    name: `${model.name} (${words.parkedInRam})`,
    nbytes: Object.values(model.parked).reduce((sum, nbytes) => sum + nbytes, 0),
    color: colorOf(model.id),
  }));
  let shared = ram.shared ?? 0; // counts for the first model that has it
  for (const part of [...parked].reverse()) {
    const less = Math.min(part.nbytes, shared);
    shared -= less;
    part.nbytes -= less;
  }
  const mirrors = { key: "mirrors", name: words.mirrors, nbytes: ram.mirrors, color: "qmove-color-mirrors" };
  const spare = { key: "spare", name: words.spare, nbytes: ram.spare, color: "qmove-color-spare" };
  return filled("ram", words.ram, ram.total, ram.free, [...parked, mirrors, spare], words);
}

/**
 * Adds what others use and what is free. Figures are read one after the other, so they may contradict by a little.
 *
 * @param {string} id
 * @param {string} title
 * @param {number} total
 * @param {number} free
 * @param {Part[]} parts
 * @param {import("./texts.js").Texts} words
 * @returns {Memory}
 */
function filled(id, title, total, free, parts, words) {
  const named = parts.filter((part) => part.nbytes > 0);
  const known = named.reduce((sum, part) => sum + part.nbytes, 0);
  const left = Math.max(0, Math.min(free, total - known));
  const other = { key: "other", name: words.other, nbytes: Math.max(0, total - known - left), color: "qmove-color-other" };
  const unused = { key: "free", name: words.free, nbytes: left, color: "qmove-color-free" };
  const tooLittle = other.nbytes < total / SMALLEST;
  if (tooLittle) unused.nbytes += other.nbytes;
  return { id, title, total, free: left, parts: [...named, ...(tooLittle ? [] : [other]), unused] };
}
