/** Divides each memory (a GPU's, the RAM) into the parts that a bar shows. Plain data in, plain data out. */

/**
 * @typedef {import("./types").Snapshot} Snapshot
 * @typedef {{key: string, name: string, nbytes: number, color: string}} Part `color` is a CSS class
 * @typedef {{id: string, title: string, total: number, free: number, parts: Part[]}} Memory
 */

export const COLORS = 8; // classes qmove-color-0 and so on
const SMALLEST_SHARE = 1 / 90; // of a memory: less is under 2 pixels wide in a narrow panel, and is shown with its like
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
  // What has come of a model that is on its way; it counts as parked until all of it is there.
  const arriving = snapshot.moves
    .filter(({ verb, state }) => verb === "restore" && state === "running")
    .filter(({ model }) => snapshot.models.some(({ id, parked }) => id === model && parked[device.name]))
    .map(({ model, name, done }) => ({
      key: `arriving-${model}`,
      name: `${name} (${words.arriving})`,
      nbytes: done,
      color: `${colorOf(model)} qmove-arriving`,
    }));
  const hosts = snapshot.comfyui_models.map((model, index) => ({
    key: `comfyui-${model.id ?? index}`,
    name: words.managedByComfyui(model.name),
    nbytes: model.resident[device.name] ?? 0,
    color: "qmove-color-host",
  }));
  let inFlight = arriving.reduce((sum, part) => sum + part.nbytes, 0); // nobody else explains these bytes
  const others = (device.others ?? []).map(({ name, nbytes, kind }, index) => {
    const moving = kind === "unexplained" ? Math.min(nbytes, inFlight) : 0;
    inFlight -= moving;
    return {
      key: `other-${index}`,
      name: words.others[kind ?? ""] ?? name,
      nbytes: nbytes - moving,
      color: "qmove-color-other",
    };
  });
  const title = device.title === device.name ? device.name : `${device.name} · ${device.title}`;
  const least = device.total / SMALLEST;
  const worthALine = others.filter((part) => part.nbytes >= least);
  return [filled(device.name, title, device.total, device.free, [...own, ...arriving, ...hosts, ...worthALine], words)];
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
  const named = merged(parts.filter((part) => part.nbytes > 0), total, words);
  const known = named.reduce((sum, part) => sum + part.nbytes, 0);
  const left = Math.max(0, Math.min(free, total - known));
  const other = { key: "other", name: words.other, nbytes: Math.max(0, total - known - left), color: "qmove-color-other" };
  const unused = { key: "free", name: words.free, nbytes: left, color: "qmove-color-free" };
  const tooLittle = other.nbytes < total / SMALLEST;
  if (tooLittle) unused.nbytes += other.nbytes;
  return { id, title, total, free: left, parts: [...named, ...(tooLittle ? [] : [other]), unused] };
}

/**
 * Puts together what would be too narrow to be seen, and would look like a hole: several small parts are one.
 *
 * @param {Part[]} parts
 * @param {number} total
 * @param {import("./texts.js").Texts} words
 * @returns {Part[]}
 */
function merged(parts, total, words) {
  const small = parts.filter((part) => part.nbytes < total * SMALLEST_SHARE);
  if (small.length < 2) return parts;
  const nbytes = small.reduce((sum, part) => sum + part.nbytes, 0);
  const large = parts.filter((part) => !small.includes(part));
  const name = words.smallParts(small.length, small.map((part) => part.name).join(", "));
  return [...large, { key: "small", name, nbytes, color: "qmove-color-small" }];
}
