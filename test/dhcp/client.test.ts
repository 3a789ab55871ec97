/** A client nobody wrote for this server, busybox udhcpc, behind the real filter. */
import { execFile, spawn } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { promisify } from 'node:util';
import { afterEach, expect, test } from 'vitest';
import { decode, encode, MessageType, Option, u8 } from '../../packages/dhcp-packet/src/index.js';
import type { DhcpEvent } from '../../src/dhcp/service.js';
import { DhcpService } from '../../src/dhcp/service.js';
import { addressOfVmid, GUEST_MAC, macBytes } from '../../src/network/addresses.js';
import { BROADCAST_MAC, ipv4, udp } from '../netback-filter/frames.js';
import { type Host, Lab, type Namespace } from '../netback-filter/lab.js';

const run = promisify(execFile);
const FAMILY = 21;
let lab: Lab;
afterEach(() => lab?.destroy());

/** The service of a VM, the events it has reported, and a way to await them. */
function serve(host: Host, tap: string, vmid: number, relay = false) {
  const events: DhcpEvent[] = [];
  let changed = () => {};
  const service = host.netns.do(
    () =>
      new DhcpService({
        tap,
        family: FAMILY,
        identity: { address: addressOfVmid(vmid), guestMac: GUEST_MAC, hostname: `vm-${vmid}` },
        relay,
        onEvent: (event) => {
          events.push(event);
          changed();
        },
      }),
  );
  lab.onDestroy(() => service.stop());
  const heard = async (...wanted: DhcpEvent[]): Promise<void> => {
    while (events.length < wanted.length) {
      await new Promise<void>((resolve, reject) => {
        const limit = setTimeout(() => reject(new Error(`heard only ${events}`)), 20_000);
        changed = () => {
          clearTimeout(limit);
          resolve();
        };
      });
    }
    expect(events).toEqual(wanted);
  };
  return { service, events, heard };
}

async function withScript<T>(text: string, work: (path: string) => Promise<T>): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), 'sf-dhcp-'));
  try {
    const path = join(folder, 'script');
    writeFileSync(path, text, { mode: 0o755 });
    return await work(path);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** Runs udhcpc until it has a lease; returns what its script was told. */
async function udhcpc(netns: Namespace, ...options: string[]): Promise<Record<string, string>> {
  const script =
    '#!/bin/sh\n[ "$1" = bound ] || exit 0\nip address add "$ip/$mask" dev "$interface"\nenv\n';
  return withScript(script, async (path) => {
    const words = `netns exec ${netns.name} busybox udhcpc -i eth0 -f -q -n -t 5 -T 1 -s ${path}`;
    const { stdout } = await run('ip', [...words.split(' '), ...options], { timeout: 30_000 });
    return Object.fromEntries(
      stdout.split('\n').flatMap((line) => {
        const at = line.indexOf('=');
        return at < 0 ? [] : [[line.slice(0, at), line.slice(at + 1)]];
      }),
    );
  });
}

test('udhcpc obtains the lease, probes the address by ARP, and can talk', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const guest = host.stackGuest(FAMILY, 3);
  const { service, events } = serve(host, guest.tap, 3);
  const peer = host.guest(FAMILY, 4);

  const told = await udhcpc(guest.netns, '-a', '-O', 'mtu');
  expect(told).toMatchObject({
    ip: '10.86.0.5',
    subnet: '255.255.0.0',
    mask: '16',
    broadcast: '10.86.255.255',
    mtu: '1500',
    hostname: 'vm-3',
    lease: '3600',
    serverid: '10.86.0.1',
  });
  expect(told.router).toBeUndefined();
  expect(events).toEqual(['offer', 'ack']);
  expect(service.state).toBe('bound');

  guest.netns.exec('bash', '-c', `echo -n hello > /dev/udp/${peer.ip}/9`);
  await peer.receive((frame) => frame.includes('hello'));
  // What it does not ask for it is not told.
  guest.netns.exec('ip', 'address', 'flush', 'dev', 'eth0');
  const less = await udhcpc(guest.netns);
  expect(less).toMatchObject({ ip: '10.86.0.5', hostname: 'vm-3' });
  expect(less.mtu).toBeUndefined();
});

