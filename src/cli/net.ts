import { type Command, InvalidArgumentError } from 'commander';
import { NatHost } from '../nat/gateway.js';
import { NetbackFilter } from '../netback-filter/filter.js';
import { REASONS } from '../netback-filter/reasons.js';
import { addressOfVmid, FAMILY_MAX, GUEST_MAC, VMID_MAX, wireMac } from '../network/addresses.js';
import { confirm } from './confirm.js';
import { note, printJson, table } from './output.js';
import { onUplink } from './uplink.js';

function number(most: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^(0x[\da-f]+|\d+)$/i.test(text) || value > most) {
      throw new InvalidArgumentError(`a number from 0 to ${most}`);
    }
    return value;
  };
}

/** In the text format of Prometheus, for a collector that reads files or runs commands. */
function metrics(uplink: string, filter: NetbackFilter): string {
  const label = (reason: string) => `{uplink="${uplink}",reason="${reason}"}`;
  const counts = filter.stats();
  return [
    '# HELP snowflock_net_frames_total Frames the netback filter saw, by what became of them.',
    '# TYPE snowflock_net_frames_total counter',
    ...REASONS.map(({ name }) => `snowflock_net_frames_total${label(name)} ${counts[name] ?? 0}`),
    '# HELP snowflock_net_vms VMs with an identity on this host.',
    '# TYPE snowflock_net_vms gauge',
    `snowflock_net_vms{uplink="${uplink}"} ${filter.vms().length}`,
    '',
  ].join('\n');
}

/** `snowflock net`: isolated networks for any VM with a tap or vif. No daemon is needed. */
export function addNetCommands(program: Command): void {
  const json = (): boolean => program.opts<{ json?: boolean }>().json === true;
  const net = program
    .command('net')
    .description('isolated private networks for VMs behind taps, by a filter in the kernel')
    .addHelpText(
      'after',
      `
UPLINK is the interface that leads to the other hosts. VMs with the same family number reach each
other, on this host and over the uplink, and nobody else. docs/network.md has the rules. The filter
is in the kernel: it goes on when the command has ended. Commands act on the network namespace they
run in. On a host with a daemon, sfld does all this for its VMs.`,
    );

  net
    .command('attach')
    .description('put the filter on an uplink, or the one that is there in its newest form')
    .argument('<uplink>', 'interface to the other hosts')
    .action(async (uplink: string) => {
      const filter = await NetbackFilter.attach({ uplink });
      const vms = filter.vms().length;
      filter.close();
      if (json()) printJson({ uplink, vms });
      else note(`the filter is on ${uplink}; VMs: ${vms}`);
    });

  net
    .command('add')
    .description("give a VM's interface its place: from then on it can be nothing else")
    .argument('<uplink>', 'interface that has the filter')
    .argument('<tap>', "the VM's tap, vif or veth on this host")
    .requiredOption('--family <number>', `of its network, 0 to ${FAMILY_MAX}`, number(FAMILY_MAX))
    .requiredOption('--vmid <number>', `its number there, 0 to ${VMID_MAX}`, number(VMID_MAX))
    .option('--guest-mac <address>', 'what the guest has as its own MAC address', GUEST_MAC)
    .action(
      async (
        uplink: string,
        tap: string,
        options: { family: number; vmid: number; guestMac: string },
      ) => {
        await onUplink(uplink, (filter) => filter.addVm({ tap, ...options }));
        const address = addressOfVmid(options.vmid);
        if (json()) printJson({ tap, ...options, address, wireMac: wireMac(options) });
        else note(`${tap} is ${address} of family ${options.family}; the guest takes it by DHCP`);
      },
    );

  net
    .command('rm')
    .description("take a VM's place away and set its interface down")
    .argument('<uplink>', 'interface that has the filter')
    .argument('<tap>', "the VM's interface; it may have gone")
    .action(async (uplink: string, tap: string) => {
      await onUplink(uplink, (filter) => filter.removeVm(tap));
      if (json()) printJson({ tap });
    });

  net
    .command('ls')
    .description('list the VMs that the filter knows')
    .argument('<uplink>', 'interface that has the filter')
    .action(async (uplink: string) => {
      const vms = await onUplink(uplink, (filter) => filter.vms());
      vms.sort((a, b) => a.family - b.family || a.vmid - b.vmid);
      const rows = vms.map((vm) => ({ ...vm, wireMac: wireMac(vm) }));
      if (json()) printJson(rows);
      else {
        const header = ['tap', 'family', 'vmid', 'address', 'wire mac', 'guest mac'];
        const cells = rows.map((vm) => [
          vm.tap,
          vm.family,
          vm.vmid,
          vm.ip,
          vm.wireMac,
          vm.guestMac,
        ]);
        process.stdout.write(`${table(header, cells)}\n`);
      }
    });

  net
    .command('stats')
    .description('show what became of frames, by numbered reason')
    .argument('<uplink>', 'interface that has the filter')
    .option('--all', 'also reasons that have counted nothing')
    .option('--prometheus', 'as metrics in the text format of Prometheus')
    .action(async (uplink: string, options: { all?: boolean; prometheus?: boolean }) => {
      if (options.prometheus === true) {
        process.stdout.write(await onUplink(uplink, (filter) => metrics(uplink, filter)));
        return;
      }
      const counts = await onUplink(uplink, (filter) => filter.stats());
      if (json()) {
        printJson(counts);
        return;
      }
      const rows = REASONS.map(({ name, passed, text }, index) => [
        index,
        counts[name] ?? 0,
        passed ? 'passed' : 'dropped',
        name,
        text,
      ]).filter((row) => options.all === true || row[1] !== 0);
      process.stdout.write(`${table(['no', 'frames', '', 'reason', 'what'], rows)}\n`);
    });

  net
    .command('detach')
    .description('take the filter off; the interfaces of its VMs are set down')
    .argument('<uplink>', 'interface that has the filter')
    .option('-y, --yes', 'do not ask')
    .action(async (uplink: string, options: { yes?: boolean }) => {
      const there = await onUplink(uplink, (filter) => ({
        vms: filter.vms().length,
        gateways: filter.gateways().length,
      }));
      const { vms, gateways } = there;
      const also = gateways > 0 ? ` and remove ${gateways} NAT gateways, with their policy` : '';
      if (vms > 0 || gateways > 0) {
        await confirm(`Cut ${vms} VMs on ${uplink} off the network${also}?`, options.yes);
      }
      await onUplink(uplink, async (filter) => {
        // Without the filter no command would find them any more.
        if (filter.gateways().length > 0) await new NatHost({ filter }).remove();
        filter.detach();
      });
      if (json()) printJson({ uplink, vms, gateways });
    });
}
