import { SnowflockError } from '../common/errors.js';
import { NetbackFilter } from '../netback-filter/filter.js';

/** With the filter that is on the uplink; says what to do where there is none. */
export async function onUplink<T>(
  uplink: string,
  work: (filter: NetbackFilter) => T | Promise<T>,
): Promise<T> {
  let filter: NetbackFilter;
  try {
    filter = await NetbackFilter.open({ uplink });
  } catch (error) {
    if (!(error instanceof SnowflockError) || error.code !== 'E_NOT_FOUND') throw error;
    throw new SnowflockError(
      'E_NOT_FOUND',
      `${error.message}; \`snowflock net attach ${uplink}\` puts one on an interface`,
    );
  }
  try {
    return await work(filter);
  } finally {
    filter.close();
  }
}