test('udhcpc renews by unicast, gives up its address at the NAK after a fork, and releases', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const guest = host.stackGuest(FAMILY, 0);
  const { service, events, heard } = serve(host, guest.tap, 0);
  // udhcpc loses an answer that comes before it has closed the socket it asked by, and asks again.
  const forgetRepeats = () => {
    for (let i = events.length - 1; i > 1; i--) {
      if (events[i] === 'ack' && events[i - 1] === 'ack' && events[i - 2] === 'ack')
        events.splice(i, 1);
    }
  };
  const script = '#!/bin/sh\n[ -z "$ip" ] || ip address replace "$ip/$mask" dev "$interface"\n';
  await withScript(script, async (path) => {
    const words = `netns exec ${guest.netns.name} busybox udhcpc -i eth0 -f -R -t 5 -T 10 -s ${path}`;
    const client = spawn('ip', words.split(' '), {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    const log = createInterface({ input: client.stderr })[Symbol.asyncIterator]();
    const says = async (text: string) => {
      for (let line = await log.next(); !line.done; line = await log.next()) {
        if (line.value.includes(text)) return;
      }
      throw new Error(`udhcpc ended without saying ${text}`);
    };
    try {
      await says('lease of 10.86.0.2 obtained');
      await heard('offer', 'ack');
      client.kill('SIGUSR1');
      await says('lease of 10.86.0.2 obtained');
      forgetRepeats();
      await heard('offer', 'ack', 'ack');
      const clone = { tap: guest.tap, family: FAMILY, vmid: 6 };
      host.netns.do(() => host.attached.addVm(clone, { family: FAMILY, vmid: 0 }));
      service.setIdentity({ ...service.identity, address: addressOfVmid(6) });
      client.kill('SIGUSR1');
      await says('lease of 10.86.0.8 obtained');
      await heard('offer', 'ack', 'ack', 'nak', 'offer', 'ack');
      client.kill('SIGUSR2');
      await heard('offer', 'ack', 'ack', 'nak', 'offer', 'ack', 'released');
      expect(service.state).toBe('released');
      expect(guest.netns.exec('ip', 'address', 'show', 'dev', 'eth0')).toContain('10.86.0.8/16');
    } finally {
      client.kill('SIGKILL');
    }
  });
});

/** A client's datagram as the guest's kernel would send it. */
function fromClient(type: number, options: [number, Uint8Array][], ciaddr = '0.0.0.0'): Buffer {
  const payload = encode({
    op: 1,
    hardwareType: 1,
    hops: 0,
    xid: 7,
    secs: 0,
    flags: 0,
    ciaddr,
    yiaddr: '0.0.0.0',
    siaddr: '0.0.0.0',
    giaddr: '0.0.0.0',
    hardwareAddress: macBytes(GUEST_MAC),
    options: new Map([[Option.MESSAGE_TYPE, u8(type)], ...options]),
  });
  return ipv4({
    to: BROADCAST_MAC,
    sourceIp: ciaddr,
    destinationIp: '255.255.255.255',
    protocol: 17,
    payload: udp(68, 67, payload),
  });
}

test("a clone that renews its parent's lease gets a NAK on its tap, and nobody else hears it", async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const clone = host.guest(FAMILY, 9);
  const sibling = host.guest(FAMILY, 10);
  serve(host, clone.tap, 9);
  clone.send(fromClient(MessageType.REQUEST, [], '10.86.0.2'));
  const frame = await clone.receive();
  expect(frame.subarray(0, 12).toString('hex')).toBe('ffffffffffff5e000015ffff');
  const nak = decode(frame.subarray(42));
  expect(nak.options.get(Option.MESSAGE_TYPE)).toEqual(Buffer.from([MessageType.NAK]));
  expect(sibling.frames).toEqual([]);
  expect(host.stats()).toMatchObject({ dhcp_to_host: 1 });
});

test('a flood is bounded before JavaScript; malformed packets are counted and harmless', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const guest = host.guest(FAMILY, 1);
  const { service, events } = serve(host, guest.tap, 1);
  const discover = fromClient(MessageType.DISCOVER, []);
  guest.send(discover.subarray(0, 60), discover.subarray(0, 300));
  const cut = Buffer.from(discover);
  cut.writeUInt16BE(28, 16); // IPv4 says: nothing behind the UDP header
  guest.send(cut, discover);
  await guest.receive();
  expect(events).toEqual(['malformed', 'malformed', 'malformed', 'offer']);
  for (let i = 0; i < 2000; i++) guest.send(discover);
  await guest.receive(() => guest.frames.length >= 20);
  const answered = service.stats().offer ?? 0;
  expect(answered).toBeLessThan(100);
  await expect
    .poll(() => host.stats(), { timeout: 10_000 })
    .toMatchObject({ dhcp_to_host: 2002, guest_malformed_ip: 2 });
});

test('the service ends with its interface', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const guest = host.guest(FAMILY, 1);
  const ended = new Promise((resolve) => {
    const service = host.netns.do(
      () =>
        new DhcpService({
          tap: guest.tap,
          family: FAMILY,
          identity: { address: guest.ip, guestMac: GUEST_MAC },
          onEnd: resolve,
        }),
    );
    lab.onDestroy(() => service.stop());
  });
  guest.close();
  expect(await ended).toMatchObject({ code: 'E_NETWORK' });
});

/** A client's DISCOVER as a relay passes it on. */
function fromRelay(giaddr: string, information: Uint8Array): Buffer {
  const discover = fromClient(MessageType.DISCOVER, [[Option.RELAY_AGENT, information]]);
  const payload = encode({ ...decode(discover.subarray(42)), giaddr, hops: 1 });
  return ipv4({
    to: BROADCAST_MAC,
    from: RELAY_MAC,
    sourceIp: giaddr,
    destinationIp: '10.86.0.1',
    protocol: 17,
    payload: udp(67, 67, payload),
  });
}
const RELAY_MAC = '02:00:00:00:09:09';

test('relayed in the test mode: the answer goes to the relay; otherwise nothing is read', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const [relayed, without] = [host.guest(FAMILY, 1), host.guest(FAMILY, 2)];
  serve(host, relayed.tap, 1, true);
  const other = serve(host, without.tap, 2);
  const information = Uint8Array.of(1, 2, 7, 7);
  relayed.send(fromRelay('10.99.0.1', information));
  without.send(fromRelay('10.99.0.1', information), fromClient(MessageType.DISCOVER, []));
  const frame = await relayed.receive();
  expect(frame.subarray(0, 6).toString('hex')).toBe('020000000909');
  expect([...frame.subarray(30, 34)]).toEqual([10, 99, 0, 1]);
  expect(frame.readUInt16BE(36)).toBe(67);
  expect([...(decode(frame.subarray(42)).options.get(Option.RELAY_AGENT) ?? [])]).toEqual([
    ...information,
  ]);
  await without.receive();
  expect(other.events).toEqual(['offer']);
});
