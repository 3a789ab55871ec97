import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { loadClusterConfig, parseClusterConfig } from '../../src/cluster/index.js';
import { temporaryFolder } from './helpers.js';

const valid = {
  version: 1,
  name: 'h1',
  address: '10.85.0.1',
  state_dir: '/var/lib/snowflock',
  run_dir: '/run/snowflock',
  ram_dir: '/dev/shm/snowflock',
  uplink: 'eth0',
  resources: { cpus: 4, memory_bytes: 8 * 2 ** 30, overcommit: { cpus: 2 } },
  tls: { ca: 'ca.crt', cert: 'host.crt', key: '/etc/keys/host.key' },
  hosts: [
    { name: 'h1', address: '10.85.0.1' },
    { name: 'h2', address: '10.85.0.2', port: 7000 },
  ],
};

const parse = (value: unknown) => parseClusterConfig(value, '/etc/snowflock/host.json');

describe('host configuration', () => {
  it('is read with its defaults, paths absolute', () => {
    expect(parse(valid)).toEqual({
      file: '/etc/snowflock/host.json',
      name: 'h1',
      address: '10.85.0.1',
      port: 7447,
      stateDir: '/var/lib/snowflock',
      runDir: '/run/snowflock',
      ramDir: '/dev/shm/snowflock',
      uplink: 'eth0',
      imageDir: '/var/lib/snowflock/image',
      mcdistPort: 7448,
      prefetchBytesPerS: 0,
      prefetchRamBytesPerS: 0,
      replayBytes: 32 * 2 ** 20,
      maxOpenFiles: 2048,
      leaseMs: 15_000,
      vmUid: 1_900_000_000,
      vmGid: 1_900_000_000,
      number: 1,
      resources: { cpus: 4, memoryBytes: 8 * 2 ** 30, overcommit: { cpus: 2, memory: 1 } },
      tls: {
        caFile: '/etc/snowflock/ca.crt',
        certFile: '/etc/snowflock/host.crt',
        keyFile: '/etc/keys/host.key',
      },
      hosts: [
        { name: 'h1', address: '10.85.0.1', port: 7447 },
        { name: 'h2', address: '10.85.0.2', port: 7000 },
      ],
    });
  });

  const faults: [string, Record<string, unknown>, string][] = [
    ['a value of the wrong type', { uplink: 7 }, '/uplink'],
    [
      'a wrong value deep inside',
      { resources: { memory_bytes: '8G' } },
      '/resources/memory_bytes: must be integer',
    ],
    ['a misspelt name', { resources: { memory_byte: 1 } }, '/resources/memory_byte: unknown name'],
    ['a missing field', { uplink: undefined }, 'uplink is missing'],
    ['an address that is none', { address: 'localhost' }, '/address: localhost is not'],
    ['a relative folder', { ram_dir: 'shm' }, '/ram_dir: shm is not an absolute path'],
    ['a run folder too long for sockets', { run_dir: `/${'x'.repeat(60)}` }, '/run_dir: '],
    ['a host name that is a path', { name: '../h1' }, '/name: '],
    ['a list without this host', { name: 'h9' }, '/hosts: this host, h9'],
    ['an address other than in the list', { address: '10.85.0.7' }, '/address: 10.85.0.7 differs'],
    ['a port other than in the list', { port: 99 }, '/port: 99 differs from 7447'],
    [
      'a host twice',
      { hosts: [...valid.hosts, { name: 'h2', address: '10.85.0.3' }] },
      '/hosts/2/name: h2 occurs twice',
    ],
    [
      'an address twice',
      { hosts: [...valid.hosts, { name: 'h3', address: '10.85.0.1' }] },
      '/hosts/2/address: 10.85.0.1:7447 occurs twice',
    ],
  ];
  for (const [title, change, message] of faults) {
    it(`is refused with the place of ${title}`, () => {
      const changed = JSON.parse(JSON.stringify({ ...valid, ...change })) as unknown;
      expect(() => parse(changed)).toThrowError(
        expect.objectContaining({
          code: 'E_CONFIG',
          message: expect.stringContaining(`/etc/snowflock/host.json: `),
        }),
      );
      expect(() => parse(changed)).toThrowError(message);
    });
  }

  describe('from a file', () => {
    let folder = temporaryFolder();
    beforeEach(() => {
      folder = temporaryFolder();
    });
    afterEach(() => folder.remove());

    it('is refused by name when the file is missing or not JSON', () => {
      const file = join(folder.path, 'host.json');
      expect(() => loadClusterConfig(file)).toThrowError(
        expect.objectContaining({ code: 'E_CONFIG', message: expect.stringContaining(file) }),
      );
      writeFileSync(file, `${JSON.stringify(valid)},`);
      expect(() => loadClusterConfig(file)).toThrowError(
        expect.objectContaining({ code: 'E_CONFIG', message: expect.stringContaining('not JSON') }),
      );
      writeFileSync(file, JSON.stringify(valid));
      expect(loadClusterConfig(file).tls.caFile).toBe(join(folder.path, 'ca.crt'));
      expect(readFileSync(file, 'utf8')).toBe(JSON.stringify(valid));
    });
  });
});
