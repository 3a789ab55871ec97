/**
 * Several processes give interfaces their places at the same moment. Whatever the order: an identity
 * is one interface's, an interface has one identity, and the others hear why they have none.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { createInterface, type Interface } from 'node:readline';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { projectRoot } from '../../src/common/native.js';
import { NetbackFilter } from '../../src/netback-filter/filter.js';
import { Guest, type Host, Lab } from './lab.js';

const FAMILY = 5;
const CLAIMERS = 3;
const ROUNDS = 20;
const script = join(projectRoot, 'test/netback-filter/claimer.mjs');

class Claimer {
  readonly #child: ChildProcess;
  readonly #lines: AsyncIterator<string>;
  readonly #reader: Interface;

  constructor(host: Host) {
    const words = ['netns', 'exec', host.netns.name, process.execPath, script];
    this.#child = spawn('ip', words, { stdio: ['pipe', 'pipe', 'inherit'] });
    if (this.#child.stdout === null) throw new Error('no pipe');
    this.#reader = createInterface({ input: this.#child.stdout });
    this.#lines = this.#reader[Symbol.asyncIterator]();
  }

  async said(): Promise<string> {
    const line = await this.#lines.next();
    if (line.done === true) throw new Error('the claimer ended');
    return line.value;
  }

  /** Only sends: all are told before the first answers. */
  tell(tap: string, vmid: number): void {
    this.#child.stdin?.write(`${tap} ${FAMILY} ${vmid}\n`);
  }

  async end(): Promise<void> {
    const gone = this.#child.exitCode === null ? once(this.#child, 'exit') : undefined;
    this.#child.kill('SIGKILL');
    await gone;
    this.#reader.close();
  }
}

let lab: Lab;
let host: Host;
let claimers: Claimer[];

beforeEach(async () => {
  lab = await Lab.create(1);
  host = lab.host(0);
  claimers = Array.from({ length: CLAIMERS }, () => new Claimer(host));
  for (const claimer of claimers) expect(await claimer.said()).toBe('ready');
});
afterEach(async () => {
  for (const claimer of claimers ?? []) await claimer.end();
  lab?.destroy();
});

/** A veth pair's end: unlike a tap it stays when nobody has it open. */
function bareInterface(): string {
  const name = lab.interfaceName();
  const pair = `ip link add ${name} address 02:00:00:00:05:01 type veth peer name p${name}`;
  host.netns.exec(...pair.split(' '), 'address', '02:00:00:00:05:02');
  return name;
}

const freeInterfaces = () => claimers.map(() => bareInterface());
const winners = (answers: string[]) => answers.filter((it) => it === 'ok').length;
const losers = (answers: string[]) => answers.filter((it) => it.startsWith('E_EXISTS')).length;

test('one identity for several interfaces at once: one gets it, the others E_EXISTS', async () => {
  for (let round = 0; round < ROUNDS; round++) {
    const taps = freeInterfaces();
    claimers.forEach((claimer, at) => {
      claimer.tell(taps[at] ?? '', round);
    });
    const answers = await Promise.all(claimers.map((claimer) => claimer.said()));
    expect([winners(answers), losers(answers)], answers.join('; ')).toEqual([1, CLAIMERS - 1]);
    const holders = host.attached.vms().filter((vm) => vm.vmid === round);
    expect(holders.map((vm) => vm.tap)).toEqual([taps[answers.indexOf('ok')]]);
    // The message names the holder and the identity.
    const loser = answers.find((it) => it !== 'ok');
    expect(loser).toContain(`VM ${round} of family ${FAMILY}, belongs to ${holders[0]?.tap}`);
  }
}, 60_000);

test('several identities for one interface at once: it gets one, the others E_EXISTS', async () => {
  for (let round = 0; round < ROUNDS; round++) {
    const tap = bareInterface();
    claimers.forEach((claimer, at) => {
      claimer.tell(tap, 100 * round + at);
    });
    const answers = await Promise.all(claimers.map((claimer) => claimer.said()));
    expect([winners(answers), losers(answers)], answers.join('; ')).toEqual([1, CLAIMERS - 1]);
    const got = host.attached.vms().filter((vm) => vm.tap === tap);
    expect(got.map((vm) => vm.vmid)).toEqual([100 * round + answers.indexOf('ok')]);
  }
}, 60_000);

test('the identity of an interface that has gone passes to one of several heirs', async () => {
  for (let round = 0; round < ROUNDS; round++) {
    const first = bareInterface();
    host.netns.do(() => host.attached.addVm({ tap: first, family: FAMILY, vmid: round }));
    host.netns.exec('ip', 'link', 'del', first);
    const taps = freeInterfaces();
    claimers.forEach((claimer, at) => {
      claimer.tell(taps[at] ?? '', round);
    });
    const answers = await Promise.all(claimers.map((claimer) => claimer.said()));
    expect([winners(answers), losers(answers)], answers.join('; ')).toEqual([1, CLAIMERS - 1]);
    const holders = host.attached.vms().filter((vm) => vm.vmid === round);
    expect(holders.map((vm) => vm.tap)).toEqual([taps[answers.indexOf('ok')]]);
  }
}, 60_000);

