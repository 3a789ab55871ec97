/** A client nobody wrote for this server, busybox udhcpc, behind the real filter. */
import { execFile, spawn } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { promisify } from 'node:util';
import { afterEach, expect, test } from 'vitest';
import {
  decode,
  encode,
  MessageType,
  Option,
  readU8,
  u8,
} from '../../packages/dhcp-packet/src/index.js';
import type { DhcpEvent } from '../../src/dhcp/service.js';
import { DhcpService } from '../../src/dhcp/service.js';
import { addressOfVmid, GUEST_MAC, macBytes } from '../../src/network/addresses.js';
import { Capture } from '../netback-filter/capture.js';
import { BROADCAST_MAC, ipv4, udp } from '../netback-filter/frames.js';
import { type Host, Lab, type Namespace } from '../netback-filter/lab.js';

const run = promisify(execFile);
const FAMILY = 21;
let lab: Lab;
afterEach(() => lab?.destroy());

/** The service of a VM, the events it has reported, and a way to await them. */
function serve(host: Host, tap: string, vmid: number, relay = false) {
  const events: DhcpEvent[] = [];
  const steps: string[] = [];
  let changed = () => {};
  const service = host.netns.do(
    () =>
      new DhcpService({
        tap,
        family: FAMILY,
        identity: { address: addressOfVmid(vmid), guestMac: GUEST_MAC, hostname: `vm-${vmid}` },
        relay,
        onEvent: (event, state) => {
          events.push(event);
          const step = state === undefined ? event : `${event} ${state}`;
          // It repeats a renewal to the server alone as one to all.
          const repeated = step === steps.at(-1) || steps.at(-1) === `${event} renewing`;
          if (state !== 'rebinding' ? step !== steps.at(-1) : !repeated) steps.push(step);
          changed();
        },
      }),
  );
  lab.onDestroy(() => service.stop());
  /** A client that says the same again, and is answered again, has taken one step. */
  const took = async (...wanted: string[]): Promise<void> => {
    while (steps.length < wanted.length) {
      await new Promise<void>((resolve, reject) => {
        const limit = setTimeout(() => reject(new Error(`heard only ${steps}`)), 20_000);
        changed = () => {
          clearTimeout(limit);
          resolve();
        };
      });
    }
    expect(steps).toEqual(wanted);
  };
  return { service, events, took };
}

/**
 * How often each kind of answer is on the wire. Throws if there is one that nobody asked for: each
 * needs a packet of the client's before it, with the same transaction id, that was not yet answered.
 */
function answers(frames: readonly Buffer[]): Record<string, number> {
  const open: { type: number | undefined; xid: number }[] = [];
  const count = { offer: 0, ack: 0, nak: 0 };
  for (const frame of frames) {
    const { op, xid, options } = decode(frame.subarray(42));
    const type = readU8(options, Option.MESSAGE_TYPE);
    if (op === 1) {
      open.push({ type, xid });
      continue;
    }
    const asked = type === MessageType.OFFER ? MessageType.DISCOVER : MessageType.REQUEST;
    const at = open.findIndex((one) => one.type === asked && one.xid === xid);
    if (at < 0) throw new Error(`an answer of type ${type} to nothing in transaction ${xid}`);
    open.splice(at, 1);
    if (type === MessageType.OFFER) count.offer++;
    else if (type === MessageType.ACK) count.ack++;
    else if (type === MessageType.NAK) count.nak++;
    else throw new Error(`a server sends no message of type ${type}`);
  }
  return count;
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
  const { service, took } = serve(host, guest.tap, 0);
  const wire = await Capture.start('guest', guest.netns, 'udp and port 67', 'inout');
  lab.onDestroy(() => wire.process.kill('SIGKILL'));
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
      await took('offer', 'ack selecting');
      client.kill('SIGUSR1');
      await says('lease of 10.86.0.2 obtained');
      await took('offer', 'ack selecting', 'ack renewing');
      const clone = { tap: guest.tap, family: FAMILY, vmid: 6 };
      host.netns.do(() => host.attached.addVm(clone, { family: FAMILY, vmid: 0 }));
      service.setIdentity({ ...service.identity, address: addressOfVmid(6) });
      client.kill('SIGUSR1');
      await says('lease of 10.86.0.8 obtained');
      const all = [
        'offer',
        'ack selecting',
        'ack renewing',
        'nak renewing',
        'offer',
        'ack selecting',
      ];
      await took(...all);
      client.kill('SIGUSR2');
      await took(...all, 'released');
      expect(service.state).toBe('released');
      expect(guest.netns.exec('ip', 'address', 'show', 'dev', 'eth0')).toContain('10.86.0.8/16');
      const { received, sent, dropped } = service.counters();
      expect(sent).toEqual({
        offer: received.discover,
        ack: received.request - sent.nak,
        nak: sent.nak,
      });
      expect(sent.nak).toBeGreaterThan(0);
      expect(received).toMatchObject({ release: 1, decline: 0, inform: 0 });
      expect(Object.values(dropped).every((packets) => packets === 0)).toBe(true);
      const packets = Object.values({ ...received, ...sent }).reduce((sum, n) => sum + n);
      await wire.until(`${packets} packets`, (frames) => frames.length >= packets);
      expect(answers(wire.frames)).toEqual(sent);
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
  const { received, sent, dropped } = service.counters();
  expect(received.discover).toBe(answered);
  expect(sent.offer).toBe(answered);
  expect(dropped.malformed).toBe(3);
  // The rest waits in a buffer that holds some hundreds, or was lost there.
  expect(dropped.flood).toBeGreaterThan(1000);
  expect(dropped.flood + answered).toBeLessThanOrEqual(2001);
  expect(host.stats()).toMatchObject({ dhcp_to_host: 2002, guest_malformed_ip: 2 });
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
