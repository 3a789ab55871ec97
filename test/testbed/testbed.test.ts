import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { afterEach, describe, expect, it } from 'vitest';
import { loadClusterConfig } from '../../src/cluster/index.js';
import { Testbed, type TestbedHost } from '../../src/testbed/index.js';
import { identify, isAlive } from '../../src/testbed/processes.js';

const testbeds: Testbed[] = [];
async function create(hosts: number, rateLimitMbit?: number): Promise<Testbed> {
  const testbed = await Testbed.create({
    hosts,
    ...(rateLimitMbit === undefined ? {} : { rateLimitMbit }),
  });
  testbeds.push(testbed);
  return testbed;
}

afterEach(async () => {
  for (const testbed of testbeds.splice(0)) await testbed.destroy();
});

function at(testbed: Testbed, index: number): TestbedHost {
  const host = testbed.hosts[index];
  if (!host) throw new Error(`no host ${index}`);
  return host;
}

async function pings(testbed: Testbed, from: TestbedHost, to: TestbedHost): Promise<boolean> {
  const argv = ['busybox', 'ping', '-c', '1', '-W', '1', to.address];
  return (await testbed.execIn(from, argv)).status === 0;
}

/** All that a testbed of this name has on the machine. */
function remains(name: string): string[] {
  const places = ['/run/netns', '/run', '/dev/shm', '/var/tmp', '/run/snowflock-testbeds'];
  return places
    .filter((place) => existsSync(place))
    .flatMap((place) => readdirSync(place).map((entry) => `${place}/${entry}`))
    .filter((path) => path.includes(`sf-${name}`) || path.endsWith(`/${name}.json`));
}

// Runs in a host's namespace: says `ready`, then each datagram it gets from the group.
const LISTENER = `
  const socket = require('node:dgram').createSocket({ type: 'udp4', reuseAddr: true });
  socket.on('message', (message, from) => console.log(from.address + ' ' + message));
  socket.bind(4747, () => { socket.addMembership('239.85.1.1', process.argv[1]); console.log('ready'); });
`;
const SENDER = `
  const socket = require('node:dgram').createSocket('udp4');
  socket.bind(() => socket.send(process.argv[1], 4747, '239.85.1.1', () => socket.close()));
`;

describe('testbed', () => {
  it('joins hosts on one network with the MTU of Ethernet', async () => {
    const testbed = await create(3);
    expect(testbed.hosts.map((host) => host.name)).toEqual(['h1', 'h2', 'h3']);
    for (const from of testbed.hosts) {
      for (const to of testbed.hosts) expect(await pings(testbed, from, to)).toBe(true);
    }
    const link = await testbed.execIn(at(testbed, 0), ['ip', '-o', 'link', 'show', 'eth0']);
    expect(link.stdout).toContain(' mtu 1500 ');
  });

  it('leaves no interface in the namespace of its maker', async () => {
    const before = readdirSync('/proc/sys/net/ipv4/conf').sort();
    await create(2);
    expect(readdirSync('/proc/sys/net/ipv4/conf').sort()).toEqual(before);
  });

  it('carries multicast to the hosts that joined', async () => {
    const testbed = await create(3);
    const lines: string[] = [];
    const waiting: { test: (line: string) => boolean; resolve: () => void }[] = [];
    const heard = (test: (line: string) => boolean): Promise<void> =>
      new Promise((resolve) => waiting.push({ test, resolve }));
    const listeners = [at(testbed, 1), at(testbed, 2)];
    const all: Promise<void>[] = [];
    for (const host of listeners) {
      const argv = [process.execPath, '-e', LISTENER, host.address];
      const child = testbed.spawnIn(host, argv, { stdio: ['ignore', 'pipe', 'inherit'] });
      if (!child.stdout) throw new Error('no stdout');
      createInterface(child.stdout).on('line', (text) => {
        const line = `${host.name} ${text}`;
        lines.push(line);
        for (const one of waiting) if (one.test(line)) one.resolve();
      });
      await heard((line) => line === `${host.name} ready`);
      all.push(heard((line) => line === `${host.name} 10.85.0.1 hello`));
    }
    await testbed.execIn(at(testbed, 0), [process.execPath, '-e', SENDER, 'hello']);
    await Promise.all(all);
    expect(lines).toHaveLength(4);
  });

  it('cuts a host off and joins it again', async () => {
    const testbed = await create(3);
    const [h1, h2, h3] = [at(testbed, 0), at(testbed, 1), at(testbed, 2)];
    testbed.cut(h2);
    expect(await pings(testbed, h1, h2)).toBe(false);
    expect(await pings(testbed, h2, h1)).toBe(false);
    expect(await pings(testbed, h1, h3)).toBe(true);
    testbed.heal(h2);
    expect(await pings(testbed, h1, h2)).toBe(true);
  });

  it('limits the rate of uplinks when asked', async () => {
    const testbed = await create(2, 50);
    const { stdout } = await testbed.execIn(at(testbed, 1), ['tc', 'qdisc', 'show', 'dev', 'eth0']);
    expect(stdout).toContain('tbf');
    expect(stdout).toContain('rate 50Mbit');
  });

  it('gives each host folders and a configuration of its own', async () => {
    const testbed = await create(2);
    const seen = new Set<string>();
    for (const host of testbed.hosts) {
      const config = loadClusterConfig(host.configPath);
      expect(config).toMatchObject({ name: host.name, address: host.address, uplink: 'eth0' });
      expect(config.hosts.map((other) => other.name)).toEqual(['h1', 'h2']);
      for (const dir of [config.stateDir, config.runDir, config.ramDir]) {
        expect(statSync(dir).isDirectory()).toBe(true);
        seen.add(dir);
      }
      expect(statSync(config.tls.keyFile).mode & 0o777).toBe(0o600);
    }
    expect(seen.size).toBe(6);
  });

  it('removes all it made, and processes nobody asked to end', async () => {
    const testbed = await create(2);
    const host = at(testbed, 0);
    const argv = ['sh', '-c', 'trap "" TERM; setsid sleep 1000 & echo $!; wait'];
    const child = testbed.spawnIn(host, argv, { stdio: ['ignore', 'pipe', 'inherit'] });
    if (!child.stdout) throw new Error('no stdout');
    const [line] = (await once(createInterface(child.stdout), 'line')) as [string];
    const orphan = identify(Number(line));
    if (!orphan) throw new Error('the orphan ended early');
    expect(remains(testbed.name).length).toBeGreaterThan(5);
    await testbed.destroy(100);
    expect(isAlive(orphan)).toBe(false);
    expect(remains(testbed.name)).toEqual([]);
  });

  it('refuses a name in use, and leaves the first one be', async () => {
    const testbed = await create(1);
    await expect(Testbed.create({ hosts: 1, name: testbed.name })).rejects.toMatchObject({
      code: 'E_EXISTS',
    });
    expect(await pings(testbed, at(testbed, 0), at(testbed, 0))).toBe(true);
  });

  it('refuses numbers and names that cannot be', async () => {
    for (const options of [
      { hosts: 0 },
      { hosts: 201 },
      { hosts: 1.5 },
      { hosts: 1, name: '../x' },
    ]) {
      await expect(Testbed.create(options)).rejects.toMatchObject({ code: 'E_ARGUMENT' });
    }
  });
});

