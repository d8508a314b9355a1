/** English. Functions take the parts that vary. */

export const en = {
  panelTitle: "VRAM",
  panelTooltip: "qmove: VRAM (GPU memory), and which models are in it",
  loading: "Asking ComfyUI which models it holds…",
  failed: "qmove's part of ComfyUI did not answer.",
  away: "ComfyUI is not reachable. The panel goes on by itself once it is back.",
  retry: "Try again",
  empty: "No model is known yet.",
  emptyHint: "Run a workflow: the models that its nodes use show here. They are unloaded to RAM while they stand idle, and loaded back before they are used.",
  noGpu: "This machine has no GPU whose memory could be shown.",
  memory: "Memory",
  models: "Models",
  ram: "RAM",
  other: "other use",
  free: "free",
  others: /** @type {Record<string, string>} */ ({ unexplained: "not explained by this process (contexts, engines in C++, other programs)", wires: "images and latents on wires" }),
  /** @param {string} place */
  foundAt: (place) => `found at ${place}`,
  /** @param {string} name @param {string} nbytes */
  sameAs: (name, nbytes) => `same weights as ${name}: ${nbytes}`,
  /** @param {string} models @param {string} ram @param {string} limit @param {string} saved */
  stayLoaded: (models, ram, limit, saved) =>
    `Models that stay loaded between workflows: ${models}, with ${ram} of ${limit} in RAM. ${saved}`,
  /** @param {string} hits @param {string} time @param {string} misses */
  loadsSaved: (hits, time, misses) => `Loads saved: ${hits} (${time}); loads made: ${misses}.`,
  parkedInRam: "parked",
  mirrors: "kept copies",
  spare: "reserve for the next park",
  /** @param {string} name @param {string} used @param {string} total @param {string} parts */
  barLabel: (name, used, total, parts) => `${name}: ${used} of ${total} in use. ${parts}`,
  /** @param {string} free @param {string} total */
  freeOf: (free, total) => `${free} of ${total} free`,
  autoPark: "Unload idle models automatically (auto-parking)",
  autoParkOn: "Idle models go to RAM when another node needs the VRAM, and come back before they are used.",
  autoParkOff: "Off: models leave the VRAM only when you park them.",
  park: "Park",
  restore: "Restore",
  /** @param {string} name */
  parkLabel: (name) => `Park ${name} (unload to RAM)`,
  /** @param {string} name */
  restoreLabel: (name) => `Restore ${name} (load back)`,
  parkAll: "Park all (unload to RAM)",
  freeVram: "Free VRAM",
  freeButton: "Have free:",
  gibField: "GiB that are to be free on each GPU: idle models are unloaded until they are",
  howManyGib: "How many GiB should be free on each GPU?",
  notGib: "Enter a number of GiB from 0.1 to 1024.",
  states: {
    resident: "in VRAM",
    parked: "parked in RAM",
    "partly parked": "partly parked",
    "on disk": "on disk",
    "in RAM": "in RAM",
    busy: "moving",
  },
  moving: { park: "Parking", restore: "Restoring", wait: "Waiting for other programs to free VRAM of" },
  /** @param {string} homes */
  home: (homes) => `home ${homes}`,
  neverUsed: "not used yet",
  /** @param {string} ago */
  used: (ago) => `used ${ago}`,
  secondsAgo: "just now",
  /** @param {number} minutes */
  minutesAgo: (minutes) => `${minutes} min ago`,
  /** @param {number} hours */
  hoursAgo: (hours) => `${hours} h ago`,
  /** @param {string} nbytes */
  onDisk: (nbytes) => `${nbytes} on disk`,
  /** @param {string} done @param {string} total */
  doneOf: (done, total) => `${done} of ${total}`,
  /** @param {string} time */
  timeLeft: (time) => `${time} left`,
  cancel: "Cancel",
  cancelling: "Cancelling…",
  /** @param {string} what */
  cancelLabel: (what) => `Cancel: ${what}`,
  cancelsPrompt: "The workflow needs this model: it stops. Nothing is lost.",
  cancelled: "Cancelled. The model is where it was.",
  lastRun: "Last run",
  noRun: "Run a workflow to see here how its stages use the VRAM.",
  vram: "VRAM",
  parkedRam: "parked in RAM",
  /** @param {string} device */
  inUseOn: (device) => `in use on ${device}`,
  /** @param {string} device @param {string} peak @param {string} stage */
  chartLabel: (device, peak, stage) => `VRAM over time. The most on ${device} was ${peak}, in stage ${stage}.`,
  stages: "Stages",
  moves: "What moved",
  /** @param {string} name @param {string} nbytes @param {string} time */
  hasParked: (name, nbytes, time) => `${name} went to RAM: ${nbytes} in ${time}`,
  /** @param {string} name @param {string} nbytes @param {string} time */
  hasRestored: (name, nbytes, time) => `${name} came home: ${nbytes} in ${time}`,
  /** @param {string} name */
  wasCancelled: (name) => `${name} stayed: the move was cancelled`,
  /** @param {string} name */
  hasFailed: (name) => `${name} stayed: the move failed`,
  /** @param {string} device @param {string} time */
  hasWaited: (device, time) => `other programs have freed VRAM of ${device} after ${time}`,
  /** @param {string} device */
  hasNotWaited: (device) => `no longer waiting for VRAM of ${device}`,
  /** @param {string} node */
  because: (node) => `for “${node}”`,
  becauseHost: "asked for by ComfyUI or by you",
  copiedNothing: "nothing to copy",
  parkNode: "Park this model now (unload to RAM)",
  restoreNode: "Restore this model (load back)",
  pins: /** @type {Record<string, string>} */ ({ unpin: "not pinned", pin: "pinned: never parked", forget: "left alone by qmove" }),
  /** @param {string} device */
  keptOn: (device) => `kept on ${device}`,
  /** @param {string} name */
  pinLabel: (name) => `Pin of ${name}: whether it may leave its GPU`,
  pinNode: "Pin this model",
  unpinNode: "Unpin this model",
  notParked: "Not parked",
  notRestored: "Not restored",
  notPinned: "Not pinned",
  notFreed: "No VRAM freed",
  notCancelled: "Not cancelled",
  notDone: "Not done",
  settingNotChanged: "Setting not changed",
  serverAway: "ComfyUI is not reachable.",
  /** @param {number} count @param {string} names */
  smallParts: (count, names) => `${count} small ones: ${names}`,
  arriving: "arriving",
  /** @param {string} name */
  managedByComfyui: (name) => `${name} (managed by ComfyUI)`,
  ownNote: "managed by ComfyUI: it loads and unloads this one itself",
  /** @param {string} loaded @param {string} total */
  loadedOf: (loaded, total) => `${loaded} of ${total} in VRAM`,
  unload: "Unload",
  /** @param {string} name */
  unloadLabel: (name) => `Have ComfyUI unload ${name}`,
  notUnloaded: "Not unloaded",
  search: "Search models",
  noneFound: "No model has this name.",
  orderLabel: "Order of the models",
  orders: { place: "in VRAM first", name: "by name", size: "by size", used: "last used first" },
  parkAllTip: "Unloads every model that qmove knows from VRAM to RAM. They come back when they are used.",
  release: "Lend all VRAM",
  releaseTip: "Gives all VRAM to other programs: parks all models, has ComfyUI unload its own, and empties the caches.",
  takeBack: "Take it back",
  takeBackTip: "Brings back what the last run used, as far as there is room.",
  notReleased: "Not all VRAM was given away",
  lessFreed: "Less VRAM is free than asked for",
  stopWorkflow: "Stop workflow",
  /** @param {string} what */
  stopLabel: (what) => `Stop the workflow: ${what}`,
  nothingMoves: "Nothing moves.",
  /** @param {string} nbytes */
  peak: (nbytes) => `peak ${nbytes}`,
  /** @param {string} used @param {string} wanted @param {number} models @param {string} time */
  ranIn: (used, wanted, models, time) =>
    `Ran in ${used} instead of ${wanted}: ${models} ${models === 1 ? "model" : "models"} stepped aside for ${time}`,
  /** @param {string} models */
  steppedAside: (models) => `Stepped aside: ${models}`,
  /** @param {string} node */
  shortageTitle: (node) => `Out of VRAM${node ? ` in “${node}”` : ""}`,
  /** @param {string} node */
  lostTitle: (node) => `Weights were destroyed by another node${node ? `: “${node}” cannot run` : ""}`,
  /** @param {string} name @param {number} count */
  lostTensors: (name, count) => `${name}: ${count} weights have no bytes any more`,
  /** @param {string} device @param {string} free @param {string} total */
  freeOn: (device, free, total) => `${device}: ${free} of ${total} free now`,
  parkAndRun: "Park idle models and run again",
  parkIdle: "Park idle models (unload to RAM)",
  advice: /** @type {Record<string, string>} */ ({
    vram: "Park idle models, then try again.",
    ram: "Close other programs, let models go that stay loaded, or raise the RAM limit in the settings.",
    unpin: "Unpin it first.",
    wait: "Try again when the node has ended.",
    restart: "Restart ComfyUI.",
    reload: "Load the model again: change an input of its loader, or use ComfyUI's Unload Models and Clear Cache.",
    materialize: "Put the node Materialize Model before it.",
    graph: "Try again when the training step has ended.",
  }),
  close: "Close",
  /** @param {number} count */
  countParked: (count) => `${count} parked`,
  /** @param {string} device @param {string} used @param {string} total */
  inUse: (device, used, total) => `${device}: ${used} of ${total} in use`,
  chipTip: "Click: the VRAM tab. Right click: more.",
  openPanel: "Open the VRAM tab",
  settings: "Settings…",
  hideChip: "Hide this",
  automatic: "automatic",
  none: "none",
  never: "never",
  /** @param {number} count */
  more: (count) => `${count} more`,
  turnOnAndRun: "Turn auto-parking on and run again",
};
