// A store in a process of its own (power/child.ts), with clean-up as fast as it can be.
import { expect } from 'vitest';
import { checkStore } from '../../../src/cow-disk/check.js';
import type { NbdClient } from '../../blktap/nbd-client.js';
import { connectTo, newGeneration } from '../../blktap/support.js';
import type { Command, Reply } from '../power/child.js';
import { type Server, startServer } from '../power/server.js';
import type { TreeDriver } from './driver.js';

const CONNECTIONS = 2; // to each disk

export class StoreDriver implements TreeDriver {
  readonly disks = ['disk'];
  readonly #clients = new Map<string, NbdClient[]>();
  readonly #disks = new Set<string>();
  #turn = 0;
  #server: Server;

  private constructor(
    readonly sizeBytes: number,
    readonly directory: string,
    readonly sockets: string,
  ) {
    this.#server = startServer(directory);
  }

  static async create(sizeBytes: number, directory: string, sockets: string): Promise<StoreDriver> {
    const driver = new StoreDriver(sizeBytes, directory, sockets);
    await driver.#call('createStore');
    await driver.#call('open');
    for (const name of driver.disks) {
      await driver.#call('create', { name, size_bytes: sizeBytes });
      driver.#disks.add(name);
    }
    return driver;
  }

  async #call(op: Command['op'], rest: Partial<Command> = {}): Promise<Reply> {
    const reply = await this.#server.call(op, rest);
    if (reply.error !== undefined) throw new Error(`${op}: ${reply.error}: ${reply.message}`);
    return reply;
  }

  /** Opens and serves the disk if it is not. */
  async #client(disk: string): Promise<NbdClient> {
    let clients = this.#clients.get(disk);
    if (clients === undefined) {
      const socket = `${this.sockets}-${disk}`;
      await this.#call('serve', { disk, socket });
      clients = [];
      for (let i = 0; i < CONNECTIONS; i++) clients.push(await connectTo(socket));
      this.#clients.set(disk, clients);
    }
    const client = clients[this.#turn++ % CONNECTIONS];
    if (client === undefined) throw new Error('not connected');
    return client;
  }

  async close(disk: string): Promise<void> {
    if (await this.#leave(disk)) await this.#call('unserve', { disk });
  }

  async #leave(disk: string): Promise<boolean> {
    const clients = this.#clients.get(disk);
    this.#clients.delete(disk);
    for (const client of clients ?? []) await client.close();
    return clients !== undefined;
  }

  async read(disk: string, offset: number, length: number): Promise<Buffer> {
    return (await this.#client(disk)).read(offset, length);
  }

  async write(disk: string, offset: number, data: Buffer, fua: boolean): Promise<void> {
    await (await this.#client(disk)).write(offset, data, fua ? 1 : 0);
  }

  async zero(disk: string, offset: number, length: number): Promise<void> {
    await (await this.#client(disk)).zero(offset, length);
  }

  async trim(disk: string, offset: number, length: number): Promise<void> {
    await (await this.#client(disk)).trim(offset, length);
  }

  async flush(disk: string): Promise<void> {
    await (await this.#client(disk)).flush();
  }

  async snapshot(disk: string, generation: string): Promise<void> {
    await this.#client(disk);
    await this.#call('fork', { disk, generation });
  }

  async generations(): Promise<string[]> {
    // Of a fork under way the list tells when it is recorded.
    for (const disk of this.#clients.keys()) await this.#call('prepare', { disk });
    const { listing } = await this.#call('list');
    expect(listing?.disks.map(({ name }) => name).sort()).toEqual([...this.#disks].sort());
    return (listing?.generations ?? []).map(({ id }) => id);
  }

  async readGeneration(disk: string, generation: string): Promise<Buffer> {
    const socket = `${this.sockets}-${newGeneration().slice(0, 8)}`;
    await this.#call('serveGeneration', { disk, generation, socket });
    const client = await connectTo(socket);
    const data = await client.read(0, this.sizeBytes);
    await client.close();
    await this.#call('unserveGeneration', { socket });
    return data;
  }

  async dropGeneration(disk: string, generation: string): Promise<void> {
    await this.#call('drop', { disk, generation });
  }

  async clone(disk: string, generation: string, name: string): Promise<void> {
    await this.#call('clone', { disk, generation, name });
    this.#disks.add(name);
  }

  async removeDisk(disk: string): Promise<void> {
    await this.close(disk);
    await this.#call('remove', { disk });
    this.#disks.delete(disk);
  }

  async rollback(disk: string, generation: string): Promise<void> {
    await this.close(disk);
    await this.#call('rollback', { disk, generation });
  }

  async flatten(disk: string): Promise<void> {
    await this.#call('flatten', { disk });
  }

  async commit(disk: string): Promise<string | undefined> {
    for (const open of [...this.#clients.keys()]) await this.close(open);
    const { origin, error, message } = await this.#server.call('commit', { disk });
    if (error === 'E_STATE') return undefined; // not a clone, or of something gone
    if (origin === undefined) throw new Error(`commit: ${error}: ${message}`);
    this.#disks.delete(disk);
    return origin;
  }

  async settled(): Promise<void> {
    await this.#call('settled');
    const { failures } = await this.#call('failures');
    expect(failures, 'of clean-up').toEqual([]);
  }

  async reopen(): Promise<void> {
    for (const disk of [...this.#clients.keys()]) await this.close(disk);
    await this.#call('close');
    await this.#check();
    await this.#call('open');
  }

  async kill(): Promise<void> {
    await this.#server.kill();
    for (const disk of [...this.#clients.keys()]) await this.#leave(disk);
    await this.#check();
    this.#server = startServer(this.directory);
    await this.#call('open');
  }

  async #check(): Promise<void> {
    const found = await checkStore(this.directory);
    expect(found.filter(({ severity }) => severity === 'error')).toEqual([]);
  }
}