/** Starts a process that makes a testbed of this name and then does `then`. */
function maker(name: string, then: string) {
  const script = `
    import { Testbed } from '${new URL('../../dist/src/testbed/index.js', import.meta.url).href}';
    const testbed = await Testbed.create({ hosts: 2, name: '${name}' });
    const child = testbed.spawnIn(testbed.hosts[0], ['sleep', '1000'], { stdio: 'ignore' });
    console.log(child.pid);
    ${then}
  `;
  return spawn(process.execPath, ['--input-type=module', '-e', script], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
}

describe('testbed of a process that ends', () => {
  const wait = 'setInterval(() => {}, 1000);';
  const endings: [string, string, NodeJS.Signals | undefined][] = [
    ['SIGINT', wait, 'SIGINT'],
    ['SIGTERM', wait, 'SIGTERM'],
    ['an uncaught error', 'throw new Error("expected");', undefined],
    ['process.exit', 'process.exit(3);', undefined],
  ];
  for (const [title, then, signal] of endings) {
    it(`is removed after ${title}`, async () => {
      const name = `${process.pid.toString(36)}e`;
      const child = maker(name, then);
      const ended = once(child, 'exit');
      const [line] = (await once(createInterface(child.stdout), 'line')) as [string];
      const inside = identify(Number(line));
      if (signal) child.kill(signal);
      const [status, by] = (await ended) as [number | null, NodeJS.Signals | null];
      if (signal) expect(by).toBe(signal);
      else expect(status).not.toBe(0);
      expect(remains(name)).toEqual([]);
      if (inside) expect(isAlive(inside)).toBe(false);
    });
  }

  it('is removed by reap() after SIGKILL, and others are left alone', async () => {
    const other = await create(1);
    const name = `${process.pid.toString(36)}k`;
    const child = maker(name, wait);
    const ended = once(child, 'exit');
    const [line] = (await once(createInterface(child.stdout), 'line')) as [string];
    const inside = identify(Number(line));
    if (!inside) throw new Error('nothing runs in the testbed');
    expect(Testbed.reap()).not.toContain(name);
    child.kill('SIGKILL');
    await ended;
    expect(isAlive(inside)).toBe(true);
    expect(Testbed.reap()).toContain(name);
    expect(isAlive(inside)).toBe(false);
    expect(remains(name)).toEqual([]);
    expect(await pings(other, at(other, 0), at(other, 0))).toBe(true);
  });

  it('stays when it is kept, until it is removed by name', async () => {
    const name = `${process.pid.toString(36)}p`;
    const child = maker(name, 'testbed.keep(); child.unref();');
    const ended = once(child, 'exit');
    const [line] = (await once(createInterface(child.stdout), 'line')) as [string];
    await ended;
    const inside = identify(Number(line));
    if (!inside) throw new Error('nothing runs in the testbed');
    expect(Testbed.reap()).not.toContain(name);
    expect(Testbed.list()).toContain(name);
    expect(isAlive(inside)).toBe(true);
    Testbed.remove(name);
    expect(isAlive(inside)).toBe(false);
    expect(remains(name)).toEqual([]);
    for (const unknown of [name, '../x']) {
      expect(() => Testbed.remove(unknown)).toThrowError(
        expect.objectContaining({ code: 'E_NOT_FOUND' }),
      );
    }
  });

  it('is not removed by name while its maker runs it', async () => {
    const testbed = await create(1);
    expect(() => Testbed.remove(testbed.name)).toThrowError(
      expect.objectContaining({ code: 'E_IN_USE' }),
    );
    expect(await pings(testbed, at(testbed, 0), at(testbed, 0))).toBe(true);
  });
});
