import type { Command } from 'commander';
import { addHost, initCluster } from '../cluster/ca.js';
import { loadClusterConfig } from '../cluster/config.js';
import { createLogger } from '../common/log.js';
import { note, printJson, reportError } from './output.js';

interface HostOptions {
  dir: string;
  address: string;
  uplink: string;
}

export function addClusterCommands(program: Command): void {
  const cluster = program.command('cluster').description('hosts that trust each other');
  const json = (): boolean => program.opts<{ json?: boolean }>().json === true;
  const hostOptions = (command: Command): Command =>
    command
      .requiredOption('--address <ipv4>', "the host's address on the network between hosts")
      .requiredOption('--uplink <interface>', 'its interface to that network')
      .option('--dir <folder>', "the cluster's folder (keep its CA key safe)", '/etc/snowflock');

  hostOptions(
    cluster
      .command('init')
      .description('make a cluster: its authority, its first host with certificate and host.json')
      .argument('<host>', 'name of the first host'),
  ).action(async (name: string, o: HostOptions) => {
    const files = await initCluster({ dir: o.dir, hosts: [{ name, ...specOf(o) }] });
    report([...files.values()], json());
  });

  hostOptions(
    cluster
      .command('add')
      .description('add a host: its certificate and host.json; copy its folder there')
      .argument('<host>', 'name of the new host'),
  ).action(async (name: string, o: HostOptions) => {
    report([await addHost(o.dir, { name, ...specOf(o) })], json());
    note("copy the folder of that file to the new host, and the others' host.json to theirs");
  });

  program
    .command('sfld')
    .description("run this host's daemon in the foreground; VMs go on when it ends")
    .option('--config <file>', 'the host configuration', '/etc/snowflock/host.json')
    .option('--end-vms', 'end all VMs, and the data plane, when the daemon ends')
    .action(async (o: { config: string; endVms?: boolean }) => {
      const { startDaemon } = await import('../sfld/daemon.js');
      const config = loadClusterConfig(o.config);
      const log = createLogger('sfld');
      const daemon = await startDaemon(config, log).catch((error: unknown) => {
        // What was begun keeps the process alive; it must not stay as half a daemon.
        process.exit(reportError(error, json()));
      });
      // Data: whoever started the daemon waits for this line.
      process.stdout.write(`${JSON.stringify({ ready: config.name, socket: daemon.socket })}\n`);
      const signal = await new Promise<NodeJS.Signals>((resolve) => {
        process.once('SIGINT', resolve);
        process.once('SIGTERM', resolve);
      });
      log.info({ signal }, 'ending');
      await daemon.close({ endVms: o.endVms === true });
      process.exit(0);
    });
}

function specOf(o: HostOptions): { address: string; uplink: string } {
  return { address: o.address, uplink: o.uplink };
}

function report(files: string[], json: boolean): void {
  if (json) printJson(files);
  else process.stdout.write(`${files.join('\n')}\n`);
}
