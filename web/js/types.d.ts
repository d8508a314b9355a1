/** What the routes and events of the backend carry (nodes/host/panel/state.py, panel/history.py, progress.py). All sizes are bytes. */

export type ModelState = "resident" | "parked" | "partly parked" | "on disk" | "in RAM" | "busy";

export interface ModelEntry {
  id: number;
  name: string;
  /** Where it was found, when no wire carries it; else empty. */
  place?: string;
  kind: string;
  nbytes: number;
  state: ModelState;
  busy: null | Move["verb"];
  resident: Record<string, number>;
  parked: Record<string, number>;
  on_disk: number;
  home: string[];
  last_used: number | null;
  /** The models that have the same weights, as far as that is known, and how many bytes of them. */
  same?: { id: number; name: string; nbytes: number }[];
  /** "unpin" where it is not pinned, "pin", "forget", or the device that it is kept on. */
  pin: string;
  /** Its class, where its user calls it something else. */
  class?: string;
  /** Names of tensors whose bytes another node has taken away. */
  lost?: string[];
}

/** A model that ComfyUI moves itself. */
export interface HostModel {
  id: number;
  name: string;
  class?: string;
  nbytes: number;
  resident: Record<string, number>;
  device: string;
  dynamic: boolean;
  pin: string;
}

/** A node of a prompt. */
export interface NodeName {
  node: string;
  class: string;
  /** What its user called it as it ran. */
  title: string;
  /** The id of its workflow; null where the one who queued the prompt did not say. */
  workflow: string | null;
}

/** What can be done with the models of a node: "park", "restore", "pin", "unpin". */
export type NodeMenu = NodeName & { can: string[] };

/** What parking has gained in a run. Bytes, and seconds in which something moved. */
export interface Summary {
  device: string;
  used: number;
  wanted: number;
  models: string[];
  seconds: number;
}

export interface Failure {
  id: number;
  run: number;
  at: number;
  /** "shortage": a node ran out of memory; "lost": somebody has emptied weights. */
  kind: "shortage" | "lost";
  stage: NodeName | null;
  reason: string;
  devices: {
    name: string;
    free: number | null;
    total: number | null;
    holders: { name: string; nbytes: number; kind: string }[];
  }[];
  models: { name: string; tensors: number }[];
}

export interface Move {
  id: number;
  /** "wait": a node waits for other programs; `name` is the device, `model` 0, `done` what is free. */
  verb: "park" | "restore" | "wait";
  name: string;
  model: number;
  done: number;
  total: number;
  /** Bytes that changed places, known at the end; more than were copied where host copies were kept. */
  nbytes: number | null;
  seconds: number;
  bytes_per_second: number | null;
  seconds_left: number | null;
  node: string | null;
  /** That node, where it was staged. */
  stage?: NodeName | null;
  /** Why it failed, and what helps: a key of the texts. */
  reason?: string;
  advice?: string;
  cancel: "move" | "prompt" | null;
  state: "running" | "done" | "cancelled" | "failed";
}

export interface Device {
  name: string;
  title: string;
  total: number | null;
  free: number | null;
  /** What is no model: on wires, moved by others, other programs, and what nobody explains. */
  others?: { name: string; nbytes: number; kind?: string }[];
}

export interface Snapshot {
  version: string | null;
  url: string | null;
  settings: Record<string, SettingValue>;
  models: ModelEntry[];
  comfyui_models: HostModel[];
  devices: Device[];
  ram: { total: number; free: number; parked: number; mirrors: number; spare: number; shared?: number };
  /** Models that stay loaded between workflows; null where ComfyUI has no way to ask for them. */
  pool?: PoolFigures | null;
  done: { parks: number; restores: number; moves: number; copied_bytes: number };
  moves: Move[];
  failures?: Failure[];
  nodes: string[];
  menus?: NodeMenu[];
  /** What a model's `pin` can be on this machine. */
  pins: string[];
}

export interface PoolFigures {
  /** Of RAM, in bytes; 0 where it is off. */
  limit: number;
  models: number;
  nbytes: number;
  in_ram: number;
  hits: number;
  misses: number;
  seconds_saved: number;
}

export interface Stage extends NodeName {
  name: string;
  begin: number;
  end: number | null;
  /** The most in use while it ran, by device. */
  peak?: Record<string, number>;
}

export interface Run {
  id: number;
  revision: number;
  started: number;
  running: boolean;
  devices: string[];
  totals: Record<string, number>;
  stages: Stage[];
  from: number;
  times: number[];
  used: Record<string, number[]>;
  parked: number[];
  /** The newest reading, while it runs. */
  now?: { time: number; used: Record<string, number>; parked: number } | null;
  summary?: Summary | null;
}

/** A node of the graph; ComfyUI's types do not export it by name, and leave out what the frontend adds to it. */
export type GraphNode = Parameters<
  NonNullable<import("@comfyorg/comfyui-frontend-types").ComfyExtension["getNodeMenuItems"]>
>[0] & {
  onExecuted?(output: { text?: string[] }): void;
  addDOMWidget(
    name: string,
    type: string,
    element: HTMLElement,
    options: {
      serialize: boolean;
      getValue(): string;
      setValue(value: string): void;
      getMinHeight(): number;
    }
  ): { serialize?: boolean };
};

export type SettingValue = boolean | number | string;

export interface Answer {
  report: string;
}
