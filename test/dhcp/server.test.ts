import { expect, test } from 'vitest';
import {
  addresses,
  type DhcpPacket,
  decode,
  decodeRoutes,
  decodeSearch,
  MessageType,
  Option,
  readAddress,
  readAddresses,
  readU8,
  readU16,
  readU32,
  u8,
  u16,
} from '../../packages/dhcp-packet/src/index.js';
import { DhcpMachine } from '../../src/dhcp/server.js';
import { GATEWAY, GUEST_MAC, macBytes } from '../../src/network/addresses.js';

const MINE = '10.86.0.9';
const PARENTS = '10.86.0.2';

function machine(): DhcpMachine {
  return new DhcpMachine({ address: MINE, guestMac: GUEST_MAC, hostname: 'vm-7', domain: 'flock' });
}

function ask(
  type: number,
  options: [number, Uint8Array][] = [],
  fields: Partial<DhcpPacket> = {},
): DhcpPacket {
  return {
    op: 1,
    hardwareType: 1,
    hops: 0,
    xid: 42,
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
}

const wants = (address: string): [number, Uint8Array] => [
  Option.REQUESTED_ADDRESS,
  addresses(address),
];
const FROM_US: [number, Uint8Array] = [Option.SERVER_ID, addresses(GATEWAY)];

/** The answer's kind and packet. */
function answer(to: DhcpMachine, packet: DhcpPacket, nowMs = 0) {
  const outcome = to.handle(packet, nowMs);
  return {
    kind: outcome.kind,
    ...('reply' in outcome ? { reply: outcome.reply, packet: decode(outcome.reply.bytes) } : {}),
  };
}

test('DISCOVER gets an OFFER of the one address, with all that belongs to it', () => {
  const clientId: [number, Uint8Array] = [Option.CLIENT_ID, Uint8Array.of(1, 2, 3)];
  const { kind, packet, reply } = answer(machine(), ask(MessageType.DISCOVER, [clientId]));
  expect(kind).toBe('offer');
  expect(reply).toMatchObject({ broadcast: false, address: MINE });
  if (packet === undefined) throw new Error('no packet');
  const { options } = packet;
  expect(packet).toMatchObject({ op: 2, xid: 42, yiaddr: MINE });
  expect(readU8(options, Option.MESSAGE_TYPE)).toBe(MessageType.OFFER);
  expect(readAddress(options, Option.SERVER_ID)).toBe(GATEWAY);
  expect(readAddress(options, Option.SUBNET_MASK)).toBe('255.255.0.0');
  expect(readAddress(options, Option.BROADCAST_ADDRESS)).toBe('10.86.255.255');
  expect(readU16(options, Option.INTERFACE_MTU)).toBe(1500);
  expect(readU32(options, Option.LEASE_SECONDS)).toBe(3600);
  expect(readU32(options, Option.RENEWAL_SECONDS)).toBe(1800);
  expect(readU32(options, Option.REBINDING_SECONDS)).toBe(3150);
  expect(Buffer.from(options.get(Option.HOST_NAME) ?? []).toString()).toBe('vm-7');
  expect(Buffer.from(options.get(Option.DOMAIN_NAME) ?? []).toString()).toBe('flock');
  expect(options.get(Option.CLIENT_ID)).toEqual(Uint8Array.of(1, 2, 3));
  expect(options.has(Option.ROUTER)).toBe(false);
});

test('REQUEST for the address is acknowledged in every client state', () => {
  for (const packet of [
    ask(MessageType.REQUEST, [wants(MINE), FROM_US]), // selecting
    ask(MessageType.REQUEST, [wants(MINE)]), // init-reboot
    ask(MessageType.REQUEST, [], { ciaddr: MINE }), // renewing, rebinding
  ]) {
    const server = machine();
    const { kind, packet: ack } = answer(server, packet);
    expect(kind).toBe('ack');
    expect(ack).toMatchObject({ yiaddr: MINE, ciaddr: packet.ciaddr });
    expect(server.state(0)).toBe('bound');
    expect(server.state(3600_000)).toBe('idle');
  }
});

test('REQUEST for another address gets a NAK to all: the parent address after a fork', () => {
  for (const packet of [
    ask(MessageType.REQUEST, [wants(PARENTS), FROM_US]),
    ask(MessageType.REQUEST, [wants(PARENTS)]),
    ask(MessageType.REQUEST, [], { ciaddr: PARENTS }),
    ask(MessageType.REQUEST, [wants(MINE)], { ciaddr: PARENTS }),
  ]) {
    const { kind, packet: nak, reply } = answer(machine(), packet);
    expect(kind).toBe('nak');
    expect(reply?.broadcast).toBe(true);
    expect(nak).toMatchObject({ yiaddr: '0.0.0.0', ciaddr: '0.0.0.0' });
    expect(nak?.options.has(Option.LEASE_SECONDS)).toBe(false);
  }
});

test('a new identity turns the old lease into a NAK', () => {
  const server = machine();
  answer(server, ask(MessageType.REQUEST, [wants(MINE), FROM_US]));
  server.setIdentity({ ...server.identity, address: '10.86.0.10' });
  expect(server.state(0)).toBe('idle');
  expect(answer(server, ask(MessageType.REQUEST, [], { ciaddr: MINE })).kind).toBe('nak');
});

test('INFORM is answered without a lease, RELEASE and DECLINE are noted', () => {
  const server = machine();
  const { kind, packet } = answer(server, ask(MessageType.INFORM, [], { ciaddr: MINE }));
  expect(kind).toBe('ack');
  expect(packet).toMatchObject({ yiaddr: '0.0.0.0', ciaddr: MINE });
  expect(packet?.options.has(Option.LEASE_SECONDS)).toBe(false);
  expect(packet?.options.has(Option.SUBNET_MASK)).toBe(true);
  expect(answer(server, ask(MessageType.DECLINE, [FROM_US, wants(MINE)])).kind).toBe('declined');
  expect(server.state(0)).toBe('declined');
  answer(server, ask(MessageType.REQUEST, [wants(MINE), FROM_US]));
  expect(answer(server, ask(MessageType.RELEASE, [FROM_US], { ciaddr: MINE })).kind).toBe(
    'released',
  );
  expect(server.state(0)).toBe('released');
});

test('what is not from this VM, not for this server or makes no sense is ignored', () => {
  for (const packet of [
    ask(MessageType.DISCOVER, [], { hardwareAddress: macBytes('52:54:00:53:46:02') }),
    ask(MessageType.DISCOVER, [], { op: 2 }),
    ask(MessageType.DISCOVER, [], { hardwareType: 6 }),
    ask(MessageType.DISCOVER, [], { giaddr: '10.86.0.5' }),
    ask(MessageType.REQUEST, [wants(MINE), [Option.SERVER_ID, addresses('10.86.0.77')]]),
    ask(MessageType.REQUEST),
    ask(MessageType.INFORM, [], { ciaddr: PARENTS }),
    ask(MessageType.RELEASE, [FROM_US], { ciaddr: PARENTS }),
    ask(MessageType.OFFER),
    ask(200),
    { ...ask(0), options: new Map() },
  ]) {
    expect(answer(machine(), packet).kind).toBe('ignored');
  }
});

test('a client that needs broadcast gets it, one with an address does not', () => {
  const flags = 0x8000;
  expect(answer(machine(), ask(MessageType.DISCOVER, [], { flags })).reply?.broadcast).toBe(true);
  const renew = ask(MessageType.REQUEST, [], { flags, ciaddr: MINE });
  expect(answer(machine(), renew).reply).toMatchObject({ broadcast: false, address: MINE });
});

test('an identifier too long for the answer the client takes refuses the packet', () => {
  const packet = ask(MessageType.DISCOVER, [
    [Option.CLIENT_ID, new Uint8Array(100)],
    [Option.MAX_MESSAGE_BYTES, u16(100)], // below the least that is allowed: 576
  ]);
  expect(answer(machine(), packet).kind).toBe('offer');
  const longer = ask(MessageType.DISCOVER, [[Option.CLIENT_ID, new Uint8Array(600)]]);
  expect(() => answer(machine(), longer)).toThrow(expect.objectContaining({ reason: 'long' }));
});

test('time servers, search list and routes are told', () => {
  const routes = [{ destination: '0.0.0.0', prefixBits: 0, router: GATEWAY }];
  const server = new DhcpMachine({
    address: MINE,
    guestMac: GUEST_MAC,
    ntp: ['10.86.0.3', '10.86.0.4'],
    search: ['a.flock', 'flock'],
    routes,
  });
  const options = answer(server, ask(MessageType.DISCOVER)).packet?.options ?? new Map();
  expect(readAddresses(options, Option.NTP)).toEqual(['10.86.0.3', '10.86.0.4']);
  expect(decodeSearch(options.get(Option.DOMAIN_SEARCH))).toEqual(['a.flock', 'flock']);
  expect(decodeRoutes(options.get(Option.CLASSLESS_ROUTES))).toEqual(routes);
});

test('relayed: answers go to the relay, its option 82 comes back; without the mode silence', () => {
  const relayed = { giaddr: '10.99.0.1', hops: 1 };
  const information: [number, Uint8Array] = [Option.RELAY_AGENT, Uint8Array.of(1, 2, 7, 7)];
  const identity = { address: MINE, guestMac: GUEST_MAC };
  const server = new DhcpMachine(identity, { relay: true });
  const discover = ask(MessageType.DISCOVER, [information], relayed);
  const { kind, reply, packet } = answer(server, discover);
  expect(kind).toBe('offer');
  expect(reply).toMatchObject({ broadcast: false, address: '10.99.0.1', port: 67 });
  expect(packet).toMatchObject({ giaddr: '10.99.0.1', yiaddr: MINE, flags: 0 });
  expect(packet?.options.get(Option.RELAY_AGENT)).toEqual(information[1]);
  const nak = answer(server, ask(MessageType.REQUEST, [wants(PARENTS), information], relayed));
  expect(nak.kind).toBe('nak');
  expect(nak.reply).toMatchObject({ broadcast: false, address: '10.99.0.1', port: 67 });
  expect(nak.packet?.flags).toBe(0x8000);
  expect(nak.packet?.options.get(Option.RELAY_AGENT)).toEqual(information[1]);

  expect(answer(new DhcpMachine(identity), discover).kind).toBe('ignored');
  const direct = answer(server, ask(MessageType.DISCOVER, [information]));
  expect(direct.reply?.port).toBe(68);
  expect(direct.packet?.options.has(Option.RELAY_AGENT)).toBe(false);
});

test('a REQUEST tells the state of its client', () => {
  const stateOf = (packet: DhcpPacket, unicast: boolean) => {
    const outcome = machine().handle(packet, 0, unicast);
    return 'clientState' in outcome ? outcome.clientState : undefined;
  };
  expect(stateOf(ask(MessageType.REQUEST, [wants(MINE), FROM_US]), false)).toBe('selecting');
  expect(stateOf(ask(MessageType.REQUEST, [wants(MINE)]), false)).toBe('init-reboot');
  expect(stateOf(ask(MessageType.REQUEST, [], { ciaddr: MINE }), true)).toBe('renewing');
  expect(stateOf(ask(MessageType.REQUEST, [], { ciaddr: MINE }), false)).toBe('rebinding');
});

test('options are those the client lists, in its order; the lease and the mask always', () => {
  const server = new DhcpMachine({
    address: MINE,
    guestMac: GUEST_MAC,
    hostname: 'vm-7',
    router: GATEWAY,
    dns: ['192.0.2.53'],
    ntp: ['10.86.0.3'],
    renewSeconds: 5,
  });
  const wanted = [Option.DNS, 250, Option.ROUTER, Option.SUBNET_MASK, Option.DNS];
  const list: [number, Uint8Array] = [Option.PARAMETER_LIST, Uint8Array.from(wanted)];
  const { packet } = answer(server, ask(MessageType.DISCOVER, [list]));
  expect([...(packet?.options.keys() ?? [])]).toEqual([53, 54, 51, 58, 59, 1, 6, 3]);
  expect(readU32(packet?.options ?? new Map(), Option.RENEWAL_SECONDS)).toBe(5);
  const none: [number, Uint8Array] = [Option.PARAMETER_LIST, new Uint8Array()];
  const bare = answer(server, ask(MessageType.DISCOVER, [none])).packet;
  expect([...(bare?.options.keys() ?? [])]).toEqual([53, 54, 51, 58, 59, 1]);
});

test('an answer that is too long goes into file and sname, then leaves out what is wanted least', () => {
  const label = 'a'.repeat(60);
  const server = new DhcpMachine({
    address: MINE,
    guestMac: GUEST_MAC,
    hostname: 'h'.repeat(63),
    dns: Array.from({ length: 50 }, (_, i) => `192.0.2.${i}`),
    search: [`${label}.${label}.one`, `${label}.${label}.two`],
  });
  const small: [number, Uint8Array] = [Option.MAX_MESSAGE_BYTES, u16(576)];
  const whole = answer(server, ask(MessageType.DISCOVER, [small]));
  expect(whole.reply?.bytes.length).toBeLessThanOrEqual(548);
  expect(whole.reply?.omitted).toEqual([Option.DOMAIN_SEARCH]);
  expect(readAddresses(whole.packet?.options ?? new Map(), Option.DNS)).toHaveLength(50);
  const list: [number, Uint8Array] = [
    Option.PARAMETER_LIST,
    Uint8Array.of(Option.DOMAIN_SEARCH, Option.DNS, Option.HOST_NAME),
  ];
  const other = answer(server, ask(MessageType.DISCOVER, [small, list]));
  expect(other.reply?.omitted).toEqual([Option.HOST_NAME, Option.DNS]);
  expect(decodeSearch(other.packet?.options.get(Option.DOMAIN_SEARCH) ?? bytes())).toHaveLength(2);
  // Room for all of it where the client takes a whole frame.
  const large: [number, Uint8Array] = [Option.MAX_MESSAGE_BYTES, u16(1500)];
  expect(answer(server, ask(MessageType.DISCOVER, [large])).reply?.omitted).toEqual([]);
});

const bytes = () => new Uint8Array();
