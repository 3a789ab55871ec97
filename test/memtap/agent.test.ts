import { execFileSync } from 'node:child_process';
import { connect } from 'node:net';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { agentEnvironment, MemtapServer } from '../../src/memtap/memtap.js';
import { Bench, Guest, PAGE } from './harness.js';

const PAGES = 64;
const DISCARDS = { dontneed: 4, free: 8, remove: 9, mergeable: 12, hugepage: 14 };

let bench: Bench;
beforeEach(() => {
  bench = new Bench();
});
afterEach(async () => {
  await bench.end();
});

const socketOf = (server: MemtapServer): string =>
  (server as MemtapServer & { socketPath: string }).socketPath;

test('without a server the mapping fails, and the agent says why', async () => {
  const guest = bench.guest(join(bench.open, 'nobody-listens'), 'vm');
  await expect(guest.map(PAGES)).rejects.toThrow(/map 5/);
  expect(await guest.lastWords()).toMatch(/memtap-agent: E_DATAPLANE: connect .*nobody-listens/);
});

test('a wrong token, an unknown VM, another size of RAM: no mapping', async () => {
  const server = bench.server();
  server.expect({ id: 'vm', token: 'secret', ramBytes: PAGES * PAGE });
  const wrongToken = bench.guest(socketOf(server), 'vm', 'secreT');
  await expect(wrongToken.map(PAGES)).rejects.toThrow(/map 5/);
  expect(await wrongToken.lastWords()).toMatch(/E_NOT_FOUND/);
  const unknown = bench.guest(socketOf(server), 'other');
  await expect(unknown.map(PAGES)).rejects.toThrow(/map 5/);
  const larger = bench.guest(socketOf(server), 'vm');
  await expect(larger.map(PAGES + 1)).rejects.toThrow(/map 5/);
  expect(await larger.lastWords()).toMatch(/E_SHAPE/);
  const right = bench.guest(socketOf(server), 'vm');
  await right.map(PAGES);
  const second = bench.guest(socketOf(server), 'vm');
  await expect(second.map(PAGES)).rejects.toThrow(/map 5/);
  expect(await second.lastWords()).toMatch(/E_IN_USE/);
});

test('guest RAM is neither discarded nor merged nor made huge', async () => {
  const server = bench.server();
  const { guest } = await bench.vm(server, PAGES);
  await guest.say('fill 0 8 1');
  const before = await guest.dump(0, 8);
  for (const advice of Object.values(DISCARDS)) {
    expect(await guest.say(`discard 0 8 ${advice}`)).toBe('22');
  }
  expect(await guest.dump(0, 8)).toEqual(before);
});

test('a forked child has neither the RAM nor the descriptors', async () => {
  const server = bench.server();
  const { guest } = await bench.vm(server, PAGES);
  await guest.say('fill 0 8 1');
  expect(await guest.say('fork')).toBe('0');
});

test('the agent comes back to the next server by itself, and its faults with it', async () => {
  const server = bench.server();
  const { id, guest } = await bench.vm(server, PAGES);
  await guest.say('fill 0 8 1');
  const before = await guest.dump(0, PAGES);
  const generation = await bench.fork(server, id);
  server.close();
  const written = guest.say('fill 0 4 2');
  const next = new MemtapServer({ socketPath: socketOf(server), socketMode: 0o666 });
  bench.onEnd(() => next.close());
  next.expect({ id, token: 'secret', ramBytes: PAGES * PAGE });
  next.adoptGeneration(id, { generation, directory: bench.path(generation) });
  expect(await next.attached(id, 10_000)).toEqual({ pid: guest.pid });
  await written;
  expect(await bench.image(next, id, generation, PAGES)).toEqual(before);
});

test('peers that send nonsense are dropped, and the others served', async () => {
  const server = bench.server();
  server.expect({ id: 'vm', token: 'secret', ramBytes: PAGES * PAGE });
  const hostile = bench.guest('/nonexistent', 'hostile');
  await hostile.say(`misbehave ${PAGES * PAGE} 0 ${socketOf(server)}`);
  const honest = bench.guest(socketOf(server), 'vm');
  await honest.map(PAGES);
  expect(await server.attached('vm', 10_000)).toEqual({ pid: honest.pid });
});

test('a second server at the same socket is refused', () => {
  const server = bench.server();
  expect(() => new MemtapServer({ socketPath: socketOf(server) })).toThrow(
    /another process serves/,
  );
});

test('waiting for a VM ends with its time, its removal, and the server', async () => {
  const server = bench.server();
  server.expect({ id: 'vm', token: 'secret', ramBytes: PAGES * PAGE });
  expect(() => server.expect({ id: 'vm', token: 'x', ramBytes: PAGE })).toThrow(/known already/);
  await expect(server.attached('vm', 1)).rejects.toMatchObject({ code: 'E_TIMEOUT' });
  const removed = server.attached('vm', 60_000);
  server.remove('vm');
  await expect(removed).rejects.toMatchObject({ code: 'E_CLOSED' });
  server.expect({ id: 'vm', token: 'secret', ramBytes: PAGES * PAGE });
  const closed = server.attached('vm', 60_000);
  server.close();
  await expect(closed).rejects.toMatchObject({ code: 'E_CLOSED' });
});

test('a stream connection or a program without guest RAM is none of its business', async () => {
  const server = bench.server();
  const error = await new Promise<NodeJS.ErrnoException>((resolve) =>
    connect(socketOf(server)).once('error', resolve),
  );
  expect(error.code).toBe('EPROTOTYPE');
  const env = agentEnvironment({ socketPath: '/nonexistent', id: 'vm', token: 'x' });
  expect(execFileSync('/bin/echo', ['fine'], { env }).toString()).toBe('fine\n');
  const unset = new Guest(bench.guestProgram, { LD_PRELOAD: env.LD_PRELOAD ?? '' }, bench.open);
  bench.onEnd(() => unset.kill());
  await expect(unset.map(PAGES)).rejects.toThrow(/map 5/);
  expect(await unset.lastWords()).toMatch(/E_CONFIG: SF_MEMTAP_SOCKET is not set/);
});
