/**
 * A guest without an agent after a fork: how long from the clone running until its interface has the
 * clone's own address, and until a program in it sees the end of a TCP connection inherited from the
 * parent, on which nothing is being sent. Both as the guest itself says on its console.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { SnowflockClient } from '../src/api/client.js';
import { exec } from '../src/api/exec.js';
import { SnowflockError } from '../src/common/errors.js';
import { defaultImageDir } from '../src/image/images.js';
import type { VmRecord } from '../src/sfld/records.js';
import { configure, startDaemons, type TestbedDaemon } from '../src/testbed/daemons.js';
import { Testbed } from '../src/testbed/testbed.js';
import { type Bench, numbers } from './lib/bench.js';
import { touchFreeMemory } from './lib/memory.js';
import { summarize } from './lib/stats.js';
import { spread } from './lib/table.js';

const PORT = 99;
const GOAL_MS = 200;
const LIMIT_MS = 60_000;
const RAM_BYTES = 512 * 2 ** 20;
/** Looking at the console this often is the figures' error. */
const LOOK_EVERY_MS = 1;

interface Guest {
  listen: string;
  /** An idle connection to the peer; `ended` on the console when it is over. */
  connect(peer: string): string;
}

const PYTHON_LISTEN = `import socket,time
s=socket.create_server(('',${PORT}));c=[]
while 1:c.append(s.accept())`;
const python = (peer: string) => `import socket
s=socket.create_connection(('${peer}',${PORT}))
print('open',file=open('/tmp/open','w'),flush=True)
try:s.recv(1)
except OSError as e:print('ended',e,file=open('/dev/console','w'))`;

const GUESTS: Record<string, Guest> = {
  minimal: {
    listen: `mkfifo /tmp/quiet; nc -l -p ${PORT} <>/tmp/quiet >/dev/null 2>&1 &`,
    connect: (peer) =>
      `mkfifo /tmp/quiet; (nc ${peer} ${PORT} <>/tmp/quiet; echo ended >/dev/console) >/dev/null 2>&1 &
       until netstat -tn | grep -q '${peer}:${PORT} .*ESTABLISHED'; do sleep 1; done`,
  },
  debian: {
    listen: `python3 -c "${PYTHON_LISTEN}" >/dev/null 2>&1 &`,
    connect: (peer) =>
      `ip -o monitor address >/dev/console 2>/dev/null &
       python3 -c "${python(peer)}" >/dev/null 2>&1 &
       until [ -e /tmp/open ]; do sleep 1; done`,
  },
};

async function shell(client: SnowflockClient, vm: string, script: string): Promise<void> {
  const child = await exec(client, vm, ['/bin/sh', '-c', script]);
  child.stdin.end();
  child.stdout.resume();
  child.stderr.resume();
  const { status } = await child.exited;
  if (status !== 0) throw new SnowflockError('E_GUEST', `${script} ended with ${status} in ${vm}`);
}

function consoleOf(daemons: readonly TestbedDaemon[], vm: string): string {
  for (const { host } of daemons) {
    const folder = join(host.dirs.state, 'vms');
    const name = readdirSync(folder).find((file) => file === `${vm}.json`);
    if (name === undefined) continue;
    const record = JSON.parse(readFileSync(join(folder, name), 'utf8')) as VmRecord;
    if (record.hypervisor !== null) return record.hypervisor.console_log;
  }
  throw new SnowflockError('E_INTERNAL', `no record of ${vm}`);
}

