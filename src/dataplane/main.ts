/**
 * The data plane process of a host. Everything it needs comes on its command line and over its RPC
 * socket; it keeps no state of its own, so killing it loses nothing (see protocol.ts).
 */
import { setPriority } from 'node:os';
import { parseArgs } from 'node:util';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { createLogger } from '../common/log.js';
import { type DataplaneServer, listenForSfld } from './rpc.js';
import { Dataplane } from './service.js';

const log = createLogger('dataplane');

async function main(): Promise<void> {
  // Guests wait for this process; on a busy host it goes before what they themselves compute.
  setPriority(-10);
  const { values } = parseArgs({
    options: {
      socket: { type: 'string' },
      'memtap-socket': { type: 'string' },
      'vm-gid': { type: 'string' },
      address: { type: 'string' },
      'mcdist-port': { type: 'string' },
      'max-open-files': { type: 'string' },
    },
  });
  const need = (name: keyof typeof values): string => {
    const value = values[name];
    if (value === undefined) throw new SnowflockError('E_ARGUMENT', `--${name} is missing`);
    return value;
  };
  let server: DataplaneServer | undefined;
  const dataplane = new Dataplane(
    {
      memtapSocket: need('memtap-socket'),
      vmGid: Number(need('vm-gid')),
      address: need('address'),
      mcdistPort: Number(need('mcdist-port')),
      maxOpenFiles: Number(need('max-open-files')),
    },
    log,
    (event) => server?.broadcast(event),
  );
  server = await listenForSfld(need('socket'), dataplane.handlers);
  log.info('ready');
  const end = (): void => {
    void (async () => {
      await server.close();
      await dataplane.close();
      process.exit(0);
    })();
  };
  process.on('SIGTERM', end);
  process.on('SIGINT', () => {
    // Ctrl-C in a terminal reaches the whole group; sfld decides when the data plane ends.
  });
}

main().catch((error: unknown) => {
  const { code, message, exitStatus } = asSnowflockError(error);
  log.fatal({ code }, message);
  process.exit(exitStatus);
});
