import type { NetbackFilter } from '../netback-filter/filter.js';
import { inNetns } from '../network/tap.js';

/**
 * A filter of another namespace than this process's: its calls act there, since the numbers of
 * interfaces that it holds are that namespace's.
 */
export function filterIn(filter: NetbackFilter, netns: string): NetbackFilter {
  return new Proxy(filter, {
    get: (target, name) => {
      const value = Reflect.get(target, name, target) as unknown;
      if (typeof value !== 'function') return value;
      return (...args: unknown[]) => inNetns(netns, () => Reflect.apply(value, target, args));
    },
  });
}
