/** Guests that follow DHCP alone: in a clone they get its own address, and old connections end. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { DhcpCounters } from '../../src/dhcp/counters.js';
import { snowflock, snowflockJson } from '../cli/snowflock.js';
import { Lab, MIB, sh, until } from './lab.js';

const ADDRESS = 'ip -4 -o address show dev eth0';
const LIMIT_MS = 20_000;

describe('a guest whose address comes by DHCP alone', () => {
  let lab: Lab;
  let vm: string;

  beforeAll(async () => {
    lab = await Lab.start(2);
    const made = await lab.client.run({
      name: 'parent',
      image: 'minimal',
      ram_bytes: 256 * MIB,
      vcpus: 1,
      addressing: 'dhcp',
    });
    vm = made.id;
  });
  afterAll(() => lab?.destroy());

  const has = (of: string, address: string) =>
    until(`${of} has ${address}`, LIMIT_MS, async () =>
      (await sh(lab.client, of, ADDRESS)).includes(`inet ${address}/16`),
    ).catch((error: unknown) => {
      throw new Error(`${error}\n${lab.logs()}`);
    });

  const consoleOf = (of: string) => {
    const log = lab.records().find((one) => one.id === of)?.hypervisor?.console_log;
    if (log === undefined) throw new Error(`${of} has no console`);
    return readFileSync(log, 'utf8');
  };

  it('obtains its lease through tap and filter', async () => {
    await has(vm, '10.86.0.2');
  });

  it('gets its own in clones, whose inherited connections end at once; the parent`s go on', async () => {
    const [peer] = (await lab.fork(vm, 1)).clones;
    if (peer === undefined) throw new Error('one clone was asked for');
    await has(peer.vm, peer.ip);
    await sh(lab.client, peer.vm, 'mkfifo /tmp/quiet; nc -l -p 99 <>/tmp/quiet >/dev/null 2>&1 &');
    // Nothing is sent on it: only its end can wake the program.
    await sh(
      lab.client,
      vm,
      `mkfifo /tmp/quiet
       (nc ${peer.ip} 99 <>/tmp/quiet; echo ended >/dev/console) >/dev/null 2>&1 &
       until netstat -tn | grep -q '${peer.ip}:99 .*ESTABLISHED'; do sleep 1; done`,
    );
    const fork = await lab.fork(vm, 2);
    for (const clone of fork.clones) {
      await until('the connection ended', LIMIT_MS, async () =>
        consoleOf(clone.vm).includes('ended'),
      ).catch((error: unknown) => {
        throw new Error(`${error}\n${lab.logs()}`);
      });
      await has(clone.vm, clone.ip);
      expect(await sh(lab.client, clone.vm, ADDRESS)).not.toContain('10.86.0.2');
      expect(await sh(lab.client, clone.vm, 'netstat -tn')).not.toContain('ESTABLISHED');
      await sh(lab.client, clone.vm, `ping -c 1 -W 5 ${peer.ip} && ping -c 1 -W 5 10.86.0.2`);
    }
    expect(await sh(lab.client, vm, 'netstat -tn')).toContain('ESTABLISHED');
    expect(consoleOf(vm)).not.toContain('ended');
    await has(vm, '10.86.0.2');
    await until('both told to be at their addresses', LIMIT_MS, async () =>
      (await lab.client.fork(fork.id)).fork.clones.every((one) => one.reply_ms !== null),
    );
  });

  it('has what its host`s DHCP servers did counted', async () => {
    const socket = join(lab.daemon(0).host.dirs.run, 'sfld.sock');
    const own = await snowflockJson<DhcpCounters>(['dhcp', vm, '--socket', socket]);
    expect(own.received.discover).toBeGreaterThan(0);
    expect(own.sent).toMatchObject({ offer: own.received.discover, nak: 0 });
    const host = await snowflockJson<DhcpCounters>(['dhcp', '--socket', socket]);
    expect(host.sent.ack).toBeGreaterThanOrEqual(own.sent.ack);
    const { stdout } = await snowflock(['dhcp', '--prometheus', '--socket', socket]);
    expect(stdout).toContain(`snowflock_dhcp_sent_total{host="h1",type="ack"} ${host.sent.ack}\n`);
    const table = (await snowflock(['dhcp', vm, '--socket', socket])).stdout;
    expect(table).toMatch(/ \d+ +received +discover/);
  });
});
