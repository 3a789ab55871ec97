import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { nativePath } from '../../src/common/native.js';
import { LocalSource, MemtapServer } from '../../src/memtap/memtap.js';
import { Bench, differingPages, PAGE, until } from './harness.js';

const PAGES = 2048;

/** A server in a process of its own. */
class ServerProcess {
  readonly #child: ChildProcess;
  readonly #answers: ((line: string) => void)[] = [];
  readonly ready: Promise<unknown>;

  constructor(socketPath: string) {
    const program = fileURLToPath(new URL('server-child.mjs', import.meta.url));
    this.#child = spawn(process.execPath, [program, nativePath('dataplane.node'), socketPath], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    if (this.#child.stdout === null) throw new Error('no stdout');
    createInterface({ input: this.#child.stdout }).on('line', (line) =>
      this.#answers.shift()?.(line),
    );
    this.ready = this.#answer();
  }
  async #answer(): Promise<unknown> {
    const line = await new Promise<string>((resolve) => this.#answers.push(resolve));
    const answer = JSON.parse(line) as { value?: unknown; message?: string };
    if (answer.message !== undefined) throw new Error(answer.message);
    return answer.value;
  }
  async call(object: 'server' | 'tools', method: string, ...rest: unknown[]): Promise<unknown> {
    this.#child.stdin?.write(`${JSON.stringify([object, method, ...rest])}\n`);
    return await this.#answer();
  }
  async kill(): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    const exited = new Promise((resolve) => this.#child.once('exit', resolve));
    this.#child.kill('SIGKILL');
    await exited;
  }
}

let bench: Bench;
beforeEach(() => {
  bench = new Bench();
});
afterEach(async () => {
  await bench.end();
});

async function serverProcess(): Promise<{ child: ServerProcess; socketPath: string }> {
  const socketPath = join(bench.open, bench.unique('socket'));
  const child = new ServerProcess(socketPath);
  bench.onEnd(() => child.kill());
  await child.ready;
  return { child, socketPath };
}

test('generations survive SIGKILL of the data plane while their parent writes', async () => {
  const { child, socketPath } = await serverProcess();
  await child.call('server', 'expect', 'vm', 'secret', PAGES * PAGE);
  const guest = bench.guest(socketPath, 'vm');
  await guest.map(PAGES);
  await guest.say(`fill 0 ${PAGES - 200} 1`);
  const instants = new Map<string, Buffer>();
  for (let i = 0; i < 3; i++) {
    const generation = bench.generation();
    await child.call('server', 'forkBegin', 'vm', generation, bench.path(generation));
    await child.call('server', 'forkCommit', 'vm', generation);
    instants.set(generation, await guest.dump(0, PAGES));
    await guest.say(`fill ${i * 150} 300 ${i + 2}`);
  }
  await guest.say('write-on 77');
  await child.kill();
  const server = new MemtapServer({ socketPath, socketMode: 0o666 });
  bench.onEnd(() => server.close());
  server.expect({ id: 'vm', token: 'secret', ramBytes: PAGES * PAGE });
  for (const generation of instants.keys()) {
    server.adoptGeneration('vm', { generation, directory: bench.path(generation) });
  }
  await server.attached('vm', 10_000);
  for (const [generation, instant] of instants) {
    const image = await bench.image(server, 'vm', generation, PAGES);
    expect(differingPages(image, instant)).toEqual([]);
  }
  await guest.say('pause');
  await guest.say(`fill 0 ${PAGES} 9`);
  for (const [generation, instant] of instants) {
    const image = await bench.image(server, 'vm', generation, PAGES);
    expect(differingPages(image, instant)).toEqual([]);
    await server.dropGeneration('vm', generation);
  }
});

test('killed between forkBegin and forkCommit: no generation, and the VM runs on', async () => {
  const { child, socketPath } = await serverProcess();
  await child.call('server', 'expect', 'vm', 'secret', PAGES * PAGE);
  const guest = bench.guest(socketPath, 'vm');
  await guest.map(PAGES);
  await guest.say(`fill 0 ${PAGES} 1`);
  const generation = bench.generation();
  const directory = bench.path(generation);
  await child.call('server', 'forkBegin', 'vm', generation, directory);
  await child.kill();
  const written = guest.say(`fill 0 ${PAGES} 2`);
  const server = new MemtapServer({ socketPath, socketMode: 0o666 });
  bench.onEnd(() => server.close());
  server.expect({ id: 'vm', token: 'secret', ramBytes: PAGES * PAGE });
  expect(() => server.adoptGeneration('vm', { generation, directory })).toThrow(/never committed/);
  await server.attached('vm', 10_000);
  await written;
  expect(server.stats('vm')).toMatchObject({ spuriousFaults: PAGES, savedPages: 0 });
});

test('a generation whose newer one is not adopted fails instead of reading live pages', async () => {
  const first = bench.server();
  const { id, guest } = await bench.vm(first, PAGES);
  await guest.say(`fill 0 ${PAGES} 1`);
  const older = await bench.fork(first, id);
  await bench.fork(first, id);
  await guest.say('fill 0 10 2');
  first.close();
  const { socketPath } = first as MemtapServer & { socketPath: string };
  const second = new MemtapServer({ socketPath, socketMode: 0o666 });
  bench.onEnd(() => second.close());
  const failed = new Promise((resolve) => second.once('generation-failed', resolve));
  second.expect({ id, token: 'secret', ramBytes: PAGES * PAGE });
  second.adoptGeneration(id, { generation: older, directory: bench.path(older) });
  expect(await failed).toMatchObject({ generation: older, code: 'E_SOURCE_LOST' });
  await expect(bench.image(second, id, older, PAGES)).rejects.toMatchObject({
    code: 'E_SOURCE_LOST',
  });
});

test('clone faults outstanding at SIGKILL are answered by the next data plane', async () => {
  const { child, socketPath } = await serverProcess();
  const image = randomBytes(PAGES * PAGE);
  const path = bench.path('replica');
  await child.call('tools', 'replica', 'r', path, PAGES, 'memory');
  await child.call('tools', 'expectClone', 'vm', PAGES * PAGE, 'r');
  const guest = bench.guest(socketPath, 'vm');
  await guest.map(PAGES);
  const answer = guest.dump(0, PAGES);
  await until(async () => (await child.call('tools', 'waiting', 'r')) === 1);
  await child.kill();
  const server = new MemtapServer({ socketPath, socketMode: 0o666 });
  bench.onEnd(() => server.close());
  const replica = bench.replica(PAGES, 'memory', path);
  const source = bench.replica(PAGES, 'disk');
  for (let page = 0; page < PAGES; page++) {
    source.fill(page, image.subarray(page * PAGE, (page + 1) * PAGE));
  }
  server.expect({ id: 'vm', token: 'secret', ramBytes: PAGES * PAGE, replica: replica.handle });
  const local = new LocalSource(replica.handle, source.provider);
  bench.onEnd(() => local.close());
  await server.attached('vm', 10_000);
  expect(differingPages(await answer, image)).toEqual([]);
});

test('a VM that maps another replica is refused after a restart', async () => {
  const first = bench.server();
  const replica = bench.replica(PAGES);
  const { id, guest } = await bench.vm(first, PAGES, replica);
  first.close();
  const { socketPath } = first as MemtapServer & { socketPath: string };
  const second = new MemtapServer({ socketPath, socketMode: 0o666 });
  bench.onEnd(() => second.close());
  const other = bench.replica(PAGES);
  second.expect({ id, token: 'secret', ramBytes: PAGES * PAGE, replica: other.handle });
  await expect(second.attached(id, 1000)).rejects.toMatchObject({ code: 'E_TIMEOUT' });
  second.remove(id);
  second.expect({ id, token: 'secret', ramBytes: PAGES * PAGE, replica: replica.handle });
  expect(await second.attached(id, 10_000)).toEqual({ pid: guest.pid });
});
