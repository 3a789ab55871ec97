import type { Command } from 'commander';
import { SnowflockClient } from '../api/client.js';
import { SnowflockError } from '../common/errors.js';
import { type DhcpCounters, DROPS, dhcpMetrics } from '../dhcp/counters.js';
import { printJson, table } from './output.js';

function rows(counters: DhcpCounters, all: boolean): [string, string, number][] {
  const groups = [
    ['received', counters.received],
    ['sent', counters.sent],
    ['dropped', counters.dropped],
  ] as const;
  return groups.flatMap(([what, of]) =>
    Object.entries(of)
      .filter(([, packets]) => all || packets > 0)
      .map(([name, packets]): [string, string, number] => [what, name, packets]),
  );
}

/** `snowflock dhcp`: what the DHCP servers of VMs heard and answered. */
export function addDhcpCommand(program: Command): void {
  program
    .command('dhcp')
    .description("show what the DHCP servers of this host's VMs heard and answered")
    .argument('[vm]', 'of this one only, wherever it runs: id or name')
    .option('--all', 'also types and reasons that have counted nothing')
    .option('--prometheus', 'those of the host as metrics in the text format of Prometheus')
    .action(async (vm: string | undefined, options: { all?: boolean; prometheus?: boolean }) => {
      const { socket, json } = program.opts<{ socket: string; json?: boolean }>();
      const client = new SnowflockClient(socket);
      if (options.prometheus === true) {
        if (vm !== undefined) {
          throw new SnowflockError('E_ARGUMENT', '--prometheus is for the host: name no VM');
        }
        const { name, dhcp } = await client.host();
        process.stdout.write(dhcpMetrics(name, dhcp));
        return;
      }
      const { dhcp } = vm === undefined ? await client.host() : await client.counters(vm);
      if (dhcp === null) throw new SnowflockError('E_STATE', `VM ${vm} has ended`);
      if (json === true) {
        printJson(dhcp);
        return;
      }
      const cells = rows(dhcp, options.all === true).map(([what, name, packets]) => [
        packets,
        what,
        name,
        what === 'dropped' ? DROPS[name as keyof typeof DROPS] : '',
      ]);
      process.stdout.write(`${table(['packets', '', 'type or reason', 'what'], cells)}\n`);
    });
}
