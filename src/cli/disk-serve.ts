import { isIP, isIPv4 } from 'node:net';
import { resolve } from 'node:path';
import type { Command } from 'commander';
import { InvalidArgumentError } from 'commander';
import { SnowflockError } from '../common/errors.js';
import { createLogger } from '../common/log.js';
import { MAX_OPEN_FILES } from '../cow-disk/file-cache.js';
import type { ListenOptions } from '../cow-disk/nbd-server.js';
import { parseOwner } from '../disk-server/owner.js';
import { type ServeStoreOptions, serveStore } from '../disk-server/serve.js';
import type { Exported } from '../disk-server/store-server.js';
import { diskSize, parseStoreOrDisk } from './disk-names.js';

/** Registered for NBD; taken if `--listen` names none. */
const NBD_PORT = 10809;

interface Options {
  socket?: string;
  socketOwner?: string;
  socketMode?: number;
  generations?: boolean;
  all?: boolean;
  readOnly?: boolean;
  gcRate?: number;
  maxOpenFiles?: number;
  listen?: { host: string; port: number };
  tlsDir?: string;
  tlsPsk?: string;
  tlsVerifyPeer: boolean;
  publish?: boolean;
  address?: string;
  port?: number;
  sourceFile?: string;
  prefetch?: number;
  interfaceAddress?: string;
  sourceTimeout?: number;
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
    .option('--generations', 'of a store: also all generations that have a name, as DISK@NAME')
    .option('--all', 'of a store: also those that have none, as DISK@ID')
    .option('--read-only', 'disks can only be read')
    .option('--gc-rate <size>', 'clean-up copies at most this much a second', diskSize)
    .option(
      '--publish',
      'also offer the generations named here to other hosts (`clone --from-source`)',
    )
    .option('--address <ip>', 'with --publish: IPv4 address of this host that they reach')
    .option(
      '--port <udp>',
      'with --publish of one: where they ask (default: as before, or any)',
      udp,
    )
    .option('--source-file <file>', 'with --publish of one (default: STORE/DISK@GENERATION.source)')
    .option(
      '--prefetch <size>',
      'fetch all of the generations of other hosts that disks lie on, this much a second; 0: no limit',
      rate,
    )
    .option(
      '--interface-address <ip>',
      'of this host, towards those hosts (default: by the routes)',
    )
    .option(
      '--source-timeout <s>',
      'a host that is silent for so long while it is asked is lost (default: 30)',
      seconds,
    )
    .option('--max-open-files <n>', 'files of sealed slices open at once (default: 2048)', files)
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
      const also = places.flatMap(({ disk: name, generation }): Exported[] =>
        name === null ? [] : [{ disk: name, generation }],
      );
      const disks = also.length < places.length;
      if (!disks && (o.all === true || o.generations === true)) {
        throw new SnowflockError('E_ARGUMENT', '--generations and --all need a whole store');
      }
      const owner = o.socketOwner === undefined ? {} : await parseOwner(o.socketOwner);
      await serveStore(
        store,
        {
          ...owner,
          ...(o.socketMode === undefined ? {} : { mode: o.socketMode }),
          ...listening(o),
          ...(o.socket === undefined ? {} : { socketPath: o.socket }),
          disks,
          also,
          ...(o.all === true
            ? { generations: 'all' }
            : o.generations === true
              ? { generations: 'named' }
              : {}),
          publish: toPublish(also, o),
          replicas: {
            ...(o.prefetch === undefined ? {} : { prefetch: o.prefetch }),
            ...(o.interfaceAddress === undefined ? {} : { interfaceAddress: o.interfaceAddress }),
            ...(o.sourceTimeout === undefined ? {} : { sourceTimeoutMs: 1000 * o.sourceTimeout }),
          },
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
        ({ disk: name, generation, source_file, source }) => {
          const published = `${name}@${generation}`;
          const { address, port } = source;
          process.stdout.write(
            json()
              ? `${JSON.stringify({ published, source_file, address, port })}\n`
              : `published ${published}: ${source_file}\n`,
          );
        },
      );
    });
}

/** E_ARGUMENT. */
function toPublish(named: Exported[], o: Options): NonNullable<ServeStoreOptions['publish']> {
  if (o.publish !== true) {
    if (o.address ?? o.port ?? o.sourceFile) {
      throw new SnowflockError(
        'E_ARGUMENT',
        '--address, --port and --source-file go with --publish',
      );
    }
    return [];
  }
  const generations = named.flatMap(({ disk, generation }) =>
    generation === null ? [] : [{ disk, generation }],
  );
  if (generations.length === 0) {
    throw new SnowflockError('E_ARGUMENT', '--publish needs a generation: STORE/DISK@GENERATION');
  }
  const { address, port, sourceFile } = o;
  if (address === undefined || !isIPv4(address)) {
    throw new SnowflockError(
      'E_ARGUMENT',
      '--publish needs --address, an IPv4 address of this host that the others reach',
    );
  }
  if (generations.length > 1 && (port !== undefined || sourceFile !== undefined)) {
    throw new SnowflockError(
      'E_ARGUMENT',
      '--port and --source-file are of one generation; leave them out for several',
    );
  }
  return generations.map((one) => ({
    ...one,
    address,
    ...(port === undefined ? {} : { port }),
    ...(sourceFile === undefined ? {} : { sourceFile }),
  }));
}

/** Bytes a second; 0: no limit. */
function rate(text: string): number {
  return /^0+$/.test(text) ? 0 : diskSize(text);
}

function udp(text: string): number {
  const port = /^\d{1,5}$/.test(text) ? Number(text) : 0;
  if (port < 1 || port > 65535) throw new InvalidArgumentError('must be 1 to 65535.');
  return port;
}

function seconds(text: string): number {
  const value = /^\d{1,5}(\.\d{1,3})?$/.test(text) ? Number(text) : 0;
  if (value < 0.1) throw new InvalidArgumentError('must be 0.1 to 99999 seconds.');
  return value;
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
