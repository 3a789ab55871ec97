/**
 * The fuller image: Debian with systemd, its own DHCP client (systemd-networkd), nothing told by the
 * agent. It boots, forks, and its clones take their own addresses.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { buildImage } from '../../src/image/build.js';
import { defaultImageDir } from '../../src/image/images.js';
import { Lab, MIB, sh, until } from './lab.js';

const LIMIT_MS = 120_000;
const ADDRESS = 'ip -4 -o address show dev eth0';

describe('the Debian image', () => {
  let lab: Lab;
  let vm: string;

  beforeAll(async () => {
    await buildImage('debian', { cacheDir: defaultImageDir() });
    lab = await Lab.start(2);
    const made = await lab.client.run({
      name: 'debian',
      image: 'debian',
      ram_bytes: 512 * MIB,
      vcpus: 1,
      addressing: 'dhcp',
    });
    vm = made.id;
  }, 600_000);
  afterAll(() => lab?.destroy());

  const has = (of: string, address: string) =>
    until(`${of} has ${address}`, LIMIT_MS, async () =>
      (await sh(lab.client, of, ADDRESS)).includes(`inet ${address}/16`),
    );

  it('boots Debian with systemd, whose networkd takes the lease', {
    timeout: 300_000,
  }, async () => {
    await has(vm, '10.86.0.2');
    expect(await sh(lab.client, vm, 'cat /etc/debian_version')).toMatch(/^12\./);
    expect(await sh(lab.client, vm, 'cat /proc/1/comm')).toBe('systemd');
    expect(await sh(lab.client, vm, 'networkctl --no-pager status eth0')).toContain('10.86.0.2');
  });

  it('forks: clones take their own addresses, and reach each other and the parent', {
    timeout: 300_000,
  }, async () => {
    await sh(lab.client, vm, 'echo kept >/root/kept; python3 -c "print(1)"');
    const fork = await lab.fork(vm, 2);
    for (const clone of fork.clones) {
      await has(clone.vm, clone.ip);
      expect(await sh(lab.client, clone.vm, ADDRESS)).not.toContain('10.86.0.2/');
      expect(await sh(lab.client, clone.vm, 'cat /root/kept')).toBe('kept');
      await sh(lab.client, clone.vm, 'ping -c 1 -W 5 10.86.0.2');
    }
    await has(vm, '10.86.0.2');
  });
});
