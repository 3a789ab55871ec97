/**
 * DHCP clients of other projects, each in the network and mount namespace of one guest. They get
 * their own configuration and their own /run and lease folder, and run no hook of the machine's, so
 * that they change nothing outside of the namespace.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Namespace } from '../netback-filter/lab.js';

export interface ClientKind {
  name: string;
  /** The least this client accepts without lengthening it. */
  leaseSeconds: number;
  files: Record<string, string>;
  /** Runs in the folder of the files. */
  shell: string;
}

const UDHCPC_SCRIPT = `#!/bin/sh
case "$1" in
  deconfig) ip address flush dev "$interface" ;;
  bound|renew) ip address replace "$ip/$mask" dev "$interface" ;;
esac
`;

// Instead of the machine's dhclient-script, which would write the machine's /etc/resolv.conf.
const DHCLIENT_SCRIPT = `#!/bin/sh
case "$reason" in
  BOUND|RENEW|REBIND|REBOOT)
    ip address replace "$new_ip_address/16" dev "$interface" ;;
  EXPIRE|FAIL|RELEASE|STOP) ip address flush dev "$interface" ;;
esac
exit 0
`;

const OWN_RUN = 'mount -t tmpfs run /run';

export const CLIENTS: readonly ClientKind[] = [
  {
    name: 'busybox udhcpc',
    leaseSeconds: 20,
    files: { script: UDHCPC_SCRIPT },
    shell: 'exec busybox udhcpc -i eth0 -f -t 5 -T 1 -A 1 -s ./script',
  },
  {
    name: 'ISC dhclient',
    leaseSeconds: 12,
    files: {
      script: DHCLIENT_SCRIPT,
      conf: 'initial-delay 0; initial-interval 1; backoff-cutoff 2; retry 2; timeout 5;\n',
    },
    shell: ': > leases; exec dhclient -4 -d -cf conf -lf leases -pf pid -sf "$PWD/script" eth0',
  },
  {
    name: 'dhcpcd',
    leaseSeconds: 20,
    files: { conf: 'noarp\nnoipv4ll\nipv4only\nnodev\nreboot 0\noption interface_mtu\n' },
    shell: `${OWN_RUN}; mkdir /run/dhcpcd; mount -t tmpfs leases /var/lib/dhcpcd
      exec dhcpcd -4 -B -d -f "$PWD/conf" -c /bin/true eth0`,
  },
  {
    name: 'systemd-networkd',
    leaseSeconds: 12,
    files: {
      'eth0.network':
        '[Match]\nName=eth0\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n' +
        '[DHCPv4]\nUseHostname=no\nUseDNS=no\nSendRelease=no\n',
    },
    // Without udev it takes interfaces as they are, if /sys says that nobody manages devices here.
    shell: `${OWN_RUN}; mkdir -p /run/systemd/network /run/systemd/netif
      cp eth0.network /run/systemd/network/; chown -R systemd-network /run/systemd/netif
      mount -o remount,ro,bind /sys
      SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console exec /lib/systemd/systemd-networkd`,
  },
];

function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

/** A running client. `log` is what it says; `stop` ends it and, with their namespace, its children. */
export class RealClient {
  readonly #child: ChildProcess;
  readonly #folder: string;
  #log = '';

  constructor(kind: ClientKind, netns: Namespace) {
    this.#folder = mkdtempSync(join(tmpdir(), 'sf-dhcp-'));
    for (const [name, text] of Object.entries(kind.files)) {
      writeFileSync(join(this.#folder, name), text, { mode: 0o755 });
    }
    // With the first process of its process namespace all of the client's processes end.
    const command = `cd ${this.#folder} && ${kind.shell}`;
    const words = `netns exec ${netns.name} unshare --fork --pid --kill-child --mount-proc sh -c`;
    this.#child = spawn('ip', [...words.split(' '), command], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    for (const stream of [this.#child.stdout, this.#child.stderr]) {
      stream?.on('data', (data: Buffer) => {
        this.#log = (this.#log + data).slice(-20_000);
      });
    }
  }

  get log(): string {
    return this.#log;
  }

  stop(): void {
    // unshare's --kill-child is undone when its child changes its user, as networkd does.
    const pid = this.#child.pid;
    if (pid !== undefined && this.#child.exitCode === null && this.#child.signalCode === null) {
      const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim();
      for (const child of children.split(' ').filter(Boolean)) kill(Number(child));
    }
    this.#child.kill('SIGKILL');
    rmSync(this.#folder, { recursive: true });
  }
}
