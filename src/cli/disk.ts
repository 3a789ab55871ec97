import type { Command } from 'commander';
import { addDiskChangeCommands } from './disk-change.js';
import { addDiskCheckCommands } from './disk-check.js';
import { addDiskCopyCommands } from './disk-copy.js';
import { addDiskServeCommand } from './disk-serve.js';
import { addDiskShowCommands } from './disk-show.js';

/** `snowflock disk`: virtual disks that fork, for any NBD client. No daemon is needed. */
export function addDiskCommands(program: Command): void {
  const json = (): boolean => program.opts<{ json?: boolean }>().json === true;
  const disk = program
    .command('disk')
    .description('virtual disks with snapshots and clones, for any hypervisor that speaks NBD')
    .addHelpText(
      'after',
      `
Disks are named STORE/DISK, their generations (snapshots) STORE/DISK@GENERATION. STORE is a folder;
a name without / is in the default store, $SNOWFLOCK_STORE or /var/lib/snowflock/disks. Commands work
on a store that is served (disk serve) as on one that is not.`,
    );
  addDiskChangeCommands(disk, json);
  addDiskShowCommands(disk, json);
  addDiskCopyCommands(disk, json);
  addDiskServeCommand(disk, json);
  addDiskCheckCommands(disk, json);
}
