import { createInterface } from 'node:readline/promises';
import { SnowflockError } from '../common/errors.js';

/** Before something is destroyed: asks on a terminal; without one `--yes` must have been said. */
export async function confirm(question: string, yes: boolean | undefined): Promise<void> {
  if (yes === true) return;
  if (!process.stdin.isTTY) {
    throw new SnowflockError('E_ARGUMENT', `${question} Not on a terminal: say --yes`);
  }
  const reader = createInterface({ input: process.stdin, output: process.stderr });
  const answer = await reader.question(`${question} [y/N] `);
  reader.close();
  if (!/^y(es)?$/i.test(answer.trim())) throw new SnowflockError('E_INTERRUPTED', 'not confirmed');
}
