import { SnowflockError } from '../common/errors.js';
import { Disk, type DiskOwner } from './disk.js';
import { errorsOf } from './listing.js';
import { native } from './native.js';
import { diskOf, type ReplicaHandle, type StoreParts } from './parts.js';
import { unrecovered } from './recover.js';
import type { DiskErrors } from './store-api.js';

/** A disk that is open, for a caller of take() or just for a while. */
interface OpenEntry {
  disk: Promise<Disk>;
  /** A caller of take() has it; else it is closed when nobody uses it any more. */
  owned: boolean;
  users: number;
  /** Once it is. */
  opened: Disk | undefined;
}

/** What a store does for its disks. */
export interface OpenDisksHooks extends Pick<DiskOwner, 'reserve' | 'removeGeneration'> {
  /** The replica that a slice lies on, if it does. */
  replicaBelow(slice: string): Promise<ReplicaHandle | undefined>;
  /** A disk was closed; `owned`: by the caller that had it. */
  closed(owned: boolean): Promise<void>;
}

/**
 * The disks of a store that are open. Each is open once: for one caller that has it, and for the calls
 * of the store that need it open meanwhile. With the last of them it is closed.
 */
export class OpenDisks {
  readonly #parts: StoreParts;
  readonly #hooks: OpenDisksHooks;
  readonly #open = new Map<string, OpenEntry>();
  /** Disks with a fork that the journal does not tell of, and that were not opened since. */
  readonly #unrecovered = new Set<string>();

  constructor(parts: StoreParts, hooks: OpenDisksHooks) {
    this.#parts = parts;
    this.#hooks = hooks;
  }

  get(name: string): Promise<Disk> | undefined {
    return this.#open.get(name)?.disk;
  }

  /** Names of those that are open by now. */
  opened(): string[] {
    return [...this.#open].flatMap(([name, { opened }]) => (opened === undefined ? [] : [name]));
  }

  errors(): { disk: string; errors: DiskErrors }[] {
    return [...this.#open].flatMap(([disk, { opened }]) => {
      const { errors } = errorsOf(opened);
      return errors === undefined ? [] : [{ disk, errors }];
    });
  }

  /** E_IN_USE. */
  checkUnused(name: string): void {
    if (!this.#open.has(name)) return;
    throw new SnowflockError(
      'E_IN_USE',
      `disk ${name} of ${this.#parts.directory} is open or served`,
    );
  }

  /** For one caller at a time, who closes it. E_IN_USE, and what opening it throws. */
  async take(name: string, replica: ReplicaHandle | undefined): Promise<Disk> {
    const known = this.#open.get(name);
    if (known?.owned === true) {
      throw new SnowflockError(
        'E_IN_USE',
        `disk ${name} of ${this.#parts.directory} is open already`,
      );
    }
    const entry = known ?? this.#start(name, replica);
    entry.owned = true;
    try {
      return await entry.disk;
    } catch (error) {
      entry.owned = false;
      throw error;
    }
  }

  /** Uses a disk, opening it for as long as that takes if nobody has. */
  async with<T>(name: string, work: (disk: Disk) => Promise<T>): Promise<T> {
    const entry = this.#open.get(name) ?? this.#start(name, undefined);
    entry.users++;
    try {
      return await work(await entry.disk);
    } finally {
      entry.users--;
      if (entry.users === 0 && !entry.owned) {
        await entry.disk.then(
          (disk) => disk.close(),
          () => undefined,
        );
      }
    }
  }

  /** Waits until the journal tells all of a disk's forks. */
  async journalled(name: string): Promise<void> {
    const entry = this.#open.get(name);
    if (entry !== undefined) await (await entry.disk).journalled();
    else if (this.#unrecovered.has(name)) await this.with(name, async () => undefined);
  }

  /**
   * Forks of a former owner that the journal does not tell of. One that cannot be taken up now (its
   * replica is not at hand, a file is damaged) is when its disk is opened, or that says why not.
   * Until then nothing else touches the disk's top.
   */
  async recover(): Promise<void> {
    for (const name of await unrecovered(this.#parts.directory, this.#parts.ledger.tree)) {
      this.#unrecovered.add(name);
      await this.with(name, async () => undefined).catch(() => undefined);
    }
  }

  /** The disk is gone, with what there was to recover. */
  removed(name: string): void {
    this.#unrecovered.delete(name);
  }

  /** Closes all; what could not be closed in good order is told to `failed`. */
  async close(failed: (error: unknown) => void): Promise<void> {
    for (const entry of [...this.#open.values()]) {
      const disk = await entry.disk.catch(() => undefined); // its opener has the error
      await disk?.close().catch(failed);
    }
  }

  #start(name: string, replica: ReplicaHandle | undefined): OpenEntry {
    const disk = this.#openDisk(name, replica);
    const entry: OpenEntry = { disk, owned: false, users: 0, opened: undefined };
    this.#open.set(name, entry);
    disk.then(
      (opened) => {
        entry.opened = opened;
      },
      () => this.#open.delete(name),
    );
    return entry;
  }

  async #openDisk(name: string, given: ReplicaHandle | undefined): Promise<Disk> {
    const { ledger, gate, native: store } = this.#parts;
    const replica = given ?? (await this.#hooks.replicaBelow(diskOf(ledger.tree, name).top));
    const opened = await gate.shared(() =>
      native(() => store.openDisk(Disk.chain(this.#parts, name), replica)),
    );
    const disk = new Disk(name, this.#owner(replica), opened);
    try {
      await disk.recover();
      this.#unrecovered.delete(name);
      return disk;
    } catch (error) {
      await native(() => opened.close()).catch(() => undefined);
      throw error;
    }
  }

  #owner(replica: ReplicaHandle | undefined): DiskOwner {
    const { reserve, removeGeneration } = this.#hooks;
    return {
      parts: this.#parts,
      replica,
      reserve,
      removeGeneration,
      closed: async (disk) => {
        const owned = this.#open.get(disk.name)?.owned === true;
        this.#open.delete(disk.name);
        this.#parts.changed();
        await this.#hooks.closed(owned);
      },
    };
  }
}
