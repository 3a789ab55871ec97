// Random requests to a recorded server of a store, several connections to each disk, with all that
// can be done to disks and generations beside them, reopenings and kills. Each connection has one
// request under way at a time, the store one operation.
import { CMD, NbdClient } from '../../blktap/nbd-client.js';
import { cleanup, newGeneration } from '../../blktap/support.js';
import type { Reply } from './child.js';
import { PAGE } from './file-system.js';
import { type DiskRecord, type Generation, type Ledger, lineOf } from './ledger.js';
import type { Answer } from './log.js';
import { type Recorder, type Server, startServer } from './server.js';

const CONNECTIONS = 2; // to each disk
const KEPT = 8; // generations; more are dropped
const MOST_DISKS = 4;
const BATCH = 24;
const FUA = 1;

export type Operation = (typeof OPERATIONS)[number];
/** Those that need closed disks come last. */
export const OPERATIONS = [
  'fork',
  'prepare',
  'snapshot',
  'drop',
  'clone',
  'flatten',
  'create',
  'reopen disk',
  'rollback',
  'commit',
  'remove',
] as const;
const WEIGHTS = [5, 3, 4, 6, 3, 1, 0.5, 1, 1.5, 1.5, 0.7];

interface Client {
  client: NbdClient;
  /** In the order in which this process accepted them. */
  number: number;
}

function isDeath(error: unknown): boolean {
  return /connection closed|ECONNRESET|ECONNREFUSED|EPIPE|the server died/.test(String(error));
}

function onlyItsDeath(error: unknown): void {
  if (!isDeath(error)) throw error;
}

export class Workload {
  readonly wrong: string[] = [];
  readonly counts = new Map<string, number>();
  readonly #open = new Map<DiskRecord, Client[]>();
  #server: Server;
  #process = -1;
  #connected = 0;
  #stamp = 0;

  constructor(
    readonly ledger: Ledger,
    readonly recorder: Recorder,
    readonly directory: string,
    readonly sockets: string,
    readonly pages: number,
    readonly rand: () => number,
  ) {
    this.#server = this.#start();
  }

