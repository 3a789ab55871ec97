// Certificates, keys and connections for tests of NBD over TLS, by GnuTLS's own tools and Node's TLS.
import { once } from 'node:events';
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { connect, type TLSSocket } from 'node:tls';
import type { Disk } from '../../src/cow-disk/disk.js';
import { type ListenOptions, NbdServer, type TlsOptions } from '../../src/cow-disk/nbd-server.js';
import { ByteReader } from './nbd-client.js';
import { FLAGS, NONE, OPT, options, type RawNbd, REP, rawNbd } from './raw-nbd.js';
import { cleanup, execute, newDisk, temporary } from './support.js';

export const HOST = '127.0.0.1';
const YEAR = 'expiration_days = 365';
const PURPOSE = { server: 'tls_www_server', client: 'tls_www_client' };

async function certtool(...args: string[]): Promise<void> {
  await execute('certtool', ['--no-text', ...args]);
}

/** A certificate authority in a folder of its own. */
export class Authority {
  private constructor(readonly folder: string) {}

  static async make(): Promise<Authority> {
    const folder = await temporary();
    const template = join(folder, 'ca.cfg');
    await writeFile(template, `cn = tests\nca\ncert_signing_key\ncrl_signing_key\n${YEAR}\n`);
    const key = join(folder, 'ca-key.pem');
    await certtool('--generate-privkey', '--key-type=ecdsa', '--outfile', key);
    const cert = join(folder, 'ca-cert.pem');
    await certtool(
      ...['--generate-self-signed', '--load-privkey', key],
      ...['--template', template, '--outfile', cert],
    );
    return new Authority(folder);
  }

  /** A folder for a server or a client, named `name`; a second call renews its certificate. */
  async issue(
    name: string,
    kind: 'server' | 'client',
    o: { dates?: string; purpose?: 'server' | 'client' } = {},
  ): Promise<string> {
    const folder = join(this.folder, name);
    await mkdir(folder, { recursive: true });
    const at = (file: string) => join(folder, file);
    const template = [
      `cn = ${name}`,
      `ip_address = ${HOST}`,
      'signing_key',
      'encryption_key',
      PURPOSE[o.purpose ?? kind],
      o.dates ?? YEAR,
    ];
    await writeFile(at('template'), `${template.join('\n')}\n`);
    const key = at(`${kind}-key.pem`);
    await certtool('--generate-privkey', '--key-type=ecdsa', '--outfile', key);
    await certtool(
      ...['--generate-certificate', '--load-privkey', key, '--template', at('template')],
      ...this.#signing(),
      ...['--outfile', at(`${kind}-cert.pem`)],
    );
    await execute('cp', [join(this.folder, 'ca-cert.pem'), folder]);
    return folder;
  }

  /** Puts a list that revokes the client of `client` into the folder of a server. */
  async revoke(client: string, server: string): Promise<void> {
    const template = join(this.folder, 'crl.cfg');
    await writeFile(template, 'crl_next_update = 365\ncrl_number = 1\n');
    await certtool(
      ...['--generate-crl', '--load-certificate', join(client, 'client-cert.pem')],
      ...['--template', template, ...this.#signing()],
      ...['--outfile', join(server, 'ca-crl.pem')],
    );
  }

  #signing(): string[] {
    const of = (file: string) => join(this.folder, file);
    return ['--load-ca-certificate', of('ca-cert.pem'), '--load-ca-privkey', of('ca-key.pem')];
  }
}

/** A file of keys in which `user` has one. */
export async function keyFile(user: string): Promise<string> {
  const file = join(await temporary(), 'keys.psk');
  await execute('psktool', ['-u', user, '-p', file]);
  return file;
}

export interface TlsServer {
  server: NbdServer;
  disk: Disk;
  place: { host: string; port: number };
  /** `nbds://` of the export `disk`, with parameters of libnbd. */
  uri(parameters: Record<string, string>, user?: string): string;
}

/** A disk of 64 MiB, served as `disk` (the default export) on a free port. */
export async function serveTls(
  tls: TlsOptions,
  more: Omit<ListenOptions, 'listen'> = {},
): Promise<TlsServer> {
  const { disk } = await newDisk(64 * 2 ** 20);
  const server = await NbdServer.start({ ...more, listen: { host: HOST, port: 0, tls } });
  cleanup(() => server.close());
  await disk.serve({ server, exportName: 'disk', isDefault: true });
  const place = { host: HOST, port: server.tcp?.port ?? 0 };
  const uri = (parameters: Record<string, string>, user = '') => {
    const query = Object.entries(parameters).map(([name, value]) => `${name}=${value}`);
    return `nbds://${user}${user && '@'}${HOST}:${place.port}/disk?${query.join('&')}`;
  };
  return { server, disk, place, uri };
}

/** Up to the acknowledged STARTTLS: the next bytes are the handshake's. */
export async function beforeTls(place: { host: string; port: number }): Promise<RawNbd> {
  const raw = await rawNbd(place);
  raw.socket.write(FLAGS);
  const [reply] = await raw.ask(OPT.startTls, NONE);
  if (reply?.type !== REP.ack) throw new Error(`STARTTLS was answered ${reply?.type}`);
  return raw;
}

/** An option phase inside TLS, by a client with these credentials. */
export async function insideTls(
  place: { host: string; port: number },
  credentials: { cert?: Buffer; key?: Buffer; maxVersion?: 'TLSv1.2' },
): Promise<RawNbd & { secure: TLSSocket }> {
  const { socket } = await beforeTls(place);
  const secure: TLSSocket = connect({ socket, rejectUnauthorized: false, ...credentials });
  cleanup(() => secure.destroy());
  secure.on('error', () => undefined);
  const reader = new ByteReader(secure);
  await once(secure, 'secureConnect');
  return { ...options(secure, reader), secure };
}
