/**
 * The receiving end of a capture: a Unix socket that listens before the VM is paused, so that the
 * pause holds no set-up. It takes one connection per capture and bounds what it reads.
 */
import { chmodSync, chownSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { SnowflockError } from '../../common/errors.js';
import type { VmUser } from '../driver.js';

interface Reception {
  resolve: (state: Buffer) => void;
  reject: (error: Error) => void;
  socket: Socket | undefined;
}

export class StateSocket {
  #reception: Reception | undefined;

  private constructor(
    readonly path: string,
    readonly maxBytes: number,
    private readonly server: Server,
  ) {
    server.on('connection', (socket) => this.#accept(socket));
    server.unref();
  }

  static async listen(path: string, user: VmUser, maxBytes: number): Promise<StateSocket> {
    // Left over by an earlier daemon; this VM's folder is nobody else's.
    rmSync(path, { force: true });
    const server = createServer();
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(path, resolve);
    });
    chmodSync(path, 0o600);
    chownSync(path, user.uid, user.gid);
    return new StateSocket(path, maxBytes, server);
  }

  /** All bytes of the next connection, at most `maxBytes`. One at a time. */
  receive(): { state: Promise<Buffer>; abort: (why: Error) => void } {
    if (this.#reception) throw new SnowflockError('E_STATE', 'a capture is under way already');
    let reception: Reception | undefined;
    const state = new Promise<Buffer>((resolve, reject) => {
      reception = { resolve, reject, socket: undefined };
    });
    this.#reception = reception;
    const abort = (why: Error): void => {
      if (reception) this.#fail(reception, why);
    };
    // The caller may give up before it awaits.
    state.catch(() => {});
    return { state, abort };
  }

  close(): void {
    if (this.#reception) {
      this.#fail(this.#reception, new SnowflockError('E_CLOSED', 'the VM was let go'));
    }
    this.server.close();
    rmSync(this.path, { force: true });
  }

  #fail(reception: Reception, error: Error): void {
    if (this.#reception === reception) this.#reception = undefined;
    reception.socket?.destroy();
    reception.reject(error);
  }

  #accept(socket: Socket): void {
    const reception = this.#reception;
    if (!reception || reception.socket) {
      socket.destroy();
      return;
    }
    reception.socket = socket;
    const chunks: Buffer[] = [];
    let bytes = 0;
    socket.on('data', (chunk: Buffer) => {
      bytes += chunk.length;
      if (bytes > this.maxBytes) {
        const message = `device state is larger than ${this.maxBytes} bytes`;
        this.#fail(reception, new SnowflockError('E_QEMU', message));
        return;
      }
      chunks.push(chunk);
    });
    socket.on('end', () => {
      if (this.#reception === reception) this.#reception = undefined;
      reception.resolve(Buffer.concat(chunks, bytes));
    });
    socket.on('error', (error) => {
      this.#fail(reception, new SnowflockError('E_QEMU', 'capture cut short', { cause: error }));
    });
    socket.on('close', () => {
      this.#fail(reception, new SnowflockError('E_CLOSED', 'capture cut short'));
    });
  }
}
