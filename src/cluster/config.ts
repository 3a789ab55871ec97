/**
 * The configuration of one host: `host.json`.
 *
 * On disk names are snake_case with the unit last, and unknown names are refused: a misspelt limit
 * must not silently be the default. Paths of the certificates are relative to the file's folder.
 * Every fault is `E_CONFIG` and names the file and the path of the wrong field.
 */
import { readFileSync } from 'node:fs';
import { isIPv4 } from 'node:net';
import { cpus, totalmem } from 'node:os';
import { dirname, isAbsolute, join, resolve } from 'node:path';
import Type, { type Static } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';

/** UDP port of the page server when the configuration names none. */
export const DEFAULT_MCDIST_PORT = 7448;
const DEFAULT_MAX_OPEN_FILES = 2048;
/** Several times what a small guest touches until it answers; 0.3 s of a link of 1 Gbit/s. */
const DEFAULT_REPLAY_BYTES = 32 * 2 ** 20;
export const DEFAULT_LEASE_MS = 15_000;
/** Above what systemd gives to containers (up to 1,879,048,191), below 2^31: nobody's accounts. */
const DEFAULT_VM_ID = 1_900_000_000;

/** Port of the control channel when the configuration names none. */
export const DEFAULT_CONTROL_PORT = 7447;

/**
 * The longest run directory, in bytes: a Unix socket's path is at most 107 bytes, and a socket is
 * called `<run_dir>/<vm id of 36 characters>/<name of at most 16>`.
 */
export const RUN_DIR_BYTES_MAX = 52;

const NAME_PATTERN = '^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$';

const HostEntry = Type.Object(
  {
    name: Type.String({ pattern: NAME_PATTERN }),
    address: Type.String(),
    port: Type.Optional(Type.Integer({ minimum: 1, maximum: 65535 })),
  },
  { additionalProperties: false },
);

/** The schema of `host.json`. */
export const HostConfigFile = Type.Object(
  {
    version: Type.Literal(1),
    name: Type.String({ pattern: NAME_PATTERN }),
    address: Type.String(),
    port: Type.Optional(Type.Integer({ minimum: 1, maximum: 65535 })),
    state_dir: Type.String({ minLength: 1 }),
    run_dir: Type.String({ minLength: 1 }),
    ram_dir: Type.String({ minLength: 1 }),
    uplink: Type.String({ pattern: '^[a-zA-Z0-9_.-]{1,15}$' }),
    image_dir: Type.Optional(Type.String({ minLength: 1 })),
    nat_policy: Type.Optional(Type.String({ minLength: 1 })),
    mcdist_port: Type.Optional(Type.Integer({ minimum: 1, maximum: 65535 })),
    prefetch_bytes_per_s: Type.Optional(Type.Integer({ minimum: 0, maximum: 1e12 })),
    prefetch_ram_bytes_per_s: Type.Optional(Type.Integer({ minimum: 0, maximum: 1e12 })),
    replay_bytes: Type.Optional(Type.Integer({ minimum: 0, maximum: 2 ** 36 })),
    max_open_files: Type.Optional(Type.Integer({ minimum: 1, maximum: 1_048_576 })),
    lease_ms: Type.Optional(Type.Integer({ minimum: 1000, maximum: 3_600_000 })),
    vm_uid: Type.Optional(Type.Integer({ minimum: 1, maximum: 2 ** 31 })),
    vm_gid: Type.Optional(Type.Integer({ minimum: 1, maximum: 2 ** 31 })),
    resources: Type.Optional(
      Type.Object(
        {
          cpus: Type.Optional(Type.Number({ exclusiveMinimum: 0, maximum: 65536 })),
          memory_bytes: Type.Optional(Type.Integer({ minimum: 1 })),
          overcommit: Type.Optional(
            Type.Object(
              {
                cpus: Type.Optional(Type.Number({ minimum: 0.01, maximum: 1000 })),
                memory: Type.Optional(Type.Number({ minimum: 0.01, maximum: 1000 })),
              },
              { additionalProperties: false },
            ),
          ),
        },
        { additionalProperties: false },
      ),
    ),
    tls: Type.Object(
      {
        ca: Type.String({ minLength: 1 }),
        cert: Type.String({ minLength: 1 }),
        key: Type.String({ minLength: 1 }),
      },
      { additionalProperties: false },
    ),
    hosts: Type.Array(HostEntry, { minItems: 1, maxItems: 1023 }),
  },
  { additionalProperties: false },
);
export type HostConfigFile = Static<typeof HostConfigFile>;

