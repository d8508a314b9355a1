/** English. Functions take the parts that vary. */

export const en = {
  panelTitle: "GPU memory",
  panelTooltip: "qmove: models in GPU memory",
  loading: "Asking ComfyUI which models it holds…",
  failed: "qmove's part of ComfyUI did not answer.",
  away: "ComfyUI is not reachable. The panel goes on by itself once it is back.",
  retry: "Try again",
  empty: "No model is known yet.",
  emptyHint:
    "Run a workflow: the models that its nodes use show here. They leave the VRAM while they stand idle, and come back before they are used.",
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
  autoPark: "Auto-parking",
  autoParkOn: "Idle models leave the VRAM by themselves when another node needs it.",
  autoParkOff: "Off: models leave the VRAM only when you park them.",
  park: "Park",
  restore: "Restore",
  /** @param {string} name */
  parkLabel: (name) => `Park ${name}: move it from VRAM to RAM`,
  /** @param {string} name */
  restoreLabel: (name) => `Restore ${name}: bring it back to its GPU`,
  parkAll: "Park all",
  freeVram: "Free VRAM",
  freeButton: "Free",
  gibField: "GiB to free on each GPU",
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
  cancelsPrompt: "Stops the workflow, which needs this model. Nothing is lost.",
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
  /** @param {string} nbytes */
  after: (nbytes) => `${nbytes} in use after it`,
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
  parkNode: "Park this model now",
  restoreNode: "Restore",
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
};
