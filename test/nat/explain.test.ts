/**
 * The policy as a pure function and the kernel's rules decide alike: generated policies and flows,
 * each flow tried with real traffic. SEED repeats.
 */
import { randomBytes } from 'node:crypto';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { explain, type Flow } from '../../src/nat/explain.js';
import type { FamilyPolicy } from '../../src/nat/policy.js';
import { addressOfVmid } from '../../src/network/addresses.js';
import { Random } from '../netback-filter/generate.js';
import { type Guest, HOST, NatLab, OTHERS, SERVER } from './lab.js';

const SEED = Number(process.env.SEED ?? randomBytes(4).readUInt32LE());
const POLICIES = 12;
const FLOWS = 16;
const PORTS = [80, 81, 90, 100];
const NAMES: Record<string, string[]> = { 'a.test': [SERVER], 'b.test': [...OTHERS] };
const REFUSED = ['ECONNREFUSED', 'EHOSTUNREACH'];

/** What must be reached for the comparison to say anything comes first; then chance decides. */
const FIRST: FamilyPolicy = {
  allow: [{ name: 'r0', protocol: 'tcp', to: ['0.0.0.0/0'] }],
  inbound: [
    { name: 'i80', protocol: 'tcp', port: 80, to_port: 22, from: [OTHERS[0] ?? ''] },
    { name: 'i81', protocol: 'tcp', port: 81, to_port: 22 },
  ],
};
const out = { direction: 'out', source: addressOfVmid(1), protocol: 'tcp' } as const;
const into = { direction: 'in', source: SERVER, destination: HOST, protocol: 'tcp' } as const;
const FIRST_FLOWS: Flow[] = [
  { ...out, destination: SERVER, port: 80 },
  { ...out, destination: SERVER, port: 80, protocol: 'udp' },
  { ...out, destination: HOST, port: 80 },
  { ...out, destination: '100.86.0.1', port: 80 },
  { ...out, destination: '10.86.0.1', port: 80 },
  { ...out, destination: '10.86.0.1', port: 0, protocol: 'icmp' },
  { ...into, port: 80 },
  { ...into, port: 81 },
];

let lab: NatLab;
let parent: Guest;
let clone: Guest;

beforeAll(async () => {
  lab = await NatLab.create((name) => Promise.resolve(NAMES[name] ?? []));
  parent = lab.guest(7, 0);
  clone = lab.guest(7, 1);
  await lab.serve(...PORTS);
  for (const { netns } of [parent, lab.host]) {
    for (const port of [22, ...PORTS]) {
      await lab.peers.ask(netns, 'serve_tcp', { address: '0.0.0.0', port });
    }
  }
});

afterAll(async () => {
  await lab?.destroy();
});

test('explain says what the kernel does, of flows in both directions', async () => {
  console.log(`SEED=${SEED}`);
  const random = new Random(SEED);
  const destinations = [SERVER, ...OTHERS, HOST, '10.86.0.1', '100.86.0.0', '100.86.0.1'];
  const blocks = [
    ...destinations,
    '0.0.0.0/0',
    '192.168.77.0/24',
    '198.51.100.0/24',
    'A.test',
    'b.test',
  ];
  const some = <T>(from: readonly T[]): T[] => [random.pick(from), random.pick(from)];
  const counters = new Set<string>();
  for (let round = 0; round < POLICIES; round++) {
    const generated = {
      allow: Array.from({ length: random.below(4) }, (_, i) => {
        const protocol = random.pick(['tcp', 'udp', 'icmp'] as const);
        const ports = random.pick([[], some(PORTS), ['80-90'], [81]]);
        const rule = { name: `r${i}`, protocol, to: some(blocks) };
        return protocol === 'icmp' || ports.length === 0 ? rule : { ...rule, ports };
      }),
      inbound: PORTS.filter(() => random.chance(2)).map((port) => ({
        name: `i${port}`,
        protocol: 'tcp' as const,
        port,
        ...random.pick([{}, { to_port: 22 }, { from: [OTHERS[0] ?? ''] }, { from: [SERVER] }]),
      })),
    };
    const policy: FamilyPolicy = round === 0 ? FIRST : generated;
    await lab.apply({ dns_private: true, families: { 7: policy } });
    const state = await lab.nat.policy();
    const context = {
      policy,
      resolved: state?.resolved ?? {},
      hostAddresses: [HOST, '100.86.0.0'],
      parentHere: true,
    };
    let before = await counted();
    for (let i = 0; i < FLOWS; i++) {
      const inward = random.chance(4);
      const protocol = inward ? 'tcp' : random.pick(['tcp', 'tcp', 'udp', 'icmp'] as const);
      const chosen: Flow = {
        direction: inward ? 'in' : 'out',
        source: inward ? SERVER : clone.address,
        destination: inward ? HOST : random.pick(destinations),
        protocol,
        port: protocol === 'icmp' ? 0 : random.pick(PORTS),
      };
      const flow = (round === 0 ? FIRST_FLOWS[i] : undefined) ?? chosen;
      const isIn = flow.direction === 'in';
      const expected = explain(flow, context);
      if (isIn && expected.counter === 'host') continue; // the host's own server would answer
      counters.add(expected.counter.replace(/-[ri]\d+$/, ''));
      const op = flow.protocol === 'icmp' ? 'ping' : flow.protocol;
      const { outcome } = await lab.peers.ask(isIn ? lab.outside : clone.netns, op, {
        to: flow.destination,
        port: flow.port,
      });
      const what = `SEED=${SEED} ${JSON.stringify({ policy, flow, expected, outcome })}`;
      if (expected.verdict === 'allow') expect(outcome, what).toBe('ok');
      else expect(REFUSED, what).toContain(outcome);
      const after = await counted();
      const name = [expected.counter, `${expected.counter}-out`].find((it) => it in after) ?? '';
      expect(after[name] ?? 0, what).toBeGreaterThan(before[name] ?? 0);
      before = after;
    }
  }
  const all = ['allow', 'inbound', 'gateway-ping', 'refused-outbound', 'refused-inbound'];
  for (const name of [...all, 'refused-host', 'refused-links', 'refused-gateway']) {
    expect([...counters], `SEED=${SEED}`).toContain(name);
  }
});

async function counted(): Promise<Record<string, number>> {
  const { gateways, host } = await lab.nat.view();
  const all = { ...host, ...gateways[0]?.counters };
  return Object.fromEntries(Object.entries(all).map(([name, it]) => [name, it.packets]));
}
