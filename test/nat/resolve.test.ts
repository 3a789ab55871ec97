/** Which addresses of a name count; the traffic is in policy-change.test.ts. */
import { expect, test } from 'vitest';
import { refresh } from '../../src/nat/resolve.js';

const at = (addresses: string[] | Error, allowPrivate: boolean, before = {}) =>
  refresh(
    ['a.test'],
    { 'a.test': before },
    {
      keepMs: 1000,
      nowMs: 5000,
      allowPrivate,
      resolver: () =>
        addresses instanceof Error ? Promise.reject(addresses) : Promise.resolve(addresses),
    },
  );

/** First and last of each block of RFC 6890, and its neighbours. */
const SPECIAL = [
  ...['0.0.0.0', '0.255.255.255', '127.0.0.1', '127.255.255.255', '169.254.0.0', '169.254.169.254'],
  ...['192.0.0.0', '192.0.0.255', '198.18.0.0', '198.19.255.255', '224.0.0.1', '255.255.255.255'],
];
const PRIVATE = [
  ...['10.0.0.0', '10.255.255.255', '100.64.0.0', '100.127.255.255', '172.16.0.0'],
  ...['172.31.255.255', '192.168.0.0', '192.168.255.255'],
];
const PUBLIC = [
  ...['1.0.0.0', '9.255.255.255', '11.0.0.0', '100.63.255.255', '100.128.0.0', '126.255.255.255'],
  ...['128.0.0.0', '169.253.255.255', '169.255.0.0', '172.15.255.255', '172.32.0.0'],
  ...['191.255.255.255', '192.0.1.0', '192.167.255.255', '192.169.0.0', '198.17.255.255'],
  ...['198.20.0.0', '223.255.255.255'],
];

test('a name leads to public addresses, to private ones only if the policy says so', async () => {
  const all = [...SPECIAL, ...PRIVATE, ...PUBLIC];
  const closed = await at(all, false);
  expect(Object.keys(closed.resolved['a.test'] ?? {}).sort()).toEqual([...PUBLIC].sort());
  expect(closed.failed['a.test']).toBe(
    'private addresses (dns_private would allow them) left out: 10.0.0.0, 10.255.255.255, ' +
      '100.64.0.0, ...; addresses that no name may lead to left out: 0.0.0.0, 0.255.255.255, ' +
      '127.0.0.1, ...',
  );
  const open = await at(all, true);
  const expected = [...PRIVATE, ...PUBLIC].sort();
  expect(Object.keys(open.resolved['a.test'] ?? {}).sort()).toEqual(expected);
  expect((await at(PUBLIC, false)).failed).toEqual({});
});

test('what a name had before counts by the same rules, also when it cannot be resolved', async () => {
  const before = { '10.0.0.5': 4500, '1.2.3.4': 4500 };
  for (const now of [new Error('ESERVFAIL'), ['1.2.3.5']]) {
    expect((await at(now, false, before)).resolved['a.test']).not.toHaveProperty(['10.0.0.5']);
    const { resolved } = await at(now, true, before);
    expect(resolved['a.test']).toMatchObject(before);
  }
});
