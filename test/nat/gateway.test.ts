/** Guests of two families with the same addresses, through their gateways, with real traffic. */
import { afterAll, beforeAll, expect, test } from 'vitest';
import { HOST, NatLab, OTHERS, SERVER } from './lab.js';

const FAMILIES = [7, 0xabcdef];
const POLICY = {
  allow: [
    { name: 'web', protocol: 'tcp', to: [SERVER], ports: [80, '8000-8010'] },
    { name: 'time', protocol: 'udp', to: ['192.168.77.0/24'], ports: [123] },
    { name: 'ping', protocol: 'icmp', to: [SERVER] },
  ],
};
let lab: NatLab;

beforeAll(async () => {
  lab = await NatLab.create();
  for (const family of FAMILIES) for (let vmid = 0; vmid < 8; vmid++) lab.guest(family, vmid);
  await lab.serve(80, 81, 8005, 123);
  await lab.apply({ default: POLICY });
});

afterAll(async () => {
  await lab?.destroy();
});

test('16 guests reach what is allowed; all else is refused at once', async () => {
  const { peers, guests } = lab;
  const all = await Promise.all(
    guests.map(async ({ netns }) => ({
      web: (await peers.ask(netns, 'tcp', { to: SERVER, port: 80 })).outcome,
      range: (await peers.ask(netns, 'tcp', { to: SERVER, port: 8005 })).outcome,
      time: (await peers.ask(netns, 'udp', { to: SERVER, port: 123 })).outcome,
      ping: (await peers.ask(netns, 'ping', { to: SERVER })).outcome,
      gateway: (await peers.ask(netns, 'ping', { to: '10.86.0.1' })).outcome,
      port: (await peers.ask(netns, 'tcp', { to: SERVER, port: 81 })).outcome,
      machine: (await peers.ask(netns, 'tcp', { to: OTHERS[0], port: 80 })).outcome,
      udp: (await peers.ask(netns, 'udp', { to: SERVER, port: 80 })).outcome,
      host: (await peers.ask(netns, 'tcp', { to: HOST, port: 80 })).outcome,
    })),
  );
  for (const outcomes of all) {
    expect(outcomes).toEqual({
      web: 'ok',
      range: 'ok',
      time: 'ok',
      ping: 'ok',
      gateway: 'ok',
      port: 'ECONNREFUSED',
      machine: 'ECONNREFUSED',
      udp: 'EHOSTUNREACH',
      host: 'ECONNREFUSED',
    });
  }
  for (const family of FAMILIES) {
    const counted = await lab.counters(family);
    const eachOf8 = (bytes: number) => ({ packets: 8, bytes: 8 * bytes });
    expect(counted['allow-ping-out']).toEqual(eachOf8(28));
    expect(counted['allow-ping-in']).toEqual(eachOf8(28));
    expect(counted['allow-time-out']).toEqual(eachOf8(32));
    expect(counted['allow-time-in']).toEqual(eachOf8(32));
    expect(counted['gateway-ping']).toEqual(eachOf8(28));
    // Three SYN of 60 bytes each and a datagram of 32.
    expect(counted['refused-outbound']).toEqual({ packets: 32, bytes: 8 * (3 * 60 + 32) });
  }
});
