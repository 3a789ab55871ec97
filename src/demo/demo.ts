/**
 * The main job on one machine: hosts are network namespaces with a daemon and a data plane each; a
 * VM loads a data set, forks itself with sf_clone, its clones work and report, the parent joins them
 * and checks the result against the same work done alone.
 */
import { writeFile } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import type { SnowflockClient } from '../api/client.js';
import { exec } from '../api/exec.js';
import { SnowflockError } from '../common/errors.js';
import { defaultImageDir } from '../image/images.js';
import { configure, startDaemons, type TestbedDaemon } from '../testbed/daemons.js';
import { Testbed } from '../testbed/testbed.js';
import { type DemoResult, demoResult, describe, succeeded } from './result.js';
import { type CloneView, View } from './view.js';

export interface DemoOptions {
  clones: number;
  hosts: number;
  ramBytes: number;
  keep: boolean;
  jsonFile?: string;
}

const POLL_MS = 150;
const JOB_LIMIT_MS = 300_000;
const DATA_SET_MIB = 64;

/** Runs the demo. True if every clone succeeded and the answer is right. */
export async function runDemo(options: DemoOptions): Promise<boolean> {
  const view = new View(process.stderr);
  Testbed.reap();
  view.say(`making ${options.hosts} hosts: network namespaces on a bridge`);
  const testbed = await Testbed.create({ hosts: options.hosts });
  try {
    for (const host of testbed.hosts) await configure(host, { image_dir: defaultImageDir() });
    const daemons = await startDaemons(testbed);
    const first = daemons[0];
    if (first === undefined) throw new SnowflockError('E_INTERNAL', 'a testbed has a host');
    view.say(`booting the parent on ${first.host.name}`);
    await first.client.run({
      name: 'parent',
      image: 'minimal',
      ram_bytes: options.ramBytes,
      vcpus: 1,
    });
    const result = await runJob(first.client, options, view);
    if (options.jsonFile !== undefined) {
      await writeFile(options.jsonFile, `${JSON.stringify(result, null, 2)}\n`);
    }
    process.stdout.write(`${describe(result)}\n`);
    if (options.keep) await keep(testbed, daemons);
    return result.answer_ok && result.results.every((one) => one.ok);
  } finally {
    view.done();
    await testbed.destroy();
  }
}

interface Line {
  event: string;
  [key: string]: unknown;
}

async function runJob(
  client: SnowflockClient,
  options: DemoOptions,
  view: View,
): Promise<DemoResult> {
  const dataMib = Math.min(DATA_SET_MIB, Math.floor(options.ramBytes / 2 ** 20 / 8));
  const argv = ['sf-sum', '--clones', String(options.clones), '--mib', String(dataMib)];
  view.say(`parent: ${argv.join(' ')}`);
  const job = await exec(client, 'parent', argv);
  job.stdin.end();
  let final: Line | undefined;
  let stderr = '';
  job.stderr.on('data', (chunk: Buffer) => {
    stderr = (stderr + chunk.toString()).slice(-4096);
  });
  createInterface({ input: job.stdout }).on('line', (text) => {
    const line = parse(text);
    if (line?.event === 'answer') final = line;
    view.say(`parent: ${text}`);
  });
  let over = false;
  const exited = job.exited.finally(() => {
    over = true;
  });
  exited.catch(() => {});
  const limit = Date.now() + JOB_LIMIT_MS;
  while (!over) {
    if (Date.now() > limit) throw new SnowflockError('E_TIMEOUT', 'the job takes too long');
    await show(client, view);
    await Promise.race([exited.catch(() => {}), new Promise((r) => setTimeout(r, POLL_MS))]);
  }
  const { status } = await exited;
  await show(client, view);
  view.done();
  const { forks } = await client.forks();
  const record = forks[0];
  if (record === undefined || final === undefined) {
    throw new SnowflockError('E_GUEST', `the job failed with status ${status}: ${stderr}`);
  }
  const { fork, wire } = await client.fork(record.id);
  for (const clone of fork.clones.filter((one) => !succeeded(one))) {
    view.say(`clone ${clone.vmid}: ${clone.error?.message ?? clone.end?.message ?? 'still runs'}`);
  }
  return demoResult(options, fork, wire, {
    answer: String(final.answer),
    expected: String(final.expected),
    ok: final.ok === true,
  });
}

/** A line of the program; others than its own (a warning of the guest's) are only shown. */
function parse(text: string): Line | undefined {
  try {
    return JSON.parse(text) as Line;
  } catch {
    return undefined;
  }
}

async function show(client: SnowflockClient, view: View): Promise<void> {
  const { forks } = await client.forks();
  const clones = forks.flatMap((fork) => fork.clones);
  const views = await Promise.all(
    clones.map(async (clone): Promise<CloneView> => {
      if (!clone.ok || clone.end !== null) return { clone, counters: undefined };
      // It may end between the two questions.
      return { clone, counters: await client.counters(clone.vm).catch(() => undefined) };
    }),
  );
  view.update(views);
}

async function keep(testbed: Testbed, daemons: TestbedDaemon[]): Promise<void> {
  process.stderr.write(`\nkept running. The hosts and their daemons:\n`);
  for (const { host } of daemons) {
    process.stderr.write(`  ${host.name} ${host.address} netns ${host.netns}\n`);
    process.stderr.write(`    node dist/src/cli/main.js --socket ${host.dirs.run}/sfld.sock ps\n`);
  }
  process.stderr.write(`Ctrl-C ends all of it.\n`);
  await new Promise<void>((resolve) => {
    process.once('SIGINT', resolve);
    process.once('SIGTERM', resolve);
  });
  void testbed;
}