const bench: Bench = {
  name: 'readdress',
  description:
    'a clone without an agent: time to its own address, and to the end of old connections',
  settings: {
    image: 'minimal (udhcpc) or debian (systemd-networkd)',
    rounds: 'forks of one clone each (10)',
  },
  async run({ quick, settings, signal, log }) {
    const image = settings.get('image') ?? 'minimal';
    const guest = GUESTS[image];
    if (guest === undefined) {
      throw new SnowflockError('E_ARGUMENT', `image=${image}: minimal or debian`);
    }
    const [rounds = 10] = numbers(settings, 'rounds', [quick ? 3 : 10], 1, 100);
    const addressMs: number[] = [];
    const endedMs: number[] = [];
    const testbed = await Testbed.create({ hosts: 2 });
    try {
      for (const host of testbed.hosts) await configure(host, { image_dir: defaultImageDir() });
      const daemons = await startDaemons(testbed);
      const client = daemons[0]?.client;
      if (client === undefined) throw new SnowflockError('E_INTERNAL', 'a testbed has a host');
      log(`boot of ${image}`);
      const parent = { name: 'parent', image, ram_bytes: RAM_BYTES, vcpus: 1 };
      const { id } = await client.run({ ...parent, addressing: 'dhcp' });
      const fork = async () => {
        const { ticket } = await client.requestTicket(id, 1);
        const askedAt = performance.now();
        const { clones, id: made } = await client.clone(id, ticket);
        const [clone] = clones;
        if (clone === undefined || !clone.ok || clone.running_ms === null) {
          throw new SnowflockError('E_CLONE_START', clone?.error?.message ?? 'no clone');
        }
        return { clone, fork: made, runningAt: askedAt + clone.running_ms };
      };
      /** With what there is to find out why. */
      const late = async (vm: string, text: string) => {
        const dhcp = await client.counters(vm).then(
          (counters) => JSON.stringify(counters.dhcp),
          (error: unknown) => String(error),
        );
        const said = daemons.map(
          ({ host, logPath }) => `${host.name}: ${readFileSync(logPath, 'utf8').slice(-2000)}`,
        );
        return new SnowflockError(
          'E_TIMEOUT',
          `${vm} said only: ${text.slice(-500)}\nits DHCP server: ${dhcp}\n${said.join('\n')}`,
        );
      };
      /** Milliseconds after `since` at which each text was there. */
      const said = async (vm: string, since: number, ...texts: string[]): Promise<number[]> => {
        const file = consoleOf(daemons, vm);
        const at = new Map<string, number>();
        while (at.size < texts.length) {
          if (signal.aborted) throw new SnowflockError('E_INTERRUPTED', 'bench readdress');
          const text = readFileSync(file, 'latin1');
          const now = performance.now() - since;
          for (const one of texts) if (!at.has(one) && text.includes(one)) at.set(one, now);
          if (now > LIMIT_MS) throw await late(vm, text);
          await sleep(LOOK_EVERY_MS);
        }
        return texts.map((text) => at.get(text) ?? Number.NaN);
      };
      // The peer is a clone that stays. When it has answered it has its address.
      const { clone: peer, fork: peers } = await fork();
      for (const began = performance.now(); ; await sleep(50)) {
        const { fork: now } = await client.fork(peers);
        if (now.clones.every((one) => one.reply_ms !== null)) break;
        if (performance.now() - began > LIMIT_MS) {
          throw await late(peer.vm, readFileSync(consoleOf(daemons, peer.vm), 'latin1'));
        }
      }
      await shell(client, peer.vm, guest.listen);
      await shell(client, id, guest.connect(peer.ip));
      for (let round = 0; round < rounds; round++) {
        if (signal.aborted) throw new SnowflockError('E_INTERRUPTED', 'bench readdress');
        await touchFreeMemory(2 * RAM_BYTES, signal);
        const { clone, fork: made, runningAt } = await fork();
        const [address = Number.NaN, ended = Number.NaN] = await said(
          clone.vm,
          runningAt,
          clone.ip,
          'ended',
        );
        log(
          `round ${round + 1} of ${rounds}: ended ${ended.toFixed()}, address ${address.toFixed()} ms`,
        );
        addressMs.push(address);
        endedMs.push(ended);
        await client.killClones(id, { fork: made });
      }
    } finally {
      await testbed.destroy();
    }
    const row = (what: string, values: number[]) => {
      const summary = summarize(values);
      const met = summary.median <= GOAL_MS ? 'met' : 'missed';
      return [what, spread(summary), summary.p95, `≤ ${GOAL_MS}: ${met}`];
    };
    return {
      tables: [
        {
          title: `From the clone running, ms: median (min–max) of ${rounds}; image ${image}`,
          columns: ['what', 'ms', 'p95', 'goal'],
          rows: [
            row('an inherited idle connection has ended', endedMs),
            row('the interface has its own address', addressMs),
          ],
        },
      ],
      figures: { image, connection_ended_ms: endedMs, address_ms: addressMs },
      notes: [
        'the guest says so on its serial console, with its program started for it: part of the figure',
        'without KVM every instruction is emulated, and pages come over the network when first touched',
      ],
    };
  },
};

export default bench;
