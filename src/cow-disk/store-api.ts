/**
 * What can be done with a store, as plain data: the same calls whether the store is opened by the
 * caller or served by another process (its control socket, `store.sock`).
 *
 * A disk is named by 1 to 64 letters, digits, `.`, `_`, `-` (not beginning with `.` or `-`); a
 * generation by its id (32 hex digits) or by its name, for which the same rule holds. `DISK@NAME`.
 */
export interface StoreApi {
  /** A new disk. E_EXISTS, E_ARGUMENT, E_NO_SPACE. */
  createDisk(p: CreateDisk): Promise<DiskEntry>;
  /** A new disk on a generation, in constant time. E_NOT_FOUND, E_EXISTS. */
  clone(p: { disk: string; generation: string; name: string }): Promise<DiskEntry>;
  /** Seals what the disk holds now as a generation; durable when it resolves. */
  snapshot(p: { disk: string; name?: string }): Promise<GenerationEntry>;
  /** Removes a generation; what others need of it stays and is merged in the background. */
  removeGeneration(p: { disk: string; generation: string }): Promise<void>;
  /** Removes a disk and its generations; clones of them keep working. E_IN_USE while served. */
  removeDisk(p: { disk: string }): Promise<void>;
  /** The disk holds again what the generation holds. E_IN_USE while it is served. */
  rollback(p: { disk: string; generation: string }): Promise<void>;
  /**
   * Gives the disk a copy of all pages it reads from its base and the slices below, and cuts it
   * loose from them. Works while it is served; progress by `tasks()`. The signal, or the end of the
   * caller's connection, ends it with E_INTERRUPTED.
   */
  flatten(p: { disk: string; rate_bytes_per_s?: number; signal?: AbortSignal }): Promise<void>;
  /**
   * Makes the disk that a clone was made from hold what the clone holds, and removes the clone, in
   * constant time. E_STATE if the origin was written since the clone's generation, unless `discard`.
   */
  commit(p: { disk: string; discard?: boolean }): Promise<{ origin: string }>;
  list(): Promise<StoreListing>;
  usage(): Promise<StoreUsage>;
  /** What runs in the background: merges, punches, flattens, prefetches. */
  tasks(): Promise<StoreTask[]>;
  /** Resolves when all clean-up that can be done now is done. */
  settled(): Promise<void>;
}

export type DiskBase =
  | { kind: 'none' }
  | { kind: 'image'; path: string }
  | { kind: 'replica'; generation: string };

export interface CreateDisk {
  name: string;
  size_bytes: number;
  base?: DiskBase;
}

export interface DiskEntry {
  name: string;
  size_bytes: number;
  created_ms: number;
  /** The generation its top lies on (not necessarily its own), or null: on the base. */
  parent: string | null;
  base: DiskBase;
  /** Slices from its top down to the base. */
  depth: number;
  /** Open in this process, and served over NBD. */
  open: boolean;
  exports: { socket: string; name: string }[];
  /** Of a base of kind `replica`, while it is open. */
  replica?: ReplicaStatus;
  /** While it is open, if its clients met any since. */
  errors?: DiskErrors;
}

/** Requests that failed. `last`: the last failure of a flush, or of one of the store's files. */
export interface DiskErrors {
  io: number;
  no_space: number;
  last: string | null;
}

/** How much of a generation of another host is here. */
export interface ReplicaStatus {
  generation: string;
  size_bytes: number;
  /** Pages that are here, known zeros too; with all of them the source is not needed any more. */
  present_bytes: number;
  complete: boolean;
  /** `lost`: absent pages are I/O errors until it answers. `closed`: not needed any more. */
  source: 'open' | 'lost' | 'closed';
}

export interface GenerationEntry {
  id: string;
  name: string | null;
  /** The disk it was sealed from; that one may be gone. */
  disk: string;
  created_ms: number;
  size_bytes: number;
  /** The next generation below, or null: the base. */
  parent: string | null;
}

export interface StoreListing {
  directory: string;
  disks: DiskEntry[];
  generations: GenerationEntry[];
}

export interface StoreUsage {
  disks: (SpaceUsage & { name: string })[];
  generations: (SpaceUsage & { id: string; disk: string; name: string | null })[];
  /** Copies of generations of other hosts; whoever lies on them shares them. */
  replicas: { generation: string; virtual_bytes: number; own_bytes: number }[];
  /** Taken by all slices and replicas, and by slices that clean-up will remove or merge away. */
  total_bytes: number;
  unreferenced_bytes: number;
}

export interface SpaceUsage {
  virtual_bytes: number;
  /** Given back if this alone were removed. */
  own_bytes: number;
  /** Also used by others. */
  shared_bytes: number;
}

export interface StoreTask {
  kind: 'merge' | 'punch' | 'flatten' | 'prefetch' | 'import' | 'export';
  disk: string | null;
  done_bytes: number;
  total_bytes: number | null;
  /** Of the last attempt, if it failed; it is tried again. */
  error: string | null;
}

export interface CheckFinding {
  /** `error`: a byte may be wrong or lost. `leak`: space only. `note`: normal after a crash. */
  severity: 'error' | 'leak' | 'note';
  file: string;
  message: string;
  repaired: boolean;
}
