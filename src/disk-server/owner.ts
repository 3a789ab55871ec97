import { SnowflockError } from '../common/errors.js';
import { run } from '../common/run.js';

/** `USER` or `USER:GROUP`, names or numbers; without a group the user's own. E_ARGUMENT. */
export async function parseOwner(text: string): Promise<{ uid: number; gid: number }> {
  const [user = '', group, ...rest] = text.split(':');
  if (rest.length > 0 || user === '' || group === '') throw unknown(text);
  const uid = await idOf(['passwd', user], 2);
  const gid = await (group === undefined ? idOf(['passwd', user], 3) : idOf(['group', group], 2));
  return { uid, gid };
}

/** The member of an entry of the system's data bases; a number that has no entry stands for itself. */
async function idOf([database, key]: [string, string], member: number): Promise<number> {
  const plain = /^\d{1,9}$/.test(key);
  try {
    const { stdout } = await run('getent', [database, '--', key]);
    const id = Number(stdout.split(':')[member]);
    if (Number.isInteger(id)) return id;
  } catch (error) {
    if (!plain)
      throw error instanceof SnowflockError && error.code !== 'E_IO' ? error : unknown(key);
  }
  if (!plain) throw unknown(key);
  return Number(key);
}

function unknown(text: string): SnowflockError {
  return new SnowflockError('E_ARGUMENT', `this host has no user or group ${JSON.stringify(text)}`);
}
