/** What DHCP servers count, of real frames on taps, and how it is shown. */
import { afterEach, expect, test } from 'vitest';
import {
  addresses,
  type DhcpPacket,
  encode,
  MessageType,
  Option,
  u8,
} from '../../packages/dhcp-packet/src/index.js';
import { dhcpMetrics, newCounters } from '../../src/dhcp/counters.js';
import { DhcpService } from '../../src/dhcp/service.js';
import { GUEST_MAC, macBytes } from '../../src/network/addresses.js';
import { BROADCAST_MAC, ipv4, udp } from '../netback-filter/frames.js';
import { type Host, Lab } from '../netback-filter/lab.js';

const FAMILY = 23;
const OTHER_MAC = '02:00:00:00:00:77';
const OTHER = addresses('10.86.9.9');
let lab: Lab;
afterEach(() => lab?.destroy());

function from(
  type: number,
  options: [number, Uint8Array][] = [],
  fields: Partial<DhcpPacket> = {},
  mac = GUEST_MAC,
): Buffer {
  const packet: DhcpPacket = {
    op: 1,
    hardwareType: 1,
    hops: 0,
    xid: 7,
    secs: 0,
    flags: 0,
    ciaddr: '0.0.0.0',
    yiaddr: '0.0.0.0',
    siaddr: '0.0.0.0',
    giaddr: '0.0.0.0',
    hardwareAddress: macBytes(GUEST_MAC),
    options: new Map([[Option.MESSAGE_TYPE, u8(type)], ...options]),
    ...fields,
  };
  return ipv4({
    to: BROADCAST_MAC,
    from: mac,
    sourceIp: packet.ciaddr,
    destinationIp: '255.255.255.255',
    protocol: 17,
    payload: udp(68, 67, encode(packet)),
  });
}

/** A guest with its server, and all packets that the server has looked at. */
function serve(host: Host, vmid: number, totals = newCounters()) {
  const guest = host.guest(FAMILY, vmid);
  let packets = 0;
  let changed = () => {};
  const service = host.netns.do(
    () =>
      new DhcpService({
        tap: guest.tap,
        family: FAMILY,
        identity: { address: guest.ip, guestMac: GUEST_MAC },
        totals,
        onEvent: () => {
          packets++;
          changed();
        },
      }),
  );
  lab.onDestroy(() => service.stop());
  /** Sends frames; resolves when the server has looked at each. */
  const send = async (...frames: Buffer[]): Promise<void> => {
    const wanted = packets + frames.length;
    guest.send(...frames);
    while (packets < wanted) {
      await new Promise<void>((resolve, reject) => {
        const limit = setTimeout(() => reject(new Error(`${packets} of ${wanted}`)), 20_000);
        changed = () => {
          clearTimeout(limit);
          resolve();
        };
      });
    }
  };
  return { service, send, address: addresses(guest.ip), ip: guest.ip };
}

test('each packet is counted by its type, with its answer or the reason why there was none', async () => {
  lab = await Lab.create(1);
  const { service, send, address, ip } = serve(lab.host(0), 3);
  const { DISCOVER, OFFER, REQUEST, DECLINE, RELEASE, INFORM } = MessageType;
  const wants = (of: Uint8Array): [number, Uint8Array] => [Option.REQUESTED_ADDRESS, of];
  const server = (of: Uint8Array): [number, Uint8Array] => [Option.SERVER_ID, of];
  const ours = addresses('10.86.0.1');
  await send(
    from(DISCOVER),
    from(REQUEST, [wants(address)]),
    from(REQUEST, [wants(OTHER)]),
    from(REQUEST, [wants(address), server(OTHER)]),
    from(REQUEST),
    from(INFORM, [], { ciaddr: ip }),
    from(INFORM, [], { ciaddr: '10.86.9.9' }),
    from(DECLINE, [wants(address), server(ours)]),
    from(RELEASE, [server(ours)], { ciaddr: ip }),
  );
  await send(
    from(OFFER),
    from(DISCOVER, [], { giaddr: '10.86.0.8' }),
    from(DISCOVER, [], { hardwareAddress: macBytes(OTHER_MAC) }),
    from(DISCOVER, [], {}, OTHER_MAC),
    from(DISCOVER).subarray(0, 200),
  );
  expect(service.counters()).toEqual({
    received: { discover: 3, request: 4, decline: 1, release: 1, inform: 2 },
    sent: { offer: 1, ack: 2, nak: 1 },
    dropped: {
      flood: 0,
      malformed: 1,
      foreign_mac: 1,
      not_guest: 1,
      relayed: 1,
      no_type: 1,
      other_server: 1,
      no_address: 1,
      other_address: 1,
      not_sent: 0,
    },
  });
});

test("the servers of a host's VMs count together, and go on counting when one ends", async () => {
  lab = await Lab.create(1);
  const totals = newCounters();
  const one = serve(lab.host(0), 1, totals);
  const two = serve(lab.host(0), 2, totals);
  await one.send(from(MessageType.DISCOVER));
  one.service.stop();
  await two.send(from(MessageType.DISCOVER), from(MessageType.REQUEST, [[50, OTHER]]));
  expect(two.service.counters().sent).toEqual({ offer: 1, ack: 0, nak: 1 });
  expect(totals.received).toMatchObject({ discover: 2, request: 1 });
  expect(totals.sent).toEqual({ offer: 2, ack: 0, nak: 1 });
  const lines = dhcpMetrics('h1', totals).split('\n');
  expect(lines).toContain('# TYPE snowflock_dhcp_received_total counter');
  expect(lines).toContain('snowflock_dhcp_received_total{host="h1",type="discover"} 2');
  expect(lines).toContain('snowflock_dhcp_sent_total{host="h1",type="nak"} 1');
  expect(lines).toContain('snowflock_dhcp_dropped_total{host="h1",reason="flood"} 0');
});
