// Random requests on several connections to a recorded server, with forks, drops, reopenings and
// kills in between. Each connection has one request under way at a time.
import { CMD, NbdClient } from '../../blktap/nbd-client.js';
import { cleanup, newGeneration } from '../../blktap/support.js';
import type { Reply } from './child.js';
import { PAGE } from './file-system.js';
import type { Change, Generation, Ledger } from './ledger.js';
import type { Answer } from './log.js';
import { type Recorder, type Server, startServer } from './server.js';

const CONNECTIONS = 4;
const KEPT = 4; // generations; more are dropped
const FUA = 1;

function onlyItsDeath(error: unknown): void {
  const text = String(error);
  if (!/connection closed|ECONNRESET|EPIPE|the server died/.test(text)) throw error;
}

export class Workload {
  readonly wrong: string[] = [];
  readonly #clients: { client: NbdClient; number: number }[] = [];
  #server: Server;
  #process = -1;
  #connected = 0;
  #stamp = 0;
  /** Known to exist, oldest first. */
  #present: Generation[] = [];
  /** One call to the disk itself at a time, beside the requests. */
  #controls: Promise<void> = Promise.resolve();

  constructor(
    readonly ledger: Ledger,
    readonly recorder: Recorder,
    readonly directory: string,
    readonly socketPath: string,
    readonly rand: () => number,
  ) {
    this.#server = this.#start();
  }

