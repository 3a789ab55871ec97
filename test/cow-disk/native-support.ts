import { mkdtemp, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  addon,
  type NativeChain,
  type NativeDisk,
  type NativeStep,
  type NativeStore,
  type NativeView,
  type SliceRef,
} from '../../src/cow-disk/native.js';
import { type ServedExport, serveDevice } from '../../src/cow-disk/nbd-server.js';
import { newSliceId } from '../../src/cow-disk/slice-files.js';
import { NbdClient } from '../blktap/nbd-client.js';
import { cleanup, connectTo, newGeneration, PAGE } from '../blktap/support.js';

export const NONE = { kind: 'none' } as const;
let sockets = 0;

/** Drives the native store without a journal: it keeps the chains itself, as plain arrays. */
export class Bare {
  private constructor(
    readonly directory: string,
    readonly sizeBytes: number,
    readonly base: NativeChain['base'],
    public store: NativeStore,
  ) {}

  static async make(sizeBytes: number, base: NativeChain['base'] = NONE): Promise<Bare> {
    const directory = await mkdtemp(join(tmpdir(), 'sf-native-'));
    cleanup(() => rm(directory, { recursive: true, force: true }));
    const bare = await Bare.open(directory, sizeBytes, base);
    return bare;
  }

  static async open(
    directory: string,
    sizeBytes: number,
    base: NativeChain['base'] = NONE,
  ): Promise<Bare> {
    const bare = new Bare(directory, sizeBytes, base, await addon().openStore(directory));
    cleanup(() => bare.store.close().catch(() => undefined));
    return bare;
  }

  /** Bytes that a slice's pages take. */
  async allocated({ id }: SliceRef): Promise<number> {
    return (await stat(join(this.directory, `${id}.data`))).blocks * 512;
  }

  get pages(): number {
    return Math.ceil(this.sizeBytes / PAGE);
  }

  chain(slices: SliceRef[], base = this.base): NativeChain {
    return {
      sizeBytes: this.sizeBytes,
      slices: slices.map((s) => ({ ...s, shared: false })),
      base,
    };
  }

  async slice(spare = false): Promise<SliceRef> {
    const id = newSliceId();
    await addon().createSlice(this.directory, id, this.sizeBytes, spare);
    return { id, map: 0 };
  }

  /** A new disk on a chain of sealed slices. */
  async disk(on: SliceRef[] = [], replica?: unknown): Promise<BareDisk> {
    return this.openDisk([...on, await this.slice()], '', replica);
  }

  async openDisk(chain: SliceRef[], spare = '', replica?: unknown): Promise<BareDisk> {
    const native = await this.store.openDisk({ ...this.chain(chain), spare }, replica);
    const disk = new BareDisk(this, native, chain);
    cleanup(() => disk.close());
    return disk;
  }

  async view(slices: SliceRef[], replica?: unknown): Promise<NativeView> {
    return this.store.openView(this.chain(slices), replica);
  }

  /** All bytes of a generation. By NBD: a provider would be in use until it is collected. */
  async image(slices: SliceRef[], replica?: unknown): Promise<Buffer> {
    const view = await this.view(slices, replica);
    const socketPath = join(this.directory, `nbd${sockets++}`);
    const server = await serveDevice(view.device(), { socketPath });
    view.close();
    try {
      const client = await NbdClient.connect(socketPath);
      try {
        return await client.read(0, this.sizeBytes);
      } finally {
        await client.close();
      }
    } finally {
      await server.close();
    }
  }

  /** Merges a run and returns the chain with what stays in its place. */
  async merge(chain: SliceRef[], from: number, to: number): Promise<SliceRef[]> {
    const slices = chain.slice(from, to);
    const merge = await this.store.mergeBegin({ slices, sizeBytes: this.sizeBytes });
    await finish(merge);
    const { keep, map } = await merge.prepare();
    await merge.apply();
    return [...chain.slice(0, from), { id: keep, map }, ...chain.slice(to)];
  }

  async reopen(): Promise<void> {
    await this.store.close();
    this.store = await addon().openStore(this.directory);
  }
}

export class BareDisk {
  #closed = false;
  #client: NbdClient | undefined;
  #server: ServedExport | undefined;

  constructor(
    readonly of: Bare,
    readonly native: NativeDisk,
    /** Oldest first, with the top. */
    public chain: SliceRef[],
  ) {}

  /** Its sealed slices. */
  get below(): SliceRef[] {
    return this.chain.slice(0, -1);
  }

  async client(): Promise<NbdClient> {
    if (this.#client === undefined) {
      const socketPath = join(this.of.directory, `nbd${sockets++}`);
      const server = await serveDevice(this.native.device(), { socketPath });
      this.#server = server;
      this.#client = await connectTo(socketPath);
    }
    return this.#client;
  }

  async write(page: number, value: number, count = 1): Promise<void> {
    await (await this.client()).write(page * PAGE, Buffer.alloc(count * PAGE, value));
  }

  /** Makes a spare and forks; settled, unless told otherwise. */
  async fork(settle = true): Promise<{ chain: SliceRef[]; durationUs: number }> {
    const spare = await this.of.slice(true);
    await this.native.attachSpare(spare.id);
    const { durationUs } = await this.native.fork(newGeneration());
    const chain = this.chain;
    this.chain = [...chain, spare];
    if (settle) await this.native.settle();
    return { chain, durationUs };
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    await this.#client?.close();
    await this.#server?.close();
    await this.native.close();
  }
}

/** All steps of a merge, punch or pull. */
export async function finish(step: NativeStep, bytes = 64 * 1024): Promise<number> {
  let total = 0;
  for (let done = false; !done; ) {
    const made = await step.step(bytes);
    total += made.bytes;
    done = made.done;
  }
  return total;
}
