import { execFile } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { cp, mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { SnowflockError } from '../../src/common/errors.js';
import { buildImage } from '../../src/image/build.js';
import type { BuiltImage } from '../../src/image/manifest.js';
import { identityOf } from '../api/agent-rig.js';
import { BootedGuest, imageCache } from './guest.js';

const execute = promisify(execFile);
let image: BuiltImage;
beforeAll(async () => {
  image = await buildImage('minimal', { cacheDir: imageCache });
});

describe('image build', () => {
  it('finds what is built in the cache', async () => {
    const lines: string[] = [];
    const again = await buildImage('minimal', { cacheDir: imageCache, log: (l) => lines.push(l) });
    expect(again).toEqual(image);
    expect(lines.join()).toContain('up to date');
  });

  it('makes the same bytes again elsewhere, and leaves nothing else behind', async () => {
    const cacheDir = await mkdtemp(join(tmpdir(), 'sf-cache-'));
    try {
      await cp(join(imageCache, 'packages'), join(cacheDir, 'packages'), { recursive: true });
      const [one, two] = await Promise.all([
        buildImage('minimal', { cacheDir }),
        buildImage('minimal', { cacheDir }),
      ]);
      expect(one).toEqual(two);
      for (const path of ['kernelPath', 'initrdPath', 'diskPath'] as const) {
        // Knows holes: the disks are 8 GiB of little.
        await execute('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', one[path], image[path]]);
      }
      expect((await readdir(cacheDir)).sort()).toEqual([
        `minimal-${one.manifest.version}`,
        'packages',
      ]);
    } finally {
      await rm(cacheDir, { recursive: true, force: true });
    }
  });

  it('leaves nothing half made when interrupted', async () => {
    const cacheDir = await mkdtemp(join(tmpdir(), 'sf-cache-'));
    try {
      await cp(join(imageCache, 'packages'), join(cacheDir, 'packages'), { recursive: true });
      const abort = new AbortController();
      const log = (line: string) => {
        if (line.startsWith('compiling')) abort.abort();
      };
      const build = buildImage('minimal', { cacheDir, log, signal: abort.signal });
      await expect(build).rejects.toMatchObject({ code: 'E_INTERRUPTED' });
      expect(await readdir(cacheDir)).toEqual(['packages']);
    } finally {
      await rm(cacheDir, { recursive: true, force: true });
    }
  });

  it('does not know other names', async () => {
    await expect(buildImage('windows', { cacheDir: imageCache })).rejects.toMatchObject({
      code: 'E_IMAGE_UNKNOWN',
    });
  });

  it('gives a sparse disk of 8 GiB', async () => {
    const { size, blocks } = await stat(image.diskPath);
    expect(size).toBe(8 * 1024 ** 3);
    expect(blocks * 512).toBeLessThan(16 << 20);
  });
});

describe('minimal guest', () => {
  let guest: BootedGuest;
  beforeAll(async () => {
    guest = await BootedGuest.boot(image);
    expect((await guest.channel.hello(identityOf(0), undefined, { timeoutMs: 120_000 })).net).toBe(
      'ok',
    );
  });
  afterAll(async () => {
    await guest?.end();
  });

  it('runs Debian`s kernel on an ext4 root that takes writes', async () => {
    expect(await guest.shell('uname -r')).toBe(`${image.manifest.kernel_version}\n`);
    expect(await guest.shell('grep " / " /proc/mounts')).toMatch(/^\/dev\/vda \/ ext4 rw/m);
    expect(await guest.shell('echo kept > /root/file; sync; cat /root/file')).toBe('kept\n');
  });

  it('has the address, route and name it was told, and a clock that is right', async () => {
    expect(await guest.shell('ip -4 addr show eth0')).toContain('inet 10.86.0.2/16');
    expect(await guest.shell('ip route')).toContain('default via 10.86.0.1 dev eth0');
    expect(await guest.shell('hostname')).toBe('vm 0%\n');
    const off = Math.abs(Number(await guest.shell('date +%s')) - Date.now() / 1000);
    expect(off).toBeLessThan(60);
    expect(await guest.shell('cat /sys/devices/system/clocksource/*/current_clocksource')).toMatch(
      /^tsc/,
    );
  });

  it('carries a file each way, byte for byte', async () => {
    const data = randomBytes(3 << 20);
    const session = guest.channel.exec({ argv: ['cat'] });
    session.stderr.resume();
    session.stdin.end(data);
    const hash = createHash('sha256');
    for await (const part of session.stdout) hash.update(part as Buffer);
    expect(hash.digest('hex')).toBe(createHash('sha256').update(data).digest('hex'));
  });

  it('restarts an agent that was killed; it is told who it is again', async () => {
    const killer = guest.channel.exec({ argv: ['sh', '-c', 'kill -9 $(pidof sf-agent)'] });
    await expect(killer.exited).rejects.toMatchObject({ code: 'E_GUEST' });
    await expect.poll(() => guest.channel.identified, { timeout: 30_000 }).toBe(true);
    expect(await guest.shell('sf ip 7')).toBe('10.86.0.9\n');
  });

  it('is another VM after a fork: new address and random numbers, old connections reset', async () => {
    const script =
      '(sleep 600 | nc -l -p 99 >/dev/null) & sleep 1; (sleep 600 | nc 10.86.0.2 99 >/dev/null) & sleep 1; netstat -tn';
    expect(await guest.shell(script)).toMatch(/10\.86\.0\.2:99 .*ESTABLISHED/);
    await guest.channel.ping(10_000);
    guest.channel.close();
    // The same VM stands for its clone: what counts for the agent is a new epoch.
    const { channel } = guest;
    const clone = await guest.reconnect();
    expect(clone).not.toBe(channel);
    await clone.hello(identityOf(3));
    expect(await guest.shell('ip -4 addr show eth0')).toContain('inet 10.86.0.5/16');
    expect(await guest.shell('ip -4 addr show eth0')).not.toContain('10.86.0.2');
    await expect.poll(() => guest.shell('netstat -tn')).not.toContain('ESTABLISHED');
  });

  it('runs the example, which does the work itself when no clone can be had', async () => {
    guest.channel.setCallHandler(async ({ verb, args }) => {
      if (verb === 'request_ticket') return { ticket: 't1', allocation: '2', vmids: '4-5' };
      if (verb === 'clone' && args.ticket === 't1') return { vmid: '0' };
      if (verb === 'join') return { results: '4:E_CLONE_START,5:E_PEER' };
      throw new SnowflockError('E_STATE', 'not now');
    });
    const session = guest.channel.exec({ argv: ['sf-sum', '--mib', '8', '--timeout-s', '60'] });
    session.stdin.end();
    session.stderr.resume();
    const events = (await text(session.stdout))
      .trim()
      .split('\n')
      .map((l) => JSON.parse(l));
    expect(events.map((e) => e.event)).toEqual(['loaded', 'ticket', 'forked', 'joined', 'answer']);
    expect(events.at(-1)).toMatchObject({
      ok: true,
      shares: [{ vmid: 4, by: 'parent' }, { vmid: 5 }],
    });
    expect(await session.exited).toEqual({ status: 1 });
  });
});
