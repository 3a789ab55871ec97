import type { SnowflockError } from '../common/errors.js';
import { type NativeFramePort, native, nativeError, netback } from './native.js';

export interface FramePortHandlers {
  onFrame(frame: Buffer): void;
  /** The interface has gone or the descriptor failed; the port is closed. */
  onEnd?(error: SnowflockError): void;
}

export interface FramePortLimits {
  /** Longer frames are dropped. Default 2048. */
  maxFrameBytes?: number;
  /** Token bucket before the handler; 0: no limit. Default 0. */
  framesPerSecond?: number;
  burst?: number;
}

/** Whole frames from and to a descriptor (tap, packet socket): for control traffic and tests. */
export class FramePort {
  readonly #port: NativeFramePort;

  /** Takes over the descriptor. E_ARGUMENT, E_NETWORK. */
  constructor(fd: number, handlers: FramePortHandlers, limits: FramePortLimits = {}) {
    this.#port = native(
      () =>
        new (netback().FramePort)(
          fd,
          {
            maxFrameBytes: limits.maxFrameBytes ?? 2048,
            framesPerSecond: limits.framesPerSecond ?? 0,
            burst: limits.burst ?? 1,
          },
          (frame) => handlers.onFrame(frame),
          (error) => handlers.onEnd?.(nativeError(error)),
        ),
    );
  }

  /** False if the kernel had no room for it. E_CLOSED, E_NETWORK. */
  send(frame: Uint8Array): boolean {
    return native(() => this.#port.send(frame));
  }

  /**
   * Frames that a packet socket's full buffer lost since the last call. 0 for other descriptors and
   * when the port is closed.
   */
  lost(): number {
    return native(() => this.#port.lost());
  }

  /** Also closes the descriptor. Closing twice is no error. */
  close(): void {
    this.#port.close();
  }
}