  #start(): Server {
    this.#process++;
    this.#connected = 0;
    return startServer(this.directory, this.recorder.env);
  }

  #pick(n: number): number {
    return Math.floor(this.rand() * n);
  }

  #any<T>(list: T[]): T | undefined {
    return list[this.#pick(list.length)];
  }

  async #call(...parameters: Parameters<Server['call']>): Promise<[Reply, Answer]> {
    const reply = this.#server.call(...parameters);
    const answer = { process: this.#process, line: this.#server.lastId() };
    const got = await reply;
    if (got.error !== undefined) {
      throw new Error(`${JSON.stringify(parameters)}: ${got.error}: ${got.message}`);
    }
    return [got, answer];
  }

  /** Makes the store; resolves with the answer that says so. */
  async createStore(): Promise<Answer> {
    return (await this.#call('createStore'))[1];
  }

  async open(): Promise<void> {
    const [{ listing }, answer] = await this.#call('open');
    const disks = (listing?.disks ?? []).map(({ name }) => name);
    const generations = (listing?.generations ?? []).map(({ id }) => id);
    this.wrong.push(...this.ledger.opened(disks, generations, answer));
    for (const disk of this.disks()) await this.#serve(disk);
  }

  disks(): DiskRecord[] {
    return [...this.ledger.disks.values()].filter(({ present }) => present);
  }

  generations(): Generation[] {
    return [...this.ledger.generations.values()].filter(({ present }) => present);
  }

  async #serve(disk: DiskRecord): Promise<void> {
    const socket = `${this.sockets}-${disk.name}`;
    await this.#call('serve', { disk: disk.name, socket });
    const clients: Client[] = [];
    for (let i = 0; i < CONNECTIONS; i++) {
      const client = await NbdClient.connect(socket); // one after the other: see Answers
      cleanup(() => client.close());
      clients.push({ client, number: this.#connected++ });
    }
    const [first] = clients;
    if (first === undefined) throw new Error('not connected');
    const wrong = this.ledger.observed(disk, await first.client.read(0, this.pages * PAGE));
    this.wrong.push(...wrong.map((text) => `disk ${disk.name} when opened: ${text}`));
    this.#open.set(disk, clients);
  }

  /** Closing makes all of it durable. */
  async #unserve(disk: DiskRecord): Promise<void> {
    for (const { client } of this.#open.get(disk) ?? []) await client.close();
    this.#open.delete(disk);
    const line = lineOf(disk);
    const floor = line.acknowledged();
    const present = this.ledger.of(disk);
    const [, answer] = await this.#call('unserve', { disk: disk.name });
    line.claim(floor, answer);
    for (const generation of present) generation.durable.push(answer);
  }

  /** Does `steps` requests, with operations beside them. */
  async run(steps: number): Promise<void> {
    for (let left = steps; left > 0; left -= BATCH) {
      const died = await this.#batch(Math.min(left, BATCH), this.#draw());
      if (died) throw new Error('the server died');
    }
  }

  /** Requests alone. */
  async requests(count: number): Promise<void> {
    if (await this.#batch(count, undefined)) throw new Error('the server died');
  }

  /** One operation, alone; false if there is nothing to do it to. */
  async act(operation: Operation): Promise<boolean> {
    const planned = this.#plan(operation);
    await planned?.work();
    return planned !== undefined;
  }

  /** Drops a generation that a single other one lies on, so that their slices are merged. */
  async merge(): Promise<void> {
    const cloned = new Set(this.disks().map(({ clonedFrom }) => clonedFrom));
    const first = this.generations().find((each) => !cloned.has(each));
    if (first === undefined || this.ledger.of(first.disk).length < 3) throw new Error('no merge');
    await this.#drop(first);
    await this.settled();
  }

  /** Clean-up that was to be done is done. */
  async settled(): Promise<void> {
    await this.#call('settled');
    const [{ failures = [] }] = await this.#call('failures');
    this.wrong.push(...failures);
  }

  /** Closes the store and opens it again, in the same process. */
  async reopen(): Promise<void> {
    for (const disk of this.disks()) await this.#unserve(disk);
    await this.#call('close');
    await this.open();
  }

  /** Works until the server is killed: at some call, or at some sync before it is done. */
  async kill(): Promise<void> {
    if (this.rand() < 0.7) this.recorder.killAfter(1 + this.#pick(16), 'syncs');
    else this.recorder.killAfter(1 + this.#pick(80));
    while (!(await this.#batch(BATCH, this.#draw())));
    await this.#restart();
  }

  /**
   * Does `work` with the server to be killed at the n-th sync before that is done, and starts
   * another; false if it was over before.
   */
  async killAtSync(nth: number, work: () => Promise<unknown>): Promise<boolean> {
    this.recorder.killAfter(nth, 'syncs');
    const died = await work().then(
      () => false,
      (error) => {
        onlyItsDeath(error);
        return true;
      },
    );
    if (!died) {
      this.recorder.killAfter(0);
      return false;
    }
    await this.#restart();
    return true;
  }

  async #restart(): Promise<void> {
    await this.#server.exited;
    await this.#leave();
    this.#server = this.#start();
    await this.open();
  }

  async #leave(): Promise<void> {
    for (const clients of this.#open.values()) {
      for (const { client } of clients) await client.close();
    }
    this.#open.clear();
  }

  /** Kills the server; nothing is written any more. */
  async end(): Promise<void> {
    // By the recorder, between two calls: from outside it could hit between a call and its entry.
    this.recorder.killAfter(1);
    await this.#call('list').catch(onlyItsDeath);
    await this.#server.exited;
    await this.#leave();
  }

  #draw(): Operation {
    let at = this.rand() * WEIGHTS.reduce((sum, weight) => sum + weight, 0);
    const index = WEIGHTS.findIndex((weight) => {
      at -= weight;
      return at < 0;
    });
    return OPERATIONS[Math.max(0, index)] as Operation;
  }

  /** Requests on all disks that the operation does not need for itself; true if the server died. */
  async #batch(requests: number, operation: Operation | undefined): Promise<boolean> {
    const planned = operation === undefined ? undefined : this.#plan(operation);
    let left = requests;
    const work = [...this.#open].flatMap(([disk, clients]) => {
      if (planned?.alone.includes(disk) === true) return [];
      return clients.map(async (client) => {
        while (left-- > 0) await this.#request(disk, client);
      });
    });
    const ends = await Promise.allSettled([planned?.work(), ...work]);
    const errors = ends.flatMap((end) => (end.status === 'rejected' ? [end.reason] : []));
    for (const error of errors) onlyItsDeath(error);
    return errors.length > 0;
  }

  async #request(disk: DiskRecord, { client, number }: Client): Promise<void> {
    const process = this.#process;
    const answer = (): Answer => ({
      process,
      connection: number,
      bytes: client.socket.bytesRead,
    });
    const line = lineOf(disk);
    const [offset, length] = this.#range();
    const [first, last] = [Math.floor(offset / PAGE), Math.ceil((offset + length) / PAGE)];
    const action = this.rand();
    const flags = this.rand() < 0.15 ? FUA : 0;
    if (action < 0.12 || !line.free(first, last)) {
      const floor = line.acknowledged();
      const present = this.ledger.of(disk);
      await client.flush();
      line.claim(floor, answer());
      for (const generation of present) generation.durable.push(answer());
    } else if (action < 0.25) {
      line.hold(first, last);
      const data = await client.read(offset, length);
      line.release(first, last);
      if (!data.equals(line.read(offset, length))) {
        this.wrong.push(`a read of ${length} bytes at ${offset} of ${disk.name} is wrong`);
      }
    } else {
      const zero = action < 0.42;
      const type = !zero ? CMD.write : action < 0.34 ? CMD.zero : CMD.trim;
      const data = zero ? null : this.#data(length);
      const change = line.begin(offset, length, data, type === CMD.trim);
      await client.request(type, offset, length, data ?? undefined, flags);
      line.acknowledge(change, flags === FUA ? answer() : undefined);
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

  #range(): [number, number] {
    const bytes = this.pages * PAGE;
    const hot = this.rand() < 0.7 ? 12 * PAGE : bytes; // most of it on few pages
    const from = this.#pick(hot);
    const longest = [512, PAGE, 3 * PAGE, 3 * PAGE, 20 * PAGE][this.#pick(5)] as number;
    const length = 1 + this.#pick(Math.min(longest, bytes - from));
    if (this.rand() < 0.3) return [from, length];
    const start = from - (from % PAGE);
    return [start, Math.min(Math.ceil(length / PAGE) * PAGE, bytes - start)];
  }

  /** `alone`: disks with no request under way while it is done. undefined: nothing to do it to. */
  #plan(operation: Operation): { alone: DiskRecord[]; work: () => Promise<unknown> } | undefined {
    const plan = (alone: DiskRecord[], work: () => Promise<unknown>) => {
      this.counts.set(operation, (this.counts.get(operation) ?? 0) + 1);
      return { alone, work };
    };
    const disk = this.#any(this.disks());
    const generation = this.#any(this.generations());
    if (operation === 'create') {
      return this.disks().length < MOST_DISKS ? plan([], () => this.#create()) : undefined;
    }
    if (disk === undefined) return undefined;
    switch (operation) {
      case 'reopen disk':
        return plan([disk], () => this.#unserve(disk).then(() => this.#serve(disk)));
      case 'prepare':
        return plan([], () => this.#prepare(disk));
      case 'flatten':
        return plan([], () => this.#flatten(disk));
      case 'fork':
      case 'snapshot':
        if (this.generations().length >= KEPT && generation !== undefined) {
          return plan([], () => this.#drop(generation));
        }
        return plan([], () => this.#fork(disk, operation === 'snapshot'));
      case 'commit': {
        const clones = this.disks().filter((each) => each.clonedFrom?.present === true);
        const clone = this.#any(clones);
        const origin = clone?.clonedFrom?.disk;
        if (clone === undefined || origin?.present !== true) return undefined;
        return plan([clone, origin], () => this.#commit(clone, origin));
      }
      case 'remove':
        return this.disks().length > 1 ? plan([disk], () => this.#remove(disk)) : undefined;
    }
    if (generation === undefined) return undefined;
    switch (operation) {
      case 'drop':
        return plan([], () => this.#drop(generation));
      case 'clone':
        if (this.disks().length >= MOST_DISKS) return undefined;
        return plan([], () => this.#clone(generation));
      case 'rollback':
        return plan([generation.disk], () => this.#rollback(generation));
    }
  }

  async #create(): Promise<void> {
    const name = `disk-${newGeneration().slice(0, 8)}`;
    const size_bytes = this.pages * PAGE;
    const record = this.ledger.create(name, Buffer.alloc(size_bytes), this.recorder.bytes());
    const [, answer] = await this.#call('create', { name, size_bytes });
    await this.#created(record, answer);
  }

  async #clone(generation: Generation): Promise<void> {
    const name = `clone-${newGeneration().slice(0, 8)}`;
    const record = this.ledger.create(name, generation, this.recorder.bytes());
    const { id, disk } = generation;
    const [, answer] = await this.#call('clone', { disk: disk.name, generation: id, name });
    await this.#created(record, answer);
  }

  async #created(record: DiskRecord, answer: Answer): Promise<void> {
    record.created.done = answer;
    record.durable.push(answer);
    record.present = true;
    await this.#serve(record);
  }

  async #fork(disk: DiskRecord, prepare: boolean): Promise<void> {
    const generation = this.ledger.fork(newGeneration(), disk);
    await this.#call('fork', { disk: disk.name, generation: generation.id });
    generation.newest = lineOf(disk).newest();
    generation.present = true;
    if (prepare) await this.#prepare(disk);
  }

  async #prepare(disk: DiskRecord): Promise<void> {
    const line = lineOf(disk);
    const present = this.ledger.of(disk);
    const [, answer] = await this.#call('prepare', { disk: disk.name });
    for (const generation of present) {
      generation.durable.push(answer);
      if (generation.line === line) line.claim(new Map(generation.oldest.entries()), answer);
    }
  }

  async #drop(generation: Generation): Promise<void> {
    const { id, disk } = generation;
    const step = { sent: this.recorder.bytes() };
    generation.removed = step;
    generation.present = undefined;
    const [, answer] = await this.#call('drop', { disk: disk.name, generation: id });
    generation.removed = { ...step, done: answer };
    generation.present = false;
  }

  async #flatten(disk: DiskRecord): Promise<void> {
    disk.clonedFrom = undefined;
    await this.#call('flatten', { disk: disk.name });
  }

  async #rollback(generation: Generation): Promise<void> {
    const { id, disk } = generation;
    await this.#unserve(disk);
    disk.clonedFrom = undefined;
    const step = this.ledger.replace(disk, generation, this.recorder.bytes());
    const [, answer] = await this.#call('rollback', { disk: disk.name, generation: id });
    step.done = answer;
    await this.#serve(disk);
  }

  async #commit(clone: DiskRecord, origin: DiskRecord): Promise<void> {
    await this.#unserve(clone);
    await this.#unserve(origin);
    const bytes = this.pages * PAGE;
    const image = Buffer.from(lineOf(clone).read(0, bytes));
    const sent = this.recorder.bytes();
    origin.clonedFrom = undefined;
    const replaced = this.ledger.replace(origin, image, sent);
    const removed = this.ledger.remove(clone, sent);
    try {
      const [, answer] = await this.#call('commit', { disk: clone.name });
      replaced.done = removed.done = answer;
      this.#gone(clone);
    } catch (error) {
      if (!String(error).includes('E_STATE')) throw error;
      // One of them was flattened, and they have nothing in common any more.
      clone.clonedFrom = undefined;
      this.ledger.refused(clone, origin);
      await this.#serve(clone);
    }
    await this.#serve(origin);
  }

  async #remove(disk: DiskRecord): Promise<void> {
    await this.#unserve(disk);
    const step = this.ledger.remove(disk, this.recorder.bytes());
    const [, answer] = await this.#call('remove', { disk: disk.name });
    step.done = answer;
    this.#gone(disk);
  }

  #gone(disk: DiskRecord): void {
    disk.present = false;
    for (const each of this.ledger.generations.values()) {
      if (each.disk === disk) each.present = false;
    }
  }
}
