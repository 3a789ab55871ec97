import { SnowflockError } from '../common/errors.js';
import {
  type NativeServer,
  type NativeView,
  native,
  nativeSync,
  type ServeOptions,
} from './native.js';
import { nativeChain, type ReplicaHandle, type StoreParts } from './parts.js';
import type { Tree } from './tree.js';

/** A generation somebody reads. While it is open, or served, its slices stay as they are. */
export class OpenGeneration {
  readonly #parts: StoreParts;
  readonly #native: NativeView;
  #closed = false;

  constructor(parts: StoreParts, view: NativeView) {
    this.#parts = parts;
    this.#native = view;
  }

  /** The native view, for an NBD server with several exports. */
  get device(): NativeView {
    if (this.#closed) throw new SnowflockError('E_CLOSED', 'the generation is closed');
    return this.#native;
  }

  /** A page provider, for a page server; it keeps the generation readable by itself. */
  provider(): unknown {
    const { device } = this;
    return nativeSync(() => device.provider());
  }

  /** Serves it read-only by NBD until the result is closed. */
  async serve(options: ServeOptions): Promise<{ close(): Promise<void> }> {
    const { device } = this;
    const server: NativeServer = await native(() => device.serve(options));
    return {
      close: async () => {
        await native(() => server.close());
        this.#parts.changed();
      },
    };
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#native.close();
    this.#parts.changed();
  }
}

/** Opens the image of the slice that `find` chooses. E_NOT_FOUND, E_CORRUPT, E_IO. */
export function openView(
  parts: StoreParts,
  replica: ReplicaHandle | undefined,
  find: (tree: Tree) => string,
): Promise<OpenGeneration> {
  return parts.gate.shared(async () => {
    const { tree } = parts.ledger;
    const chain = nativeChain(tree, find(tree));
    const view = await native(() => parts.native.openView(chain, replica));
    return new OpenGeneration(parts, view);
  });
}
