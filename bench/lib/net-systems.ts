/**
 * What the filter is measured beside. `redirect` is the least that can be done: one program on each
 * interface that sends on what comes, without a look at it. The others are told to do what the filter
 * does, as far as they can; where they do less, their title says so.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { nativePath } from '../../src/common/native.js';
import { run } from '../../src/common/run.js';
import { GUEST_MAC, ipNumber, macNumber } from '../../src/network/addresses.js';
import { netback } from '../../src/network/native.js';
import type { NetLab, NetSystem, Port } from './net-lab.js';

const FAMILY_MASK = '5e:00:00:07:00:00/ff:ff:ff:ff:00:00';
const REDIRECT_SOURCE = fileURLToPath(
  new URL('../../../bench/lib/redirect.bpf.c', import.meta.url),
);

export type SystemName = 'redirect' | 'filter' | 'nftables' | 'ebtables' | 'ovs';

/** Rewritten on the way, as the filter does it. */
const rewriting = {
  guestMac: () => GUEST_MAC,
  destination: (to: Port) => to.wireMac,
  arrival: (from: Port) => [GUEST_MAC, from.wireMac] as const,
};

export async function plainRedirect(lab: NetLab): Promise<NetSystem> {
  const folder = mkdtempSync(join(tmpdir(), 'sf-net-'));
  try {
    const { stdout } = await run('gcc', ['-print-multiarch']);
    const pairs = [
      [0, 'vm-a', 'vm-b'],
      [0, 'vm-b', 'vm-a'],
      [0, 'vm-x', 'eth0'],
      [0, 'eth0', 'vm-x'],
      [1, 'vm-y', 'eth0'],
      [1, 'eth0', 'vm-y'],
    ] as const;
    for (const [at, from, to] of pairs) {
      const host = lab.hosts[at];
      const target = host.exec('cat', `/sys/class/net/${to}/ifindex`).trim();
      const object = join(folder, `${at}-${from}.o`);
      await run('clang', [
        ...['-O2', '-g', '-target', 'bpf', '-mcpu=v3', `-I/usr/include/${stdout.trim()}`],
        ...[`-DTARGET_IFINDEX=${target}`, '-c', REDIRECT_SOURCE, '-o', object],
      ]);
      host.exec('tc', 'qdisc', 'add', 'dev', from, 'clsact');
      host.exec(...`tc filter add dev ${from} ingress bpf da obj ${object} sec tc`.split(' '));
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  return {
    title: 'plain redirect',
    guestMac: () => GUEST_MAC,
    destination: () => GUEST_MAC,
    arrival: () => [GUEST_MAC, GUEST_MAC],
    close: async () => {},
  };
}

export async function ourFilter(lab: NetLab): Promise<NetSystem> {
  const identity = (tap: string, vm: { wireMac: string; ip: string }) => ({
    tap,
    wireMac: macNumber(vm.wireMac),
    guestMac: macNumber(GUEST_MAC),
    ip: ipNumber(vm.ip),
  });
  for (const at of [0, 1] as const) {
    const host = lab.hosts[at];
    const filter = await host.do(() => netback().attach(nativePath('netback.bpf.o'), 'eth0'));
    try {
      host.do(() => {
        for (const port of lab.of(at)) filter.addVm(identity(port.device, port));
        // They are known as VMs of this host whose interfaces the bench does without.
        for (let number = 0; number < lab.known; number++) {
          filter.putIdentity(100_000 + number, identity('known', lab.knownVm(number)));
        }
      });
    } finally {
      filter.close();
    }
  }
  return { title: 'filter', ...rewriting, close: async () => {} };
}

/** A bridge of all ports; where each address is is told, not learnt. */
async function bridge(lab: NetLab, at: 0 | 1): Promise<void> {
  const host = lab.hosts[at];
  host.exec(...'ip link add br0 address 02:00:00:00:03:00 type bridge mcast_snooping 0'.split(' '));
  host.exec('sysctl', '-qew', 'net.bridge.bridge-nf-call-iptables=0');
  host.exec('ip', 'link', 'set', 'br0', 'up');
  for (const device of [...lab.of(at).map((it) => it.device), 'eth0']) {
    host.exec('ip', 'link', 'set', device, 'master', 'br0');
    host.exec('bridge', 'link', 'set', 'dev', device, 'learning', 'off', 'flood', 'off');
  }
  const entries = lab.ports.map((port) => [port.wireMac, port.host === at ? port.device : 'eth0']);
  for (let number = 0; number < lab.known; number++) {
    entries.push([lab.knownVm(number).wireMac, 'eth0']);
  }
  const lines = entries.map(([mac, device]) => `fdb replace ${mac} dev ${device} master static\n`);
  await run('ip', ['netns', 'exec', host.name, 'bridge', '-b', '-'], { input: lines.join('') });
}

export async function nftables(lab: NetLab): Promise<NetSystem> {
  for (const at of [0, 1] as const) {
    await bridge(lab, at);
    const here = lab.of(at);
    const others = Array.from({ length: lab.known }, (_, number) => lab.knownVm(number));
    const known = others.map((vm, number) => ({ ...vm, device: `k${number}` }));
    const list = (items: readonly string[]) => items.join(',\n');
    const ruleset = `table bridge sf {
      map wire {
        typeof iifname : ether saddr
        elements = { ${list([...here, ...known].map((it) => `"${it.device}" : ${it.wireMac}`))} }
      }
      set own {
        typeof iifname . ether saddr . ip saddr
        elements = { ${list([...here, ...known].map((it) => `"${it.device}" . ${GUEST_MAC} . ${it.ip}`))} }
      }
      set members {
        typeof ether daddr . ip daddr
        elements = { ${list([...lab.ports, ...known].map((it) => `${it.wireMac} . ${it.ip}`))} }
      }
      chain from_guest {
        type filter hook prerouting priority -300; policy accept;
        iifname "eth0" goto from_wire
        ether type != ip drop
        iifname . ether saddr . ip saddr != @own drop
        udp sport 67 drop
        udp dport { 67, 68 } drop
        ether saddr set iifname map @wire
      }
      chain from_wire {
        ether type != ip drop
        ether saddr & ff:ff:ff:ff:00:00 != 5e:00:00:07:00:00 drop
        ether saddr . ip saddr != @members drop
      }
      chain forward {
        type filter hook forward priority 0; policy drop;
        ether daddr . ip daddr @members accept
      }
      chain to_guest {
        type filter hook postrouting priority 300; policy accept;
        oifname != "eth0" ether daddr set ${GUEST_MAC}
      }
    }`;
    await run('ip', ['netns', 'exec', lab.hosts[at].name, 'nft', '-f', '-'], { input: ruleset });
  }
  return { title: 'nftables, bridge family', ...rewriting, close: async () => {} };
}

/**
 * Its snat target comes after the last place where the arriving interface is known, and its dnat
 * before the bridge looks for the port: with one MAC address for all guests neither can be used.
 * So guests have their wire addresses, and the rules check only.
 */
export async function ebtables(lab: NetLab): Promise<NetSystem> {
  for (const at of [0, 1] as const) {
    await bridge(lab, at);
    const jumps = Array.from({ length: lab.known }, (_, it) => `-A FORWARD -i k${it} -j wire`);
    const half = Math.ceil(jumps.length / 2);
    const chains = lab
      .of(at)
      .map((port) => [
        `-A ${port.device} -s ! ${port.wireMac} -j DROP`,
        `-A ${port.device} -p ! IPv4 -j DROP`,
        `-A ${port.device} -p IPv4 --ip-src ! ${port.ip} -j DROP`,
        `-A ${port.device} -p IPv4 --ip-proto udp --ip-sport 67 -j DROP`,
        `-A ${port.device} -p IPv4 --ip-proto udp --ip-dport 67:68 -j DROP`,
        `-A ${port.device} -d ! ${FAMILY_MASK} -j DROP`,
        `-A ${port.device} -j ACCEPT`,
      ]);
    const lines = [
      '*filter',
      ':FORWARD DROP',
      ...lab.of(at).map((port) => `:${port.device} ACCEPT`),
      ':wire ACCEPT',
      '-A FORWARD -i eth0 -j wire',
      ...jumps.slice(0, half),
      ...lab.of(at).map((port) => `-A FORWARD -i ${port.device} -j ${port.device}`),
      ...jumps.slice(half),
      ...chains.flat(),
      `-A wire -s ! ${FAMILY_MASK} -j DROP`,
      `-A wire -d ! ${FAMILY_MASK} -j DROP`,
      '-A wire -p ! IPv4 -j DROP',
      '-A wire -j ACCEPT',
    ];
    const folder = mkdtempSync(join(tmpdir(), 'sf-net-'));
    try {
      const file = join(folder, 'rules');
      writeFileSync(file, `${lines.join('\n')}\n`);
      const restore = `exec ebtables-nft-restore < ${file}`;
      await run('ip', ['netns', 'exec', lab.hosts[at].name, 'sh', '-c', restore]);
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  }
  return {
    title: 'ebtables, checks only',
    guestMac: (port) => port.wireMac,
    destination: (to) => to.wireMac,
    arrival: (from, to) => [to.wireMac, from.wireMac],
    close: async () => {},
  };
}
