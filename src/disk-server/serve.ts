import { join, resolve } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { listenForControl } from '../cow-disk/control.js';
import { notifyServiceManager } from './notify.js';
import type { Publication, PublishPlan } from './publications.js';
import type { ReplicasOptions } from './replicas.js';
import { type ServePlan, StoreServer } from './store-server.js';

export type ServeStoreOptions = Omit<ServePlan, 'socketPath'> & {
  /** Default: `nbd.sock` in the store. */
  socketPath?: string;
  gc_bytes_per_s?: number;
  replicas?: Omit<ReplicasOptions, 'warn'>;
  /** Generations offered to other hosts, each by a source file. */
  publish?: (PublishPlan & { disk: string; generation: string })[];
};

/** sun_path of unix(7), with its final NUL. */
const SOCKET_PATH_BYTES = 107;

/**
 * Serves a store in the foreground: NBD and control socket, until SIGINT or SIGTERM; then clients
 * are disconnected, everything is made durable and this resolves. A second signal ends the process at
 * once (what NBD clients flushed is safe). `onExport` is told what can be connected to.
 */
export async function serveStore(
  directory: string,
  options: ServeStoreOptions,
  log: Logger,
  onExport: (one: { name: string; socket: string }) => void,
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
  const { gc_bytes_per_s, replicas, publish = [], ...plan } = options;
  const store = await StoreServer.open(directory, {
    ...replicas,
    ...(gc_bytes_per_s === undefined ? {} : { gc_bytes_per_s }),
    warn: (message) => log.warn(message),
  });
  let control: { close(): Promise<void> } | undefined;
  try {
    await store.serve({ ...plan, socketPath });
    const published: Publication[] = [];
    for (const one of publish) published.push(await store.publish(one, one));
    control = await listenForControl(store, log);
    for (const one of store.exported()) onExport(one);
    for (const one of published) onPublished(one);
    notifyServiceManager('READY=1');
    await ended;
    notifyServiceManager('STOPPING=1');
  } finally {
    await control?.close();
    await store.close();
  }
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
