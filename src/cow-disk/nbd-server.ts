import { SnowflockError } from '../common/errors.js';
import { addon, type NativeNbdServer, native, nativeSync } from './native.js';

/** Where to listen: on a Unix socket, on TCP, or on both with the same exports. */
export interface ListenOptions {
  socketPath?: string;
  /** Of the socket's file (default: own, 0o600). */
  uid?: number;
  gid?: number;
  mode?: number;
  listen?: TcpListen;
  /** Of all exports together (default 256, at most 4096); more are closed at once. */
  maxConnections?: number;
  /**
   * TLS clients that have not proved yet who they are (default 32, at most 1024); they take none of
   * `maxConnections`. For one more the oldest of them is disconnected.
   */
  maxHandshakes?: number;
  /** For all a client says before its first request, TLS included (default 30,000). */
  handshakeTimeoutMs?: number;
}

/** One that processes of this host can always reach. */
export type LocalListenOptions = ListenOptions & { socketPath: string };

/** A TCP port. Without `tls` only a loopback address, and only if `plaintext` is said. */
export interface TcpListen {
  /** An IPv4 or IPv6 address. */
  host: string;
  /** 0: one that is free, see `stats().port`. */
  port: number;
  tls?: TlsOptions;
  plaintext?: boolean;
}

/**
 * At least one of the two; a client may come in by either. Both are read anew for each client, so
 * what is renewed or revoked counts from the next one on.
 */
export interface TlsOptions {
  /**
   * A folder with `ca-cert.pem`, `server-cert.pem`, `server-key.pem` and, if there are revocations,
   * `ca-crl.pem`: the names of QEMU's tls-creds-x509.
   */
  directory?: string;
  /** Pre-shared keys, as psktool writes them: lines `USER:HEX KEY`. */
  pskFile?: string;
  /** Default true: a client needs a certificate of the CA. False: anybody may come in. */
  verifyPeer?: boolean;
}

/** What clients see of an export. Name and description: at most 4096 bytes of UTF-8, no NULs. */
export interface ExportOptions {
  /** Default: the empty name, which clients get that ask for none. */
  exportName?: string;
  description?: string;
  /** Default 64; a client that chooses the export beyond that is told so. */
  maxConnections?: number;
}

/** An export of a server with several. `isDefault`: it is also what the empty name stands for. */
export interface SharedServer extends ExportOptions {
  server: NbdServer;
  isDefault?: boolean;
}

/** A server of its own for one export, which is the default one. */
export type ServeOptions = ListenOptions & ExportOptions;

export interface ServedExport {
  readonly exportName: string;
  connections(): number;
  /** Ends its connections, and waits until nothing uses the device any more. */
  close(): Promise<void>;
}

export interface NbdExportStats {
  exportName: string;
  description: string;
  isDefault: boolean;
  readOnly: boolean;
  sizeBytes: number;
  /** Now, and since the export was added. */
  connections: number;
  accepted: number;
  requests: number;
}

export interface NbdServerStats {
  /** Clients that have not chosen an export yet count here only. */
  connections: number;
  accepted: number;
  /** Closed at once because of `maxConnections`. */
  refused: number;
  /** Of TCP; 0: it does not listen there. */
  port: number;
  tls: TlsStats;
  exports: NbdExportStats[];
}

/** TLS handshakes so far. `dropped`: for `maxHandshakes`, counted as `failed` too. */
export interface TlsStats {
  accepted: number;
  failed: number;
  dropped: number;
  /** Of the last that failed: the client's address and why, or the file that could not be read. */
  lastError: string;
}

/**
 * An NBD server on a Unix socket, on TCP, or both. Exports (at most 1,024) come and go while it runs, by
 * `disk.serve({ server, exportName })` and `disk.serveGeneration(generation, { server, ... })`; a
 * disk that is closed takes its exports with it.
 */
export class NbdServer {
  /** Undefined if it listens on TCP only. */
  readonly socketPath: string | undefined;
  /** The TCP address with the port in use, if it listens there. */
  readonly tcp: { host: string; port: number; tls: boolean } | undefined;
  readonly #native: NativeNbdServer;
  readonly #exports = new Map<string, ServedExport>();
  #closing: Promise<void> | undefined;

  private constructor(options: ListenOptions, started: NativeNbdServer) {
    this.socketPath = options.socketPath;
    this.#native = started;
    const { listen } = options;
    if (listen !== undefined) {
      const { port } = started.stats();
      this.tcp = { host: listen.host, port, tls: listen.tls !== undefined };
    }
  }

  /**
   * Listens; the socket appears with its owner and mode, ready to connect to. E_IN_USE if somebody
   * listens there, E_EXISTS if the path is no socket, E_CONFIG if certificates or keys cannot be
   * used, E_ARGUMENT, E_IO.
   */
  static async start(options: ListenOptions): Promise<NbdServer> {
    return new NbdServer(options, await native(() => addon().startNbdServer(options)));
  }

  get #where(): string {
    return this.socketPath ?? `${this.tcp?.host} port ${this.tcp?.port}`;
  }

  /** `device`: a handle of NativeDisk. E_EXISTS, E_CAPACITY, E_ARGUMENT, E_CLOSED. */
  addExport(device: unknown, options: ExportOptions & { isDefault?: boolean }): ServedExport {
    if (this.#closing !== undefined) {
      throw new SnowflockError('E_CLOSED', `the NBD server on ${this.#where} is closed`);
    }
    const name = options.exportName ?? '';
    const { exportName, description, isDefault, maxConnections } = options;
    nativeSync(() =>
      this.#native.addExport(device, { exportName, description, isDefault, maxConnections }),
    );
    let closing: Promise<void> | undefined;
    const remove = async () => {
      if (this.#closing !== undefined) return this.#closing;
      await native(() => this.#native.removeExport(name));
      if (this.#exports.get(name) === handle) this.#exports.delete(name);
    };
    const handle: ServedExport = {
      exportName: name,
      connections: () => {
        if (closing !== undefined) return 0;
        const all = this.#native.stats().exports;
        return all.find((entry) => entry.exportName === name)?.connections ?? 0;
      },
      close: () => {
        closing ??= remove();
        return closing;
      },
    };
    this.#exports.set(name, handle);
    return handle;
  }

  /** Ends the export's connections; resolves when its device is at rest. E_NOT_FOUND. */
  async removeExport(name: string): Promise<void> {
    const handle = this.#exports.get(name);
    if (handle === undefined) {
      throw new SnowflockError(
        'E_NOT_FOUND',
        `the NBD server on ${this.#where} has no export ${JSON.stringify(name)}`,
      );
    }
    await handle.close();
  }

  stats(): NbdServerStats {
    return this.#native.stats();
  }

  /** Ends all connections and removes the socket. */
  close(): Promise<void> {
    this.#closing ??= native(() => this.#native.close());
    return this.#closing;
  }
}

/** Serves a device on a server of its own, or as an export of one that is there. */
export async function serveDevice(
  device: unknown,
  options: ServeOptions | SharedServer,
): Promise<ServedExport> {
  if ('server' in options) return options.server.addExport(device, options);
  const server = await NbdServer.start(options);
  try {
    const { exportName, connections } = server.addExport(device, { ...options, isDefault: true });
    return { exportName, connections, close: () => server.close() };
  } catch (error) {
    await server.close();
    throw error;
  }
}
