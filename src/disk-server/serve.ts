import { join, resolve } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { listenForControl } from '../cow-disk/control.js';
import type { NbdServer } from '../cow-disk/nbd-server.js';
import { nbdUri } from '../cow-disk/transfer.js';
import { notifyServiceManager } from './notify.js';
import type { Publication, PublishPlan } from './publications.js';
import type { ReplicasOptions } from './replicas.js';
import { type ServePlan, StoreServer } from './store-server.js';

export type ServeStoreOptions = Omit<ServePlan, 'socketPath'> & {
  /** Default: `nbd.sock` in the store. */
  socketPath?: string;
  gc_bytes_per_s?: number;
  /** Files of sealed slices open at once (StoreOptions). */
  max_open_files?: number;
  replicas?: Omit<ReplicasOptions, 'warn'>;
  /** Generations offered to other hosts, each by a source file. */
  publish?: (PublishPlan & { disk: string; generation: string })[];
};

const REFUSALS_MS = 5000;
const ERRORS_MS = 1000;

/** sun_path of unix(7), with its final NUL. */
const SOCKET_PATH_BYTES = 107;

/**
 * Serves a store in the foreground: NBD and control socket, until SIGINT or SIGTERM; then clients
 * are disconnected, everything is made durable and this resolves. A second signal ends the process at
 * once (what NBD clients flushed is safe). `onExport` is told what can be connected to, and how.
 */
export async function serveStore(
  directory: string,
  options: ServeStoreOptions,
  log: Logger,
  onExport: (one: { name: string; uris: string[] }) => void,
  onPublished: (one: Publication) => void = () => undefined,
): Promise<void> {
  const socketPath = resolve(options.socketPath ?? join(directory, 'nbd.sock'));
  for (const path of [socketPath, join(directory, 'store.sock')]) {
    if (Buffer.byteLength(path) > SOCKET_PATH_BYTES) {
      throw new SnowflockError(
        'E_ARGUMENT',
        `${path} is too long for a socket (${SOCKET_PATH_BYTES} bytes)`,
      );
    }
  }
  // From here on: a signal during start-up must not leave sockets behind.
  const ended = endSignal();
  const { gc_bytes_per_s, max_open_files, replicas, publish = [], ...plan } = options;
  const store = await StoreServer.open(directory, {
    ...replicas,
    ...(gc_bytes_per_s === undefined ? {} : { gc_bytes_per_s }),
    ...(max_open_files === undefined ? {} : { max_open_files }),
    warn: (message) => log.warn(message),
  });
  let control: { close(): Promise<void> } | undefined;
  const watches: NodeJS.Timeout[] = [];
  try {
    await store.serve({ ...plan, socketPath });
    const published: Publication[] = [];
    for (const one of publish) published.push(await store.publish(one, one));
    control = await listenForControl(store, log);
    const server = await store.server();
    for (const { name: export_name, socket } of store.exported()) {
      const tcp = server?.tcp === undefined ? [] : [nbdUri({ ...server.tcp, export_name })];
      onExport({ name: export_name, uris: [nbdUri({ socket, export_name }), ...tcp] });
    }
    if (server !== undefined) watches.push(reportRefusals(server, log));
    watches.push(reportErrors(store, log));
    for (const one of published) onPublished(one);
    notifyServiceManager('READY=1');
    await ended;
    notifyServiceManager('STOPPING=1');
  } finally {
    for (const watch of watches) clearInterval(watch);
    await control?.close();
    await store.close();
  }
}

/** Logs TLS clients that were not let in; at most a line every few seconds, however many they are. */
function reportRefusals(server: NbdServer, log: Logger): NodeJS.Timeout {
  let known = 0;
  return setInterval(() => {
    const { failed, lastError } = server.stats().tls;
    if (failed === known) return;
    log.warn({ clients: failed - known, last: lastError }, 'TLS clients were not let in');
    known = failed;
  }, REFUSALS_MS).unref();
}

/** Logs what the clients of each disk met, once for each time its counts have risen. */
function reportErrors(store: StoreServer, log: Logger): NodeJS.Timeout {
  const known = new Map<string, number>();
  return setInterval(() => {
    const now = store.errors();
    for (const disk of known.keys()) {
      if (!now.some((one) => one.disk === disk)) known.delete(disk); // opened again, it counts anew
    }
    for (const { disk, errors } of now) {
      const { io, no_space, last } = errors;
      const before = known.get(disk);
      known.set(disk, io + no_space);
      if (before === io + no_space) continue;
      log.error({ disk, io_errors: io, no_space_errors: no_space, last }, 'requests failed');
    }
  }, ERRORS_MS).unref();
}

function endSignal(): Promise<void> {
  return new Promise((resolve) => {
    let again = false;
    const onSignal = (signal: NodeJS.Signals): void => {
      if (again) process.exit(signal === 'SIGINT' ? 130 : 143);
      again = true;
      resolve();
    };
    process.on('SIGINT', onSignal);
    process.on('SIGTERM', onSignal);
  });
}