test('one interface cannot be in the filters of two uplinks', async () => {
  const tap = bareInterface();
  host.netns.exec(...'ip link add eth1 address 02:00:00:00:05:03 type veth'.split(' '));
  const other = await host.netns.do(() => NetbackFilter.attach({ uplink: 'eth1' }));
  try {
    host.netns.do(() => {
      host.attached.addVm({ tap, family: FAMILY, vmid: 1 });
      expect(() => other.addVm({ tap, family: FAMILY, vmid: 1 })).toThrow(
        expect.objectContaining({
          code: 'E_EXISTS',
          message: expect.stringContaining(`net rm eth0 ${tap}`),
        }),
      );
      host.attached.removeVm(tap);
      other.addVm({ tap, family: FAMILY, vmid: 1 });
      other.detach();
    });
  } finally {
    other.close();
  }
});

test.each([
  ['whose uplink has gone', 'ip link del eth1'],
  ['taken off its uplink by hand', 'tc qdisc del dev eth1 clsact'],
])('interfaces of a filter %s can go to one that lives, and leave the old one', async (_, end) => {
  host.netns.exec(...'ip link add eth1 address 02:00:00:00:05:03 type veth'.split(' '));
  const old = await host.netns.do(() => NetbackFilter.attach({ uplink: 'eth1' }));
  const open: { close(): void }[] = [old];
  try {
    const [stays, goes] = [0, 1].map((vmid) => {
      const identity = { family: FAMILY, vmid };
      const tap = lab.interfaceName();
      const guest = new Guest(host, tap, identity, host.tap(tap));
      open.unshift(guest);
      host.netns.do(() => old.addVm({ tap, ...identity }));
      return guest;
    }) as [Guest, Guest];
    stays.send(stays.frameTo(goes, 'before'));
    await goes.receive((it) => it.includes('before'));

    host.netns.exec(...end.split(' '));
    const byHand = end.startsWith('tc');
    const filter = byHand
      ? await host.netns.do(() => NetbackFilter.attach({ uplink: 'eth1' }))
      : host.attached;
    if (byHand) open.push(filter);
    // Another family now: who is in the old filter still must not reach it there.
    host.netns.do(() => filter.addVm({ tap: goes.tap, family: FAMILY + 1, vmid: 1 }));
    const { guest_no_such_vm: before = 0, guest_to_wire: wire = 0 } = old.stats();
    stays.send(stays.frameTo(goes, 'after'));
    const unknown = () => {
      const { guest_no_such_vm: now = 0, guest_to_wire: out = 0 } = old.stats();
      return now + out - before - wire;
    };
    await expect.poll(unknown, { timeout: 10_000 }).toBe(1);
    expect(goes.frames.filter((it) => it.includes('after'))).toEqual([]);
    // The new one's alone: what it sends is counted there.
    goes.send(goes.frameTo(stays, 'to another family'));
    const foreign = () => filter.stats().guest_foreign_family ?? 0;
    await expect.poll(foreign, { timeout: 10_000 }).toBe(1);
    host.netns.do(() => filter.removeVm(goes.tap));
  } finally {
    for (const one of open) one.close();
  }
});

test('who died between claiming an identity and using it keeps nobody from it', () => {
  const [first, second] = [bareInterface(), bareInterface()];
  host.netns.do(() => host.attached.addVm({ tap: first, family: FAMILY, vmid: 1 }));
  // What is left then: the claim in sf_by_wire alone.
  const [filter] = JSON.parse(
    host.netns.exec('tc', '-j', 'filter', 'show', 'dev', 'eth0', 'ingress'),
  ).filter((it: { options?: { prog?: object } }) => it.options?.prog) as [
    { options: { prog: { id: number } } },
  ];
  const show = (what: string, id: number) =>
    JSON.parse(host.netns.exec('bpftool', '-j', what, 'show', 'id', String(id)));
  const ports = (show('prog', filter.options.prog.id).map_ids as number[]).find(
    (id) => show('map', id).name === 'sf_ports',
  );
  const ifindex = Buffer.alloc(4);
  ifindex.writeUInt32LE(Number(host.netns.exec('cat', `/sys/class/net/${first}/ifindex`)));
  const key = [...ifindex].map(String);
  host.netns.exec('bpftool', 'map', 'delete', 'id', String(ports), 'key', ...key);
  host.netns.do(() => host.attached.addVm({ tap: second, family: FAMILY, vmid: 1 }));
  expect(host.attached.vms().map((vm) => vm.tap)).toEqual([second]);
});
