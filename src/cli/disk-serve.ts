import { isIP } from 'node:net';
import { resolve } from 'node:path';
import type { Command } from 'commander';
import { InvalidArgumentError } from 'commander';
import { SnowflockError } from '../common/errors.js';
import { createLogger } from '../common/log.js';
import { MAX_OPEN_FILES } from '../cow-disk/file-cache.js';
import type { ListenOptions } from '../cow-disk/nbd-server.js';
import { parseOwner } from '../disk-server/owner.js';
import { serveStore } from '../disk-server/serve.js';
import type { Exported } from '../disk-server/store-server.js';
import { diskSize, parseStoreOrDisk } from './disk-names.js';

/** Registered for NBD; taken if `--listen` names none. */
const NBD_PORT = 10809;

interface Options {
  socket?: string;
  socketOwner?: string;
  socketMode?: number;
  all?: boolean;
  readOnly?: boolean;
  gcRate?: number;
  maxOpenFiles?: number;
  listen?: { host: string; port: number };
  tlsDir?: string;
  tlsPsk?: string;
  tlsVerifyPeer: boolean;
}

export function addDiskServeCommand(disk: Command, json: () => boolean): void {
  disk
    .command('serve')
    .description('serve disks by NBD until SIGINT or SIGTERM, and all other commands on the store')
    .argument('<what...>', 'a store, or STORE/DISK[@GENERATION] of one store')
    .option('--socket <path>', 'where to listen (default: STORE/nbd.sock)')
    .option('--socket-owner <user>', 'who may connect: USER or USER:GROUP (default: who serves)')
    .option('--socket-mode <mode>', 'mode of the socket, octal (default: 600)', octal)
    .option('--listen <addr:port>', 'also on TCP, with TLS (port: default 10809)', tcpAddress)
    .option('--tls-dir <folder>', 'ca-cert.pem, server-cert.pem and server-key.pem')
    .option('--tls-psk <file>', 'pre-shared keys, as psktool makes them')
    .option('--no-tls-verify-peer', 'clients need no certificate')
    .option('--all', 'also generations that have no name, as DISK@ID')
    .option('--read-only', 'disks can only be read')
    .option('--gc-rate <size>', 'clean-up copies at most this much a second', diskSize)
    .option('--max-open-files <n>', 'files of sealed slices open at once (default: 256)', files)
    .action(async (names: string[], o: Options) => {
      const places = names.map(parseStoreOrDisk);
      const stores = new Set(places.map(({ store }) => store));
      const [store = ''] = stores;
      if (stores.size !== 1) {
        throw new SnowflockError(
          'E_ARGUMENT',
          `one process serves one store; these are ${stores.size}: ${[...stores].join(', ')}`,
        );
      }
      const only = places.flatMap(({ disk: name, generation }): Exported[] =>
        name === null ? [] : [{ disk: name, generation }],
      );
      const owner = o.socketOwner === undefined ? {} : await parseOwner(o.socketOwner);
      await serveStore(
        store,
        {
          ...owner,
          ...(o.socketMode === undefined ? {} : { mode: o.socketMode }),
          ...listening(o),
          ...(o.socket === undefined ? {} : { socketPath: o.socket }),
          ...(only.length === places.length ? { only } : {}),
          unnamed: o.all === true,
          readOnly: o.readOnly === true,
          ...(o.gcRate === undefined ? {} : { gc_bytes_per_s: o.gcRate }),
          ...(o.maxOpenFiles === undefined ? {} : { max_open_files: o.maxOpenFiles }),
        },
        createLogger('disk-serve'),
        ({ name, uris }) => {
          const [uri, tcp_uri] = uris;
          const lines = json() ? [JSON.stringify({ export: name, uri, tcp_uri })] : uris;
          process.stdout.write(lines.map((line) => `${line}\n`).join(''));
        },
      );
    });
}

function octal(text: string): number {
  if (!/^0?[0-7]{3}$/.test(text)) throw new InvalidArgumentError('must be octal, e.g. 660.');
  return Number.parseInt(text, 8);
}

function files(text: string): number {
  const value = Number(text);
  if (!/^\d+$/.test(text) || value < 1 || value > MAX_OPEN_FILES) {
    throw new InvalidArgumentError(`must be 1 to ${MAX_OPEN_FILES}.`);
  }
  return value;
}

/** TCP is for other hosts: only with TLS. */
function listening(o: Options): Pick<ListenOptions, 'listen'> {
  const tls = {
    ...(o.tlsDir === undefined ? {} : { directory: resolve(o.tlsDir) }),
    ...(o.tlsPsk === undefined ? {} : { pskFile: resolve(o.tlsPsk) }),
  };
  const credentials = Object.keys(tls).length > 0;
  if (o.listen === undefined) {
    if (!credentials && o.tlsVerifyPeer) return {};
    throw new SnowflockError('E_ARGUMENT', 'the TLS options go with --listen');
  }
  if (!credentials) {
    throw new SnowflockError('E_ARGUMENT', '--listen needs --tls-dir, --tls-psk or both');
  }
  return { listen: { ...o.listen, tls: { ...tls, verifyPeer: o.tlsVerifyPeer } } };
}

function tcpAddress(text: string): { host: string; port: number } {
  const [, v6, v4, port] = /^(?:\[([^\]]*)\]|([^:]*))(?::(\d{1,5}))?$/.exec(text) ?? [];
  const host = v6 ?? v4 ?? '';
  const number = port === undefined ? NBD_PORT : Number(port);
  if (isIP(host) !== (v6 === undefined ? 4 : 6) || number > 65535) {
    throw new InvalidArgumentError('must be like 192.0.2.1:10809 or [2001:db8::1]:10809.');
  }
  return { host, port: number };
}
