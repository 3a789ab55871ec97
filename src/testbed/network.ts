/**
 * The testbed's network: one namespace for the switch, one for each host, joined by veth pairs
 * that are made inside those namespaces, so that the machine's own namespace never sees them.
 *
 *     ns PREFIX-br:  br0 ── p1, p2, …          (no multicast snooping: there is no querier)
 *     ns PREFIX-hK:  eth0 10.85.0.K/24, MTU 1500, route 224.0.0.0/4 dev eth0
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, readdirSync, rmSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { NAT_RUN_DIR } from '../nat/gateway.js';

/** Hosts of one testbed at most: their addresses are 10.85.0.1 to .200. */
export const HOSTS_MAX = 200;

export const hostAddress = (index: number): string => `10.85.0.${index}`;
export const switchNetns = (prefix: string): string => `${prefix}-br`;
export const hostNetns = (prefix: string, index: number): string => `${prefix}-h${index}`;

/** The names of all namespaces of a testbed, the switch's last. */
export function netnsNames(prefix: string, hosts: number): string[] {
  const names = Array.from({ length: hosts }, (_, at) => hostNetns(prefix, at + 1));
  return [...names, switchNetns(prefix)];
}

/** Makes namespaces, switch and cables. @throws {SnowflockError} `E_NETWORK`. */
export function createNetwork(prefix: string, hosts: number, rateLimitMbit?: number): void {
  const bridge = switchNetns(prefix);
  const names = netnsNames(prefix, hosts);
  batch(undefined, ['ip'], [...names.map((name) => `netns add ${name}`)]);
  batch(
    bridge,
    ['ip'],
    [
      'link set lo up',
      'link add br0 type bridge mcast_snooping 0 stp_state 0 forward_delay 0',
      'link set br0 up',
    ],
  );
  for (let index = 1; index <= hosts; index++) {
    const host = hostNetns(prefix, index);
    batch(
      undefined,
      ['ip'],
      [
        `link add name p${index} netns ${bridge} mtu 1500 type veth peer name eth0 netns ${host} mtu 1500`,
      ],
    );
    batch(bridge, ['ip'], [`link set p${index} master br0 up`]);
    batch(
      host,
      ['ip'],
      [
        'link set lo up',
        // A random address may begin with 5e, which the netback filter keeps for VMs.
        `link set eth0 address 02:85:00:00:00:${index.toString(16).padStart(2, '0')}`,
        'link set eth0 up',
        `address add ${hostAddress(index)}/24 broadcast 10.85.0.255 dev eth0`,
        'route add 224.0.0.0/4 dev eth0',
      ],
    );
    if (rateLimitMbit !== undefined) {
      const shape = `root tbf rate ${rateLimitMbit}mbit burst 256kb latency 50ms`;
      batch(host, ['tc'], [`qdisc add dev eth0 ${shape}`]);
      batch(bridge, ['tc'], [`qdisc add dev p${index} ${shape}`]);
    }
  }
}

/**
 * Blocks (or opens again) a host's port of the switch. The host keeps its carrier and gets no
 * error: frames vanish both ways, as behind a broken switch.
 */
export function setPort(prefix: string, index: number, open: boolean): void {
  const state = open ? 'forwarding' : 'disabled';
  run('bridge', [
    '-n',
    switchNetns(prefix),
    'link',
    'set',
    'dev',
    `p${index}`,
    'state',
    PORT[state],
  ]);
}

/** Kernel numbers of port states (linux/if_bridge.h). */
const PORT = { disabled: '0', forwarding: '3' } as const;

/**
 * Removes a namespace and with it its interfaces, and what NAT gateways of a host in it have outside
 * (src/nat/gateway.ts); one that is not there is no error.
 */
export function removeNetns(name: string): void {
  if (!existsSync(`/run/netns/${name}`)) return;
  const number = statSync(`/run/netns/${name}`).ino;
  for (const other of readdirSync('/run/netns')) {
    if (new RegExp(`^sfnat-[0-9a-f]{6}-${number}$`).test(other)) removeNetns(other);
  }
  rmSync(join(NAT_RUN_DIR, `nat-${number}.json`), { force: true });
  try {
    run('ip', ['netns', 'delete', name]);
  } catch (error) {
    // Another reaper may have been faster.
    if (existsSync(`/run/netns/${name}`)) throw error;
  }
}

function batch(netns: string | undefined, tool: readonly ['ip' | 'tc'], lines: string[]): void {
  const args = [...(netns === undefined ? [] : ['-n', netns]), '-batch', '-'];
  const result = spawnSync(tool[0], args, {
    input: `${lines.join('\n')}\n`,
    encoding: 'utf8',
    timeout: 20_000,
  });
  if (result.status !== 0) {
    // What the tool said first: one that ends before it has read all its lines leaves EPIPE as well.
    const said = result.stderr?.trim().split('\n').join('; ');
    const reason = said || (result.error?.message ?? `exit status ${result.status}`);
    throw new SnowflockError(
      'E_NETWORK',
      `${tool[0]} ${args.join(' ')} with [${lines.join('; ')}] failed: ${reason}`,
    );
  }
}

function run(tool: string, args: string[]): void {
  try {
    execFileSync(tool, args, { stdio: ['ignore', 'ignore', 'pipe'], timeout: 20_000 });
  } catch (error) {
    const stderr = String((error as { stderr?: Buffer }).stderr ?? error).trim();
    throw new SnowflockError('E_NETWORK', `${tool} ${args.join(' ')} failed: ${stderr}`);
  }
}
