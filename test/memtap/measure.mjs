// Prints what memtap costs on this machine: `node test/memtap/measure.mjs [MiB]` after the build.
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, mkdtempSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('../..', import.meta.url));
const addon = createRequire(import.meta.url)(join(root, 'build/Release/dataplane.node'));
const mib = Math.max(256, Number(process.argv[2] ?? 512));
const pages = mib * 256;
const directory = mkdtempSync('/dev/shm/memtap-measure-');
chmodSync(directory, 0o777);
const program = join(directory, 'guest');
const source = join(root, 'test/memtap/guest.c');
const include = join(root, 'native/agent');
execFileSync('gcc', ['-D_GNU_SOURCE', '-O2', '-pthread', '-I', include, '-o', program, source]);
const socketPath = join(directory, 'socket');
const options = { socketPath, socketMode: 0o666, socketUid: -1, socketGid: -1, saveWaitMs: 1000 };
const server = new addon.MemtapServer({ ...options, populate: false }, () => {});
const children = [];
let generations = 0;

async function vm(id, replica) {
  server.expect(id, 'secret', pages * 4096, replica?.handle);
  const child = spawn(program, [], {
    env: {
      LD_PRELOAD: join(root, 'build/Release/memtap-agent.so'),
      SF_MEMTAP_SOCKET: socketPath,
      SF_MEMTAP_VM: id,
      SF_MEMTAP_TOKEN: 'secret',
    },
    uid: 65534,
    gid: 65534,
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  children.push(child);
  const died = once(child, 'exit').then(() => ['error: the guest ended']);
  const lines = createInterface({ input: child.stdout });
  const say = async (command) => {
    child.stdin.write(`${command}\n`);
    const [line] = await Promise.race([once(lines, 'line'), died]);
    if (!line.startsWith('ok')) throw new Error(`${command}: ${line}`);
    return Number(line.split(' ')[1]);
  };
  await say(`map ${pages * 4096}`);
  return say;
}

async function begin(id) {
  generations += 1;
  const generation = generations.toString(16).padStart(32, '0');
  const start = performance.now();
  await server.forkBegin(id, generation, join(directory, generation));
  return { generation, beginMs: performance.now() - start };
}

const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
const row = (what, value, unit) => console.log(`${what.padEnd(56)} ${value.toFixed(2)} ${unit}`);

process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
  rmSync(directory, { recursive: true, force: true });
});

const parent = await vm('parent');
await parent(`fill 0 ${pages} 1`);
let last;
const begins = [];
const commits = [];
for (let i = 0; i < 20; i++) {
  const fork = await begin('parent');
  await parent(`poke 0 1000 ${Math.floor(pages / 1000)}`);
  const start = performance.now();
  const { durationUs, dirtyPages } = await server.forkCommit('parent', fork.generation);
  commits.push({ us: durationUs, wallMs: performance.now() - start, dirtyPages });
  begins.push(fork.beginMs);
  last = fork.generation;
}
row(`forkBegin, ${mib} MiB populated, median of 20`, median(begins), 'ms');
row('forkCommit, 1000 scattered dirty pages, first', commits[0].us, 'us');
row('forkCommit, the same, 20th fork (19 generations open)', commits[19].us, 'us');
row('forkCommit, median as JavaScript sees it', median(commits.map((c) => c.wallMs)), 'ms');
row('write to a protected page, old page saved', await parent('poke 1 20000 3'), 'us');
row('write to a page already saved', await parent('poke 1 20000 3'), 'us');

const filled = new addon.Replica(join(directory, 'a'), '0'.repeat(32), pages, 'memory');
const absent = new addon.Replica(join(directory, 'b'), '0'.repeat(32), pages, 'memory');
const page = Buffer.alloc(4096, 7);
for (let i = 0; i < 4000; i++) filled.fill(i, page);
filled.fillZero(4000, 8000);
const a = await vm('a', filled);
row('read of a page in the replica (no fault to memtap)', await a('touch 0 4000'), 'us');
row('read of a page known to be zero', await a('touch 4000 4000'), 'us');
const local = new addon.LocalSource(absent.handle, server.provider('parent', last), 1000);
const b = await vm('b', absent);
row('read of an absent page, fetched from the parent here', await b('touch 0 4000 5'), 'us');

const start = performance.now();
for (let i = 1; i <= generations; i++) {
  await server.dropGeneration('parent', i.toString(16).padStart(32, '0'));
}
row('dropping 20 generations', performance.now() - start, 'ms');

local.close();
server.close();
process.exit(0);
