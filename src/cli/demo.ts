import type { Command } from 'commander';
import { InvalidArgumentError } from 'commander';
import { runDemo } from '../demo/demo.js';
import { count, DEFAULT_RAM_BYTES, size } from './vm.js';

function hosts(text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1 || value > 16) {
    throw new InvalidArgumentError('must be a whole number from 1 to 16.');
  }
  return value;
}

export function addDemoCommand(program: Command): void {
  program
    .command('demo')
    .description('the whole system on this machine: hosts as network namespaces, one VM, n clones')
    .option('--clones <n>', 'how many clones', count, 8)
    .option('--hosts <n>', 'how many hosts', hosts, 4)
    .option('--memory <MiB>', 'RAM of the parent (default: 512)', size)
    .option('--json <file>', 'write the figures to this file')
    .option('--keep', 'leave it running to look around, until Ctrl-C')
    .action(
      async (o: {
        clones: number;
        hosts: number;
        memory?: number;
        json?: string;
        keep?: boolean;
      }) => {
        const ok = await runDemo({
          clones: o.clones,
          hosts: o.hosts,
          ramBytes: o.memory ?? DEFAULT_RAM_BYTES,
          keep: o.keep === true,
          ...(o.json === undefined ? {} : { jsonFile: o.json }),
        });
        if (!ok) process.exitCode = 1;
      },
    );
}
