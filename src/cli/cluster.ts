import type { Command } from 'commander';
import { loadClusterConfig } from '../cluster/config.js';
import { createLogger } from '../common/log.js';

export function addClusterCommands(program: Command): void {
  program
    .command('sfld')
    .description("run this host's daemon in the foreground; VMs go on when it ends")
    .option('--config <file>', 'the host configuration', '/etc/snowflock/host.json')
    .option('--end-vms', 'end all VMs, and the data plane, when the daemon ends')
    .action(async (o: { config: string; endVms?: boolean }) => {
      const { startDaemon } = await import('../sfld/daemon.js');
      const config = loadClusterConfig(o.config);
      const log = createLogger('sfld');
      const daemon = await startDaemon(config, log);
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
