/**
 * A server of mcdist in JavaScript, on loopback, that does what a test tells it: it welcomes whoever
 * asks, keeps what is asked, and sends what it is told to. Made from docs/mcdist.md alone.
 */
import { randomBytes } from 'node:crypto';
import { createSocket, type Socket } from 'node:dgram';
import { randomGroup } from '../../src/mcdist/groups.js';
import {
  type Announce,
  announceBody,
  type Request,
  readRequest,
  seal,
  symbols,
  TYPE,
  unseal,
  welcomeBody,
} from './wire.js';

export const LOOPBACK = '127.0.0.1';
export const FRAGMENTS = 3;

export interface FakeGeneration {
  generation: string;
  key: Buffer;
  group: string;
  groupPort: number;
  pages: Buffer[];
}

export function fakeGeneration(pages: number): FakeGeneration {
  const generation = randomBytes(16).toString('hex');
  const { group, port } = randomGroup();
  const bytes = Array.from({ length: pages }, () => randomBytes(4096));
  return { generation, key: randomBytes(32), group, groupPort: port, pages: bytes };
}

export class FakeServer {
  readonly boot = randomBytes(16);
  readonly requests: Request[] = [];
  /** Called for each request with the right cookie, after it was welcomed or not. */
  onRequest: (request: Request) => void = () => {};
  welcoming = true;
  #waiting: Array<(request: Request) => boolean> = [];
  #counter = 0n;
  #cookie = 12345n;
  #peer: { address: string; port: number } | undefined;

  private constructor(
    readonly of: FakeGeneration,
    readonly socket: Socket,
  ) {}

  static async start(of: FakeGeneration, at = LOOPBACK): Promise<FakeServer> {
    const socket = createSocket('udp4');
    await new Promise<void>((resolve) => socket.bind(0, at, resolve));
    socket.setMulticastInterface(LOOPBACK);
    socket.setMulticastLoopback(true);
    const server = new FakeServer(of, socket);
    socket.on('message', (data, from) => server.#receive(data, from));
    return server;
  }

  get address() {
    return { address: this.socket.address().address, port: this.socket.address().port };
  }

  /** The next request, or the first of all, that is like that. */
  async asked(like: (request: Request) => boolean): Promise<Request> {
    const had = this.requests.find(like);
    if (had !== undefined) return had;
    return new Promise((resolve) => {
      this.#waiting.push((request) => {
        if (!like(request)) return false;
        resolve(request);
        return true;
      });
    });
  }

  close(): Promise<void> {
    return new Promise((resolve) => this.socket.close(() => resolve()));
  }

  #receive(data: Buffer, from: { address: string; port: number }): void {
    this.#peer = from;
    const request = readRequest(unseal(this.of.key, this.#id, data));
    const client = Buffer.from(data.subarray(24, 40));
    const known = request.cookie === this.#cookie;
    const empty = request.runs.length === 0 && request.reports.length === 0;
    if (this.welcoming && (!known || empty)) {
      const echo = BigInt(data.readUIntBE(12, 6));
      const pages = BigInt(this.of.pages.length);
      this.#send(TYPE.welcome, welcomeBody(this.#cookie, client, echo, pages), {}, true);
    }
    if (!known) return;
    this.requests.push(request);
    this.onRequest(request);
    this.#waiting = this.#waiting.filter((take) => !take(request));
  }

  get #id() {
    return Buffer.from(this.of.generation, 'hex');
  }

  #send(type: number, body: Buffer, header: object, unicast = false): void {
    const packet = seal(this.of.key, {
      ...{ type, generation: this.#id, boot: this.boot, counter: ++this.#counter, body },
      ...header,
    });
    const to = unicast ? this.#peer : { address: this.of.group, port: this.of.groupPort };
    if (to !== undefined) this.socket.send(packet, to.port, to.address);
  }

  announce(announce: Partial<Announce> = {}): void {
    const pages = BigInt(this.of.pages.length);
    this.#send(
      TYPE.announce,
      announceBody({ ...this.address, held: pages, pages, ...announce }),
      {},
    );
  }

  /** Fragments of a page to the group; `pushed`: as a push cursor does. */
  page(number: number, { pushed = false, fragments = [0, 1, 2] } = {}): void {
    const page = this.of.pages[number] ?? Buffer.alloc(4096);
    symbols(page, FRAGMENTS).forEach((body, fragment) => {
      if (!fragments.includes(fragment)) return;
      this.#send(TYPE.page, body, {
        ...{ fragment, fragments: FRAGMENTS, page: BigInt(number) },
        ...(pushed ? { cursor: 0 } : {}),
      });
    });
  }

  negative(first: number, count = 1): void {
    const body = Buffer.alloc(8);
    body.writeBigUInt64BE(BigInt(first) | (BigInt(count - 1) << 40n));
    this.#send(TYPE.negative, body, { page: BigInt(first) });
  }

  /** Parity `index` over some symbols of a block, which the native code encoded. */
  parity(block: number, index: number, coverId: number, cover: bigint, symbol: Buffer): void {
    const prefix = Buffer.alloc(18);
    prefix.set([index, coverId]);
    prefix.writeBigUInt64BE(cover >> 64n, 2);
    prefix.writeBigUInt64BE(cover & 0xffffffffffffffffn, 10);
    this.#send(TYPE.parity, Buffer.concat([prefix, symbol]), {
      ...{ fragments: FRAGMENTS, page: BigInt(block * 32) },
    });
  }
}
