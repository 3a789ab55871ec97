import { resolve } from 'node:path';
import type { Command } from 'commander';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { checkStore, repairStore } from '../cow-disk/check.js';
import type { CheckFinding } from '../cow-disk/store-api.js';
import { watched } from './disk-change.js';
import { defaultStore, isStore } from './disk-names.js';
import { isServed, noStore, withStore } from './disk-open.js';
import { note, printJson } from './output.js';
import { interruptible } from './progress.js';

/** Exit status of a check that found errors (as E_CORRUPT has it), and of one that found only leaks. */
const ERRORS = 18;
const LEAKS = 1;

/** Commands that look after the files of a store. */
export function addDiskCheckCommands(disk: Command, json: () => boolean): void {
  const show = (findings: CheckFinding[]): void => {
    if (json()) printJson({ findings });
    else for (const one of findings) process.stdout.write(`${line(one)}\n`);
    const open = findings.filter((one) => !one.repaired);
    const count = (severity: CheckFinding['severity']) =>
      open.filter((one) => one.severity === severity).length;
    if (!json()) {
      note(
        open.length === 0
          ? 'no errors'
          : `${count('error')} errors, ${count('leak')} leaks, ${count('note')} notes`,
      );
    }
    if (count('error') > 0) process.exitCode = ERRORS;
    else if (count('leak') > 0) process.exitCode = LEAKS;
  };

  disk
    .command('check')
    .description('check all files of a store; status 0: clean, 18: errors, 1: lost space only')
    .argument('[store]', 'folder of the store (default: the default store)')
    .action(async (text?: string) => {
      show(await alone('check', text, (store) => checkStore(store)));
    });

  disk
    .command('repair')
    .description(
      'repair what can be proved; what has an error is left as it is. Status as of check',
    )
    .argument('[store]', 'folder of the store (default: the default store)')
    .option('--dry-run', 'only say what would be done')
    .action(async (text: string | undefined, o: { dryRun?: boolean }) => {
      const dryRun = o.dryRun === true;
      show(await alone('repair', text, (store) => repairStore(store, { dryRun })));
    });

  disk
    .command('gc')
    .description('wait until what was removed is cleaned up')
    .argument('[store]', 'folder of the store (default: the default store)')
    .action(async (text?: string) => {
      const store = folder(text);
      const { before, after } = await withStore(store, (open) =>
        interruptible(async (signal) => {
          const before = (await open.usage()).total_bytes;
          await watched(
            open,
            'clean-up',
            open.settled(),
            signal,
            (task) => task.kind === 'merge' || task.kind === 'punch',
          );
          if (!json()) {
            for (const task of await open.tasks()) {
              if (task.kind !== 'prefetch') continue;
              const share = Math.floor((100 * task.done_bytes) / (task.total_bytes ?? 1));
              const name = task.disk === null ? 'prefetch' : `prefetch of ${task.disk}`;
              note(`${name}: ${share} %${task.error === null ? '' : `, ${task.error}`}`);
            }
          }
          return { before, after: (await open.usage()).total_bytes };
        }),
      );
      if (json()) printJson({ total_bytes: after, freed_bytes: Math.max(0, before - after) });
      else note('clean');
    });
}

function folder(text: string | undefined): string {
  const store = resolve(text ?? defaultStore());
  if (!isStore(store)) throw noStore(store);
  return store;
}

/** A check reads files that nobody may change meanwhile. */
async function alone<T>(
  what: string,
  text: string | undefined,
  work: (store: string) => Promise<T>,
): Promise<T> {
  const store = folder(text);
  try {
    return await work(store);
  } catch (error) {
    if (asSnowflockError(error).code !== 'E_IN_USE' || !(await isServed(store))) throw error;
    throw new SnowflockError(
      'E_IN_USE',
      `${store} is served, and ${what} needs it for itself: end \`snowflock disk serve\` first`,
    );
  }
}

function line(one: CheckFinding): string {
  return `${one.severity}${one.repaired ? ' (repaired)' : ''}: ${one.file}: ${one.message}`;
}
