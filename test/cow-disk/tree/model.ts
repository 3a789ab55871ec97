// Random operations on a tree of disks, and a plain copy in memory of what each disk and generation
// must hold. Everything read is compared.
import { expect } from 'vitest';
import { newGeneration, PAGE } from '../../blktap/support.js';
import type { TreeDriver } from './driver.js';

const MAX_DISKS = 6;
const MAX_GENERATIONS = 12;

export class TreeModel {
  readonly #disks = new Map<string, Buffer>();
  readonly #generations = new Map<string, { disk: string; image: Buffer }>();
  readonly counts = new Map<string, number>();
  #step = 0;
  #named = 0;
  #stamp = 0;

  constructor(
    readonly driver: TreeDriver,
    readonly rand: () => number,
  ) {
    for (const disk of driver.disks) this.#disks.set(disk, Buffer.alloc(driver.sizeBytes));
  }

  #pick(n: number): number {
    return Math.floor(this.rand() * n);
  }

  #any<K, V>(map: Map<K, V>): [K, V] | undefined {
    return [...map][this.#pick(map.size)];
  }

  #range(): [number, number] {
    const bytes = this.driver.sizeBytes;
    const from = this.#pick(this.rand() < 0.6 ? Math.min(bytes, 32 * PAGE) : bytes);
    const longest = [1, 512, PAGE, 10 * PAGE, 80 * PAGE][this.#pick(5)] as number;
    const length = 1 + this.#pick(Math.min(longest, bytes - from));
    if (this.rand() < 0.5) return [from, length];
    const start = from - (from % PAGE);
    return [start, Math.min(Math.ceil(length / PAGE) * PAGE, bytes - start)];
  }

  async step(): Promise<void> {
    const { driver } = this;
    const able: [number, string, (disk: string) => Promise<void>][] = [
      [30, 'write', (disk) => this.#write(disk)],
      [25, 'read', (disk) => this.#read(disk)],
      [8, 'zero', (disk) => this.#zero(disk, false)],
      [6, 'trim', (disk) => this.#zero(disk, true)],
      [6, 'flush', (disk) => driver.flush(disk)],
      [7, 'snapshot', (disk) => this.#snapshot(disk)],
      [4, 'read a generation', () => this.#readGeneration()],
      [5, 'drop a generation', () => this.#drop()],
      [3, 'clone', () => this.#clone()],
      [2, 'close', (disk) => driver.close(disk)],
      [1, 'roll back', (disk) => this.#rollback(disk)],
      [1, 'flatten', (disk) => driver.flatten(disk)],
      [4, 'commit', (disk) => this.#commit(disk)],
      [1, 'remove a disk', (disk) => this.#remove(disk)],
      [1, 'reopen', () => driver.reopen()],
      [0.5, 'kill', (disk) => this.#kill(disk)],
    ];
    let at = this.rand() * able.reduce((sum, [weight]) => sum + weight, 0);
    for (const [weight, name, action] of able) {
      at -= weight;
      if (at >= 0) continue;
      this.#step++;
      this.counts.set(name, (this.counts.get(name) ?? 0) + 1);
      const disk = this.#disk();
      const others = [...this.#disks.keys()].filter((each) => each !== disk);
      const alone = ['commit', 'reopen', 'kill'].includes(name) || others.length === 0;
      const other = others[this.#pick(others.length)] ?? '';
      const beside = !alone && this.rand() < 0.3 ? this.#write(other) : undefined;
      await Promise.all([action(disk), beside]);
      return;
    }
  }

  /** Compares all of everything. */
  async check(): Promise<void> {
    await this.driver.settled();
    const { sizeBytes } = this.driver;
    for (const [disk, image] of this.#disks) {
      this.#same(await this.driver.read(disk, 0, sizeBytes), image, `disk ${disk}`);
    }
    const found = await this.driver.generations();
    expect([...found].sort()).toEqual([...this.#generations.keys()].sort());
    for (const [id, { disk, image }] of this.#generations) {
      this.#same(await this.driver.readGeneration(disk, id), image, `generation ${id}`);
    }
  }

  #same(data: Buffer, expected: Buffer, what: string): void {
    if (data.equals(expected)) return;
    const at = data.findIndex((byte, i) => byte !== expected[i]);
    expect.fail(`step ${this.#step}: ${what} is wrong from byte ${at} on`);
  }

  #disk(): string {
    const found = this.#any(this.#disks);
    if (found === undefined) throw new Error('no disk left');
    return found[0];
  }

  #image(disk: string): Buffer {
    const image = this.#disks.get(disk);
    if (image === undefined) throw new Error(`no disk ${disk}`);
    return image;
  }

  #data(length: number): Buffer {
    const data = Buffer.alloc(length);
    const stamp = ++this.#stamp;
    for (let at = 0; at + 4 <= length; at += 4) {
      data.writeUInt32LE((stamp * 0x10001 + Math.floor(at / PAGE)) >>> 0, at);
    }
    data.fill(stamp, length - (length % 4));
    return data;
  }

  async #write(disk: string): Promise<void> {
    const image = this.#image(disk);
    const [offset, length] = this.#range();
    const data = this.#data(length);
    await this.driver.write(disk, offset, data, this.rand() < 0.05);
    data.copy(image, offset);
  }

  async #read(disk: string): Promise<void> {
    const image = this.#image(disk);
    const [offset, length] = this.#range();
    const data = await this.driver.read(disk, offset, length);
    this.#same(data, image.subarray(offset, offset + length), `${disk} from ${offset}`);
  }

  async #zero(disk: string, trim: boolean): Promise<void> {
    const image = this.#image(disk);
    const [offset, length] = this.#range();
    if (!trim) {
      await this.driver.zero(disk, offset, length);
      image.fill(0, offset, offset + length);
      return;
    }
    await this.driver.trim(disk, offset, length);
    const from = Math.ceil(offset / PAGE) * PAGE;
    const to = Math.floor((offset + length) / PAGE) * PAGE;
    if (from < to) image.fill(0, from, to);
  }

  async #snapshot(disk: string): Promise<void> {
    if (this.#generations.size >= MAX_GENERATIONS) return this.#drop();
    const image = Buffer.from(this.#image(disk));
    const generation = newGeneration();
    await this.driver.snapshot(disk, generation);
    this.#generations.set(generation, { disk, image });
  }

  async #readGeneration(): Promise<void> {
    const found = this.#any(this.#generations);
    if (found === undefined) return;
    const [id, { disk, image }] = found;
    this.#same(await this.driver.readGeneration(disk, id), image, `generation ${id}`);
  }

  async #drop(): Promise<void> {
    const found = this.#any(this.#generations);
    if (found === undefined) return;
    const [id, { disk }] = found;
    await this.driver.dropGeneration(disk, id);
    this.#generations.delete(id);
  }

  /** With a write under way: each of its pages is old or new then. */
  async #kill(disk: string): Promise<void> {
    const image = this.#image(disk);
    const [offset, length] = this.#range();
    const data = this.#data(length);
    const write = this.driver.write(disk, offset, data, false).catch(() => undefined);
    await this.driver.kill();
    await write;
    const first = offset - (offset % PAGE);
    const last = Math.min(Math.ceil((offset + length) / PAGE) * PAGE, image.length);
    const now = await this.driver.read(disk, first, last - first);
    const after = Buffer.from(image);
    data.copy(after, offset);
    for (let at = first; at < last; at += PAGE) {
      const page = now.subarray(at - first, at - first + PAGE);
      const wasWritten = page.equals(after.subarray(at, at + PAGE));
      if (wasWritten) page.copy(image, at);
      else this.#same(page, image.subarray(at, at + PAGE), `${disk} at ${at} after a kill`);
    }
  }

  async #clone(): Promise<void> {
    const found = this.#any(this.#generations);
    if (found === undefined || this.#disks.size >= MAX_DISKS) return;
    const [id, { disk, image }] = found;
    const name = `clone${++this.#named}`;
    await this.driver.clone(disk, id, name);
    this.#disks.set(name, Buffer.from(image));
  }

  /** Its generations go with it. */
  async #remove(disk: string): Promise<void> {
    if (this.#disks.size < 2) return;
    await this.driver.removeDisk(disk);
    this.#gone(disk);
  }

  #gone(disk: string): void {
    this.#disks.delete(disk);
    for (const [id, generation] of this.#generations) {
      if (generation.disk === disk) this.#generations.delete(id);
    }
  }

  async #rollback(disk: string): Promise<void> {
    const own = [...this.#generations].filter(([, generation]) => generation.disk === disk);
    const found = own[this.#pick(own.length)];
    if (found === undefined) return;
    const [id, { image }] = found;
    await this.driver.rollback(disk, id);
    this.#disks.set(disk, Buffer.from(image));
  }

  async #commit(disk: string): Promise<void> {
    const image = this.#image(disk);
    const origin = await this.driver.commit(disk);
    if (origin === undefined) return;
    this.counts.set('commit done', (this.counts.get('commit done') ?? 0) + 1);
    this.#gone(disk);
    this.#disks.set(origin, image);
  }
}
