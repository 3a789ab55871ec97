// One disk in a process of its own (power/child.ts), as a tree of one disk: nothing to clone yet.

import type { NbdClient } from '../../blktap/nbd-client.js';
import { connectTo, newGeneration } from '../../blktap/support.js';
import type { Command, Reply } from '../power/child.js';
import { type Server, startServer } from '../power/server.js';
import type { TreeDriver } from './driver.js';

export class DiskDriver implements TreeDriver {
  readonly disks = ['disk'];
  #clients: NbdClient[] = [];
  #turn = 0;
  #server: Server;

  private constructor(
    readonly sizeBytes: number,
    readonly directory: string,
    readonly socketPath: string,
  ) {
    this.#server = startServer(directory, socketPath, {});
  }

  static async create(
    sizeBytes: number,
    directory: string,
    socketPath: string,
  ): Promise<DiskDriver> {
    const driver = new DiskDriver(sizeBytes, directory, socketPath);
    await driver.#call('create', { size_bytes: sizeBytes });
    await driver.#open();
    return driver;
  }

  async #call(op: Command['op'], rest: Partial<Command> = {}): Promise<Reply> {
    const reply = await this.#server.call(op, rest);
    if (reply.error !== undefined) throw new Error(`${op}: ${reply.error}: ${reply.message}`);
    return reply;
  }

  async #open(): Promise<void> {
    await this.#call('open');
    this.#clients = [await connectTo(this.socketPath), await connectTo(this.socketPath)];
  }

  async #leave(): Promise<void> {
    for (const client of this.#clients.splice(0)) await client.close();
  }

  #client(): NbdClient {
    const client = this.#clients[this.#turn++ % this.#clients.length];
    if (client === undefined) throw new Error('not connected');
    return client;
  }

  read(_disk: string, offset: number, length: number): Promise<Buffer> {
    return this.#client().read(offset, length);
  }

  write(_disk: string, offset: number, data: Buffer, fua: boolean): Promise<void> {
    return this.#client().write(offset, data, fua ? 1 : 0);
  }

  zero(_disk: string, offset: number, length: number): Promise<void> {
    return this.#client().zero(offset, length);
  }

  trim(_disk: string, offset: number, length: number): Promise<void> {
    return this.#client().trim(offset, length);
  }

  flush(): Promise<void> {
    return this.#client().flush();
  }

  async snapshot(_disk: string, generation: string): Promise<void> {
    await this.#call('fork', { generation });
  }

  async generations(): Promise<string[]> {
    return (await this.#call('generations')).generations ?? [];
  }

  async readGeneration(generation: string): Promise<Buffer> {
    const socket = `${this.socketPath}-${newGeneration().slice(0, 8)}`;
    await this.#call('serve', { generation, socket });
    const client = await connectTo(socket);
    const data = await client.read(0, this.sizeBytes);
    await client.close();
    await this.#call('unserve', { socket });
    return data;
  }

  async dropGeneration(generation: string): Promise<void> {
    await this.#call('drop', { generation });
  }

  async reopen(): Promise<void> {
    await this.#leave();
    await this.#call('close');
    await this.#open();
  }

  async kill(): Promise<void> {
    await this.#server.kill();
    await this.#leave();
    this.#server = startServer(this.directory, this.socketPath, {});
    await this.#open();
  }
}
