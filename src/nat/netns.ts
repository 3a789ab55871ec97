/** Commands and settings in a network namespace; no path: this process's own. */
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { run } from '../common/run.js';
import { inNetns } from '../network/tap.js';

/** `/run/netns/NAME` or the like; undefined: where this process is. */
export type Netns = string | undefined;

const inside = <T>(netns: Netns, work: () => T): T =>
  netns === undefined ? work() : inNetns(netns, work);

/** What the command wrote. E_NETWORK with the command and what it said; E_REQUIREMENT. */
export async function command(
  netns: Netns,
  name: string,
  args: readonly string[],
  input?: string,
): Promise<string> {
  try {
    // The child is made before the call returns, in the namespace that this thread is in then.
    const options = input === undefined ? {} : { input };
    return (await inside(netns, () => run(name, args, options))).stdout;
  } catch (error) {
    const { code, message } = asSnowflockError(error);
    throw new SnowflockError(code === 'E_IO' ? 'E_NETWORK' : code, message, { cause: error });
  }
}

/** Many `ip` commands in one process, until the first that fails. */
export async function ip(netns: Netns, commands: readonly string[]): Promise<void> {
  await command(netns, 'ip', ['-batch', '-'], `${commands.join('\n')}\n`);
}

/** One nftables transaction through its JSON interface: all of it or nothing. */
export async function nft(netns: Netns, commands: readonly object[]): Promise<void> {
  // nft opens /dev/stdin anew, which cannot be done with the socket that Node makes for it.
  const line = 'cat | nft -j -f -';
  await command(netns, 'sh', ['-c', line], JSON.stringify({ nftables: commands }));
}

/** Objects of one kind (`counter`, `set`, ...) as nft lists them. */
export async function nftList(netns: Netns, ...what: string[]): Promise<Record<string, unknown>[]> {
  const text = await command(netns, 'nft', ['-j', 'list', ...what]);
  return (JSON.parse(text) as { nftables: Record<string, unknown>[] }).nftables;
}

export function setSysctl(netns: Netns, name: string, value: string): void {
  try {
    inside(netns, () => writeFileSync(`/proc/sys/${name}`, value));
  } catch (error) {
    throw new SnowflockError('E_NETWORK', `cannot set ${name} to ${value}: ${String(error)}`);
  }
}

export function getSysctl(netns: Netns, name: string): string {
  try {
    return inside(netns, () => readFileSync(`/proc/sys/${name}`, 'utf8').trim());
  } catch (error) {
    throw new SnowflockError('E_NETWORK', `cannot read ${name}: ${String(error)}`);
  }
}

/** The number of a namespace: names in /run/netns are global, and several hosts may be on a machine. */
export function namespaceNumber(netns: Netns): number {
  return statSync(netns ?? '/proc/self/ns/net').ino;
}
