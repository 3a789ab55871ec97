import { createSocket } from 'node:dgram';
import { afterEach, expect, test } from 'vitest';
import { type Group, GroupReserve, randomGroup } from '../../src/mcdist/groups.js';

const interfaceAddress = '127.0.0.1';
let reserve: GroupReserve | undefined;
afterEach(() => reserve?.close());

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await new Promise((resolve) => setImmediate(resolve));
}

/** Candidates in a known order. */
function listed(count: number): { groups: Group[]; candidate: () => Group } {
  const port = 16384 + (process.pid % 16384);
  const groups = Array.from({ length: count }, (_, i) => ({ group: `239.195.77.${i + 1}`, port }));
  let next = 0;
  return { groups, candidate: () => groups[next++ % count] as Group };
}

test('a group on which somebody is heard is not used', async () => {
  const { groups, candidate } = listed(3);
  const made = new GroupReserve({ interfaceAddress, size: 2, candidate });
  reserve = made;
  await until(() => made.stats().listening === 2);
  const foreign = createSocket('udp4');
  try {
    await new Promise<void>((resolve) => foreign.bind(0, interfaceAddress, resolve));
    foreign.setMulticastInterface(interfaceAddress);
    foreign.send('anything', groups[0]?.port, groups[0]?.group);
    await until(() => made.stats().busy === 1 && made.stats().listening === 2);
    expect(made.take()).toEqual(groups[1]);
    expect(made.stats().failures).toBe(0);
  } finally {
    foreign.close();
  }
});

test('a group in use is not given out again before it is released', async () => {
  const { groups, candidate } = listed(3);
  const made = new GroupReserve({ interfaceAddress, size: 1, candidate });
  reserve = made;
  await until(() => made.stats().listening === 1);
  expect(made.take()).toEqual(groups[0]);
  await until(() => made.stats().listening === 1);
  expect(made.take()).toEqual(groups[1]);
  await until(() => made.stats().listening === 1);
  // The first two are in use, the third is the candidate: what comes next is what was released.
  made.release(groups[1] as Group);
  expect(made.take()).toEqual(groups[2]);
  await until(() => made.stats().listening === 1);
  expect(made.take()).toEqual(groups[1]);
  expect(made.stats().used).toBe(3);
});

test('where nothing can be listened to, groups are given out all the same, and it is told', async () => {
  const made = new GroupReserve({ interfaceAddress: '203.0.113.1', size: 2 });
  reserve = made;
  await until(() => made.stats().failures === 2);
  expect(made.take().group).toMatch(/^239\.195\./);
});

test('a group of what is served again after a restart is not given out', async () => {
  const { groups, candidate } = listed(3);
  const made = new GroupReserve({ interfaceAddress, size: 1, candidate });
  reserve = made;
  // The first is listened to already, the second would be the next.
  made.adopt(groups[1] as Group);
  made.adopt(groups[0] as Group);
  await until(() => made.stats().listening === 1);
  expect(made.take()).toEqual(groups[2]);
  expect(made.stats().used).toBe(3);
});

test('who can wait takes a group that was listened to', async () => {
  const { groups, candidate } = listed(2);
  const made = new GroupReserve({ interfaceAddress, size: 1, candidate });
  reserve = made;
  const taken = made.takeQuiet(100);
  await until(() => made.stats().listening === 1);
  const foreign = createSocket('udp4');
  try {
    await new Promise<void>((resolve) => foreign.bind(0, interfaceAddress, resolve));
    foreign.setMulticastInterface(interfaceAddress);
    foreign.send('anything', groups[0]?.port, groups[0]?.group);
    expect(await taken).toEqual(groups[1]);
  } finally {
    foreign.close();
  }
});

test('random groups are administratively scoped, below ephemeral ports, and differ', () => {
  const seen = new Set<string>();
  for (let i = 0; i < 1000; i++) {
    const { group, port } = randomGroup();
    expect(group).toMatch(/^239\.195\.\d+\.\d+$/);
    expect(port).toBeGreaterThanOrEqual(16384);
    expect(port).toBeLessThan(32768);
    seen.add(`${group}:${port}`);
  }
  expect(seen.size).toBeGreaterThanOrEqual(999);
});
