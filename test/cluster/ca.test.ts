import { X509Certificate } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { addHost, initCluster, loadClusterConfig } from '../../src/cluster/index.js';
import { temporaryFolder } from './helpers.js';

describe('cluster folder', () => {
  let folder = temporaryFolder();
  let dir = '';
  beforeEach(() => {
    folder = temporaryFolder();
    dir = join(folder.path, 'cluster');
  });
  afterEach(() => folder.remove());

  const hosts = [
    { name: 'h1', address: '10.85.0.1' },
    { name: 'h2', address: '10.85.0.2' },
  ];

  it('holds a configuration and a certificate with name and address for each host', async () => {
    const files = await initCluster({ dir, hosts });
    const ca = new X509Certificate(readFileSync(join(dir, 'ca.crt')));
    expect(ca.ca).toBe(true);
    for (const host of hosts) {
      const config = loadClusterConfig(files.get(host.name) ?? '');
      const certificate = new X509Certificate(readFileSync(config.tls.certFile));
      expect(certificate.subjectAltName).toBe(`DNS:${host.name}, IP Address:${host.address}`);
      expect(certificate.verify(ca.publicKey)).toBe(true);
      expect(certificate.ca).toBe(false);
      expect(certificate.publicKey.asymmetricKeyDetails?.namedCurve).toBe('prime256v1');
    }
  });

  it('keeps keys from others', async () => {
    await initCluster({ dir, hosts });
    expect(statSync(dir).mode & 0o777).toBe(0o700);
    for (const key of ['ca.key', 'hosts/h1/host.key', 'hosts/h2/host.key']) {
      expect(statSync(join(dir, key)).mode & 0o777).toBe(0o600);
    }
    expect(readdirSync(join(dir, 'hosts', 'h1')).sort()).toEqual([
      'ca.crt',
      'host.crt',
      'host.json',
      'host.key',
      'nbd-tls',
    ]);
    const nbd = join(dir, 'hosts', 'h1', 'nbd-tls');
    expect(readFileSync(join(nbd, 'server-cert.pem'))).toEqual(
      readFileSync(join(dir, 'hosts', 'h1', 'host.crt')),
    );
  });

  it('gets further hosts, and the others learn of them', async () => {
    const files = await initCluster({ dir, hosts });
    const added = await addHost(dir, { name: 'h3', address: '10.85.0.3' });
    for (const file of [...files.values(), added]) {
      expect(loadClusterConfig(file).hosts.map((host) => host.name)).toEqual(['h1', 'h2', 'h3']);
    }
    const ca = new X509Certificate(readFileSync(join(dir, 'ca.crt')));
    const certificate = new X509Certificate(readFileSync(loadClusterConfig(added).tls.certFile));
    expect(certificate.verify(ca.publicKey)).toBe(true);
  });

  it('refuses a host that is there already, and changes nothing', async () => {
    const files = await initCluster({ dir, hosts });
    const key = readFileSync(join(dir, 'hosts', 'h2', 'host.key'));
    await expect(addHost(dir, { name: 'h2', address: '10.85.0.9' })).rejects.toMatchObject({
      code: 'E_EXISTS',
    });
    await expect(addHost(dir, { name: 'h9', address: '10.85.0.2' })).rejects.toMatchObject({
      code: 'E_CONFIG',
    });
    expect(readFileSync(join(dir, 'hosts', 'h2', 'host.key'))).toEqual(key);
    expect(loadClusterConfig(files.get('h1') ?? '').hosts).toHaveLength(2);
    expect(existsSync(join(dir, 'hosts', 'h9'))).toBe(false);
  });

  it('refuses an existing folder and a bad host, and leaves nothing half made', async () => {
    mkdirSync(dir);
    await expect(initCluster({ dir, hosts })).rejects.toMatchObject({ code: 'E_EXISTS' });
    const other = join(folder.path, 'other');
    for (const bad of [
      { name: 'h1\n[x]', address: '10.85.0.1' },
      { name: 'h1', address: '10.85.0.1, DNS:h2' },
    ]) {
      await expect(initCluster({ dir: other, hosts: [bad] })).rejects.toMatchObject({
        code: 'E_CONFIG',
      });
    }
    expect(readdirSync(folder.path)).toEqual(['cluster']);
  });
});