/** A host of the cluster as the others reach it. */
export interface HostAddress {
  readonly name: string;
  /** IPv4 address on the uplink network. */
  readonly address: string;
  /** TCP port of the control channel. */
  readonly port: number;
}

/** What a host may give to VMs. The limit on vCPUs is `cpus * overcommit.cpus`, on memory alike. */
export interface HostResources {
  readonly cpus: number;
  readonly memoryBytes: number;
  readonly overcommit: { readonly cpus: number; readonly memory: number };
}

/** One host's configuration, checked; all paths are absolute. */
export interface ClusterConfig extends HostAddress {
  /** The file it was read from. */
  readonly file: string;
  /** On disk, survives a reboot: disks, images, records. */
  readonly stateDir: string;
  /** Sockets and pid files; at most {@link RUN_DIR_BYTES_MAX} bytes long. */
  readonly runDir: string;
  /** On tmpfs: RAM replicas. */
  readonly ramDir: string;
  /** The network interface towards the other hosts. */
  readonly uplink: string;
  /** The NAT gateways' policy file; absent: families reach nothing outside. */
  readonly natPolicy?: string;
  /** Guest images; default `<state_dir>/image`. */
  readonly imageDir: string;
  /** UDP port on which this host's data plane answers page requests. */
  readonly mcdistPort: number;
  /** Disks of clones on this host are filled in the background at this rate; 0: on demand only. */
  readonly prefetchBytesPerS: number;
  /** Their RAM alike; a setting of its own, since it takes memory of this host (`ramDir`). */
  readonly prefetchRamBytesPerS: number;
  /**
   * Of what clones touched first, so much of RAM and of disk is sent to hosts of later clones before
   * they ask; 0: nothing.
   */
  readonly replayBytes: number;
  readonly maxOpenFiles: number;
  /** A parent's host and a clone's host that do not hear of each other for so long part. */
  readonly leaseMs: number;
  /**
   * VM processes run as users of their own, from this number up, so that one that breaks out cannot
   * reach another. Numbers, so that no accounts are needed.
   */
  readonly vmUid: number;
  /** Their group: it may connect to memtap, and nothing else. */
  readonly vmGid: number;
  /** Unique in the cluster: its place in the list of hosts, from 1. New hosts go to the end. */
  readonly number: number;
  readonly resources: HostResources;
  readonly tls: { readonly caFile: string; readonly certFile: string; readonly keyFile: string };
  /** All hosts, this one included. */
  readonly hosts: readonly HostAddress[];
}

/**
 * Reads and checks a host's configuration.
 * @throws {SnowflockError} `E_CONFIG` naming the file and the field.
 */
export function loadClusterConfig(file: string): ClusterConfig {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new SnowflockError('E_CONFIG', `cannot read ${file}: ${reason}`, { cause: error });
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new SnowflockError('E_CONFIG', `${file} is not JSON: ${reason}`, { cause: error });
  }
  return parseClusterConfig(value, resolve(file));
}

