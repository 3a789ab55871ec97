// A small NBD client for tests: many requests under way at once, replies in any order.
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';

export const CMD = {
  read: 0,
  write: 1,
  disconnect: 2,
  flush: 3,
  trim: 4,
  cache: 5,
  zero: 6,
  status: 7,
};

export class NbdError extends Error {
  constructor(readonly errno: number) {
    super(`NBD error ${errno}`);
  }
}

/** Takes exact numbers of bytes from a socket. */
export class ByteReader {
  #chunks: Buffer[] = [];
  #bytes = 0;
  #want: { bytes: number; resolve: (b: Buffer) => void; reject: (e: Error) => void } | undefined;
  #ended: Error | undefined;

  constructor(socket: Socket) {
    socket.on('data', (chunk: Buffer) => {
      this.#chunks.push(chunk);
      this.#bytes += chunk.length;
      this.#serve();
    });
    const end = (error?: Error) => {
      this.#ended ??= error ?? new Error('connection closed');
      this.#want?.reject(this.#ended);
      this.#want = undefined;
    };
    socket.on('close', () => end());
    socket.on('error', end);
  }

  take(bytes: number): Promise<Buffer> {
    return new Promise((resolve, reject) => {
      this.#want = { bytes, resolve, reject };
      this.#serve();
      if (this.#want !== undefined && this.#ended !== undefined) reject(this.#ended);
    });
  }

  #serve(): void {
    const want = this.#want;
    if (want === undefined || this.#bytes < want.bytes) return;
    const all = this.#chunks.length === 1 ? this.#chunks[0] : Buffer.concat(this.#chunks);
    const buffer = all ?? Buffer.alloc(0);
    this.#want = undefined;
    this.#chunks = [buffer.subarray(want.bytes)];
    this.#bytes -= want.bytes;
    want.resolve(buffer.subarray(0, want.bytes));
  }
}

interface Waiting {
  length: number;
  resolve: (data: Buffer) => void;
  reject: (error: Error) => void;
}

export class NbdClient {
  size = 0;
  flags = 0;
  readonly #pending = new Map<bigint, Waiting>();
  #cookie = 0n;

  private constructor(
    readonly socket: Socket,
    readonly reader: ByteReader,
  ) {}

  /** Connects by NBD_OPT_EXPORT_NAME: simple replies only. */
  static async connect(socketPath: string, name = ''): Promise<NbdClient> {
    const socket = connect(socketPath);
    const reader = new ByteReader(socket);
    const client = new NbdClient(socket, reader);
    await once(socket, 'connect');
    await reader.take(18);
    const text = Buffer.from(name);
    const option = Buffer.alloc(4 + 16);
    option.writeUInt32BE(3, 0);
    option.write('IHAVEOPT', 4, 'latin1');
    option.writeUInt32BE(1, 12);
    option.writeUInt32BE(text.length, 16);
    socket.write(Buffer.concat([option, text]));
    const answer = await reader.take(10);
    client.size = Number(answer.readBigUInt64BE(0));
    client.flags = answer.readUInt16BE(8);
    void client.#receive();
    return client;
  }

  get pending(): number {
    return this.#pending.size;
  }

  async #receive(): Promise<void> {
    try {
      for (;;) {
        const head = await this.reader.take(16);
        if (head.readUInt32BE(0) !== 0x67446698) throw new Error('bad reply magic');
        const error = head.readUInt32BE(4);
        const cookie = head.readBigUInt64BE(8);
        const waiting = this.#pending.get(cookie);
        if (waiting === undefined) throw new Error('reply to nothing');
        this.#pending.delete(cookie);
        if (error !== 0) waiting.reject(new NbdError(error));
        else waiting.resolve(Buffer.from(await this.reader.take(waiting.length)));
      }
    } catch (error) {
      for (const waiting of this.#pending.values()) waiting.reject(error as Error);
      this.#pending.clear();
      this.socket.destroy();
    }
  }

  request(type: number, offset: number, length: number, data?: Buffer, flags = 0): Promise<Buffer> {
    const head = Buffer.alloc(28);
    const cookie = ++this.#cookie;
    head.writeUInt32BE(0x25609513, 0);
    head.writeUInt16BE(flags, 4);
    head.writeUInt16BE(type, 6);
    head.writeBigUInt64BE(cookie, 8);
    head.writeBigUInt64BE(BigInt(offset), 16);
    head.writeUInt32BE(length, 24);
    return new Promise((resolve, reject) => {
      this.#pending.set(cookie, { length: type === CMD.read ? length : 0, resolve, reject });
      if (this.socket.destroyed) reject(new Error('connection closed'));
      this.socket.write(data === undefined ? head : Buffer.concat([head, data]));
    });
  }

  read(offset: number, length: number): Promise<Buffer> {
    return this.request(CMD.read, offset, length);
  }
  async write(offset: number, data: Buffer, flags = 0): Promise<void> {
    await this.request(CMD.write, offset, data.length, data, flags);
  }
  async zero(offset: number, length: number): Promise<void> {
    await this.request(CMD.zero, offset, length);
  }
  async trim(offset: number, length: number): Promise<void> {
    await this.request(CMD.trim, offset, length);
  }
  async flush(): Promise<void> {
    await this.request(CMD.flush, 0, 0);
  }

  async close(): Promise<void> {
    if (this.socket.closed) return;
    this.socket.destroy();
    await once(this.socket, 'close');
  }
}