  #start(): Server {
    this.#process++;
    this.#connected = 0;
    return startServer(this.directory, this.socketPath, this.recorder.env);
  }

  #pick(n: number): number {
    return Math.floor(this.rand() * n);
  }

  async #call(...parameters: Parameters<Server['call']>): Promise<[Reply, Answer]> {
    const reply = this.#server.call(...parameters);
    const answer = { process: this.#process, line: this.#server.lastId() };
    const got = await reply;
    if (got.error !== undefined) {
      throw new Error(`${parameters[0]}: ${got.error}: ${got.message}`);
    }
    return [got, answer];
  }

  /** Makes the disk; resolves with the answer that says so. */
  async create(): Promise<Answer> {
    const [, answer] = await this.#call('create', { size_bytes: this.ledger.pages * PAGE });
    return answer;
  }

  async open(): Promise<void> {
    const [{ generations = [] }] = await this.#call('open');
    for (const generation of this.ledger.generations) {
      const here = generations.includes(generation.id);
      const { newest, dropSent, dropped } = generation;
      if (!here && newest !== undefined && dropSent === undefined) {
        this.wrong.push(`generation ${generation.id} is missing when opened again`);
      }
      if (here && dropped !== undefined) this.wrong.push(`generation ${generation.id} is back`);
    }
    this.#present = this.ledger.generations.filter(({ id }) => generations.includes(id));
    for (let i = 0; i < CONNECTIONS; i++) {
      const client = await NbdClient.connect(this.socketPath); // one after the other: see accept
      cleanup(() => client.close());
      this.#clients.push({ client, number: this.#connected++ });
    }
  }

  /** Does `steps` requests on all connections together, with forks and drops meanwhile. */
  async run(steps: number): Promise<void> {
    let left = steps;
    await Promise.all(
      this.#clients.map(async ({ client, number }) => {
        while (left-- > 0) await this.#request(client, number);
      }),
    );
    await this.#controls;
  }

  /** Closes the disk and opens it again, in the same process. */
  async reopen(): Promise<void> {
    for (const { client } of this.#clients.splice(0)) await client.close();
    const floor = this.ledger.acknowledged();
    const present = [...this.#present];
    const [, answer] = await this.#call('close');
    this.ledger.claim(floor, answer);
    for (const generation of present) generation.durable.push(answer);
    await this.open();
  }

  /**
   * Forks, and does requests until the server is killed: at some call, or at some sync before it is
   * done. Then another one opens the disk.
   */
  async kill(): Promise<void> {
    if (this.rand() < 0.7) this.recorder.killAfter(1 + this.#pick(12), 'syncs');
    else this.recorder.killAfter(1 + this.#pick(60));
    this.#controlLater(0);
    await Promise.all(
      this.#clients.map(async ({ client, number }) => {
        const forever = async () => {
          for (;;) await this.#request(client, number);
        };
        await forever().catch(onlyItsDeath);
      }),
    );
    await this.#restart();
  }

  /** Forks, and nothing else, until the server is killed at the n-th sync before it is done. */
  async killAtSync(nth: number): Promise<void> {
    this.recorder.killAfter(nth, 'syncs');
    const forever = async () => {
      for (;;) await this.#control(0);
    };
    await forever().catch(onlyItsDeath);
    await this.#restart();
  }

  async #restart(): Promise<void> {
    await this.#controls.catch(onlyItsDeath);
    this.#controls = Promise.resolve();
    await this.#server.exited;
    for (const { client } of this.#clients.splice(0)) await client.close();
    this.#server = this.#start();
    await this.open();
    const client = this.#clients[0]?.client;
    if (client === undefined) throw new Error('not connected');
    this.wrong.push(...this.ledger.resolve(await client.read(0, this.ledger.pages * PAGE)));
  }

  /** Kills the server; nothing is written any more. */
  async end(): Promise<void> {
    // By the recorder, between two calls: from outside it could hit between a call and its entry.
    this.recorder.killAfter(1);
    await this.#call('prepare').catch(onlyItsDeath);
    await this.#server.exited;
    for (const { client } of this.#clients.splice(0)) await client.close();
  }

  async #request(client: NbdClient, number: number): Promise<void> {
    const process = this.#process;
    const answer = (): Answer => ({
      process,
      connection: number,
      bytes: client.socket.bytesRead,
    });
    if (this.rand() < 0.04) this.#controlLater();
    const [offset, length] = this.#range();
    const [first, last] = [Math.floor(offset / PAGE), Math.ceil((offset + length) / PAGE)];
    const action = this.rand();
    const flags = this.rand() < 0.15 ? FUA : 0;
    if (action < 0.15 || !this.ledger.free(first, last)) {
      const floor = this.ledger.acknowledged();
      const present = [...this.#present];
      await client.flush();
      this.ledger.claim(floor, answer());
      for (const generation of present) generation.durable.push(answer());
    } else if (action < 0.3) {
      this.ledger.hold(first, last);
      const data = await client.read(offset, length);
      this.ledger.release(first, last);
      if (!data.equals(this.ledger.read(offset, length))) {
        this.wrong.push(`a read of ${length} bytes at ${offset} is wrong`);
      }
    } else {
      const zero = action < 0.5;
      const type = !zero ? CMD.write : action < 0.4 ? CMD.zero : CMD.trim;
      const data = zero ? null : this.#data(length);
      const change: Change = this.ledger.begin(offset, length, data, type === CMD.trim);
      await client.request(type, offset, length, data ?? undefined, flags);
      this.ledger.acknowledge(change, flags === FUA ? answer() : undefined);
    }
  }

  /** Each write has bytes of its own, different from page to page. */
  #data(length: number): Buffer {
    const data = Buffer.alloc(length);
    this.#stamp++;
    for (let at = 0; at + 4 <= length; at += 4) {
      data.writeUInt32LE((this.#stamp * 0x10001 + Math.floor(at / PAGE)) >>> 0, at);
    }
    return data;
  }

  #controlLater(action = this.rand()): void {
    this.#controls = this.#controls.then(() => this.#control(action));
    this.#controls.catch(() => undefined); // whoever waits for it learns of it
  }

  async #control(action: number): Promise<void> {
    if (this.#present.length > KEPT) {
      const oldest = this.#present.shift() as Generation;
      oldest.dropSent = this.recorder.bytes();
      const [, answer] = await this.#call('drop', { generation: oldest.id });
      oldest.dropped = answer;
    } else if (action < 0.6) {
      const generation = this.ledger.fork(newGeneration());
      await this.#call('fork', { generation: generation.id });
      this.ledger.forked(generation);
      this.#present.push(generation);
    } else {
      const present = [...this.#present];
      const [, answer] = await this.#call('prepare');
      for (const generation of present) {
        generation.durable.push(answer);
        this.ledger.claim(new Map(generation.oldest.entries()), answer);
      }
    }
  }

  #range(): [number, number] {
    const bytes = this.ledger.pages * PAGE;
    const hot = this.rand() < 0.7 ? 16 * PAGE : bytes; // most of it on few pages
    const from = this.#pick(hot);
    const longest = [512, PAGE, 3 * PAGE, 3 * PAGE, 40 * PAGE][this.#pick(5)] as number;
    const length = 1 + this.#pick(Math.min(longest, bytes - from));
    if (this.rand() < 0.3) return [from, length];
    const start = from - (from % PAGE);
    return [start, Math.min(Math.ceil(length / PAGE) * PAGE, bytes - start)];
  }
}
