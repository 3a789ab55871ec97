/**
 * Open vSwitch with its datapath in user space (`datapath_type=netdev`): its own kernel module is in
 * few kernels. One database and one switch in each host's namespace, with files in a folder of
 * their own: nothing of an Open vSwitch of the machine is touched.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { run } from '../../src/common/run.js';
import { GUEST_MAC } from '../../src/network/addresses.js';
import type { NetLab, NetSystem } from './net-lab.js';

const SCHEMA = '/usr/share/openvswitch/vswitch.ovsschema';
const FAMILY_MASK = '5e:00:00:07:00:00/ff:ff:ff:ff:00:00';
const CONTROL_LIMIT_S = 10;
const END_LIMIT_MS = 5000;

export async function openVswitch(lab: NetLab): Promise<NetSystem> {
  const folder = mkdtempSync(join(tmpdir(), 'sf-ovs-'));
  const pids: number[] = [];
  const close = async () => {
    for (const pid of pids.splice(0).reverse()) await end(pid);
    rmSync(folder, { recursive: true, force: true });
  };
  try {
    const switches: number[] = [];
    for (const at of [0, 1] as const) {
      const place = join(folder, `h${at}`);
      await run('mkdir', ['-p', place]);
      const env = { OVS_RUNDIR: place, OVS_LOGDIR: place, OVS_DBDIR: place };
      const inside = (command: string, ...args: string[]) =>
        run('ip', ['netns', 'exec', lab.hosts[at].name, command, ...args], { env });
      const database = `unix:${place}/db.sock`;
      const daemon = ['--no-chdir', '--detach', '--log-file', '-vconsole:off'];
      await inside('ovsdb-tool', 'create', `${place}/conf.db`, SCHEMA);
      const socket = `--remote=p${database}`;
      await inside('ovsdb-server', `${place}/conf.db`, socket, '--pidfile', ...daemon);
      pids.push(pidOf(`${place}/ovsdb-server.pid`));
      const control = ['ovs-vsctl', `--timeout=${CONTROL_LIMIT_S}`, `--db=${database}`] as const;
      await inside(...control, '--no-wait', 'init');
      await inside('ovs-vswitchd', database, '--pidfile', ...daemon);
      const vswitchd = pidOf(`${place}/ovs-vswitchd.pid`);
      pids.push(vswitchd);
      switches.push(vswitchd);
      const kind = ['datapath_type=netdev', 'fail_mode=secure'];
      await inside(...control, 'add-br', 'br0', '--', 'set', 'bridge', 'br0', ...kind);
      const devices = ['eth0', ...lab.of(at).map((it) => it.device)];
      const add = devices.flatMap((device, number) => [
        ...['--', 'add-port', 'br0', device],
        ...['--', 'set', 'interface', device, `ofport_request=${number + 1}`],
      ]);
      await inside(...control, ...add.slice(1));
      const file = join(place, 'flows');
      await run('tee', [file], { input: flows(lab, at).join('\n') });
      await inside('ovs-ofctl', 'add-flows', `unix:${place}/br0.mgmt`, file);
    }
    return {
      title: 'Open vSwitch, user space',
      guestMac: () => GUEST_MAC,
      destination: (to) => to.wireMac,
      arrival: (from) => [GUEST_MAC, from.wireMac],
      withoutOffloads: true,
      pids: switches,
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

function flows(lab: NetLab, at: 0 | 1): string[] {
  const here = lab.of(at);
  const known = Array.from({ length: lab.known }, (_, number) => lab.knownVm(number));
  const remote = [...lab.ports.filter((port) => port.host !== at), ...known];
  return [
    'table=0,priority=300,udp,tp_src=67,actions=drop',
    'table=0,priority=300,udp,tp_dst=67,actions=drop',
    'table=0,priority=300,udp,tp_dst=68,actions=drop',
    `table=0,priority=200,in_port=1,ip,dl_src=${FAMILY_MASK},actions=resubmit(,1)`,
    ...here.map((port, number) =>
      [
        `table=0,priority=100,in_port=${number + 2},ip,dl_src=${GUEST_MAC},nw_src=${port.ip}`,
        `actions=mod_dl_src:${port.wireMac},resubmit(,1)`,
      ].join(','),
    ),
    ...here.map((port, number) =>
      [
        `table=1,ip,dl_dst=${port.wireMac},nw_dst=${port.ip}`,
        `actions=mod_dl_dst:${GUEST_MAC},output:${number + 2}`,
      ].join(','),
    ),
    ...remote.map((vm) => `table=1,ip,dl_dst=${vm.wireMac},nw_dst=${vm.ip},actions=output:1`),
    '',
  ];
}

function pidOf(file: string): number {
  const pid = Number(readFileSync(file, 'utf8'));
  if (!Number.isInteger(pid) || pid < 2) throw new Error(`no process in ${file}`);
  return pid;
}

function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

async function end(pid: number): Promise<void> {
  if (alive(pid)) process.kill(pid, 'SIGTERM');
  for (const until = performance.now() + END_LIMIT_MS; alive(pid); ) {
    await new Promise((resolve) => setTimeout(resolve, 20));
    if (performance.now() > until) {
      process.kill(pid, 'SIGKILL');
      return;
    }
  }
}
