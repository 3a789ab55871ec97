/**
 * A cluster's certificate authority and its hosts' certificates and configurations.
 *
 * The cluster's folder:
 *   cluster.json            name and hosts: what the next addHost() builds on
 *   ca.key, ca.crt          the authority; ca.key never leaves this folder
 *   hosts/NAME/host.json    configuration, complete: hand this folder to the host
 *   hosts/NAME/ca.crt, host.crt, host.key
 *   hosts/NAME/nbd-tls/     the same under the names that QEMU, nbdkit and libnbd look for
 *
 * Keys are ECDSA P-256. A host's certificate carries its name (DNS) and address (IP): a peer is
 * who its certificate's DNS name says. Keys have mode 0600, folders 0700.
 *
 * A cluster is made in a folder beside its own and renamed: half a cluster is never seen. Adding
 * a host writes the new host's folder first, then the others' lists, each file replaced as a
 * whole; a run cut short is completed by running it again.
 *
 * Left out: revocation lists. A host taken off the others' `hosts` lists is refused by name.
 */
import { generateKeyPairSync, randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import {
  chmod,
  copyFile,
  mkdir,
  mkdtemp,
  readFile,
  rename,
  rm,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import Type from 'typebox';
import { Value } from 'typebox/value';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { DEFAULT_CONTROL_PORT, type HostConfigFile, parseClusterConfig } from './config.js';
import { openssl } from './openssl.js';

/** What is to be known of a host to make its configuration. */
export interface HostSpec {
  readonly name: string;
  /** IPv4 address on the uplink network. */
  readonly address: string;
  readonly port?: number;
  /** Default `/var/lib/snowflock`. */
  readonly stateDir?: string;
  /** Default `/run/snowflock`. */
  readonly runDir?: string;
  /** On tmpfs; default `/dev/shm/snowflock`. */
  readonly ramDir?: string;
  /** Default `eth0`. */
  readonly uplink?: string;
  /** Default: this many CPUs and 80 % of the memory of the machine that reads the file. */
  readonly resources?: HostConfigFile['resources'];
}

const ClusterFile = Type.Object({
  version: Type.Literal(1),
  name: Type.String(),
  hosts: Type.Array(
    Type.Object({ name: Type.String(), address: Type.String(), port: Type.Integer() }),
  ),
});

const CERTIFICATE_DAYS = '3650';

/**
 * Makes a cluster: authority, certificates and a `host.json` for each host.
 * @param dir the cluster's folder; it must not exist.
 * @returns each host's configuration file.
 * @throws {SnowflockError} `E_EXISTS`, `E_CONFIG` (names the field), `E_REQUIREMENT`, `E_IO`.
 */
export async function initCluster(options: {
  dir: string;
  name?: string;
  hosts: readonly HostSpec[];
}): Promise<Map<string, string>> {
  const dir = resolve(options.dir);
  if (existsSync(dir)) throw new SnowflockError('E_EXISTS', `${dir} exists`);
  const hosts = options.hosts.map(withDefaults);
  for (const host of hosts) checkHost(host, hosts);
  await mkdir(dirname(dir), { recursive: true });
  const making = await mkdtemp(`${dir}.making-`);
  try {
    const name = options.name ?? basename(dir);
    await makeAuthority(making, name);
    await Promise.all(hosts.map((host) => writeHost(making, host, hosts)));
    await writeJson(join(making, 'cluster.json'), clusterFile(name, hosts));
    await rename(making, dir);
  } catch (error) {
    await rm(making, { recursive: true, force: true });
    throw asSnowflockError(error, 'E_IO');
  }
  return new Map(hosts.map((host) => [host.name, join(dir, 'hosts', host.name, 'host.json')]));
}

/**
 * Adds a host to a cluster: its certificate and configuration, and its name in the lists of the
 * others (their daemons read the list when they start).
 * @returns the new host's configuration file.
 */
export async function addHost(dir: string, spec: HostSpec): Promise<string> {
  const file = join(dir, 'cluster.json');
  let cluster: unknown;
  try {
    cluster = JSON.parse(await readFile(file, 'utf8'));
  } catch (error) {
    throw new SnowflockError('E_CONFIG', `cannot read ${file}`, { cause: error });
  }
  if (!Value.Check(ClusterFile, cluster)) {
    throw new SnowflockError('E_CONFIG', `${file} is not a cluster's file`);
  }
  const host = withDefaults(spec);
  if (cluster.hosts.some((other) => other.name === host.name)) {
    throw new SnowflockError('E_EXISTS', `host ${host.name} is in the cluster already`);
  }
  const hosts = [...cluster.hosts, { name: host.name, address: host.address, port: host.port }];
  checkHost(host, hosts);
  const folder = join(dir, 'hosts', host.name);
  try {
    await rm(folder, { recursive: true, force: true });
    await writeHost(dir, host, hosts);
    for (const other of cluster.hosts) {
      const otherFile = join(dir, 'hosts', other.name, 'host.json');
      const config = JSON.parse(await readFile(otherFile, 'utf8')) as HostConfigFile;
      await writeJson(otherFile, { ...config, hosts });
    }
    await writeJson(file, { ...cluster, hosts });
  } catch (error) {
    throw asSnowflockError(error, 'E_IO');
  }
  return join(folder, 'host.json');
}

type FullSpec = Required<Omit<HostSpec, 'resources'>> & Pick<HostSpec, 'resources'>;
type Listed = { name: string; address: string; port: number };

function withDefaults(spec: HostSpec): FullSpec {
  return {
    port: DEFAULT_CONTROL_PORT,
    stateDir: '/var/lib/snowflock',
    runDir: '/run/snowflock',
    ramDir: '/dev/shm/snowflock',
    uplink: 'eth0',
    ...spec,
  };
}

function hostConfig(host: FullSpec, hosts: readonly Listed[]): HostConfigFile {
  return {
    version: 1,
    name: host.name,
    address: host.address,
    port: host.port,
    state_dir: host.stateDir,
    run_dir: host.runDir,
    ram_dir: host.ramDir,
    uplink: host.uplink,
    ...(host.resources ? { resources: host.resources } : {}),
    tls: { ca: 'ca.crt', cert: 'host.crt', key: 'host.key' },
    hosts: hosts.map(({ name, address, port }) => ({ name, address, port })),
  };
}

function clusterFile(name: string, hosts: readonly Listed[]): object {
  return {
    version: 1,
    name,
    hosts: hosts.map((host) => ({ name: host.name, address: host.address, port: host.port })),
  };
}

/** The host's file is checked before anything is made of it: names go into paths and subjects. */
function checkHost(host: FullSpec, hosts: readonly Listed[]): void {
  parseClusterConfig(hostConfig(host, hosts), `host ${host.name}`);
}

async function writeHost(dir: string, host: FullSpec, hosts: readonly Listed[]): Promise<void> {
  const folder = join(dir, 'hosts', host.name);
  await mkdir(folder, { recursive: true, mode: 0o700 });
  await copyFile(join(dir, 'ca.crt'), join(folder, 'ca.crt'));
  const key = join(folder, 'host.key');
  await writeKey(key);
  const request = join(folder, 'request.cnf');
  await writeFile(
    request,
    [
      '[req]',
      'prompt = no',
      'distinguished_name = subject',
      '[subject]',
      `CN = ${host.name}`,
      '[host]',
      'basicConstraints = critical, CA:FALSE',
      'keyUsage = critical, digitalSignature',
      'extendedKeyUsage = serverAuth, clientAuth',
      `subjectAltName = DNS:${host.name}, IP:${host.address}`,
      'subjectKeyIdentifier = hash',
      'authorityKeyIdentifier = keyid',
      '',
    ].join('\n'),
  );
  const csr = join(folder, 'request.csr');
  await openssl(['req', '-new', '-sha256', '-config', request, '-key', key, '-out', csr]);
  await openssl([
    ...['x509', '-req', '-sha256', '-in', csr, '-out', join(folder, 'host.crt')],
    ...['-CA', join(dir, 'ca.crt'), '-CAkey', join(dir, 'ca.key')],
    ...['-set_serial', serial(), '-days', CERTIFICATE_DAYS],
    ...['-extfile', request, '-extensions', 'host'],
  ]);
  await rm(request);
  await rm(csr);
  await mkdir(join(folder, 'nbd-tls'));
  for (const [name, file] of NBD_TLS_NAMES)
    await symlink(`../${file}`, join(folder, 'nbd-tls', name));
  await writeJson(join(folder, 'host.json'), hostConfig(host, hosts));
}

/** A host's certificate is good for both ends of a connection. */
const NBD_TLS_NAMES = [
  ['ca-cert.pem', 'ca.crt'],
  ['server-cert.pem', 'host.crt'],
  ['server-key.pem', 'host.key'],
  ['client-cert.pem', 'host.crt'],
  ['client-key.pem', 'host.key'],
] as const;

async function makeAuthority(dir: string, name: string): Promise<void> {
  await chmod(dir, 0o700);
  const key = join(dir, 'ca.key');
  await writeKey(key);
  const request = join(dir, 'request.cnf');
  await writeFile(
    request,
    [
      '[req]',
      'prompt = no',
      'distinguished_name = subject',
      'x509_extensions = authority',
      '[subject]',
      // The random part keeps two clusters of one name apart in error messages and chains.
      `CN = SnowFlock ${name.replace(/[^A-Za-z0-9._-]/g, '_').slice(0, 32)} ${randomBytes(4).toString('hex')}`,
      '[authority]',
      'basicConstraints = critical, CA:TRUE, pathlen:0',
      'keyUsage = critical, keyCertSign, cRLSign',
      'subjectKeyIdentifier = hash',
      '',
    ].join('\n'),
  );
  await openssl([
    ...['req', '-x509', '-new', '-sha256', '-config', request, '-key', key],
    ...['-set_serial', serial(), '-days', CERTIFICATE_DAYS, '-out', join(dir, 'ca.crt')],
  ]);
  await rm(request);
}

/** A random positive serial of 127 bits (RFC 5280, 4.1.2.2: at most 20 bytes). */
function serial(): string {
  const bytes = randomBytes(16);
  bytes[0] = ((bytes[0] ?? 0) & 0x7f) | 0x40;
  return `0x${bytes.toString('hex')}`;
}

/** The key is made here and written with its mode: it is at no instant readable by others. */
async function writeKey(file: string): Promise<void> {
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  const pem = privateKey.export({ type: 'pkcs8', format: 'pem' });
  await writeFile(file, pem, { mode: 0o600, flag: 'wx' });
}

async function writeJson(file: string, value: unknown): Promise<void> {
  const making = `${file}.making`;
  await writeFile(making, `${JSON.stringify(value, null, 2)}\n`, { mode: 0o644 });
  await rename(making, file);
}