/** Checks an already parsed configuration; `file` is named in errors and anchors TLS paths. */
export function parseClusterConfig(value: unknown, file: string): ClusterConfig {
  const fail = (path: string, what: string): never => {
    throw new SnowflockError('E_CONFIG', `${file}: ${path}: ${what}`);
  };
  if (!Value.Check(HostConfigFile, value)) {
    const { path, what } = firstFault(value);
    return fail(path, what);
  }
  const address = (path: string, text: string): string =>
    isIPv4(text) && !text.startsWith('0.') ? text : fail(path, `${text} is not an IPv4 address`);
  const absolute = (path: string, text: string): string =>
    isAbsolute(text) ? resolve(text) : fail(path, `${text} is not an absolute path`);

  const port = value.port ?? DEFAULT_CONTROL_PORT;
  const hosts = value.hosts.map((host, index) => ({
    name: host.name,
    address: address(`/hosts/${index}/address`, host.address),
    port: host.port ?? DEFAULT_CONTROL_PORT,
  }));
  const names = new Set<string>();
  const endpoints = new Set<string>();
  hosts.forEach((host, index) => {
    if (names.has(host.name)) fail(`/hosts/${index}/name`, `${host.name} occurs twice`);
    names.add(host.name);
    const endpoint = `${host.address}:${host.port}`;
    if (endpoints.has(endpoint)) fail(`/hosts/${index}/address`, `${endpoint} occurs twice`);
    endpoints.add(endpoint);
  });
  address('/address', value.address);
  const self = hosts.find((host) => host.name === value.name);
  if (!self) return fail('/hosts', `this host, ${value.name}, is not among them`);
  if (self.address !== value.address) {
    fail('/address', `${value.address} differs from ${self.address} in the list of hosts`);
  }
  if (self.port !== port) {
    fail('/port', `${port} differs from ${self.port} in the list of hosts`);
  }
  const runDir = absolute('/run_dir', value.run_dir);
  if (Buffer.byteLength(runDir) > RUN_DIR_BYTES_MAX) {
    fail(
      '/run_dir',
      `${runDir} is longer than ${RUN_DIR_BYTES_MAX} bytes: socket paths would not fit`,
    );
  }
  const folder = dirname(file);
  const resources = value.resources ?? {};
  return {
    file,
    name: value.name,
    address: value.address,
    port,
    stateDir: absolute('/state_dir', value.state_dir),
    runDir,
    ramDir: absolute('/ram_dir', value.ram_dir),
    uplink: value.uplink,
    ...(value.nat_policy === undefined ? {} : { natPolicy: resolve(folder, value.nat_policy) }),
    imageDir:
      value.image_dir === undefined
        ? join(absolute('/state_dir', value.state_dir), 'image')
        : absolute('/image_dir', value.image_dir),
    mcdistPort: value.mcdist_port ?? DEFAULT_MCDIST_PORT,
    prefetchBytesPerS: value.prefetch_bytes_per_s ?? 0,
    prefetchRamBytesPerS: value.prefetch_ram_bytes_per_s ?? 0,
    replayBytes: value.replay_bytes ?? DEFAULT_REPLAY_BYTES,
    maxOpenFiles: value.max_open_files ?? DEFAULT_MAX_OPEN_FILES,
    leaseMs: value.lease_ms ?? DEFAULT_LEASE_MS,
    vmUid: value.vm_uid ?? DEFAULT_VM_ID,
    vmGid: value.vm_gid ?? DEFAULT_VM_ID,
    number: hosts.indexOf(self) + 1,
    resources: {
      cpus: resources.cpus ?? cpus().length,
      memoryBytes: resources.memory_bytes ?? Math.floor(totalmem() * 0.8),
      overcommit: {
        cpus: resources.overcommit?.cpus ?? 4,
        memory: resources.overcommit?.memory ?? 1,
      },
    },
    tls: {
      caFile: resolve(folder, value.tls.ca),
      certFile: resolve(folder, value.tls.cert),
      keyFile: resolve(folder, value.tls.key),
    },
    hosts,
  };
}

/** The first fault a person can act on: the deepest one, with its path and what is wrong. */
function firstFault(value: unknown): { path: string; what: string } {
  const faults = Value.Errors(HostConfigFile, value);
  // A refused extra name is reported twice, the second time for the object around it.
  const unknownName = faults.find((fault) => fault.keyword === 'boolean');
  if (unknownName) return { path: unknownName.instancePath, what: 'unknown name' };
  const fault = faults[0];
  if (!fault) return { path: '/', what: 'is not valid' };
  if (fault.keyword === 'required') {
    const missing = fault.params.requiredProperties.join(', ');
    return { path: fault.instancePath || '/', what: `${missing} is missing` };
  }
  return { path: fault.instancePath || '/', what: fault.message };
}
